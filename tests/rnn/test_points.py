"""No point is invented: padding and empty sequences reach neither values nor gradients. And sums are wide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models.cells.min_gru import CELL as MIN_GRU
from tests.tiny import quick_compiler

BATCH, TIME, FEATURES, HIDDEN = 4, 10, 5, 8
X = np.random.default_rng(0).uniform(0.5, 1.5, (BATCH, TIME, FEATURES)).astype(np.float32)
RAGGED = {"one empty": [10, 0, 3, 1], "all empty": [0, 0, 0, 0]}
LAYERS = {
    "lstm": (rnn.lstm, rnn.init_lstm),
    "gru": (rnn.gru, rnn.init_gru),
    "reset before": (
        functools.partial(rnn.gru, reset_after=False),
        functools.partial(rnn.init_gru, reset_after=False),
    ),
    "min_gru": (MIN_GRU.layer, MIN_GRU.init),
}

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


# ---- Steps that are singular somewhere ---------------------------------------------------


def unit_vector(q, carry, x_t):
    """Singular at x = 0."""
    carry = carry + q * x_t / jnp.linalg.norm(x_t, axis=-1, keepdims=True)
    return carry, carry


def root(q, carry, x_t):
    """Singular at x = 0 and where the carry is 0 after the first step."""
    carry = jnp.sqrt(carry + q * x_t)
    return carry, carry


def distance(q, carry, x_t):
    """Singular where a frame is the one before it."""
    y = q * jnp.linalg.norm(x_t - carry, axis=-1, keepdims=True)
    return x_t, y


STEPS = {"unit vector": unit_vector, "root": root, "distance": distance}


def layer_of(step):
    def layer(q, x, carry=None, **options):
        return rnn.scan(step, q, x, jnp.full((x.shape[0], FEATURES), 0.1) if carry is None else carry, **options)

    return layer


def alone(step, q, x, lengths, reverse):
    """The sum of outputs and its gradients, one sequence at a time without any padding."""

    def total(q, x):
        ends = [x[b : b + 1, :end] for b, end in enumerate(lengths) if end]
        return sum((layer_of(step)(q, part, reverse=reverse)[1].sum() for part in ends), 0.0 * q)

    return jax.value_and_grad(total, (0, 1))(q, x)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("way", "reverse"), [("scan", False), ("remat", True)], ids=["scan", "remat reverse"])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_is_differentiated_only_where_a_sequence_goes(step, lengths, way, reverse):
    layer = rnn.remat(layer_of(step), 3) if way == "remat" else layer_of(step)
    padded = np.where(np.arange(TIME)[:, None] < np.array(lengths)[:, None, None], X, np.nan).astype(np.float32)

    def total(q, x):
        return layer(q, x, lengths=np.array(lengths), reverse=reverse)[1].sum()

    got = jax.value_and_grad(total, (0, 1))(0.7, padded)
    want = alone(step, 0.7, X, lengths, reverse)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


@pytest.mark.slow
@both_directions
def test_a_kernel_of_a_step_that_is_singular_at_zero_takes_no_padding(need_native, reverse):
    need_native("native")
    rng = np.random.default_rng(0)
    params = {"U": 0.4 * rng.standard_normal((6, 6)), "W": rng.uniform(0.5, 1, (2, 6))}
    params = jax.tree.map(jnp.float32, params)
    x, lengths = jnp.float32(rng.uniform(0.5, 1, (3, 5, 2))), jnp.array([5, 3, 0])
    x = x.at[1, 3:].set(0).at[2].set(0)

    def step(p, h, x_t):
        h = jnp.tanh(h @ p["U"] + jnp.sqrt(x_t @ p["W"]))
        return h, h

    def total(params, x, backend):
        return rnn.scan(step, params, x, jnp.zeros((3, 6)), lengths=lengths, reverse=reverse, backend=backend)[1].sum()

    got, want = (jax.grad(total, (0, 1))(params, x, backend) for backend in ("native", "scan"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


@pytest.mark.sampled(1)
@both_directions
@pytest.mark.parametrize(
    ("cell", "backend"),
    [("lstm", "scan"), ("gru", "fused"), ("lstm", "native"), ("gru", "native"), ("min_gru", "native")],
)
def test_the_carry_of_an_empty_sequence_may_be_anything(need_native, cell, backend, reverse):
    need_native(backend)
    lengths = [10, 7, 0, 0]
    run, init = LAYERS[cell]
    params = init(jax.random.key(0), FEATURES, HIDDEN)
    h = np.ones((BATCH, HIDDEN), np.float32)
    h[np.array(lengths) == 0] = np.nan

    def total(params, x, h, layer=run):
        carry = (h, h) if cell == "lstm" else h
        return layer(params, x, carry, lengths=np.array(lengths), reverse=reverse, backend=backend)[1].sum()

    got = jax.grad(total, (0, 1))(params, X, h)
    want = jax.grad(total, (0, 1))(params, X, np.nan_to_num(h))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    by_remat = jax.grad(functools.partial(total, layer=rnn.remat(run, 3)), (0, 1))(params, X, h)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), by_remat, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "precision", "saves"),
    [(3, "float32", False), (3, "bfloat16", True), (17, "float32", True), (17, "bfloat16", False)],
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_infinite_x_saturates_the_units_and_no_more(need_native, monkeypatch, cell, hidden, precision, saves):
    """Gates at their ends: numbers, and gradients of all but the weights that x is multiplied with."""
    need_native()
    if not saves:
        monkeypatch.setattr(rnn.recurrence, "MOST_KEPT_BYTES", 0)
    run, init = LAYERS[cell]
    params = init(jax.random.key(0), FEATURES, hidden)
    x = X.copy()
    x[0, 5, 0] = np.inf

    def gradients(backend):
        def total(params, x):
            outputs = run(params, x, precision=precision, backend=backend)[1]
            return outputs.sum(), outputs

        return jax.jit(jax.grad(total, has_aux=True))(params, x)

    (got, outputs), (want, reference) = gradients("native"), gradients("scan")
    np.testing.assert_allclose(outputs, reference, atol=2e-2)
    for name in params:
        if name != "kernel":  # There is inf * 0.
            np.testing.assert_allclose(got[name], want[name], atol=2e-2 * np.abs(want[name]).max())


# ---- What a scan takes for the batch -----------------------------------------------------


@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize("shape", [(), (1, 8), (5,)])
def test_with_lengths_all_of_the_carry_has_a_batch_axis(shape, return_sequences):
    def step(_, carry, x_t):
        return carry, x_t

    carry = {"h": jnp.zeros((BATCH, 2)), "other": jnp.zeros(shape)}
    options = {"return_sequences": return_sequences}
    with pytest.raises(ValueError, match=r"^carry has shape .*; with lengths expected \[batch, \.\.\.\], batch 4"):
        rnn.scan(step, None, X, carry, lengths=[10, 7, 3, 1], **options)
    # Whole sequences need none.
    np.testing.assert_array_equal(rnn.scan(step, None, X, carry, **options)[0]["other"], jnp.zeros(shape))


@pytest.mark.parametrize("return_sequences", [True, False])
def test_with_lengths_all_of_the_output_has_a_batch_axis(return_sequences):
    with pytest.raises(ValueError, match=r"^the step's output has shape \(\); with lengths or a mask expected"):
        rnn.scan(lambda _, c, x: (c, x.sum()), None, X, (), lengths=[9, 1, 1, 1], return_sequences=return_sequences)


@pytest.mark.parametrize("run", [rnn.scan, lambda step, q, x, carry: rnn.remat(layer_of(step), 3)(q, x, carry)])
def test_known_nan_in_x_of_a_step_is_named(run):
    x = X.copy()
    x[1, 5, 2] = np.nan
    with pytest.raises(ValueError, match=r"^x \(4, 10, 5\) holds NaN"):
        run(unit_vector, 0.7, x, np.zeros((BATCH, FEATURES), np.float32))


# ---- remat -------------------------------------------------------------------------------


def two_faced(params, carry, x_t):
    """What it hands on is not what it remembers, whose last array is neither; and it begins at one."""
    h = jnp.tanh(carry["h"] * params + x_t.sum(-1, keepdims=True))
    return {"h": h, "z": carry["z"] + 1.0}, {"double": 2 * h, "pair": jnp.stack([h, -h], axis=1)}


def two_faced_layer(params, x, carry=None, **options):
    if carry is None:
        ones = jnp.ones((x.shape[0], 2))
        carry = {"h": ones, "z": 5 * ones}
    return rnn.scan(two_faced, params, x, carry, **options)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("return_sequences", "reverse"), [(True, True), (False, False)], ids=["all reverse", "last forward"]
)
@pytest.mark.parametrize(
    ("steps", "lengths"), [(3, None), (1, [10, 7, 3, 0]), (3, [10, 7, 3, 0]), (5, [0, 0, 0, 0]), (7, [10, 7, 3, 0])]
)
def test_remat_gives_what_the_layer_gives(steps, lengths, return_sequences, reverse):
    """Whatever its carry and outputs are, the carry that it begins with included."""

    def call(layer):
        options = {"lengths": lengths, "reverse": reverse, "return_sequences": return_sequences}
        value, pull_back = jax.vjp(lambda q: layer(q, -X, **options), jnp.float32(0.3))
        return value, pull_back(jax.tree.map(jnp.ones_like, value))

    got, want = call(rnn.remat(two_faced_layer, steps)), call(two_faced_layer)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.slow
def test_such_a_cell_in_a_stack():
    def step(params, carry, x_t):
        h = jnp.tanh(carry * params + x_t.sum(-1, keepdims=True))
        return h, 2 * h

    cell = rnn.cell(step, lambda key, features, hidden_size: jnp.zeros(hidden_size))
    params = {"layer_0": {"forward": jnp.array([0.3, 0.2], jnp.float32)}}
    want = rnn.stack(cell, params, X, lengths=[10, 7, 3, 0])
    for engine in (rnn.Engine(remat=3), rnn.Engine(unroll=2), rnn.Engine(unroll=2, remat=3)):
        np.testing.assert_allclose(rnn.stack(cell, params, X, lengths=[10, 7, 3, 0], engine=engine), want, rtol=1e-6)


# ---- Sums --------------------------------------------------------------------------------


def in_a_stack(name):
    cell = {"lstm": rnn.LSTM, "gru": rnn.GRU, "reset before": rnn.GRU_RESET_BEFORE, "min_gru": MIN_GRU}[name]

    def run(params, x):
        masks = {"layer_0": {"forward": rnn.Masks(state=jnp.ones((x.shape[0], 16), x.dtype))}}
        return None, rnn.stack(cell, {"layer_0": {"forward": params}}, x, masks=masks, return_sequences=True)

    return run


def by_step(step, zero):
    return lambda params, x: rnn.scan(step, params, x, zero(jnp.zeros((x.shape[0], 16), x.dtype)))


HALVES = {
    "lstm": ("lstm", rnn.lstm),
    "lstm scan": ("lstm", functools.partial(rnn.lstm, backend="scan")),
    "gru": ("gru", rnn.gru),
    "reset before": ("reset before", LAYERS["reset before"][0]),
    "min_gru": ("min_gru", MIN_GRU.layer),
    "remat": ("gru", rnn.remat(rnn.gru, 1)),
    "step": ("gru", by_step(rnn.gru_step, lambda zero: zero)),
    **{f"stack of {name}": (name, in_a_stack(name)) for name in LAYERS},
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", HALVES)
def test_gradients_of_half_precision_are_sums_in_float32(way):
    """Hundreds of shares of one sign: added up in bfloat16 they would soon be lost beside their sum."""
    cell, run = HALVES[way]
    params = LAYERS[cell][1](jax.random.key(0), 1, 16)
    x = jax.random.uniform(jax.random.key(1), (8, 300, 1))
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (params, x))
    gradient = jax.jit(jax.grad(lambda params, x: run(params, x)[1].astype(jnp.float32).mean()))
    got = gradient(*half)
    want = gradient(*jax.tree.map(lambda array: array.astype(jnp.float32), half))
    for name in params:
        assert got[name].dtype == jnp.bfloat16
        size = float(jnp.linalg.norm(got[name].astype(jnp.float32)) / jnp.linalg.norm(want[name]))
        assert 0.98 < size < 1.02, (name, size)


@pytest.mark.slow
def test_blocks_of_the_fused_way_back_are_added_in_float32():
    """As many blocks as steps are in one of the above."""
    params = rnn.init_gru(jax.random.key(0), 1, 4)
    x = jax.random.uniform(jax.random.key(1), (4, 29 * 500, 1))
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (params, x))
    gradient = jax.jit(jax.grad(lambda params, x: rnn.gru(params, x)[1].astype(jnp.float32).mean()))
    with quick_compiler(False):  # Of so many steps the running costs more than the compiling.
        got = gradient(*half)["bias"].astype(jnp.float32)
        want = gradient(*jax.tree.map(lambda array: array.astype(jnp.float32), half))["bias"]
    assert 0.98 < float(jnp.linalg.norm(got) / jnp.linalg.norm(want)) < 1.02


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(rnn.TIME_SCALES))
def test_time_scales_of_half_precision(name, dtype):
    """Drawn in float32: float16 ends below the longest of them, and bfloat16 has 128 numbers to an octave."""
    init = rnn.TIME_SCALES[name](100_000)
    half, single = (init(jax.random.key(0), (1000,), kind) for kind in (dtype, "float32"))
    assert half.dtype == dtype
    np.testing.assert_array_equal(half, single.astype(dtype))
    assert bool(jnp.isfinite(half).all())


@pytest.mark.parametrize("kernel_init", sorted(rnn.KERNELS))
@pytest.mark.parametrize("init", [rnn.init_lstm, rnn.init_gru])
def test_kernels_of_half_precision_are_those_of_float32(init, kernel_init):
    half, single = (
        init(jax.random.key(0), 5, 6, kernel_init=kernel_init, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, single)
