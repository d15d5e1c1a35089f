"""Masks with gaps, and resets, against loops in NumPy's float64 that know nothing of the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models.cells.min_gru import CELL as MIN_GRU
from tests.rnn import reference

BATCH, TIME, FEATURES, HIDDEN = 5, 8, 7, 6
RNG = np.random.default_rng(0)
X = RNG.standard_normal((BATCH, TIME, FEATURES)).astype(np.float32)
# Gaps, left padding, right padding, all, none.
MASK = np.array([[1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [0] * 8], bool)
RESETS = RNG.random((BATCH, TIME)) < 0.4
RESETS[:, 0] = [1, 0, 1, 0, 1]
CELLS = {
    "lstm": (rnn.lstm, rnn.init_lstm(jax.random.key(0), FEATURES, HIDDEN)),
    "gru": (rnn.gru, rnn.init_gru(jax.random.key(0), FEATURES, HIDDEN)),
    "min_gru": (MIN_GRU.layer, MIN_GRU.init(jax.random.key(0), FEATURES, HIDDEN)),
}
PARTS = {"lstm": ("c", "h"), "gru": ("h",), "min_gru": ("h",)}
H, C = (np.tanh(RNG.standard_normal((BATCH, HIDDEN))).astype(np.float32) for _ in range(2))
CARRIES = {"lstm": (C, H), "gru": H, "min_gru": H}
BARS = {"y": RNG.standard_normal((BATCH, TIME, HIDDEN)), "end": RNG.standard_normal((BATCH, HIDDEN))}


def one_step(cell, params, x, h, c):
    if cell != "min_gru":
        return reference._step(cell, params, x, h, c)[:2]
    z, n = np.split(x @ params["kernel"] + params["bias"], 2, axis=1)
    z = reference.logistic(z)
    return (1 - z) * n + z * h, c


def by_loop(cell, params, x, carry, mask, resets, reverse=False, zero=False):
    """(carry, outputs), one sequence and one step at a time."""
    params = {name: np.asarray(value, float) for name, value in params.items()}
    c, h = (np.array(part, float) for part in (carry if cell == "lstm" else (carry, carry)))
    first, outputs = (c.copy(), h.copy()), np.zeros((*x.shape[:2], h.shape[1]))
    for b in range(x.shape[0]):
        last = np.zeros(h.shape[1])
        for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
            if mask[b, t]:
                if resets[b, t]:
                    c[b], h[b] = first[0][b], first[1][b]
                new, state = one_step(cell, params, x[b : b + 1, t].astype(float), h[b : b + 1], c[b : b + 1])
                h[b], c[b], last = new[0], state[0], new[0]
            outputs[b, t] = last if mask[b, t] or not zero else 0
    return ((c, h) if cell == "lstm" else h), outputs


def total(run, params, x, carry, **options):
    end, y = run(params, x, carry, **options)
    return (jax.tree.leaves(end)[-1] * BARS["end"]).sum() + (y * BARS["y"]).sum()


WAYS = pytest.mark.parametrize(
    ("cell", "backend", "reverse"),
    [
        ("lstm", "scan", True),
        ("lstm", "native", False),
        ("gru", "native", True),
        ("gru", "fused", False),
        ("min_gru", "native", True),
        ("min_gru", "fused", False),
    ],
)


@pytest.mark.sampled(1)
@WAYS
def test_values_are_those_of_a_loop(need_native, cell, backend, reverse):
    need_native(backend)
    layer, params = CELLS[cell]
    run = functools.partial(layer, backend=backend, reverse=reverse)
    nan = np.where(MASK[..., None], X, np.nan)
    # Of a state that starts anew from zero the kernel is another, which takes as long to build.
    from_zero = CARRIES[cell] if backend == "native" else None
    for mask, resets, carry, zero in (
        (MASK, RESETS, CARRIES[cell], False),
        (None, RESETS, from_zero, False),
        (MASK, None, CARRIES[cell], True),
    ):
        got = run(params, X if mask is None else nan, carry, mask=mask, resets=resets, zero_output_for_mask=zero)
        start = jax.tree.map(np.zeros_like, CARRIES[cell]) if carry is None else carry
        on, anew = MASK | True if mask is None else mask, MASK & False if resets is None else resets
        want = by_loop(cell, params, X, start, on, anew, reverse, zero)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)
    last = run(params, nan, CARRIES[cell], mask=MASK, resets=RESETS, return_sequences=False)
    want = by_loop(cell, params, X, CARRIES[cell], MASK, RESETS, reverse)[0]
    # Of an empty sequence these layers give their state, as Keras; of another cell nobody knows what is its output.
    outputs = jax.tree.leaves(want)[-1] * (MASK.any(1, keepdims=True) | (cell != "min_gru"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), last, (want, outputs))


@pytest.mark.sampled(2)
@WAYS
def test_gradients_are_those_of_a_loop(need_native, cell, backend, reverse):
    """By differences of the loop, which in float64 are exact to 1e-8; what is masked, NaN too, has none."""
    need_native(backend)
    layer, params = CELLS[cell]
    run = functools.partial(layer, backend=backend, reverse=reverse, mask=MASK, resets=RESETS)
    given = params, np.where(MASK[..., None], X, np.nan).astype(np.float32), CARRIES[cell]
    got = jax.jit(jax.grad(functools.partial(total, run), (0, 1, 2)))(*given)
    assert not np.asarray(got[1])[~MASK].any()

    def by_numbers(arguments):
        end, y = by_loop(cell, *arguments, MASK, RESETS, reverse)
        return (jax.tree.leaves(end)[-1] * BARS["end"]).sum() + (y * BARS["y"]).sum()

    rng = np.random.default_rng(1)
    exact = jax.tree.map(lambda a: np.asarray(a, float), (params, X, CARRIES[cell]))
    for _ in range(3):
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), exact)
        ends = [by_numbers(jax.tree.map(lambda a, d, s=s: a + s * 1e-5 * d, exact, way)) for s in (1, -1)]
        want = (ends[0] - ends[1]) / 2e-5
        along = sum(np.vdot(np.asarray(g, float), d) for g, d in zip(*map(jax.tree.leaves, (got, way)), strict=True))
        np.testing.assert_allclose(along, want, rtol=2e-5, atol=1e-4)


def elman(params, h, x):
    h = jnp.tanh(x @ params["W"] + h @ params["U"])
    return h, 2 * h


ELMAN = {"W": jnp.ones((FEATURES, HIDDEN)) / 3, "U": jnp.eye(HIDDEN) / 2}


@pytest.mark.slow
def test_a_cell_of_ones_own(need_native):
    """`scan` of any step by its kernel, in segments, and with an output that is not its state."""
    need_native()
    x = np.where(MASK[..., None], X, np.nan).astype(np.float32)
    first = by_loop_of_elman(None)

    def layer(params, x, carry, **options):
        return rnn.scan(elman, params, x, carry, **options)

    for run in (functools.partial(layer, backend="fused"), rnn.remat(functools.partial(layer, backend="scan"), 3)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), run(ELMAN, x, jnp.asarray(H), mask=MASK), first
        )
    got = layer(ELMAN, x, H, mask=MASK, resets=RESETS, backend="native")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, by_loop_of_elman(RESETS))
    # The last output of nothing is zero.
    assert not layer(ELMAN, x, H, mask=MASK, return_sequences=False, backend="fused")[1][4].any()
    with pytest.raises(ValueError, match=r"^resets are given, .*under remat"):
        rnn.remat(layer, 3)(ELMAN, X, H, resets=RESETS)


def by_loop_of_elman(resets):
    h, outputs = H.astype(float), np.zeros((BATCH, TIME, HIDDEN))
    W, U = (np.asarray(ELMAN[name], float) for name in "WU")
    for b in range(BATCH):
        for t in range(TIME):
            outputs[b, t] = outputs[b, t - 1] if t else 0
            if MASK[b, t]:
                before = H[b] if resets is not None and resets[b, t] else h[b]
                h[b] = np.tanh(X[b, t] @ W + before @ U)
                outputs[b, t] = 2 * h[b]
    return h, outputs


@pytest.mark.slow
def test_a_step_that_asks_what_x_is_has_a_kernel(need_native):
    """As a step with resets does; a truth value that depends on x alone is made outside."""
    need_native()

    def choosing(params, h, x):
        h = jnp.where(x[:, -1:] > 0, jnp.tanh(h @ params["U"] + x @ params["W"]), 0.5 * h)
        return h, h

    assert rnn.explain_step(choosing, ELMAN, X, H).startswith("native")

    def loss(backend):
        return lambda p, x: (rnn.scan(choosing, p, x, H, backend=backend)[1] * BARS["y"]).sum()

    got, want = (jax.jit(jax.value_and_grad(loss(b), (0, 1)))(ELMAN, X) for b in ("native", "scan"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_lengths_are_the_mask_of_the_first_steps():
    lengths = np.array([8, 5, 0, 1, 7])
    mask = np.arange(TIME) < lengths[:, None]
    for (cell, (layer, params)), reverse in zip(CELLS.items(), (False, True, False), strict=True):
        run = functools.partial(layer, params, X, CARRIES[cell], resets=RESETS, reverse=reverse)
        by_mask, by_lengths = run(mask=mask, zero_output_for_mask=True), run(lengths=lengths)
        jax.tree.map(np.testing.assert_array_equal, by_mask, by_lengths)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("cell", [rnn.GRU, MIN_GRU], ids=["gru", "min_gru"])
def test_packed_sequences_in_a_stack(cell):
    """Two sequences in one row, in both directions, with a gap between them: each as if alone."""
    params = rnn.init_stack(jax.random.key(0), cell, FEATURES, HIDDEN, num_layers=2, bidirectional=True)
    mask = np.array([[1, 1, 1, 0, 0, 1, 1, 1]] * BATCH, bool)
    resets = np.arange(TIME) == np.full((BATCH, 1), 5)
    x = np.where(mask[..., None], X, np.nan).astype(np.float32)
    got = rnn.stack(cell, params, x, mask=mask, resets=resets, return_sequences=True)
    for part in (slice(0, 3), slice(5, 8)):
        alone = rnn.stack(cell, params, X[:, part], return_sequences=True)
        np.testing.assert_allclose(got[:, part], alone, atol=2e-6)
    # In a gap each direction has the output of its own step before.
    np.testing.assert_array_equal(got[:, 3:5, :HIDDEN], jnp.repeat(got[:, 2:3, :HIDDEN], 2, axis=1))
    np.testing.assert_array_equal(got[:, 3:5, HIDDEN:], jnp.repeat(got[:, 5:6, HIDDEN:], 2, axis=1))


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"mask": MASK[:, 1:]}, r"^mask has shape \(5, 7\); expected \[batch, time\] = \(5, 8\)"),
        ({"resets": MASK[0]}, r"^resets has shape \(8,\)"),
        ({"mask": MASK.astype(np.float32)}, r"^mask has dtype float32; expected bool"),
        ({"resets": RESETS.astype(int)}, r"^resets has dtype int\d+; expected bool"),
        ({"mask": MASK, "lengths": [8] * 5}, r"^mask and lengths are both given"),
        ({"mask": "all"}, r"^mask has shape \(\)"),
        ({"zero_output_for_mask": 2}, r"^zero_output_for_mask is 2; expected True or False"),
    ],
)
@pytest.mark.parametrize("way", ["lstm", "min_gru", "scan", "remat", "stack"])
def test_what_is_no_mask_is_refused(way, marks, message):
    params = CELLS["gru"][1]
    run = {
        "lstm": functools.partial(*CELLS["lstm"]),
        "min_gru": functools.partial(*CELLS["min_gru"]),
        "scan": lambda x, **marks: rnn.scan(rnn.gru_step, params, x, H, **marks),
        "remat": functools.partial(rnn.remat(rnn.gru, 2), params),
        "stack": lambda x, **marks: rnn.stack(rnn.GRU, {"layer_0": {"forward": params}}, x, **marks),
    }[way]
    with pytest.raises(ValueError, match=r"^resets are given" if way == "remat" and "resets" in marks else message):
        run(X, **marks)


def test_no_steps_have_no_mask():
    end, y = rnn.gru(CELLS["gru"][1], X[:, :0], H, mask=MASK[:, :0], resets=RESETS[:, :0])
    np.testing.assert_array_equal(end, H)
    assert y.shape == (BATCH, 0, HIDDEN)


def test_a_mask_in_reverse_promotes_no_dtype():
    layer, params = CELLS["gru"]
    with jax.numpy_dtype_promotion("strict"):
        found = layer(params, X, mask=MASK, reverse=True)[1]
    np.testing.assert_array_equal(found, layer(params, X, mask=MASK, reverse=True)[1])
