"""The recurrence engine as training uses it: which backend, which precision, how much memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pixel_gru, row_lstm
from seqmnist_jax import rnn
from seqmnist_jax.cli import describe, text
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import data_key
from seqmnist_jax.workdir import config as configs

with_kernel = pytest.mark.skipif(bool(rnn.native_problem()), reason=str(rnn.native_problem()))
BACKENDS = ["scan", "fused", pytest.param("native", marks=with_kernel)]


def small(module=row_lstm, **changes):
    config = module.get_config()
    config.data.source = "embedded"
    config.optimizer.schedule = "constant"
    config.model.hidden_size = 16
    config.train.batch_size = 8
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def train(config, count=10):
    run = build_run(config)
    learner, data = run.learner, run.task.part("train")
    state = jax.jit(learner.init)()
    orders, offset, _ = ExampleStream(data_key(state), len(data), run.batch_size).window(0)
    arrays = [jnp.asarray(array) for array in (data.images, data.labels)]
    bounds = jnp.int32(offset), jnp.int32(count)
    program = jax.jit(learner.train_steps()).lower(state, learner.hyper, *arrays, orders, *bounds).compile()
    state, finite = program(state, learner.hyper, *arrays, orders, *bounds)
    assert finite
    return state.params, program.memory_analysis().temp_size_in_bytes


def farthest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


@functools.cache
def reference(cell):
    return train(small(**{"model.cell": cell, "runtime.backend": "scan"}))[0]


# Each backend and each cell: all pairs are tested where the layers are.
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("backend", "cell"), [("fused", "gru"), pytest.param("native", "lstm", marks=with_kernel), ("auto", "gru")]
)
def test_ten_steps_are_those_of_the_scan(cell, backend):
    params, _ = train(small(**{"model.cell": cell, "runtime.backend": backend}))
    assert farthest(params, reference(cell)) < 1e-5


@pytest.mark.sampled(1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_near_and_is_not_float32(backend):
    params, _ = train(small(**{"model.cell": "gru", "runtime.backend": backend, "model.precision": "bfloat16"}))
    assert 1e-6 < farthest(params, reference("gru")) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model.num_layers": 2, "model.bidirectional": True, "data.min_length": 9}])
def test_remat_changes_nothing_but_rounding(changes):
    plain, _ = train(small(**changes))
    remat, _ = train(small(**changes, **{"model.remat": 9}))
    assert farthest(remat, plain) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_remat_saves_memory(backend):
    changes = {"runtime.backend": backend, "model.hidden_size": 64}
    _, plain = train(small(pixel_gru, **changes), count=0)
    _, remat = train(small(pixel_gru, **changes, **{"model.remat": 28}), count=0)
    assert remat < plain / 4


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"runtime.backend": "cudnn"}, "runtime.backend"),
        ({"model.precision": "float16"}, "model.precision"),
        ({"model.remat": -1}, "model.remat"),
        ({"runtime.backend": "native", "model.unroll": 2}, "model.unroll"),
    ],
)
def test_what_does_not_go_is_named(changes, field):
    with pytest.raises(UsageError, match=field):
        build_run(small(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"runtime.backend": "fused"}, "fused: named"),
        ({"model.unroll": 2}, "scan:"),
        ({"runtime.backend": "fused", "model.dropout.state_keep": 0.5}, "fused: named"),
    ],
)
def test_describe_says_what_runs(changes, expected):
    run = build_run(small(**changes))
    assert describe.describe(run, {})["recurrence"].startswith(expected)
    assert f"Recurrence   {expected}" in text.description(run, describe.describe(run, {}))


@pytest.mark.slow
def test_reset_before_trains():
    params, _ = train(small(**{"model.cell": "gru_reset_before"}))
    assert set(params["rnn"]["layer_0"]["forward"]) == {"kernel", "recurrent_kernel", "bias"}


def test_a_config_of_an_earlier_version_is_read():
    config = small(**{"model.precision": "float32"})
    old = configs.to_json(config)
    for field in configs.ADDED:
        section, name = field.split(".")
        del old[section][name]
    assert configs.to_json(configs.from_json(old)) == configs.to_json(config)


@pytest.mark.slow
def test_same_bits_twice():
    first, second = (train(small())[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
