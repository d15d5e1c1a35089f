"""The published equations as a plain loop in float64, one sequence and one step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def logistic(a):
    return 1.0 / (1.0 + np.exp(-a))


def lstm_sequence(p, x, c, h, order):
    w, u, b = p["kernel"], p["recurrent_kernel"], p["bias"]
    n = len(h)
    y = np.zeros((len(x), n))
    for t in order:
        pre = [
            x[t] @ w[:, k * n : (k + 1) * n] + h @ u[:, k * n : (k + 1) * n] + b[k * n : (k + 1) * n] for k in range(4)
        ]
        write, keep, show = logistic(pre[0]), logistic(pre[1]), logistic(pre[3])
        c = keep * c + write * np.tanh(pre[2])
        h = show * np.tanh(c)
        y[t] = h
    return (c, h), y


def gru_sequence(p, x, h, order):
    n = len(h)
    y = np.zeros((len(x), n))
    for t in order:
        from_x = (x[t] @ p["kernel"] + p["bias"]).reshape(3, n)
        from_h = (h @ p["recurrent_kernel"] + p["recurrent_bias"]).reshape(3, n)
        reset = logistic(from_x[0] + from_h[0])
        keep = logistic(from_x[1] + from_h[1])
        candidate = np.tanh(from_x[2] + reset * from_h[2])
        h = (1 - keep) * candidate + keep * h
        y[t] = h
    return h, y


def reference(name, params, x, carry, lengths, reverse):
    carries, outputs = [], []
    for b, length in enumerate(lengths):
        order = range(min(max(length, 0), x.shape[1]))
        order = reversed(order) if reverse else order
        if name == "lstm":
            last, y = lstm_sequence(params, x[b], carry[0][b], carry[1][b], order)
        else:
            last, y = gru_sequence(params, x[b], carry[b], order)
        carries.append(last)
        outputs.append(y)
    return jax.tree.map(lambda *rows: np.stack(rows), *carries), np.stack(outputs)


def check(layer, drawn, lengths, reverse):
    params, x, carry = drawn
    want_carry, want_outputs = reference(
        layer.name, params, x, carry, [x.shape[1]] * len(x) if lengths is None else lengths, reverse
    )
    with jax.enable_x64(True):
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        arguments = jax.tree.map(jnp.asarray, (params, x, carry))
        # As a program: where values are known, lengths out of range are an error.
        run = jax.jit(lambda params, x, carry, lengths: layer.run(params, x, carry, lengths=lengths, reverse=reverse))
        got_carry, got_outputs = run(*arguments, lengths)
    np.testing.assert_allclose(got_outputs, want_outputs, rtol=0, atol=1e-12)
    for got, want in zip(jax.tree.leaves(got_carry), jax.tree.leaves(want_carry), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", [None, [7, 0, 3], [100, -2, 6]], ids=["whole", "ragged", "out of range"])
def test_equals_the_loop(layer, draw, lengths, reverse):
    check(layer, draw(dtype=np.float64), lengths, reverse)


@pytest.mark.sampled(2)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_equals_the_loop_for_any_shape(layer, draw, data):
    sizes = {
        name: data.draw(st.integers(1, top), name)
        for name, top in {"batch": 4, "time": 6, "features": 4, "hidden": 5}.items()
    }
    ragged = st.lists(st.integers(-1, sizes["time"] + 1), min_size=sizes["batch"], max_size=sizes["batch"])
    lengths = data.draw(st.none() | ragged, "lengths")
    seed = data.draw(st.integers(0, 99), "seed")
    check(layer, draw(seed=seed, dtype=np.float64, **sizes), lengths, data.draw(st.booleans(), "reverse"))
