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
@pytest.mark.parametrize("change", ["one column less", "one axis more", "no axis", "one gate less"])
def test_shapes_of_params(layer, draw, change, jitted):
    params, x, carry = draw()
    for name, old in params.items():
        new = {
            "one column less": old[..., :-1],
            "one axis more": old[None],
            "no axis": np.float32(1.0),
            "one gate less": old[..., :-6],
        }[change]
        with pytest.raises(ValueError, match=r"^params\["):
            run(layer, params | {name: new}, x, carry, jitted=jitted)


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel"])
def test_transposed_kernels(layer, draw, name):
    params, x, carry = draw()
    with pytest.raises(ValueError, match=r"^params\["):
        run(layer, params | {name: params[name].T}, x, carry)


def test_missing_and_surplus_params(layer, draw):
    params, x, carry = draw()
    for name in params:
        less = {key: value for key, value in params.items() if key != name}
        with pytest.raises(ValueError, match=r"^params has .*expected.*'kernel'"):
            run(layer, less, x, carry)
    with pytest.raises(ValueError, match=r"^params has .*'peephole'.*expected"):
        run(layer, params | {"peephole": params["bias"]}, x, carry)


def test_params_of_the_other_layer(layer, draw):
    params, x, carry = draw()
    if layer.name == "gru":
        del params["recurrent_bias"]
    else:
        params["recurrent_bias"] = params["bias"]
    with pytest.raises(ValueError, match=r"^params has .*expected"):
        run(layer, params, x, carry)


def test_integer_params_are_promoted(layer, draw):
    params, x, _ = draw()
    for name, value in params.items():
        _, outputs = run(layer, params | {name: value.astype(np.int32)}, x, None)
        assert outputs.dtype == jnp.float32


@pytest.mark.parametrize("name", ["recurrent_kernel", "bias"])
def test_params_of_two_precisions_promote_or_are_named(layer, draw, name):
    params, x, _ = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), draw())
    params[name] = params[name].astype(jnp.float32)
    try:
        _, outputs = run(layer, params, x, None)
    except ValueError as error:
        assert str(error).startswith("params")  # noqa: PT017
    else:
        assert outputs.dtype == jnp.float32


@in_both_ways
@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 6), (1, 6), (1, 3, 6), (3, 1, 6)])
def test_shape_of_carry(layer, draw, shape, jitted):
    params, x, _ = draw()
    part = jnp.zeros(shape)
    carry = part if layer.name == "gru" else (jnp.zeros((3, 6)), part)
    with pytest.raises(ValueError, match=r"^carry"):
        run(layer, params, x, carry, jitted=jitted)


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_dtype_of_carry(layer, draw, dtype):
    params, x, carry = draw()
    carry = jax.tree.map(lambda part: jnp.asarray(part.astype(dtype)), carry)
    with pytest.raises(ValueError, match=r"^carry"):
        run(layer, params, x, carry)


@pytest.mark.parametrize("structure", ["one", "three", "dict", "half"])
def test_structure_of_carry(layer, draw, structure):
    params, x, _ = draw()
    part = jnp.zeros((3, 6))
    carry = {"one": (part,), "three": (part,) * 3, "dict": {"c": part, "h": part}, "half": (None, part)}[structure]
    with pytest.raises(ValueError, match=r"^carry"):
        run(layer, params, x, carry)


def test_carry_of_the_other_layer(layer, draw):
    params, x, carry = draw()
    other = (carry, carry) if layer.name == "gru" else carry[1]
    with pytest.raises(ValueError, match=r"^carry"):
        run(layer, params, x, other)


def test_carry_that_would_unpack_by_accident(layer, draw):
    # A batch of two: an LSTM would take the rows of a bare h for c and h.
    params, x, carry = draw(batch=2)
    other = (carry, carry) if layer.name == "gru" else carry[1]
    with pytest.raises(ValueError, match=r"^carry"):
        run(layer, params, x, other)


@in_both_ways
@pytest.mark.parametrize("shape", [(), (7,), (2,), (1,), (3, 1), (3, 7)])
def test_shape_of_lengths(layer, draw, shape, jitted):
    with pytest.raises(ValueError, match=r"^lengths has shape"):
        run(layer, *draw(), lengths=jnp.ones(shape, jnp.int32), jitted=jitted)


@in_both_ways
@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_dtype_of_lengths(layer, draw, dtype, jitted):
    with pytest.raises(ValueError, match=r"^lengths has dtype"):
        run(layer, *draw(), lengths=jnp.ones(3, dtype), jitted=jitted)
