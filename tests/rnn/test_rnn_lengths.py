import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LENGTHS = np.array([4, 7, 0])
PADDING = np.arange(7) >= LENGTHS[:, None]

# Each backend with each cell and in each direction, yet not all together.
both_directions = pytest.mark.parametrize(
    ("layer", "reverse"),
    [
        ("lstm-scan", False),
        ("gru-scan", True),
        ("lstm-fused", True),
        ("gru-fused", False),
        ("lstm-native", False),
        ("gru-native", True),
    ],
    indirect=["layer"],
)

# Lengths are turned into numbers before any backend has them, and compared by each.
some_layers = pytest.mark.parametrize("layer", ["lstm-scan", "gru-fused", "lstm-native"], indirect=True)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def clamping(layer, reverse=False):
    """The layer as a program: it does not know the lengths' values, so that they are clamped, not refused."""
    run = functools.partial(layer.run, reverse=reverse)
    return jax.jit(lambda params, x, carry, lengths: run(params, x, carry, lengths=lengths))


def with_padding(x, value):
    return np.where(PADDING[..., None], np.float32(value), x)


@pytest.mark.sampled(4)
@both_directions
def test_padding_gets_no_gradient_and_the_rest_does(layer, draw, reverse):
    params, x, carry = draw()

    def total(x):
        # Outputs past the end are in the sum too: they are constants.
        carry_out, outputs = layer.run(params, x, carry, lengths=LENGTHS, reverse=reverse)
        return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in [outputs, *jax.tree.leaves(carry_out)])

    gradient = np.asarray(jax.jit(jax.grad(total))(x))
    assert np.all(gradient[PADDING] == 0.0)
    assert np.all(np.any(gradient[~PADDING] != 0.0, axis=-1))


@both_directions
def test_padding_changes_no_value(layer, draw, reverse):
    params, x, carry = draw()
    for value in (0.0, 1e6, np.nan):
        got = layer.run(params, with_padding(x, value), carry, lengths=LENGTHS, reverse=reverse)
        assert_same_bits(got, layer.run(params, x, carry, lengths=LENGTHS, reverse=reverse))


# As in PyTorch, whose packed sequences do not hold the padding at all.
@pytest.mark.sampled(4)
def test_padding_changes_no_gradient(layer, draw):
    params, x, carry = jax.tree.map(jnp.asarray, draw())

    @jax.jit
    def gradients(params, x, carry):
        result, pull_back = jax.vjp(lambda *arguments: layer.run(*arguments, lengths=LENGTHS), params, x, carry)
        return pull_back(jax.tree.map(jnp.ones_like, result))

    for value in (0.0, 1e6, np.nan, np.inf):
        assert_same_bits(gradients(params, with_padding(x, value), carry), gradients(params, x, carry))


@pytest.mark.sampled(6)
@both_directions
@pytest.mark.parametrize("length", [1, 4])
def test_carry_is_that_of_the_truncated_sequence(layer, draw, reverse, length):
    params, x, carry = jax.tree.map(jnp.asarray, draw())

    def first_row(time, lengths):
        lengths = None if lengths is None else jnp.array(lengths)
        final, outputs = layer.run(params, x[:, :time], carry, lengths=lengths, reverse=reverse)
        return jax.tree.map(lambda a: a[0], (final, outputs[:, :length]))

    got = first_row(7, [length, 7, 2])
    assert_same_bits(got, first_row(length, [length, length, min(length, 2)]))
    # Without lengths the compiler fuses the step's arithmetic otherwise: an ulp is allowed.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, first_row(length, None))


@both_directions
def test_empty_sequence_keeps_the_initial_carry(layer, draw, reverse):
    params, x, carry = draw()
    run = clamping(layer, reverse)
    for length in (0, -3):
        got, outputs = run(params, x, carry, np.array([7, length, 3]))
        assert_same_bits(jax.tree.map(lambda a: a[1], got), jax.tree.map(lambda a: a[1], carry))
        assert np.all(np.asarray(outputs[1]) == 0.0)


@pytest.mark.sampled(4)
@both_directions
def test_gradient_passes_an_empty_sequence_unchanged(layer, draw, reverse):
    params, x, carry = draw()

    def final(carry):
        return layer.run(params, x, carry, lengths=LENGTHS, reverse=reverse)[0]

    _, pull_back = jax.vjp(final, jax.tree.map(jnp.asarray, carry))
    bar = jax.tree.map(lambda part: jnp.asarray(part) + 2.0, carry)
    (got,) = pull_back(bar)
    assert_same_bits(jax.tree.map(lambda a: a[2], got), jax.tree.map(lambda a: a[2], bar))


@both_directions
def test_long_lengths_mean_the_whole_sequence(layer, draw, reverse):
    params, x, carry = draw()
    run = clamping(layer, reverse)
    beyond = run(params, x, carry, np.array([8, 1000, 7]))
    assert_same_bits(beyond, run(params, x, carry, np.array([7, 7, 7])))
    whole = layer.run(params, x, carry, reverse=reverse)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), beyond, whole)


@pytest.mark.sampled(3)
@some_layers
@pytest.mark.parametrize(("dtype", "known"), [("int8", True), ("uint8", False)], ids=["int8 eager", "uint8 jit"])
def test_lengths_too_narrow_for_the_time_axis(layer, draw, dtype, known):
    """A type that cannot hold the number of steps holds these lengths all the same."""
    params, x, carry = draw(time=300)
    lengths = np.array([120, 5, 0], dtype)
    run = (lambda p, x, c, lengths: layer.run(p, x, c, lengths=lengths)) if known else clamping(layer)
    assert_same_bits(run(params, x, carry, lengths), run(params, x, carry, lengths.astype(np.int32)))


@pytest.mark.sampled(3)
@some_layers
@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_largest_lengths_mean_the_whole_sequence(layer, draw, dtype):
    params, x, carry = draw()
    most = np.full(3, np.iinfo(dtype).max, dtype)
    run = clamping(layer)
    assert_same_bits(run(params, x, carry, most), run(params, x, carry, np.full(3, 7, dtype)))


@both_directions
def test_outputs_past_the_end_are_zero(layer, draw, reverse):
    params, x, carry = draw()
    _, outputs = layer.run(params, x, carry, lengths=LENGTHS, reverse=reverse)
    outputs = np.asarray(outputs)
    assert np.all(outputs[PADDING] == 0.0)
    assert np.all(outputs[~PADDING] != 0.0)


@pytest.mark.sampled(6)
@some_layers
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32"])
def test_any_integer_type_will_do(layer, draw, dtype):
    params, x, carry = draw()
    got = layer.run(params, x, carry, lengths=LENGTHS.astype(dtype))
    assert_same_bits(got, layer.run(params, x, carry, lengths=LENGTHS))


def test_reverse_is_the_flipped_sequence(layer, draw):
    params, x, carry = draw()
    got_carry, got_outputs = layer.run(params, x, carry, reverse=True)
    want_carry, want_outputs = layer.run(params, np.flip(x, 1), carry)
    np.testing.assert_allclose(got_outputs, np.flip(want_outputs, 1), rtol=1e-6, atol=1e-6)
    for got, want in zip(jax.tree.leaves(got_carry), jax.tree.leaves(want_carry), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.sampled(4)
def test_carry_continues_a_split_sequence(layer, draw):
    params, x, carry = draw()
    middle, first = layer.run(params, x[:, :3], carry)
    end, second = layer.run(params, x[:, 3:], middle)
    want_end, want = layer.run(params, x, carry)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), want, rtol=1e-6, atol=1e-6)
    for got, expected in zip(jax.tree.leaves(end), jax.tree.leaves(want_end), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("reverse", "indices"), [(False, [6, 6, 6]), (True, [0, 0, 0])], ids=["forward", "reverse"])
def test_last_output_only(layer, draw, reverse, indices):
    params, x, carry = draw()
    want_carry, outputs = layer.run(params, x, carry, reverse=reverse)
    got_carry, last = layer.run(params, x, carry, reverse=reverse, return_sequences=False)
    assert last.shape == (3, 6)
    np.testing.assert_allclose(last, outputs[np.arange(3), indices], rtol=1e-6, atol=1e-6)
    for got, want in zip(jax.tree.leaves(got_carry), jax.tree.leaves(want_carry), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@both_directions
def test_last_output_only_of_ragged_sequences(layer, draw, reverse):
    params, x, carry = draw()
    _, outputs = layer.run(params, x, carry, lengths=LENGTHS, reverse=reverse)
    (_, last) = layer.run(params, x, carry, lengths=LENGTHS, reverse=reverse, return_sequences=False)
    np.testing.assert_allclose(last[0], outputs[0, 0 if reverse else 3], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last[1], outputs[1, 0 if reverse else 6], rtol=1e-6, atol=1e-6)
    h = carry[1] if layer.name == "lstm" else carry
    np.testing.assert_array_equal(last[2], h[2])
