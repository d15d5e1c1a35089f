import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn

LENGTHS = np.array([4, 7, 0])

OPTIONS = {
    "whole": (None, False, True),
    "ragged last": (LENGTHS, False, False),
    "ragged reverse": (LENGTHS, True, True),
}
# Each backend with each of these and with both cells, yet not all together.
PAIRS = {
    "lstm-scan": ["whole", "ragged reverse"],
    "gru-scan": ["ragged last"],
    "lstm-fused": ["ragged last"],
    "gru-fused": ["whole", "ragged reverse"],
    "lstm-native": ["ragged reverse", "ragged last"],
    "gru-native": ["whole"],
}
options = pytest.mark.parametrize(
    ("layer", "lengths", "reverse", "return_sequences"),
    [pytest.param(layer, *OPTIONS[name], id=f"{layer}, {name}") for layer, names in PAIRS.items() for name in names],
    indirect=["layer"],
)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.sampled(5)
@options
def test_jit(layer, draw, lengths, reverse, return_sequences):
    traces = []

    def run(params, x, carry, lengths):
        traces.append(1)
        return layer.run(params, x, carry, lengths=lengths, reverse=reverse, return_sequences=return_sequences)

    arguments = draw()
    jitted = jax.jit(run)
    for seen in [lengths, None if lengths is None else lengths[::-1]]:
        assert_close(jitted(*arguments, seen), run(*arguments, seen))
    # Two eager calls, and one trace for both: other lengths are other values, not another program.
    assert len(traces) == 3


def test_numpy_arrays_will_do(layer, draw):
    arguments = draw()
    assert_close(
        layer.run(*arguments, lengths=LENGTHS), layer.run(*jax.tree.map(jnp.asarray, arguments), lengths=LENGTHS)
    )


@pytest.mark.sampled(5)
@options
def test_vmap_over_params(layer, draw, lengths, reverse, return_sequences):
    several = [draw(seed=seed)[0] for seed in range(3)]
    _, x, carry = draw()

    def run(params):
        return layer.run(params, x, carry, lengths=lengths, reverse=reverse, return_sequences=return_sequences)

    stacked = jax.vmap(run)(jax.tree.map(lambda *a: jnp.stack(a), *several))
    for i, params in enumerate(several):
        assert_close(jax.tree.map(lambda a, i=i: a[i], stacked), run(params))


@pytest.mark.sampled(5)
@options
def test_vmap_over_data(layer, draw, lengths, reverse, return_sequences):
    params = draw()[0]
    data = [draw(seed=seed)[1:] for seed in range(3)]
    data = [(x, carry, None if lengths is None else np.roll(lengths, i)) for i, (x, carry) in enumerate(data)]

    def run(x, carry, lengths):
        return layer.run(params, x, carry, lengths=lengths, reverse=reverse, return_sequences=return_sequences)

    stacked = jax.vmap(run)(*jax.tree.map(lambda *a: jnp.stack(a), *data))
    for i, arguments in enumerate(data):
        assert_close(jax.tree.map(lambda a, i=i: a[i], stacked), run(*arguments))


def scalar_of(run):
    def scalar(*arguments):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(*arguments)))

    return scalar


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("layer", "return_sequences"),
    [("lstm-scan", True), ("gru-scan", False), ("lstm-fused", False), ("gru-fused", True)],
    indirect=["layer"],
)
def test_gradient_is_the_slope(layer, draw, return_sequences):
    def run(*arguments):
        return layer.run(*arguments, lengths=LENGTHS, return_sequences=return_sequences)

    @jax.jit
    def slopes(point, direction):
        gradient = jax.grad(scalar_of(run), argnums=(0, 1, 2))(*point)
        backward = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        if layer.backend != "scan":  # The only one that differentiates forwards.
            return scalar_of(run)(*point), backward, backward
        value, forward = jax.jvp(scalar_of(run), point, direction)
        return value, backward, forward

    with jax.enable_x64(True):
        point, direction = draw(dtype=np.float64), draw(seed=1, dtype=np.float64)

        def value(size):
            return slopes(jax.tree.map(lambda p, d: p + size * d, point, direction), direction)[0]

        want = (value(1e-5) - value(-1e-5)) / 2e-5
        _, backward, forward = slopes(point, direction)
    np.testing.assert_allclose(backward, want, rtol=1e-6)
    np.testing.assert_allclose(forward, backward, rtol=1e-12)


@pytest.mark.parametrize("layer", ["lstm-scan", "gru-fused", "lstm-native"], indirect=True)
def test_checkpoint_of_the_layer(layer, draw):
    def run(*arguments):
        return layer.run(*arguments, lengths=LENGTHS)

    def value_and_grad(run):
        return jax.jit(jax.value_and_grad(scalar_of(run), argnums=(0, 1, 2)))(*draw())

    assert_close(value_and_grad(jax.checkpoint(run)), value_and_grad(run))


@pytest.mark.parametrize("layer", ["lstm", "gru"], indirect=True)  # A step has no backends.
def test_checkpoint_of_each_step(layer, draw):
    def value_and_grad(step):
        def run(params, x, carry):
            return rnn.scan(step, params, x, carry, lengths=LENGTHS)

        return jax.jit(jax.value_and_grad(scalar_of(run), argnums=(0, 1, 2)))(*draw())

    assert_close(value_and_grad(jax.checkpoint(layer.step)), value_and_grad(layer.step))


def test_half_precision_stays_half_precision(layer, draw):
    params, x, carry = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), draw())
    if layer.backend == "native":
        with pytest.raises(ValueError, match=r"^backend is 'native'.*bfloat16; expected float32 arrays"):
            layer.run(params, x, carry)
        return
    for initial in (carry, None):
        result = layer.run(params, x, initial, lengths=LENGTHS)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}


def test_integer_x_is_promoted(layer, draw):
    params, _, carry = draw()
    x = np.arange(105).reshape(3, 7, 5) % 3
    assert_close(layer.run(params, x, carry), layer.run(params, x.astype(np.float32), carry))
