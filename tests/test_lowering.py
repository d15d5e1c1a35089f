"""The whole training step lowers for every platform, from any machine."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from seqmnist_jax.training.run import build_run

pytestmark = pytest.mark.full_compiler


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["row_lstm_basic", "row_lstm", "pixel_gru", "permuted_gru"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_train_steps_lower(name, platform):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.source = "embedded"
    run = build_run(config)
    learner = run.learner
    size = len(run.task.part("train"))
    lowered = (
        jax.jit(learner.train_steps(), donate_argnums=0)
        .trace(
            learner.template,
            learner.hyper,
            jax.ShapeDtypeStruct((size, 28, 28), jnp.uint8),
            jax.ShapeDtypeStruct((size,), jnp.uint8),
            jax.ShapeDtypeStruct((2 * size,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        .lower(lowering_platforms=(platform,))
    )
    assert "while" in lowered.as_text()
