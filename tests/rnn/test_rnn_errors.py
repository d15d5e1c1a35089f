"""What does not fit is a ValueError that names the argument, eagerly and under jit alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

in_both_ways = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


def run(layer, params, x, carry, lengths=None, jitted=False):
    def call(params, x, carry, lengths):
        return layer.run(params, x, carry, lengths=lengths)

    return (jax.jit(call) if jitted else call)(params, x, carry, lengths)


@in_both_ways
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (3, 7, 5, 1), (3, 0, 5)])
def test_shape_of_x(layer, draw, shape, jitted):
    params, _, carry = draw()
    with pytest.raises(ValueError, match=r"^x has shape"):
        run(layer, params, jnp.zeros(shape), carry, jitted=jitted)


@in_both_ways
def test_features_of_x_and_params(layer, draw, jitted):
    params, _, carry = draw()
    with pytest.raises(ValueError, match=r"params\['kernel'\] has shape \(5, .*\bx \(3, 7, 4\)"):
        run(layer, params, jnp.zeros((3, 7, 4)), carry, jitted=jitted)


@in_both_ways
@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel", "bias", "recurrent_bias"])
@pytest.mark.parametrize("change", ["one column less", "one axis more", "transposed", "one gate less"])
def test_shapes_of_params(layer, draw, name, change, jitted):
    params, x, carry = draw()
    if name not in params:
        pytest.skip(f"a {layer.name} has no {name}")
    if change == "transposed" and params[name].ndim == 1:
        pytest.skip("a vector is its own transpose")
    old = params[name]
    params[name] = {
        "one column less": old[..., :-1],
        "one axis more": old[None],
        "transposed": old.T,
        "one gate less": old[..., :-6],
    }[change]
    with pytest.raises(ValueError, match="^params"):
        run(layer, params, x, carry, jitted=jitted)


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel", "bias", "recurrent_bias"])
def test_scalar_param(layer, draw, name):
    params, x, carry = draw()
    if name not in params:
        pytest.skip(f"a {layer.name} has no {name}")
    params[name] = np.float32(1.0)
    with pytest.raises(ValueError, match="^params"):
        run(layer, params, x, carry)


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel", "bias", "recurrent_bias"])
def test_missing_and_surplus_params(layer, draw, name):
    params, x, carry = draw()
    if name in params:
        del params[name]
    else:
        params[name] = np.zeros_like(params["bias"])
    with pytest.raises(ValueError, match=r"^params has .*expected.*'kernel'"):
        run(layer, params, x, carry)


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel", "bias", "recurrent_bias"])
@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_dtype_of_params(layer, draw, name, dtype):
    params, x, _ = draw()
    if name not in params:
        pytest.skip(f"a {layer.name} has no {name}")
    params[name] = params[name].astype(dtype)
    if dtype == "int32":
        # Whole numbers promote, as they do for x.
        _, outputs = run(layer, params, x, None)
        assert outputs.dtype == jnp.float32
    else:
        with pytest.raises(ValueError, match="^params"):
            run(layer, params, x, None)


@in_both_ways
@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 6), (1, 6), (1, 3, 6), (3, 1, 6)])
def test_shape_of_carry(layer, draw, shape, jitted):
    params, x, _ = draw()
    part = jnp.zeros(shape)
    carry = part if layer.name == "gru" else (jnp.zeros((3, 6)), part)
    with pytest.raises(ValueError, match="^carry"):
        run(layer, params, x, carry, jitted=jitted)


@in_both_ways
@pytest.mark.parametrize("dtype", ["int32", "float16", "complex64"])
def test_dtype_of_carry(layer, draw, dtype, jitted):
    params, x, carry = draw()
    carry = jax.tree.map(lambda part: jnp.asarray(part.astype(dtype)), carry)
    with pytest.raises(ValueError, match="^carry"):
        run(layer, params, x, carry, jitted=jitted)


@pytest.mark.parametrize("parts", [1, 3, "bare", "dict"])
def test_structure_of_carry(layer, draw, parts):
    params, x, _ = draw()
    part = jnp.zeros((3, 6))
    if parts == "bare":
        if layer.name == "gru":
            pytest.skip("a bare array is a GRU's carry")
        carry = part
    else:
        carry = {"c": part, "h": part} if parts == "dict" else (part,) * parts
    with pytest.raises(ValueError, match="^carry"):
        run(layer, params, x, carry)


def test_carry_of_the_other_layer(layer, draw):
    params, x, carry = draw()
    other = (carry, carry) if layer.name == "gru" else carry[1]
    with pytest.raises(ValueError, match="^carry"):
        run(layer, params, x, other)


def test_carry_that_would_unpack_by_accident(layer, draw):
    # A batch of two: an LSTM would take the rows of a bare h for c and h.
    params, x, carry = draw(batch=2)
    other = (carry, carry) if layer.name == "gru" else carry[1]
    with pytest.raises(ValueError, match="^carry"):
        run(layer, params, x, other)


@in_both_ways
@pytest.mark.parametrize("shape", [(), (7,), (2,), (1,), (3, 1), (3, 7)])
def test_shape_of_lengths(layer, draw, shape, jitted):
    with pytest.raises(ValueError, match="^lengths has shape"):
        run(layer, *draw(), lengths=jnp.ones(shape, jnp.int32), jitted=jitted)


@in_both_ways
@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_dtype_of_lengths(layer, draw, dtype, jitted):
    with pytest.raises(ValueError, match="^lengths has dtype"):
        run(layer, *draw(), lengths=jnp.ones(3, dtype), jitted=jitted)


def test_dtype_of_x(layer, draw):
    params, x, carry = draw()
    with pytest.raises(ValueError, match=r"^x\b"):
        run(layer, params, x.astype(np.complex64), carry)
