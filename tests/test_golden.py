"""The first step of the four models, pinned: loss, gradient norm, parameter norms before and after.

A change of these numbers means that every later result changes with it. It is legitimate
only where the model, its initialisation, the order of examples or the optimiser is meant
to change; then say so in the CHANGELOG and pin anew what
``python tests/test_golden.py`` prints. They hold for the embedded digits and seed 0.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import data_key

# config: (loss, gradient norm, parameter norm before, parameter norm after)
GOLDEN = {
    "row_lstm_basic": (3.3402057, 8.4504881, 28.464323, 28.464191),
    "row_lstm": (2.2994604, 0.4169364, 16.533306, 16.5333),
    "pixel_gru": (2.3032069, 0.25182876, 48.667381, 48.667385),
    "permuted_gru": (2.3018701, 0.25560898, 48.667381, 48.667385),
}


def first_step(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.seed = 0
    config.data.source = "embedded"
    # Its first step would otherwise have rate zero.
    config.optimizer.schedule = "constant"
    run = build_run(config)
    learner, data = run.learner, run.task.part("train")
    state = jax.jit(learner.init)()
    orders, offset, _ = ExampleStream(data_key(state), len(data), run.batch_size).window(0)
    norm = jax.jit(optax.tree.norm)
    before = norm(state.params)
    state, _ = jax.jit(learner.train_steps())(
        state, learner.hyper, data.images, data.labels, orders, jnp.int32(offset), jnp.int32(1)
    )
    metrics = state.metrics.compute()
    return tuple(float(v) for v in (metrics["loss"], metrics["gradient_norm"], before, norm(state.params)))


CONFIGS = ("row_lstm_basic", "row_lstm", "pixel_gru", "permuted_gru")


@pytest.mark.parametrize("name", CONFIGS)
def test_first_step(name):
    np.testing.assert_allclose(first_step(name), GOLDEN[name], rtol=2e-5)


if __name__ == "__main__":
    for name in CONFIGS:
        print(f'    "{name}": {tuple(float(f"{number:.8g}") for number in first_step(name))},')
