"""The minGRU: its layer against its step, and both against a loop in NumPy's float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn

BATCH, TIME, FEATURES, HIDDEN = 3, 7, 5, 6
LENGTHS = np.array([4, 7, 0])
PADDING = np.arange(TIME) >= LENGTHS[:, None]

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
whole_and_ragged = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])


def draw(seed=0, batch=BATCH, time=TIME, features=FEATURES, hidden=HIDDEN, dtype=np.float32):
    """(params, x, carry), every entry away from zero."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    params = {"kernel": normal(features, 2 * hidden) / 2, "bias": normal(2 * hidden)}
    return params, normal(batch, time, features), normal(batch, hidden)


def looped(params, x, carry, lengths=None, reverse=False):
    """The equations of the module's docstring, one sequence and one step at a time, in float64."""
    params, x, carry = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, carry))
    batch, time, _ = x.shape
    hidden = carry.shape[1]
    end, outputs = carry.copy(), np.zeros((batch, time, hidden))
    for b in range(batch):
        steps = range(time if lengths is None else lengths[b])
        for t in reversed(steps) if reverse else steps:
            from_x = x[b, t] @ params["kernel"] + params["bias"]
            z = 1 / (1 + np.exp(-from_x[:hidden]))
            end[b] = (1 - z) * from_x[hidden:] + z * end[b]
            outputs[b, t] = end[b]
    return end, outputs


def serial(params, x, carry, lengths=None, reverse=False):
    return rnn.scan(rnn.min_gru_step, params, x, carry, lengths=lengths, reverse=reverse, backend="scan")


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


# Values.


@pytest.mark.sampled(5)
@whole_and_ragged
@both_directions
@pytest.mark.parametrize("backend", ["scan", "fused", "native"])
def test_layer_and_step_are_the_equations(need_native, backend, reverse, lengths):
    need_native(backend)
    arguments = draw()
    want = looped(*arguments, lengths, reverse)
    assert_close(rnn.min_gru(*arguments, lengths=lengths, reverse=reverse, backend=backend), want)
    assert_close(serial(*arguments, lengths, reverse), want)


def test_float64():
    with jax.enable_x64(True):
        arguments = draw(time=100, dtype=np.float64)
        got = rnn.min_gru(*arguments)
        assert got[1].dtype == np.float64
        assert_close(got, looped(*arguments), 1e-13)


def test_errors_do_not_grow_with_the_sequence():
    """Over 1,000 steps, with gates that keep for 2 to 1,000 of them."""
    params = rnn.init_min_gru(jax.random.key(0), 1, 32, time_scales=rnn.log_uniform_time_scales(1000))
    x = np.random.default_rng(0).standard_normal((2, 1000, 1)).astype(np.float32)
    _, outputs = rnn.min_gru(params, x)
    _, want = looped(params, x, np.zeros((2, 32)))
    assert np.abs(outputs - want).max() < 1e-5 * np.abs(want).max()


def test_no_carry_is_a_carry_of_zeros():
    params, x, carry = draw()
    assert_close(rnn.min_gru(params, x), rnn.min_gru(params, x, np.zeros_like(carry)), 0)


@both_directions
def test_carry_continues_a_split_sequence(reverse):
    params, x, carry = draw()
    parts = (x[:, 3:], x[:, :3]) if reverse else (x[:, :3], x[:, 3:])
    middle, first = rnn.min_gru(params, parts[0], carry, reverse=reverse)
    end, second = rnn.min_gru(params, parts[1], middle, reverse=reverse)
    outputs = np.concatenate([second, first] if reverse else [first, second], axis=1)
    assert_close((end, outputs), rnn.min_gru(params, x, carry, reverse=reverse))


@whole_and_ragged
@both_directions
def test_last_output_only(reverse, lengths):
    """Each sequence's last; of an empty one its initial h, as the GRU's: zero unless a carry is given."""
    params, x, carry = draw()
    want, _ = rnn.min_gru(params, x, carry, lengths=lengths, reverse=reverse)
    end, last = rnn.min_gru(params, x, carry, lengths=lengths, reverse=reverse, return_sequences=False)
    assert_close((end, last), (want, want), 0)
    if lengths is not None:
        np.testing.assert_array_equal(last[2], carry[2])
        _, last = rnn.min_gru(params, x, lengths=lengths, reverse=reverse, return_sequences=False)
        assert not np.asarray(last[2]).any()


def test_a_unit_keeps_sigmoid_of_its_bias():
    """With bias b a unit keeps sigmoid(b) of h at each step, so that 1 + e^b is its time scale."""
    scales = np.array([2.0, 10.0, 100.0])
    params = {"kernel": np.zeros((1, 6), np.float32), "bias": np.float32([*np.log(scales - 1), 0, 0, 0])}
    _, outputs = rnn.min_gru(params, np.zeros((1, 100, 1), np.float32), np.ones((1, 3), np.float32))
    np.testing.assert_allclose(outputs[0, 0], 1 / (1 + np.exp(-params["bias"][:3])), rtol=1e-6)
    for unit, steps in enumerate([2, 10, 100]):
        np.testing.assert_allclose(outputs[0, steps - 1, unit], (1 - 1 / steps) ** steps, rtol=1e-5)


def test_bfloat16_rounds_what_is_multiplied_and_nothing_else():
    params, x, carry = draw(time=40)

    def rounded(array):
        return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)

    want = looped({"kernel": rounded(params["kernel"]), "bias": params["bias"]}, rounded(x), carry)
    assert_close(rnn.min_gru(params, x, carry, precision="bfloat16"), want)
    step = functools.partial(rnn.min_gru_step, precision="bfloat16")
    assert_close(rnn.scan(step, params, x, carry), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_of_half_precision_keep_their_dtype(dtype):
    arguments = jax.tree.map(lambda a: jnp.asarray(a, dtype), draw())
    got = rnn.min_gru(*arguments, lengths=LENGTHS)
    assert {part.dtype for part in got} == {jnp.dtype(dtype)}
    assert_close(jax.tree.map(lambda a: np.asarray(a, np.float32), got), looped(*arguments, LENGTHS), 0.05)


# Padding.


@both_directions
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_reaches_neither_values_nor_gradients(reverse, value):
    params, x, carry = draw()

    @jax.jit
    def values_and_gradients(params, x, carry):
        run = functools.partial(rnn.min_gru, lengths=LENGTHS, reverse=reverse)
        results, pull_back = jax.vjp(run, params, x, carry)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))

    got = values_and_gradients(params, np.where(PADDING[..., None], np.float32(value), x), carry)
    assert_close(got, values_and_gradients(params, x, carry), 0)
    (end, outputs), (_, dx, d_carry) = jax.tree.map(np.asarray, got)
    assert not outputs[PADDING].any()
    assert outputs[~PADDING].all()
    assert not dx[PADDING].any()
    assert dx[~PADDING].all()
    # The empty sequence: its carry goes through, and so does the gradient.
    np.testing.assert_array_equal(end[2], carry[2])
    np.testing.assert_array_equal(d_carry[2], np.ones(HIDDEN))


@both_directions
def test_unknown_lengths_beyond_the_sequence_are_clamped(reverse):
    arguments = draw()
    run = jax.jit(lambda lengths: rnn.min_gru(*arguments, lengths=lengths, reverse=reverse))
    assert_close(run(np.array([-3, 1000, 7])), run(np.array([0, 7, 7])), 0)


# Gradients and transforms.


@pytest.mark.parametrize(
    ("lengths", "reverse", "return_sequences"),
    [(None, False, True), (None, True, False), (LENGTHS, False, False), (LENGTHS, True, True)],
    ids=["whole forward all", "whole reverse last", "ragged forward last", "ragged reverse all"],
)
def test_gradients_are_those_of_the_serial_form(lengths, reverse, return_sequences):
    with jax.enable_x64(True):
        arguments = draw(dtype=np.float64)
        weights = np.random.default_rng(1).standard_normal((BATCH, TIME, HIDDEN))

        def total(run, *arguments):
            end, outputs = run(*arguments)
            return jnp.sum(outputs * (weights if return_sequences else weights[:, 0])) + jnp.sum(jnp.sin(end))

        options = {"lengths": lengths, "reverse": reverse}
        layer = functools.partial(rnn.min_gru, return_sequences=return_sequences, **options)

        def step_by_step(params, x, carry):
            end, outputs = rnn.scan(rnn.min_gru_step, params, x, carry, backend="scan", **options)
            return end, outputs if return_sequences else end

        gradients = [
            jax.jit(jax.grad(functools.partial(total, run), argnums=(0, 1, 2)))(*arguments)
            for run in (layer, step_by_step)
        ]
        assert_close(*gradients, 1e-12)


def test_gradients_by_complex_steps():
    """An independent derivative: Im f(w + i e) / e of the NumPy loop."""
    with jax.enable_x64(True):
        params, x, carry = draw(time=4, dtype=np.float64)
        got = jax.grad(lambda params: rnn.min_gru(params, x, carry)[1].sum())(params)
    step = 1e-30

    def total(kernel, bias):
        h, result = carry, 0.0
        for t in range(4):
            from_x = x[:, t] @ kernel + bias
            z = 1 / (1 + np.exp(-from_x[:, :HIDDEN]))
            h = (1 - z) * from_x[:, HIDDEN:] + z * h
            result = result + h.sum()
        return result

    for column in (0, HIDDEN):  # a weight of each gate
        kernel, bias = params["kernel"].astype(complex), params["bias"].astype(complex)
        kernel[2, column] += 1j * step
        np.testing.assert_allclose(got["kernel"][2, column], total(kernel, bias).imag / step, rtol=1e-12)
        bias[column] += 1j * step
        want = total(params["kernel"], bias).imag / step
        np.testing.assert_allclose(got["bias"][column], want, rtol=1e-12)


@whole_and_ragged
def test_jit_and_vmap_over_params_and_data(lengths):
    several = [draw(seed) for seed in range(3)]

    def run(*arguments):
        return rnn.min_gru(*arguments, lengths=lengths)

    stacked = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *a: np.stack(a), *several))
    for i, arguments in enumerate(several):
        assert_close(jax.tree.map(lambda a, i=i: a[i], stacked), run(*arguments))


def test_forward_mode_and_second_derivatives():
    params, x, carry = draw(batch=1, time=3, hidden=2)
    run = functools.partial(rnn.min_gru, backend="scan")
    _, tangent = jax.jvp(lambda x: run(params, x, carry)[1], (x,), (np.ones_like(x),))
    assert np.isfinite(tangent).all()

    def total(carry):
        return jnp.sum(jnp.square(run(params, x, carry)[0]))

    # h is linear in the carry, with the product of all gates kept as its factor.
    _, kept = jax.jvp(lambda carry: run(params, x, carry)[0], (carry,), (np.ones_like(carry),))
    hessian = jax.jit(jax.hessian(total))(jnp.asarray(carry)).reshape(2, 2)
    assert_close(hessian, np.diag(2 * np.square(kept).ravel()))


# Initialiser.


def test_initial_parameters():
    params = rnn.init_min_gru(jax.random.key(0), 28, 64)
    assert {name: value.shape for name, value in params.items()} == {"kernel": (28, 128), "bias": (128,)}
    limit = math.sqrt(6 / (28 + 128))
    kernel = np.asarray(params["kernel"])
    assert 0.99 * limit < np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / math.sqrt(3), rtol=0.03)
    assert not np.asarray(params["bias"]).any()


@pytest.mark.parametrize("features", [1, 5, 9])
def test_orthogonal_kernels_block_by_block(features):
    params = rnn.init_min_gru(jax.random.key(0), features, 6, kernel_init="orthogonal", dtype=jnp.bfloat16)
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.bfloat16)}
    params = rnn.init_min_gru(jax.random.key(0), features, 6, kernel_init="orthogonal")
    blocks = np.split(np.asarray(params["kernel"]), 2, axis=1)
    for block in blocks:
        gram = block @ block.T if features < 6 else block.T @ block
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    assert not np.allclose(*blocks)


@pytest.mark.parametrize("kernel_init", sorted(rnn.KERNELS))
def test_every_kernel_initialiser_of_the_other_cells_will_do(kernel_init):
    params = rnn.init_min_gru(jax.random.key(0), 5, 6, kernel_init=kernel_init)
    assert np.asarray(params["kernel"]).std() > 0.1


def test_time_scales_go_into_the_gate_that_keeps_alone():
    plain = rnn.init_min_gru(jax.random.key(3), 5, 256)
    params = rnn.init_min_gru(jax.random.key(3), 5, 256, time_scales=rnn.log_uniform_time_scales(784))
    keep, candidate = np.split(np.asarray(params["bias"]), 2)
    assert keep.min() >= 0
    assert 0.9 * math.log(784) < keep.max() <= np.float32(math.log(784))
    assert not candidate.any()
    np.testing.assert_array_equal(params["kernel"], plain["kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 0}, "^features is 0"),
        ({"hidden_size": -1}, "^hidden_size is -1"),
        ({"kernel_init": "glorot"}, "^kernel_init is 'glorot'; expected one of .*'glorot_uniform'"),
    ],
)
def test_bad_requests_to_the_initialiser(changes, message):
    with pytest.raises(ValueError, match=message):
        rnn.init_min_gru(jax.random.key(0), **({"features": 5, "hidden_size": 6} | changes))


# Stacks.


@pytest.fixture(scope="module")
def two_layers():
    params = rnn.init_stack(jax.random.key(0), rnn.MIN_GRU, FEATURES, HIDDEN, num_layers=2, bidirectional=True)
    assert params["layer_1"]["backward"]["kernel"].shape == (2 * HIDDEN, 2 * HIDDEN)
    return params, draw()[1]


def test_two_layers_in_both_directions_by_hand(two_layers):
    params, x = two_layers
    zero = np.zeros((BATCH, HIDDEN))
    y = x
    for layer in ("layer_0", "layer_1"):
        runs = [looped(params[layer][d], y, zero, LENGTHS, d == "backward") for d in ("forward", "backward")]
        y = np.concatenate([outputs for _, outputs in runs], axis=-1)
        last = np.concatenate([end for end, _ in runs], axis=-1)
    assert_close(rnn.stack(rnn.MIN_GRU, params, x, lengths=LENGTHS, return_sequences=True), y)
    assert_close(rnn.stack(rnn.MIN_GRU, params, x, lengths=LENGTHS), last)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("engine", "return_sequences"),
    [(rnn.Engine(remat=3), True), (rnn.Engine(remat=3), False), (rnn.Engine(unroll=3), True)],
    ids=["remat all", "remat last", "unroll"],
)
def test_remat_and_unrolled_steps_change_no_value_and_no_gradient(two_layers, engine, return_sequences):
    params, x = two_layers
    params = {"layer_0": params["layer_0"]}

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_gradient(params, x, engine):
        def total(params, x):
            y = rnn.stack(rnn.MIN_GRU, params, x, lengths=LENGTHS, engine=engine, return_sequences=return_sequences)
            return jnp.sum(jnp.sin(y))

        return jax.value_and_grad(total, argnums=(0, 1))(params, x)

    assert_close(value_and_gradient(params, x, engine), value_and_gradient(params, x, rnn.Engine()))


def test_a_mask_on_the_state_is_applied_between_steps():
    params, x, _ = draw()
    mask = np.float32(np.random.default_rng(0).choice([0.0, 2.0], (BATCH, HIDDEN)))
    masks = {"layer_0": {"forward": rnn.Masks(state=jnp.asarray(mask))}}
    got = rnn.stack(rnn.MIN_GRU, {"layer_0": {"forward": params}}, x, masks=masks, return_sequences=True)
    h = np.zeros((BATCH, HIDDEN))
    for t in range(TIME):
        h, _ = looped(params, x[:, t : t + 1], h * mask)
        assert_close(got[:, t], h, 2e-5)


@pytest.mark.parametrize(("cell", "name"), [(rnn.MIN_GRU, "tpu"), (rnn.GRU_RESET_BEFORE, "cuda"), (rnn.GRU, "gpu")])
def test_a_stack_refuses_a_backend_that_its_cell_has_not(cell, name):
    params = rnn.init_stack(jax.random.key(0), cell, FEATURES, HIDDEN, num_layers=1, bidirectional=False)
    with pytest.raises(ValueError, match=rf"^backend is '{name}'; .*'auto'"):
        rnn.stack(cell, params, draw()[1], engine=rnn.Engine(backend=name))


# Bad input.


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params, x, carry: (params, x[0], carry), r"^x has shape \(7, 5\)"),
        (lambda params, x, carry: (params, x[..., 1:], carry), r"^params\['kernel'\] has shape .*x \(3, 7, 4\)"),
        (lambda params, x, carry: (params, x, carry[1:]), r"^carry has shape \(2, 6\)"),
        (lambda params, x, carry: (params, x, (carry, carry)), r"^carry is .*expected one array h"),
        (lambda params, x, carry: (params, x, carry.astype(np.int32)), r"^carry has dtype int32"),
        (lambda params, x, carry: (params | {"bias": params["bias"][1:]}, x, carry), r"^params\['bias'\] has shape"),
        (lambda params, x, carry: (params | {"bias": np.float32(1)}, x, carry), r"^params\['bias'\] has shape \(\)"),
        (lambda params, x, carry: ({k: v[..., 1:] for k, v in params.items()}, x, carry), r"^params\['kernel'\]"),
        (lambda params, x, carry: (params | {"bias": params["bias"] + 1j}, x, carry), r"^params\['bias'\].*complex"),
        (lambda params, x, carry: ({"kernel": params["kernel"]}, x, carry), r"^params has \['kernel'\]; expected"),
        (lambda params, x, carry: (params | {"recurrent_kernel": carry}, x, carry), r"^params has .*expected"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message, jitted):
    run = jax.jit(rnn.min_gru) if jitted else rnn.min_gru
    with pytest.raises(ValueError, match=message):
        run(*change(*draw()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "^backend is 'cuda'; expected one of 'auto'"),
        ({"precision": "half"}, "^precision is 'half'; expected one of"),
        ({"lengths": np.array([8, 1, 1])}, "^lengths has values from 1 to 8"),
        ({"lengths": np.array([1, 1])}, "^lengths has shape"),
        ({"lengths": np.array([1.0, 1.0, 1.0])}, "^lengths has dtype"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rnn.min_gru(*draw(), **options)


def test_bfloat16_products_are_of_float32_arrays():
    arguments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float16), draw())
    with pytest.raises(ValueError, match=r"^precision is 'bfloat16'"):
        rnn.min_gru(*arguments, precision="bfloat16")


def test_nan_in_x_is_named_where_it_is_known_and_stays_in_its_sequence_where_not():
    params, x, carry = draw()
    hurt = x.copy()
    hurt[1, 3, 2] = np.nan
    with pytest.raises(ValueError, match=r"^x \(3, 7, 5\) holds NaN"):
        rnn.min_gru(params, hurt, carry)
    end, outputs = jax.jit(rnn.min_gru)(params, hurt, carry)
    want_end, want = rnn.min_gru(params, x, carry)
    assert np.isnan(outputs[1, 3:]).all()
    assert np.isnan(end[1]).all()
    assert_close(outputs[1, :3], want[1, :3])
    assert_close((end[::2], outputs[::2]), (want_end[::2], want[::2]))
