"""Layers and steps on the device at hand, by whatever 'auto' takes there, against plain scans in float64 on the CPU.

On a GPU these are its kernels: of one block and of a cluster, with everything that a layer can be asked for.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models import CELLS

TOLERANCE = {"float32": 1e-4, "tensorfloat32": 4e-3, "bfloat16": 4e-2}
BATCH, TIME = 21, 30


class Layer(NamedTuple):
    """run(params, x, carry, **options), init(key, features, hidden), and how many arrays the carry has."""

    run: object
    init: object
    carries: int


def of_step(name):
    cell = CELLS[name].cell
    return Layer(functools.partial(rnn.scan, cell.step), cell.init, len(jax.tree.leaves(cell.zero_carry(0))))


LAYERS = {
    "gru": Layer(rnn.gru, rnn.init_gru, 1),
    "lstm": Layer(rnn.lstm, rnn.init_lstm, 2),
    "reset_before": Layer(
        functools.partial(rnn.gru, reset_after=False), functools.partial(rnn.init_gru, reset_after=False), 1
    ),
    **{name: of_step(name) for name in ("lem", "cornn", "elman", "ur_lstm")},
}
OPTIONS = {
    "last": {"return_sequences": False},
    "lengths": {"lengths": np.r_[0, 1, TIME, np.arange(BATCH - 3) + 7]},
    "backwards": {"lengths": np.r_[0, 1, TIME, np.arange(BATCH - 3) + 7], "reverse": True},
}


def draw(layer, features, hidden, replicas=None):
    """Parameters, x and a carry, float32 of NumPy; with a leading axis of replicas where there are several."""

    def one(seed):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(np.asarray, layer.init(jax.random.key(seed), features, hidden))
        params = {
            name: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32) for name, value in params.items()
        }
        parts = [0.5 * rng.standard_normal((BATCH, hidden)).astype(np.float32) for _ in range(layer.carries)]
        x = rng.uniform(-1, 1, (BATCH, TIME, features)).astype(np.float32)
        return params, x, parts[0] if layer.carries == 1 else tuple(parts)

    with jax.default_device(jax.devices("cpu")[0]):
        drawn = [one(seed) for seed in range(replicas or 1)]
    return drawn[0] if replicas is None else jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)


def results(run, given, **options):
    """The end, the outputs, and the gradients of all that is given, for a loss in which each has its part."""

    def loss(given):
        end, outputs = run(*given, **options)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((end, outputs))), (end, outputs)

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(given)
    return found, grads


def check(found, expected, tolerance):
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other)
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@functools.cache
def in_float64(name, features, hidden, options=None, replica=None):
    """What is given, and what must come of it; of one replica of three, or of a layer alone."""
    layer = LAYERS[name]
    given = draw(layer, features, hidden)
    if replica is not None:
        given = jax.tree.map(lambda leaf: leaf[replica], draw(layer, features, hidden, replicas=3))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), given)
        expected = results(layer.run, wide, backend="scan", **OPTIONS.get(options, {}))
        return given, jax.tree.map(np.asarray, expected)


def cases(*choices, every):
    """All combinations on a GPU; on a CPU, whose backends have tests of their own, one out of `every` so many."""
    return list(itertools.product(*choices))[:: every if jax.default_backend() == "cpu" else 1]


# One out of so many that each of those has other options.
@pytest.mark.sampled(1)
@pytest.mark.parametrize(("name", "options", "precision"), cases(LAYERS, OPTIONS, TOLERANCE, every=16))
def test_layer(name, options, precision):
    given, expected = in_float64(name, 3 if options == "last" else 1, 64, options)
    found = results(LAYERS[name].run, given, precision=precision, **OPTIONS[options])
    check(found, expected, TOLERANCE[precision])


SHORT = ["tensorfloat32", "bfloat16"]


@pytest.mark.parametrize(
    ("name", "hidden", "precision"), cases(["gru", "lstm", "lem"], [40, 128, 256], SHORT, every=18)
)
def test_sizes(name, hidden, precision):
    given, expected = in_float64(name, 1, hidden)
    check(results(LAYERS[name].run, given, precision=precision), expected, TOLERANCE[precision])


@pytest.mark.parametrize(("name", "precision"), cases(["gru", "lstm", "lem"], SHORT, every=6))
def test_replicas(name, precision):
    replicated = jax.vmap(lambda *one: LAYERS[name].run(*one, precision=precision))
    found = results(replicated, draw(LAYERS[name], 1, 64, replicas=3))
    expected = [in_float64(name, 1, 64, replica=replica)[1] for replica in range(3)]
    check(found, jax.tree.map(lambda *leaves: np.stack(leaves), *expected), TOLERANCE[precision])


@pytest.mark.parametrize(("batch", "hidden"), cases([8, 600], [64, 256], every=4))
def test_gradients_that_leave_float16(batch, hidden):
    """Of a third of the sequences they begin small and grow tenfold a step; the GPU's kernel then scales them anew."""
    rng = np.random.default_rng(3)
    grows = np.arange(batch) % 3 == 0
    w = np.linalg.qr(rng.standard_normal((hidden, hidden)))[0]
    x = np.broadcast_to(np.where(grows, 10.0, 1.0)[:, None, None], (batch, 8, 1))
    carry = 1e-4 * rng.standard_normal((batch, hidden))
    factors = np.where(grows, 2.0**-8, 1.0)[:, None] * rng.standard_normal((batch, hidden))

    def gradients(dtype, **options):
        def loss(w, x, carry, factors):
            run = functools.partial(rnn.scan, lambda w, h, x: (h * x @ w,) * 2, return_sequences=False, **options)
            return (run(w, x, carry)[1] * factors).sum()

        return jax.jit(jax.grad(loss, (0, 2)))(*(jnp.asarray(a, dtype) for a in (w, x, carry, factors)))

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        of_w, of_carry = jax.tree.map(np.asarray, gradients(jnp.float64, backend="scan"))
    found_w, found_carry = gradients(jnp.float32, precision="tensorfloat32")
    check((found_w, list(found_carry)), (of_w, list(of_carry)), TOLERANCE["tensorfloat32"])


def test_a_nan_is_seen_behind_a_maximum():
    x = np.zeros((8, 5, 64), np.float32)
    x[3, 2, 7] = np.nan

    def step(w, h, x):
        return (jnp.maximum(h @ w + x, 0),) * 2

    run = jax.jit(functools.partial(rnn.scan, step, precision="tensorfloat32"))
    h, _ = run(jnp.eye(64), jnp.asarray(x), jnp.ones((8, 64)))
    assert np.isnan(np.asarray(h)).any(1).tolist() == [i == 3 for i in range(8)]
