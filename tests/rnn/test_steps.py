"""Steps of one's own that are easily taken for others: what is stopped, reshaped, bound, or has side effects."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn


def both_ways(backend, step, params, h, x):
    """What a backend and 'scan' make of a step: outputs, and gradients of all that is given."""

    def loss(given, backend):
        outputs = rnn.scan(step, given[0], given[2], given[1], backend=backend)[1]
        return jnp.sin(outputs).sum(), outputs

    return [jax.grad(loss, has_aux=True)((params, h, x), backend) for backend in (backend, "scan")]


@pytest.fixture(params=["fused", "native"])
def backend(request, need_native):
    need_native(request.param)
    return request.param


def assert_alike(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def test_no_gradient_goes_through_a_product_of_what_is_stopped(backend):
    def step(p, h, x):
        h = jnp.tanh(x @ p["w"] + jax.lax.stop_gradient(h) @ p["u"] + h * p["k"])
        return h, h

    params = {"w": drawn(5, 4), "u": drawn(4, 4), "k": drawn(4)}
    assert_alike(*both_ways(backend, step, params, drawn(2, 4), drawn(2, 5, 5)))


@pytest.mark.parametrize("outputs", [lambda h: h > 0, lambda h: h[:, :0], lambda h: h.astype(jnp.bfloat16)])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_an_output_that_no_kernel_has_is_that_of_the_loop(outputs, return_sequences, recwarn):
    def step(w, h, x):
        h = 0.5 * h + x @ w
        return h, outputs(h)

    given, options = (drawn(3, 4), drawn(2, 5, 3), drawn(2, 4)), {"return_sequences": return_sequences}
    found, wanted = (rnn.scan(step, *given, **options, backend=b)[1] for b in ("auto", "scan"))
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))
    assert not recwarn.list


def test_a_carry_of_another_dtype_is_refused():
    for dtype in (jnp.bool_, jnp.bfloat16):
        with pytest.raises(ValueError, match=rf"carry .*float32.* into {jnp.dtype(dtype).name}"):
            rnn.scan(lambda w, h, x, d=dtype: (h.astype(d), h), None, drawn(2, 5, 4), drawn(2, 4))


def test_a_tuple_that_becomes_a_list_is_told():
    with pytest.raises(ValueError, match=r"step turns .*\(\*,\).* into .*\[\*\].*; expected the same tree"):
        rnn.scan(lambda w, c, x: ([c[0] + x], x), None, drawn(2, 5, 4), (drawn(2, 4),))


def test_all_outputs_have_a_batch():
    step = lambda w, h, x: (h, x.mean())  # noqa: E731
    assert rnn.scan(step, None, drawn(2, 5, 4), drawn(2, 4), return_sequences=False)[1].shape == ()
    with pytest.raises(ValueError, match=r"output has shape \(\); .*expected \[batch, \.\.\.\]"):
        rnn.scan(step, None, drawn(2, 5, 4), drawn(2, 4))


@pytest.mark.slow
def test_functions_with_an_infinity_in_them_have_a_kernel(backend):
    def step(p, h, x):
        m = 5 * (h @ p["u"])
        h = jnp.tanh(x @ p["w"] + jax.nn.softplus(m) + jax.nn.log_sigmoid(-m) + jax.nn.mish(0.5 * m))
        return h, h

    given = {"w": drawn(5, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 5)
    assert_alike(*both_ways(backend, step, *given))


@jax.custom_jvp
def whole(x):
    return x.astype(jnp.int32).astype(x.dtype)


whole.defjvps(lambda tangent, ans, x: tangent)


def test_what_a_derivative_of_its_own_rounds_is_rounded():
    def step(p, h, x):
        h = 0.3 * whole(4 * h @ p["u"] + x)
        return h, h

    given = {"u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 4)
    assert_alike(*both_ways("auto", step, *given))
    with pytest.raises(ValueError, match="convert_element_type of int32 in a step"):
        both_ways("fused", step, *given)


def with_derivative(pull):
    """What it is given, with a derivative of its own: of what is given, the result's and the cotangent."""

    @jax.custom_vjp
    def same(value):
        return value

    same.defvjp(lambda value: (value, value), lambda value, bar: (pull(value, bar),))
    return same


LINEAR = {
    "straight through": lambda value, bar: bar,
    "masked": lambda value, bar: jnp.where(jnp.abs(value) < 1, bar, 0.0),
    "scaled": lambda value, bar: -2 * bar / (1 + jnp.abs(value)) + (bar.T @ jnp.abs(value)).sum(),
}
OTHERS = {
    "clipped": lambda value, bar: jnp.clip(bar, -0.1, 0.1),
    "normed": lambda value, bar: bar / jnp.linalg.norm(bar),
    "decayed": lambda value, bar: bar + 0.1 * value,
    "signs": lambda value, bar: jnp.sign(bar),
    "rounded": lambda value, bar: (10 * bar).astype(jnp.int8).astype(bar.dtype),
}


@pytest.mark.parametrize("pull", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_not_linear_in_a_parameters_gradient_is_done_at_each_step(pull, inside):
    own = with_derivative(pull)

    def step(p, h, x):
        u = jax.lax.cond(p["w"].sum() < 1e9, own, jnp.negative, p["u"]) if inside else own(p["u"])
        h = jnp.tanh(x @ p["w"] + h @ u)
        return h, h

    given = {"w": drawn(5, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 5)
    assert_alike(*both_ways("auto", step, *given))
    assert "own derivative is not known to be linear" in rnn.explain_step(step, given[0], given[2], given[1])


@pytest.mark.parametrize("pull", LINEAR.values(), ids=LINEAR)
@pytest.mark.sampled(2)
def test_what_is_linear_in_a_parameters_gradient_is_done_once(pull, backend):
    own = with_derivative(pull)

    def step(p, h, x):
        h = jnp.tanh(x @ p["w"] + h @ own(p["u"]))
        return h, h

    given = {"w": drawn(5, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 5)
    assert_alike(*both_ways(backend, step, *given))


def test_a_number_among_what_is_given_is_no_reason(backend):
    @jax.custom_vjp
    def quantised(value, bits):
        return jnp.round(value * 2.0**bits) / 2.0**bits

    quantised.defvjp(lambda value, bits: (quantised(value, bits), None), lambda _, bar: (bar, None))

    def step(p, h, x):
        h = jnp.tanh(x @ p["w"] + h @ quantised(p["u"], 4))
        return h, h

    given = {"w": drawn(5, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 5)
    assert_alike(*both_ways(backend, step, *given))


def test_what_the_loop_and_the_output_read_has_one_gradient():
    own = with_derivative(lambda value, bar: jnp.clip(bar, -0.05, 0.05))

    def step(p, h, x):
        z = own(x @ p["w"])
        h = 0.9 * h + z
        return h, (h @ p["u"]) * z

    def loss(params, backend):
        return rnn.scan(step, params, drawn(2, 5, 5), drawn(2, 4), backend=backend, return_sequences=False)[1].sum()

    params = {"w": drawn(5, 4), "u": drawn(4, 4)}
    assert_alike(*(jax.grad(loss)(params, backend) for backend in ("auto", "scan")))


@pytest.mark.slow
def test_choices_that_are_known_have_a_kernel(backend):
    def step(p, h, x, training=False):
        new = jnp.tanh(x @ p["w"] + h @ p["u"])
        h = jnp.where(training, 0.9 * new + 0.1 * h, new)
        left, right, top = h > 0, h < -0.1, h > 0.2
        parts = [(True, False), (True, right), (False, right), (right, True), (right, False), (right, top)]
        chosen = [jnp.where(left, *part) for part in parts]
        return jnp.where(True, h, 0.0), sum(jnp.where(one, 0.1 * 2**i, h) for i, one in enumerate(chosen))

    given = {"w": drawn(5, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 5)
    assert_alike(*both_ways(backend, step, *given))


@pytest.mark.slow
def test_columns_of_constants_beside_the_state_have_a_kernel(backend):
    @jax.custom_jvp
    def spike(v):
        return (v > 0).astype(v.dtype)

    # The slope at 0 of a sigmoid: a number that a derivative makes of numbers.
    spike.defjvp(lambda given, dots: (spike(*given), dots[0] * jnp.exp(-0.5) / (1 + jnp.exp(-0.5)) ** 2))

    def step(p, h, x):
        beside = lambda value: jnp.concatenate([h, jnp.full_like(h, value)], axis=1)  # noqa: E731
        chosen = jnp.where(beside(0.0) > 0, beside(-0.0) * 2, 0.3)
        safe = jnp.where(beside(0.0) > 0, jnp.log(jnp.abs(beside(0.0))), 0.0)
        known = jnp.tanh(jnp.where(False, safe, 0.3))
        parts = [jnp.tanh(beside(0.0)), jax.nn.relu(-beside(0.0)), jnp.exp(beside(0.5)), chosen, safe, known]
        kept = jax.nn.sigmoid(beside(1.0))[:, 4:] * h
        return jnp.tanh(x + kept + sum(part @ w for part, w in zip(parts, p, strict=True))), spike(h)

    params = [drawn(8, 4) * 0.1 * i for i in range(1, 7)]
    assert_alike(*both_ways(backend, step, params, drawn(2, 4), drawn(2, 5, 4)))


@pytest.mark.slow
def test_a_truth_value_may_be_multiplied(backend):
    def step(p, h, x):
        fires = jnp.concatenate([h > 0, x > h], axis=1)
        h = jnp.tanh(x + fires @ p["w"] + (h < 0) @ p["u"])
        return h, h

    assert_alike(*both_ways(backend, step, {"w": drawn(8, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 4)))


@pytest.mark.slow
def test_truth_values_are_compared(backend):
    def step(p, h, x):
        h = jnp.tanh(h @ p["u"] + x)
        a, b, large = h > 0, h > 0.2, h > 1e9
        parts = a == True, a > large, large < b, a >= b, jax.lax.max(large, b), jax.lax.min(a, b)  # noqa: E712
        return jnp.tanh(sum(jnp.where(part, 0.1 * 2**i, h) for i, part in enumerate(parts))), h

    assert_alike(*both_ways(backend, step, {"u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, 4)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("features", [1, 4])
def test_a_product_of_few_features_may_be_normalised(backend, features):
    def step(p, h, x):
        z = x @ p["w"]
        z = (z - z.mean(1, keepdims=True)) / jnp.sqrt(z.var(1, keepdims=True) + 1e-2)
        h = jnp.tanh(h @ p["u"] + z)
        return h, h

    given = {"w": drawn(features, 4), "u": drawn(4, 4)}, drawn(2, 4), drawn(2, 5, features)
    assert_alike(*both_ways(backend, step, *given))


@pytest.mark.slow
def test_a_step_without_products_may_normalise_what_x_alone_makes(backend):
    def step(p, h, x):
        z = p * x
        h = 0.9 * h + z - z.mean(1, keepdims=True)
        return h, h

    assert_alike(*both_ways(backend, step, drawn(4), drawn(2, 4), drawn(2, 5, 4)))


def of_the_mean(w, h, x):
    h = jnp.tanh(x - jax.lax.pmean(x, "i") + w * h)
    return h, h


def of_the_place(w, h, x):
    h = jnp.tanh(x + jax.lax.axis_index("i") + w * h)
    return h, h


def called_back(w, h, x):
    h = jnp.tanh(jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + w * h)
    return h, h


@pytest.mark.parametrize("step", [of_the_mean, of_the_place, called_back])
def test_what_x_alone_goes_into_may_have_no_vmap_over_the_steps(step):
    def mapped(backend):
        run = functools.partial(rnn.scan, step, backend=backend)
        if step is called_back:
            return run(drawn(3), drawn(2, 5, 3), drawn(2, 3))[1]
        return jax.vmap(lambda x: run(drawn(3), x, drawn(2, 3))[1], axis_name="i")(drawn(2, 2, 5, 3))

    np.testing.assert_allclose(mapped("auto"), mapped("scan"), rtol=1e-6)


def scaled_state(w, h, x):
    h = jnp.tanh(h @ w + x * jax.lax.axis_size("i"))
    return h, h


def scaled_output(w, h, x):
    h = 0.5 * h + x
    return h, h @ w + jax.lax.axis_size("i")


@pytest.mark.parametrize("step", [scaled_state, scaled_output])
def test_an_axis_of_another_size_makes_another_step(step):
    def mapped(count, backend):
        def run(x):
            return rnn.scan(step, drawn(3, 3), x, drawn(2, 3), backend=backend, return_sequences=False)[1]

        return jax.vmap(run, axis_name="i")(drawn(count, 2, 5, 3))

    for count in (2, 3):
        np.testing.assert_allclose(mapped(count, "fused"), mapped(count, "scan"), rtol=1e-5)


@pytest.mark.slow
def test_a_step_goes_by_the_axes_where_it_was_called(backend):
    """Its rules, of batching and derivatives, are traced later: where the axis is another, or none."""
    x, w, factors = drawn(2, 4, 3), drawn(2, 3, 3), jnp.arange(1.0, 4.0)

    def total(backend, w):
        return rnn.scan(scaled_state, w, x, jnp.zeros((2, 3)), backend=backend)[1].sum()

    def gradient(backend, w):
        return jax.grad(lambda w: jax.vmap(functools.partial(total, backend), axis_name="i")(w).sum())(w)

    def mapped_gradient(backend):
        return jax.vmap(lambda factor: gradient(backend, w * factor), axis_name="i")(factors)

    def mapped_twice(backend):
        inner = jax.vmap(functools.partial(total, backend), axis_name="i")
        return jax.vmap(lambda factor: inner(w * factor), axis_name="i")(factors)

    for of in (mapped_gradient, mapped_twice):
        np.testing.assert_allclose(of(backend), of("scan"), rtol=1e-4, atol=1e-5)


def test_products_are_in_full_float32_in_a_named_axis_too():
    def step(w, h, x):
        h = jnp.tanh(x @ w + h @ w)
        return h, h

    def text(**axis):
        mapped = jax.vmap(lambda w: rnn.scan(step, w, drawn(2, 5, 4), drawn(2, 4), backend="fused")[1], **axis)
        return jax.jit(mapped).lower(drawn(2, 4, 4)).as_text()

    assert text(axis_name="i").count("HIGHEST") == text().count("HIGHEST") > 0


@pytest.mark.slow
def test_a_step_of_double_precision_is_another():
    def step(p, h, x):
        h = jnp.tanh(x @ p + h)
        return h, h * jnp.arange(4.0)

    given = drawn(5, 4), drawn(2, 3, 5), drawn(2, 4)
    assert rnn.scan(step, *given)[1].dtype == jnp.float32
    with jax.enable_x64(True):
        assert rnn.scan(step, *given)[1].dtype == rnn.scan(step, *given, backend="scan")[1].dtype == jnp.float64


@pytest.mark.parametrize("return_sequences", [True, False])
def test_a_carry_of_a_weak_type_takes_the_step_s_also_where_sequences_end(return_sequences):
    def step(p, h, x):
        return p * h + x, h

    given, options = (jnp.bfloat16(0.5), jnp.ones((2, 5, 3), jnp.bfloat16)), {"return_sequences": return_sequences}
    nothing = {}, {"lengths": jnp.array([5, 5])}, {"resets": jnp.zeros((2, 5), bool)}
    ends = [rnn.scan(step, *given, jnp.full((2, 3), 0.0), **changes, **options) for changes in nothing]
    for end in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, end, ends[0])
        assert end[0].dtype == jnp.bfloat16


@dataclasses.dataclass
class Leaky:
    rate: float

    def __call__(self, p, h, x):
        h = self.rate * h + jnp.tanh(x * p)
        return h, h


def test_a_step_that_has_no_hash():
    resets = jnp.array([[True, False, True, False, False]] * 2)
    given = jnp.ones(3), drawn(2, 5, 3), jnp.zeros((2, 3))
    found = rnn.scan(Leaky(0.5), *given, resets=resets)[1]
    np.testing.assert_allclose(found[:, 2:], rnn.scan(Leaky(0.5), given[0], given[1][:, 2:], given[2])[1], rtol=1e-6)


@pytest.mark.slow
def test_constants_in_a_tuple_are_told_apart_by_their_sign():
    def step(p, h, x, c):
        h = h + jnp.arctan2(c[0], -1.0)
        return h, h

    given = None, jnp.zeros((1, 2, 3)), jnp.zeros((1, 3))
    ends = [rnn.scan(functools.partial(step, c=(zero,)), *given)[0] for zero in (0.0, -0.0)]
    np.testing.assert_allclose(ends[0], -ends[1])


@pytest.mark.slow
def test_a_column_of_parameters_that_becomes_a_row_is_of_the_units(backend):
    def step(p, h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"].reshape(-1))
        return h, h

    params = {"w": drawn(5, 4), "u": drawn(4, 4), "b": drawn(4, 1)}
    assert_alike(*both_ways(backend, step, params, drawn(4, 4), drawn(4, 5, 5)))  # as many sequences as units


def test_a_reshape_that_transposes_first_is_no_copy(backend):
    def step(p, h, x):
        h = jnp.tanh((x @ p["w"] + h @ p["u"]) * jax.lax.reshape(p["u"], (4, 4), dimensions=(1, 0)))
        return h, h

    def of_state(p, h, x):
        h = jnp.tanh(x @ p["w"] + jax.lax.reshape(h, h.shape, dimensions=(1, 0)) @ p["u"])
        return h, h

    given = {"w": drawn(5, 4), "u": drawn(4, 4)}, drawn(4, 4), drawn(4, 5, 5)
    assert_alike(*both_ways(backend, step, *given))
    assert "transpose" in rnn.explain_step(of_state, given[0], given[2], given[1])


@pytest.mark.parametrize("wrap", [lambda step: step, functools.partial], ids=["method", "partial"])
def test_a_method_is_asked_anew_what_its_object_has_become(wrap):
    class Own:
        def step(self, p, h, x):
            h = jnp.tanh(x @ p + h @ self.w)
            return h, h

    own, p, h, x = Own(), drawn(5, 4), drawn(2, 4), drawn(2, 5, 5)
    for own.w in (jnp.eye(4), -jnp.eye(4)):
        found = [rnn.scan(wrap(own.step), p, x, h, backend=backend)[1] for backend in ("fused", "scan")]
        wanted = jax.lax.scan(lambda h, x: own.step(p, h, x), h, jnp.swapaxes(x, 0, 1))[1]
        cell = rnn.cell(own.step, lambda key, features, hidden_size: jnp.zeros((features, hidden_size)))
        stack = functools.partial(rnn.stack, cell, {"layer_0": {"forward": p}}, x, return_sequences=True)
        dropped = {"layer_0": {"forward": rnn.Masks(state=jnp.ones((2, 4)))}}
        found += [stack(), stack(engine=rnn.Engine(remat=2)), stack(masks=dropped), rnn.remat(cell.layer, 2)(p, x)[1]]
        of_stack = jax.lax.scan(lambda h, x: own.step(p, h, x), 0 * h, jnp.swapaxes(x, 0, 1))[1]
        for outputs, want in zip(found, (wanted, wanted, *[of_stack] * 4), strict=True):
            np.testing.assert_allclose(outputs, jnp.swapaxes(want, 0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [lambda own: own, dataclasses.dataclass], ids=["plain", "dataclass"])
@pytest.mark.slow
def test_an_object_that_is_a_step_may_change(kind):
    class Own:
        scale: float = 1.0

        def __call__(self, p, h, x):
            h = jnp.tanh(self.scale * h + x @ p)
            return h, h

    own, p, h, x = kind(Own)(), drawn(5, 4), drawn(2, 4), drawn(2, 5, 5)
    for own.scale in (1.0, 2.0):
        scale = own.scale
        wanted = rnn.scan(lambda p, h, x: 2 * (jnp.tanh(scale * h + x @ p),), p, x, h)[1]  # noqa: B023
        for backend in ("fused", "scan"):
            np.testing.assert_allclose(rnn.scan(own, p, x, h, backend=backend)[1], wanted, rtol=1e-5, atol=1e-6)


def test_an_object_bound_to_a_step_may_change():
    class Own:
        w = jnp.eye(4)

    def step(own, p, h, x):
        h = jnp.tanh(x @ p + h @ own.w)
        return h, h

    own, p, h, x = Own(), drawn(5, 4), drawn(2, 4), drawn(2, 5, 5)
    bound = functools.partial(step, own)
    first = rnn.scan(bound, p, x, h)[1]
    own.w = -own.w
    for one in (bound, functools.partial(step, own)):
        assert np.abs(rnn.scan(one, p, x, h)[1] - first).max() > 0.1


def test_a_step_with_side_effects_or_a_narrow_state_stays_with_the_scan():
    def tells(p, h, x):
        jax.debug.print("{}", h.sum())
        h = jnp.tanh(x @ p + h)
        return h, h

    def counts(p, carry, x):
        h, count = carry
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + count)
        return (h, count + 1), h

    given = drawn(5, 16), drawn(2, 5, 5), drawn(2, 16)
    assert "side effects" in rnn.explain_step(tells, *given)
    params = {"w": drawn(5, 16), "u": drawn(16, 16)}
    assert "the least that the carry has" in rnn.explain_step(counts, params, given[1], (given[2], drawn(2, 1)))


@pytest.mark.slow
def test_a_whole_number_of_the_state_is_told_and_one_of_x_has_a_kernel(need_native):
    need_native("native")

    def of_state(p, h, x):
        return jnp.tanh(h @ p + jnp.where(h > 0, 1, 0)), h

    def of_x(p, h, x):
        h = 0.5 * h + p[x.astype(jnp.int32) % 4].sum(1)
        return h, h

    p, x, h = drawn(4, 4), drawn(2, 5, 4), drawn(2, 4)
    assert "in int32 " in rnn.explain_step(of_state, p, x, h)
    assert rnn.explain_step(of_x, p, x, h).startswith("native")


def test_units_are_told_by_the_parameters_that_have_as_many():
    def init(key, features, hidden_size):
        return {"d": jnp.ones(hidden_size // 2 + 1), "w": jnp.ones((features, hidden_size))}

    def step(p, h, x):
        h = 0.9 * h + x @ p["w"]
        return h, h

    for units in (4, 5):
        cell, params, x = rnn.cell(step, init), init(None, 3, units), drawn(2, 5, 3)
        assert cell.layer(params, x)[0].shape == (2, units)
        dropped = {"layer_0": {"forward": rnn.Masks(state=jnp.ones((2, units)))}}
        assert rnn.stack(cell, {"layer_0": {"forward": params}}, x, masks=dropped)[1].shape[-1] == units


def test_a_carry_of_a_class_that_jax_does_not_know_is_named():
    @dataclasses.dataclass
    class State:
        h: jax.Array

    with pytest.raises(ValueError, match=r"^carry is a State, which is no array; register its class as a pytree"):
        rnn.scan(lambda p, carry, x: (carry, x), None, drawn(2, 5, 4), State(drawn(2, 4)))


def test_a_mask_of_no_sequences():
    params = rnn.init_gru(jax.random.key(0), 3, 4)
    h, outputs = rnn.gru(params, jnp.zeros((0, 5, 3)), mask=jnp.zeros((0, 5), bool))
    assert (h.shape, outputs.shape) == ((0, 4), (0, 5, 4))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "GRU_RESET_BEFORE"])
def test_cells_travel_between_processes(cell):
    assert pickle.loads(pickle.dumps(getattr(rnn, cell))).init is not None
