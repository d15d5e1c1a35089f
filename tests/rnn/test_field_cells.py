"""The field's cells against their papers' equations in NumPy, and how each begins."""

import functools

import field_steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from seqmnist_jax import rnn
from seqmnist_jax.models import CELLS
from seqmnist_jax.models.cells.exp_rnn import orthogonal
from seqmnist_jax.models.cells.registry import known_options, with_options
from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.cell import first_carry
from seqmnist_jax.rnn.stages import Options

NAMES = [name for name in CELLS if hasattr(field_steps, name)]
# Of which the numbers are others than the defaults.
OPTIONS = {"ind_rnn": {"bound": 0.7}, "cornn": {"dt": 0.3, "gamma": 1.2, "epsilon": 0.7}, "lem": {"dt": 0.8}}
BATCH, TIME, FEATURES, HIDDEN = 3, 9, 2, 6
init = {name: functools.partial(CELLS[name].cell.init, jax.random.key(0)) for name in NAMES}


def draw(name, seed=0):
    """params, x and carry in float64, none of them where a relu has its corner."""
    rng = np.random.default_rng(seed)
    params = {k: np.asarray(v, np.float64) for k, v in init[name](FEATURES, HIDDEN).items()}
    params = {k: v + 0.3 * rng.standard_normal(v.shape) for k, v in params.items()}
    parts = len(jax.tree.leaves(first_carry(CELLS[name].cell, params, jnp.zeros((1, 1)))))
    carry = tuple(0.5 * rng.standard_normal((BATCH, HIDDEN)) for _ in range(parts))
    return params, rng.standard_normal((BATCH, TIME, FEATURES)), carry[0] if parts == 1 else carry


def looped(step, params, x, carry):
    """The carry after all steps, and each step's output."""
    outputs = []
    for t in range(x.shape[1]):
        carry, y = step(params, carry, x[:, t])
        outputs.append(y)
    return carry, np.stack(outputs, axis=1)


def loss(found):
    """A number on which the end and each output have their part."""
    leaves = jax.tree.leaves(found)
    return sum((jnp if isinstance(leaf, jax.Array) else np).sin(leaf + k).sum() for k, leaf in enumerate(leaves))


def slope(function, given, ways, h=1e-3):
    """The derivative of a function of NumPy's arrays along ways, by differences of the sixth order."""
    at = [function(*jax.tree.map(lambda a, w, k=k: a + k * h * w, given, ways)) for k in (-3, -2, -1, 1, 2, 3)]
    return np.dot([-1, 9, -45, 45, -9, 1], at) / (60 * h)


@pytest.mark.parametrize("backend", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_the_equations_(name, backend):
    options, given = OPTIONS.get(name, {}), draw(name)
    cell = with_options(CELLS[name].cell, tuple(options.items()))
    step = functools.partial(getattr(field_steps, name), **options)
    want = looped(step, *given)
    with jax.enable_x64(True):

        def run(*given):
            found = cell.layer(*given, backend=backend)
            return loss(found), found

        grads, found = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(*given)
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)
        check_gradients(name, step, given, jax.tree.map(np.asarray, grads))


def check_gradients(name, step, given, grads):
    """Along a random way of each array by itself."""
    rng = np.random.default_rng(1)
    zeros = jax.tree.map(np.zeros_like, given)
    leaves, tree = jax.tree.flatten(zeros)
    for k, (grad, leaf) in enumerate(zip(jax.tree.leaves(grads), leaves, strict=True)):
        way = rng.standard_normal(leaf.shape)
        if name == "ind_rnn" and leaf.shape == (HIDDEN,):
            # A u beyond the bound has the gradient of the one that is used.
            way = way * (np.abs(jax.tree.leaves(given)[k]) < OPTIONS[name]["bound"] - 0.01)
        ways = jax.tree.unflatten(tree, [*leaves[:k], way, *leaves[k + 1 :]])
        found = slope(lambda *g: loss(looped(step, *g)), given, ways, h=1e-4)
        np.testing.assert_allclose(np.vdot(grad, way), found, rtol=1e-6, atol=1e-7)


def test_a_unit_beyond_its_bound_comes_back():
    params = {"kernel": jnp.zeros((1, 2)), "recurrent_kernel": jnp.array([2.0, -2.0]), "bias": jnp.ones(2)}
    step = functools.partial(CELLS["ind_rnn"].cell.step, bound=1.0)

    def run(params):
        return rnn.scan(step, params, jnp.zeros((1, 3, 1)), jnp.zeros((1, 2)), backend="scan")[0]

    np.testing.assert_allclose(run(params), [[3.0, 1.0]])
    grad = jax.grad(lambda params: run(params)[0, 0])(params)["recurrent_kernel"]
    np.testing.assert_allclose(grad, [3.0, 0.0])


def test_kernels_are_made_of_all_of_them():
    for name in NAMES:
        cell = CELLS[name].cell
        params = init[name](FEATURES, HIDDEN)
        carry = first_carry(cell, params, jnp.zeros((BATCH, HIDDEN)))
        call = recurrence.Call(cell.step, Options("all", False, "float32"), "cpu")
        assert recurrence.stages_of(call, params, jnp.zeros((BATCH, TIME, FEATURES)), carry).division is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_the_equations_too(name, need_native):
    need_native()
    params, x, carry = draw(name)
    params["skew"] = params["skew"] / 3 if name == "exp_rnn" else None
    given = jax.tree.map(
        lambda a: np.asarray(a, np.float32), ({k: v for k, v in params.items() if v is not None}, x, carry)
    )
    cell = CELLS[name].cell
    assert cell.explain(*given[:2], backend="auto", precision="float32").startswith("native:")
    wide = jax.tree.map(np.float64, given)
    want = looped(getattr(field_steps, name), *wide)
    for got, wanted in zip(jax.tree.leaves(cell.layer(*given)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda *given: loss(cell.layer(*given)), argnums=(0, 1, 2))(*given)
    with jax.enable_x64(True):
        exact = jax.grad(lambda *given: loss(cell.layer(*given, backend="scan")), argnums=(0, 1, 2))(*wide)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


# How they begin.


def test_orthogonal_matrices_are_orthogonal():
    u = init["elman"](1, 64)["recurrent_kernel"]
    np.testing.assert_allclose(u @ u.T, np.eye(64), atol=1e-5)
    for size in (9, 64):
        params = init["exp_rnn"](1, size)
        rotation = jax.jit(functools.partial(orthogonal, hidden_size=size))
        u = np.asarray(rotation(params["skew"]), np.float64)
        np.testing.assert_allclose(u @ u.T, np.eye(size), atol=1e-5)
        # Rotations by at most tan(pi / 4), in blocks of two.
        angles = np.abs(np.angle(np.linalg.eigvals(u)))
        assert angles.max() <= 1 + 1e-5
        assert np.count_nonzero(params["skew"]) == size // 2
        # Wherever training takes it.
        moved = params["skew"] + jax.random.normal(jax.random.key(1), params["skew"].shape)
        u = rotation(moved)
        np.testing.assert_allclose(u @ u.T, np.eye(size), atol=1e-5)
        upper = np.zeros((size, size))
        upper[np.triu_indices(size, 1)] = moved
        np.testing.assert_allclose(u, scipy.linalg.expm(upper - upper.T), atol=1e-5)


def gates(bias):
    return np.sort(1 / (1 + np.exp(-np.asarray(bias, np.float64))))


@pytest.mark.parametrize("name", ["ur_lstm", "ur_gru"])
def test_refined_gates_begin_even(name):
    units = 512
    forget, refine, *others = np.split(np.asarray(init[name](1, units)["bias"]), 4)
    np.testing.assert_array_equal(refine, -forget)
    assert not np.any(others)
    found = gates(forget)
    assert 1 / units - 1e-6 <= found[0]
    assert found[-1] <= 1 - 1 / units + 1e-6
    assert np.abs(found - (np.arange(units) + 0.5) / units).max() < 2 / units**0.5


def test_time_scales_are_drawn_into_the_gates():
    scales = ("log_uniform", 784)
    for name in ("ur_lstm", "ur_gru", "peephole_lstm", "min_lstm"):
        params = init[name](1, 256, time_scales=scales)
        count = {"min_lstm": 3}.get(name, 4)
        bias = np.split(np.asarray(params["bias"]), count)
        kept, other = (bias[1], bias[0]) if name == "peephole_lstm" else bias[:2]
        assert 0 <= kept.min() < 0.1
        assert np.log(784) - 0.1 < kept.max() <= np.log(784)
        np.testing.assert_array_equal(other, -kept)
    assert not np.any(params["bias"][512:])
    kept, candidate = np.split(np.asarray(init["min_gru"](1, 256, time_scales=scales)["bias"]), 2)
    assert 0.9 * np.log(784) < kept.max() <= np.float32(np.log(784))
    assert kept.min() >= 0
    assert not candidate.any()
    assert not np.any(init["peephole_lstm"](1, 8)["peepholes"])


def test_a_unit_of_the_min_gru_keeps_sigmoid_of_its_bias():
    """With bias b a unit keeps sigmoid(b) of h at each step, so that 1 + e^b is its time scale."""
    scales = np.array([2.0, 10.0, 100.0])
    params = {"kernel": np.zeros((1, 6), np.float32), "bias": np.float32([*np.log(scales - 1), 0, 0, 0])}
    layer = CELLS["min_gru"].cell.layer
    _, outputs = layer(params, np.zeros((1, 100, 1), np.float32), np.ones((1, 3), np.float32), backend="fused")
    for unit, steps in enumerate([2, 10, 100]):
        np.testing.assert_allclose(outputs[0, steps - 1, unit], (1 - 1 / steps) ** steps, rtol=1e-5)


def test_the_kernel_of_the_min_gru_stands_alone():
    """Glorot's limit counts no recurrent kernel, for there is none."""
    params = init["min_gru"](28, 64)
    assert {name: value.shape for name, value in params.items()} == {"kernel": (28, 128), "bias": (128,)}
    limit = (6 / (28 + 128)) ** 0.5
    assert 0.99 * limit < np.abs(params["kernel"]).max() <= limit
    blocks = np.split(np.asarray(init["min_gru"](9, 6, kernel_init="orthogonal")["kernel"]), 2, axis=1)
    for block in blocks:
        np.testing.assert_allclose(block.T @ block, np.eye(6), atol=1e-5)


def test_units_of_the_ind_rnn_begin_below_their_bound():
    u = np.asarray(init["ind_rnn"](1, 2000, bound=0.5)["recurrent_kernel"])
    assert 0 <= u.min() < 0.01
    assert 0.49 < u.max() < 0.5


def test_the_ring_of_the_lru():
    params = init["lru"](1, 800, r_min=0.6, r_max=0.9, max_phase=0.5)
    size, phase = np.exp(-np.exp(np.float64(params["nu"]))), np.exp(np.float64(params["theta"]))
    for values, most in (((size**2 - 0.36) / 0.45, 1), (phase, 0.5)):
        counts, _ = np.histogram(values, bins=10, range=(-1e-6, most + 1e-6))
        assert counts.sum() == 800
        assert np.abs(counts - 80).max() < 45
    np.testing.assert_allclose(np.exp(params["gamma"]), np.sqrt(1 - size**2), rtol=1e-4)
    assert all(np.all(np.isfinite(value)) for value in init["lru"](1, 800).values())
    with pytest.raises(ValueError, match=r"r_min, r_max, max_phase are 0\.5, 1\.5, 6\.28; expected"):
        init["lru"](1, 4, r_min=0.5, r_max=1.5)


def test_the_poles_of_the_s5():
    params = init["s5"](1, 256)
    np.testing.assert_allclose(-np.exp(params["decay"]), -0.5, rtol=1e-6)
    np.testing.assert_allclose(params["omega"], np.pi * np.arange(256), rtol=1e-6)
    dt = np.exp(params["dt"])
    assert 1e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1
    with pytest.raises(ValueError, match=r"dt_min, dt_max are 0\.2, 0\.1; expected"):
        init["s5"](1, 4, dt_min=0.2)


@pytest.mark.parametrize("dt", [1e-3, 1e-6])
def test_a_short_step_of_the_s5_is_as_exact_as_a_long_one(dt):
    params = {**init["s5"](1, 16), "dt": jnp.full(16, np.log(dt), jnp.float32)}
    wide = {name: np.float64(value) for name, value in params.items()}
    zero, x = np.zeros((1, 16)), np.ones((1, 1))
    found, _ = CELLS["s5"].cell.step(params, (jnp.float32(zero), jnp.float32(zero)), jnp.float32(x))
    expected, _ = field_steps.s5(wide, (zero, zero), x)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("backend", ["scan", "fused", "native"])
def test_gates_of_the_min_lstm_may_both_be_closed(need_native, backend):
    if backend == "native":
        need_native()

    def read(bias):
        params = {"kernel": jnp.zeros((1, 3)), "bias": bias}
        return CELLS["min_lstm"].cell.layer(params, jnp.ones((1, 2, 1)), jnp.zeros((1, 1)), backend=backend)[1]

    for closed in (-39.0, -50.0, -90.0, -200.0):
        bias = jnp.array([closed, closed, 1.0])
        np.testing.assert_allclose(read(bias)[0, :, 0], [0.5, 0.75], rtol=1e-5)
        slopes = jax.grad(lambda bias: read(bias).sum())(bias)
        np.testing.assert_allclose(slopes, [0, 0, 1.25] if closed < -40 else [-0.5, 0.5, 1.25], rtol=1e-5)


def test_uniform_weights_fill_their_range():
    for name, limit in (("lem", 64**-0.5), ("cornn", 131**-0.5)):
        for value in init[name](3, 64).values():
            assert 0.8 * limit < np.abs(value).max() <= limit


# The numbers that a config may set.


def test_numbers_are_found_and_taken():
    assert known_options(CELLS["lem"].cell) == {"dt": 0.31}
    assert known_options(CELLS["lru"].cell) == {"r_min": 0.0, "r_max": 1.0, "max_phase": 6.28}
    assert known_options(CELLS["ind_rnn"].cell) == {"bound": 2 ** (1 / 784)}
    assert not any(known_options(CELLS[name].cell) for name in ("lstm", "gru", "gru_reset_before", "min_gru", "elman"))
    other = with_options(CELLS["lem"].cell, (("dt", 0.5),))
    assert other is with_options(CELLS["lem"].cell, (("dt", 0.5),))
    doubled = functools.wraps(other.layer)(lambda *given, **named: jax.tree.map(jnp.add, *2 * (other.layer(*given),)))
    assert with_options(other._replace(layer=doubled), (("dt", 0.5),)).layer is doubled
    ring = with_options(CELLS["lru"].cell, (("r_min", 0.9),))
    assert np.exp(-np.exp(ring.init(jax.random.key(0), 1, 64)["nu"])).min() >= 0.9 - 1e-6


@pytest.mark.parametrize(
    ("x", "options", "error"),
    [
        (np.ones((2, 3)), {}, ValueError),
        (np.full((2, 3, 1), np.nan), {}, ValueError),
        (np.ones((2, 3, 1)), {"reverse": "yes"}, ValueError),
        (np.ones((2, 3, 1)), {"reverse": None}, ValueError),
        (np.ones((2, 3, 1)), {"lenghts": [1, 2]}, TypeError),
    ],
)
def test_the_diagonal_s_last_state_refuses_what_its_loop_does(x, options, error):
    with pytest.raises(error):
        CELLS["diagonal"].cell.layer(init["diagonal"](1, 4), x, return_sequences=False, **options)


def test_the_diagonal_s_phases_and_time_constants():
    params = init["diagonal"](1, 4, sequence_length=49, states=800, shortest=0.5, longest=3.0)
    np.testing.assert_allclose(params["theta"], 2 * np.pi * (np.arange(800) + 0.5) / 49, rtol=1e-6)
    counts, _ = np.histogram(-np.asarray(params["nu"]), bins=10, range=(np.log(24.5), np.log(147)))
    assert counts.sum() == 800
    assert np.abs(counts - 80).max() < 45
    assert params["output_kernel"].shape == (1600, 4)
    for wrong in ({"shortest": 2.0, "longest": 1.0}, {"states": 2.7}, {"states": -1}, {"states": 1e30}):
        with pytest.raises(ValueError, match=r"shortest, longest, states are .*; expected"):
            init["diagonal"](1, 4, **wrong)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bfloat16"])
def test_the_diagonal_s_last_state_counts_its_steps_in_any_dtype(dtype):
    cell = CELLS["diagonal"].cell
    params = cell.init(jax.random.key(0), 1, 4, 300)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 300, 1)), dtype)
    found, wanted = (cell.layer(params, x.astype(d), return_sequences=False)[1] for d in (dtype, jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("features", "states"), [(1, 5), (3, 0)])
def test_the_diagonal_s_last_state_by_powers_is_that_of_the_loop(reverse, features, states):
    cell = CELLS["diagonal"].cell
    params = cell.init(jax.random.key(0), features, 4, 40, states)
    x = jax.random.normal(jax.random.key(1), (3, 40, features))
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))

        def run(params, x, backend):
            found = cell.layer(params, x, return_sequences=False, reverse=reverse, backend=backend)
            return loss(found), found

        by = {b: jax.grad(run, (0, 1), has_aux=True)(params, x, b) for b in ("auto", "scan", "fused")}
        for backend in ("scan", "fused"):
            for got, wanted in zip(jax.tree.leaves(by["auto"]), jax.tree.leaves(by[backend]), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-10)
