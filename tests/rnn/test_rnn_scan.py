import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn

LENGTHS = np.array([4, 7, 0])

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
with_and_without_lengths = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def leaky(params, carry, x):
    """A leaky sum that counts its steps; its output has other shapes and types than its carry."""
    level = params["leak"] * carry["level"] + x
    count = carry["count"] + 1
    y = {"pair": jnp.stack([level, -level], axis=1), "best": jnp.argmax(level, axis=-1), "shares": (level[:, 0], count)}
    return {"level": level, "count": count}, y


def leaky_by_hand(leak, x, level, count, lengths, reverse):
    batch, time, _ = x.shape
    level, count = level.copy(), count.copy()
    pair = np.zeros((batch, time, 2, x.shape[2]), x.dtype)
    best, first, counts = np.zeros((batch, time), int), np.zeros((batch, time), x.dtype), np.zeros((batch, time), int)
    for b in range(batch):
        steps = range(time if lengths is None else lengths[b])
        for t in reversed(steps) if reverse else steps:
            level[b] = leak * level[b] + x[b, t]
            count[b] += 1
            pair[b, t] = level[b], -level[b]
            best[b, t], first[b, t], counts[b, t] = level[b].argmax(), level[b, 0], count[b]
    return {"level": level, "count": count}, {"pair": pair, "best": best, "shares": (first, counts)}


@pytest.fixture
def leaky_case():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 7, 5)).astype(np.float32)
    return x, rng.standard_normal((3, 5)).astype(np.float32), np.array([10, 20, 30], np.int32)


@pytest.mark.sampled(12)
@both_directions
@with_and_without_lengths
@pytest.mark.parametrize("return_sequences", [True, False], ids=["all", "last"])
def test_step_through_scan_equals_the_layer(layer, draw, lengths, reverse, return_sequences):
    params, x, carry = draw()
    options = {"lengths": lengths, "reverse": reverse, "return_sequences": return_sequences}
    carry_scan, outputs_scan = rnn.scan(layer.step, params, x, carry, **options)
    carry_layer, outputs_layer = layer.run(params, x, carry, **options)
    assert_close(carry_scan, carry_layer)
    if lengths is None or return_sequences:
        assert_close(outputs_scan, outputs_layer)
    else:
        # Documented difference: a scan knows no h to return for the empty sequence.
        assert_close(outputs_scan[:2], outputs_layer[:2])
        np.testing.assert_array_equal(outputs_scan[2], np.zeros(6))


@both_directions
@with_and_without_lengths
def test_users_cell(leaky_case, lengths, reverse):
    x, level, count = leaky_case
    carry = {"level": level, "count": count}
    got_carry, got = rnn.scan(leaky, {"leak": 0.5}, x, carry, lengths=lengths, reverse=reverse)
    want_carry, want = leaky_by_hand(0.5, x, level, count, lengths, reverse)
    assert got["pair"].shape == (3, 7, 2, 5)
    assert_close(got, want)
    assert_close(got_carry, want_carry)
    assert got_carry["count"].dtype == jnp.int32


@both_directions
@with_and_without_lengths
def test_last_output_of_users_cell(leaky_case, lengths, reverse):
    x, level, count = leaky_case
    carry = {"level": level, "count": count}
    got_carry, got = rnn.scan(leaky, {"leak": 0.5}, x, carry, lengths=lengths, reverse=reverse, return_sequences=False)
    want_carry, outputs = leaky_by_hand(0.5, x, level, count, lengths, reverse)
    ends = np.full(3, 7) if lengths is None else lengths
    # An empty sequence's index 0 holds zeros, as its last output should be.
    last = np.zeros(3, int) if reverse else np.maximum(ends - 1, 0)
    assert_close(got, jax.tree.map(lambda y: y[np.arange(3), last], outputs))
    assert_close(got_carry, want_carry)


@pytest.mark.parametrize("return_sequences", [True, False], ids=["all", "last"])
def test_gradient_reaches_users_params(leaky_case, return_sequences):
    x, level, count = leaky_case

    def total(leak):
        carry = {"level": level, "count": count}
        _, y = rnn.scan(leaky, {"leak": leak}, x[:, :2], carry, return_sequences=return_sequences)
        return jnp.sum(y["shares"][0])

    # Step 1: a = k l + x0; step 2: b = k a + x1. Only component 0 is read.
    k, a = 0.5, 0.5 * level[:, 0] + x[:, 0, 0]
    want_last = np.sum(a + k * level[:, 0])
    want = want_last + (np.sum(level[:, 0]) if return_sequences else 0.0)
    np.testing.assert_allclose(jax.grad(total)(k), want, rtol=1e-5)


def test_steps_see_one_frame_each(leaky_case):
    x, _, _ = leaky_case
    shapes = []

    def spy(params, carry, x_t):
        shapes.append(x_t.shape)
        return carry, x_t

    _, outputs = rnn.scan(spy, None, x, ())
    np.testing.assert_array_equal(outputs, x)
    assert set(shapes) == {(3, 5)}


@pytest.mark.parametrize("return_sequences", [True, False], ids=["all", "last"])
@pytest.mark.parametrize(
    ("x", "lengths", "name"),
    [
        (np.zeros((3, 5), np.float32), None, "x"),
        (np.zeros((3, 7, 5, 1), np.float32), None, "x"),
        (np.zeros((3, 7, 5), np.float32), np.zeros(7, np.int32), "lengths"),
        (np.zeros((3, 7, 5), np.float32), np.zeros((3, 1), np.int32), "lengths"),
        (np.zeros((3, 7, 5), np.float32), np.zeros((), np.int32), "lengths"),
        (np.zeros((3, 7, 5), np.float32), np.zeros(3, np.float32), "lengths"),
        (np.zeros((3, 7, 5), np.float32), np.zeros(3, bool), "lengths"),
    ],
)
def test_bad_input_is_named(x, lengths, name, return_sequences):
    with pytest.raises(ValueError, match=rf"^{name} has "):
        rnn.scan(lambda p, c, x: (c, x), None, x, (), lengths=lengths, return_sequences=return_sequences)


@pytest.mark.parametrize("lengths", [None, np.array([7, 0, 3], np.int32)], ids=["whole", "ragged"])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda p, c, x: c["h"], r"step gives float32\[3,5\]; expected two results, \(carry, y\)"),
        (
            lambda p, c, x: (c["h"], x),
            r"step turns carry\['h'\] float32\[3,5\], carry\['n'\] int32\[3\] into carry float32\[3,5\]; ",
        ),
        (
            lambda p, c, x: (c | {"h": c["h"][:, :2]}, x),
            r"step turns carry\['h'\] float32\[3,5\] into float32\[3,2\]; ",
        ),
        (
            lambda p, c, x: (c | {"h": c["h"].mean(1, keepdims=True)}, x),
            r"step turns carry\['h'\] float32\[3,5\] into float32\[3,1\]; ",
        ),
        (lambda p, c, x: (c | {"n": c["n"] + 0.5}, x), r"step turns carry\['n'\] int32\[3\] into float32\[3\]; "),
    ],
    ids=["no pair", "another tree", "another shape", "a shape that broadcasts", "another type"],
)
def test_a_step_that_does_not_keep_the_carry_s_form_is_told_so(step, message, lengths):
    carry = {"h": np.zeros((3, 5), np.float32), "n": np.zeros(3, np.int32)}
    with pytest.raises(ValueError, match=message):
        rnn.scan(step, None, np.zeros((3, 7, 5), np.float32), carry, lengths=lengths)


def test_a_step_s_own_error_has_a_note_of_its_shapes():
    with pytest.raises(TypeError) as caught:
        rnn.scan(lambda p, h, x: (h @ p + x, x), np.eye(5), np.zeros((3, 7, 5)), np.zeros((3, 4)))
    assert any("carry float32[3,4] and x_t float32[3,5]" in note for note in caught.value.__notes__)


def test_a_number_as_carry_takes_the_step_s_type_if_that_can_hold_it():
    x = np.ones((3, 7, 5), np.float32)
    total, _ = rnn.scan(lambda p, c, x: (c + x.sum(), x), None, x, 0)
    assert total == 105
    with pytest.raises(ValueError, match=r"step turns carry float32\[\] into int32\[\]; "):
        rnn.scan(lambda p, c, x: (jnp.int32(1), x), None, x, 0.0)


def test_what_the_loop_brings_to_the_carry_s_type_is_no_error():
    x, carry = np.ones((3, 7, 5), np.float32), np.zeros((3, 5), np.float32)
    end, _ = rnn.scan(lambda p, c, x: (c.astype(jnp.bfloat16) + 1, x), None, x, carry, lengths=np.array([7, 0, 3]))
    np.testing.assert_array_equal(end[:, 0], [7, 0, 3])
