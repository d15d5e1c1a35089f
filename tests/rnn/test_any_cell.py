"""Kernels made of a step against `lax.scan` over it in float64: values, and gradients of everything."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cells import CELLS, random_cells
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from seqmnist_jax import rnn
from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.jaxprs import NotDivisibleError
from seqmnist_jax.rnn.stages import Options

DERIVED = ("derived", np.float64, 1e-9)
CPU = ("cpu", np.float32, 1e-4)


def case(cell, batch=4, time=6, features=1, hidden=8, ragged=False, seed=0, bias=0.0):
    """A step and the arrays of a call in float64, all of them numbers that float32 holds."""
    step, params, carries = cell(hidden, features)
    rng = np.random.default_rng([seed, batch, time, features, hidden])

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    if bias:
        name = "b" if "b" in params else "bias"
        params[name] = params[name] + bias
    carry = tuple(np.tanh(normal(batch, hidden)).astype(np.float32).astype(np.float64) for _ in range(carries))
    lengths = None
    if ragged:
        lengths = rng.integers(0, time + 1, batch)
        lengths[rng.integers(batch)] = 0
        lengths[rng.integers(batch)] = time
    return step, recurrence.Given(params, normal(batch, time, features), carry[0] if carries == 1 else carry, lengths)


def bars_of(step, options, arrays, seed=1):
    """Cotangents of the end's carry and of the outputs."""
    rng = np.random.default_rng(seed)
    call = recurrence.Call(step, options, "")
    shapes = jax.eval_shape(functools.partial(recurrence.plain, call), arrays)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32).astype(np.float64), shapes)


def by_scan(step, options, arrays, bars):
    call = recurrence.Call(step, options, "")

    @jax.jit
    def run(params, x, carry, bars):
        out, pull = jax.vjp(lambda *p: recurrence.plain(call, recurrence.Given(*p, arrays.lengths)), params, x, carry)
        return out, pull(bars)

    return run(*arrays[:3], bars)


def in_type(tree, dtype):
    """Floating-point arrays in this type, whole numbers in int32."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if jnp.asarray(a).dtype != jnp.int64 else jnp.int32), tree)


def by_kernel(platform, step, options, arrays, bars, dtype, inline=True, forward_only=False):
    arrays, bars = in_type(arrays, dtype), in_type(bars, dtype)
    call = recurrence.Call(step, options, platform)

    @jax.jit
    def run(arrays, bars):
        end, outputs, kept = recurrence._kernel_forward(call, True, inline, arrays)
        gradients = recurrence._kernel_backward(call, inline, arrays, kept, bars)
        again = recurrence._kernel_forward(call, False, inline, arrays)[:2] if forward_only else (end, outputs)
        return (end, outputs), again, gradients[:3]

    out, again, gradients = run(arrays, bars)
    compare("without a way back, ", again, out, 1e-6)
    return out, (gradients[0], None if inline else gradients[1], gradients[2])


def errors(got, wanted):
    """Each array's largest error as a part of its own largest number, or of 1e-3 where that is smaller."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    return {
        jax.tree_util.keystr(path): np.max(np.abs(np.asarray(g, np.float64) - w)) / max(np.max(np.abs(w)), 1e-3)
        for (path, g), w in pairs
        if w.size
    }


def compare(name, got, wanted, tolerance):
    for path, error in errors(got, wanted).items():
        assert error < tolerance, f"{name}{path}: {error:.1e}"


def check(kernel, step, options, arrays, inline=True, forward_only=False):
    platform, dtype, tolerance = kernel
    with jax.enable_x64(True):
        bars = bars_of(step, options, arrays)
        wanted, wanted_gradients = by_scan(step, options, arrays, bars)
        got, gradients = by_kernel(platform, step, options, arrays, bars, dtype, inline, forward_only)
        compare("result", got, wanted, tolerance)
        for name, g, w in zip(("params", "x", "carry"), gradients, wanted_gradients, strict=True):
            if g is not None:
                compare(name, g, w, tolerance)


BOTH = pytest.mark.parametrize("kernel", [CPU, DERIVED], ids=lambda k: k[0])


def options_and(cell, outputs="all", reverse=False, **sizes):
    step, arrays = case(cell, **sizes)
    return step, Options(outputs, reverse, "float32"), arrays


@pytest.mark.sampled(3)
@BOTH
@pytest.mark.parametrize("name", CELLS)
def test_cell(kernel, name):
    check(kernel, *options_and(CELLS[name]), forward_only=True)


@pytest.mark.sampled(1)
@BOTH
@pytest.mark.parametrize("name", ["gru", "lem", "concatenating", "ind_rnn", "diagonal"])
def test_many_features_with_the_gradient_of_x(kernel, name):
    check(kernel, *options_and(CELLS[name], features=6, ragged=True, batch=3), inline=False)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("outputs", "reverse"), [("all", True), ("last", False), ("none", True)])
def test_x_that_is_read_as_it_is(outputs, reverse):
    """And sequences of more steps than the kernel takes in a row."""
    cell = options_and(CELLS["diagonal"], outputs, reverse, hidden=20, features=40, batch=3, time=150, ragged=True)
    check(CPU, *cell, inline=False)


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("name", ["lstm", "gru_reset_before", "diagonal"])
@pytest.mark.parametrize("outputs", ["all", "last", "none"])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_and_outputs(kernel, name, outputs, reverse):
    check(kernel, *options_and(CELLS[name], outputs, reverse, batch=5, ragged=True), forward_only=True)


# Odd and even, below and above a vector and a tile, more rows than a slice; blocks of steps that don't come out even.
SIZES = [(1, 1, 3), (17, 2, 9), (96, 37, 4), (128, 9, 30), (200, 1, 2), (16, 130, 6)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["gru", "lstm", "lem", "cornn", "ind_rnn", "diagonal"])
@pytest.mark.parametrize(("hidden", "batch", "time"), SIZES)
def test_sizes(name, hidden, batch, time):
    cell = options_and(CELLS[name], "last", hidden=hidden, batch=batch, time=time, ragged=batch > 1)
    check(CPU, *cell, forward_only=True)


@pytest.mark.sampled(1)
@BOTH
@pytest.mark.parametrize("name", ["gru", "lstm", "ur_lstm"])
def test_nearly_closed_gates_and_saturation(kernel, name):
    """Where 1 - sigmoid has lost its digits in float32, the kernel is as near to float64 as float32's scan is."""
    platform, dtype, tolerance = kernel
    for bias in (9.0, -9.0):
        step, options, arrays = options_and(CELLS[name], "last", time=40, bias=bias)
        with jax.enable_x64(True):
            bars = bars_of(step, options, arrays)
            result, (of_params, _, of_carry) = by_scan(step, options, arrays, bars)
            rounded = recurrence.Given(*in_type(arrays[:3], dtype), arrays.lengths)
            _, (of_params_32, _, of_carry_32) = by_scan(step, options, rounded, in_type(bars, dtype))
            got, gradients = by_kernel(platform, step, options, arrays, bars, dtype)
            compare("result", got, result, tolerance)
            for name_of, g, s, w in (
                ("params", gradients[0], of_params_32, of_params),
                ("carry", gradients[2], of_carry_32, of_carry),
            ):
                compare(name_of, g, w, max(tolerance, 1.5 * max(errors(s, w).values())))


@pytest.mark.slow
def test_hidden_units_that_divide_by_zero_do_not_reach_others():
    def step(p, h, x):
        h = jnp.tanh(h @ p["U"] + x @ p["W"]) / p["scale"]
        return h, h

    rng = np.random.default_rng(0)
    params = {"U": rng.standard_normal((5, 5)), "W": rng.standard_normal((1, 5)), "scale": np.full(5, 2.0)}
    arrays = recurrence.Given(params, rng.standard_normal((3, 4, 1)), rng.standard_normal((3, 5)), None)
    check(CPU, step, Options("all", False, "float32"), arrays)


@BOTH
def test_bfloat16_rounds_what_is_multiplied(kernel):
    step, options, arrays = options_and(CELLS["lem"], hidden=32, batch=3)
    platform = kernel[0]
    with jax.enable_x64(True):
        bars = bars_of(step, options, arrays)
        wanted, wanted_gradients = by_scan(step, options, arrays, bars)
        rounded = options._replace(precision="bfloat16")
        got, gradients = by_kernel(platform, step, rounded, arrays, bars, np.float32)
        compare("result", got, wanted, 2e-2)
        compare("params", gradients[0], wanted_gradients[0], 5e-2)
        with pytest.raises(AssertionError):
            compare("result", got, wanted, 1e-5)


def _less_the_mean(p, v):
    return v - v.mean(0)


def _by_the_batch(p, v):
    return v / v.shape[0]


def _masked(p, v):
    return v * p["mask"]


@pytest.mark.sampled(1)
@BOTH
@pytest.mark.parametrize("made", [_less_the_mean, _by_the_batch, _masked])
def test_what_a_step_makes_of_the_whole_batch(kernel, made):
    """A value of x or of parameters may have the batch in it; there it is the batch of one step."""

    def step(p, h, x):
        h = jnp.tanh(made(p, x @ p["W"]) + made(p, p["mask"]) * (h @ p["U"]))
        return h, h

    rng = np.random.default_rng(0)
    sizes = {"W": (7, 6), "U": (6, 6), "mask": (3, 6)}
    params = {name: rng.standard_normal(size) for name, size in sizes.items()}
    arrays = recurrence.Given(params, rng.standard_normal((3, 4, 7)), rng.standard_normal((3, 6)), None)
    check(kernel, step, Options("all", False, "float32"), arrays, inline=False)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["gru", "cornn"])
def test_replicas(name):
    step, options, arrays = options_and(CELLS[name], "last", hidden=20, batch=3)
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    call = recurrence.Call(step, options, "cpu")

    def loss(params, x):
        end, last = recurrence.recurrence(call, arrays._replace(params=params, x=x))
        return sum(jnp.sum(part**2) for part in jax.tree.leaves((end, last)))

    many = jax.tree.map(lambda p: jnp.stack([p * (1 + 0.1 * i) for i in range(3)]), arrays.params)
    got = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None))(many, arrays.x)
    one = [jax.value_and_grad(loss)(jax.tree.map(lambda p: p[i], many), arrays.x) for i in range(3)]  # noqa: B023
    compare("replicas", got, jax.tree.map(lambda *parts: jnp.stack(parts), *one), 1e-5)


@pytest.mark.parametrize(
    ("function", "operation"),
    [(lambda h: jnp.sort(h, -1), "sort"), (lambda h: h / jnp.linalg.norm(h, axis=1, keepdims=True), "reduce_sum")],
    ids=["sort", "norm"],
)
def test_what_has_no_kernel_is_told_with_the_line_of_the_user(function, operation):
    """Also where it is inside a function of JAX that is a program of its own."""

    def step(params, h, x):
        return h, function(jnp.tanh(x + h * params))

    told = rnn.explain_step(step, jnp.ones(5), jnp.ones((2, 3, 5)), jnp.ones((2, 5)))
    line = inspect.getsourcelines(function)[1]
    assert re.search(rf"{operation} of the state \({re.escape(__file__)}:{line}:", told), told


def test_a_number_that_a_derivative_of_its_own_is_given_is_told_by_its_dtype():
    @jax.custom_vjp
    def times(value, count):
        return value * count

    times.defvjp(lambda value, count: (value * count, count), lambda count, bar: (bar * count, None))
    step = lambda params, h, x: (times(h, 3), h)  # noqa: E731
    assert "times in int32 " in rnn.explain_step(step, None, jnp.ones((2, 3, 5)), jnp.ones((2, 5)))


def test_explain_step_refuses_what_the_scan_does():
    with pytest.raises(ValueError, match=r"^x has shape \(2, 5\)"):
        rnn.explain_step(lambda p, h, x: (h, h), None, jnp.ones((2, 5)), jnp.ones((2, 5)))


@jax.custom_jvp
def almost_sigmoid(x):
    """Of the same operations in the same order."""
    e = jnp.exp(-jnp.abs(x))
    small = e / (3.0 + e)
    return jnp.where(x > 0, 1.0 - small, small)


@almost_sigmoid.defjvp
def _(primals, tangents):
    return almost_sigmoid(*primals), tangents[0]


@pytest.mark.parametrize("backend", ["fused", "native"])
@pytest.mark.slow
def test_a_custom_function_may_be_given_a_number(backend, need_native):
    need_native(backend)

    @jax.custom_jvp
    def between(x, most):
        return jnp.tanh(x / most) * most

    between.defjvp(lambda given, slopes: (between(*given), slopes[0]))

    def of(p, backend):
        def step(p, h, x):
            return (h * between(p, 2.0) + between(x + h, 0.5),) * 2

        return rnn.scan(step, p, jnp.ones((2, 3, 5)), jnp.ones((2, 5)), backend=backend)[1].sum()

    found, wanted = (jax.value_and_grad(of)(jnp.full(5, 0.3), b) for b in (backend, "scan"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("backend", ["fused", "native"])
@pytest.mark.parametrize(
    ("function", "scale"),
    [(almost_sigmoid, 1.0), (lambda z: (jnp.expm1(z) + 2 * jnp.log1p(z)) / z, 1e-6)],
    ids=["custom", "expm1 and log1p"],
)
@pytest.mark.sampled(1)
def test_functions_that_look_like_others_are_themselves(function, scale, backend, need_native):
    need_native(backend)
    x = scale * (0.5 + jax.random.uniform(jax.random.key(0), (2, 3, 5)))

    def of(x, backend):
        return rnn.scan(lambda p, h, x: (function(h * 0 + x),) * 2, None, x, jnp.ones((2, 5)), backend=backend)[1]

    np.testing.assert_allclose(of(x, backend), of(x, "scan"), rtol=1e-6)
    if function is almost_sigmoid:  # the others' gradients are differences of large numbers
        found, wanted = (jax.grad(lambda x, b=b: of(x, b).sum())(x) for b in (backend, "scan"))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


# ---- Random cells ----

SHAPES = st.fixed_dictionaries(
    {
        "hidden": st.sampled_from([1, 5, 16, 33]),
        "batch": st.integers(1, 11),
        "time": st.integers(1, 7),
        "features": st.sampled_from([1, 3, 6]),
        "ragged": st.booleans(),
        "outputs": st.sampled_from(["all", "last"]),
        "reverse": st.booleans(),
    }
)


def check_random(kernel, cell, shape, inline):
    try:
        check(kernel, *options_and(cell, **shape), inline=inline)
    except NotDivisibleError:
        reject()


@pytest.mark.sampled(1)
@BOTH
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(cell=random_cells(), shape=SHAPES, inline=st.booleans())
def test_random_cells(kernel, cell, shape, inline):
    check_random(kernel, cell, shape, inline)


@pytest.mark.slow
@BOTH
@settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cell=random_cells(), shape=SHAPES, inline=st.booleans())
def test_many_random_cells(kernel, cell, shape, inline):
    check_random(kernel, cell, shape, inline)
