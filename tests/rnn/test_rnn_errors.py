"""What does not fit is a ValueError that names the argument, eagerly and under jit alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn

in_both_ways = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


def run(layer, params, x, carry, lengths=None, jitted=False):
    def call(params, x, carry, lengths):
        return layer.run(params, x, carry, lengths=lengths)

    return (jax.jit(call) if jitted else call)(params, x, carry, lengths)


@in_both_ways
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (3, 7, 5, 1)])
def test_shape_of_x(layer, draw, shape, jitted):
    params, _, carry = draw()
    with pytest.raises(ValueError, match=r"^x has shape"):
        run(layer, params, jnp.zeros(shape), carry, jitted=jitted)


@in_both_ways
def test_params_and_x_in_the_wrong_order(layer, draw, jitted):
    params, x, carry = draw()
    with pytest.raises(ValueError, match=r"^x is a dict; expected an array .* params before it"):
        run(layer, x, params, carry, jitted=jitted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("option", ["return_sequences", "reverse"])
def test_an_option_that_jit_traces_is_told_how_to_be_static(layer, draw, option):
    params, x, _ = draw()
    with pytest.raises(ValueError, match=rf'^{option} is traced; .*static_argnames="{option}"'):
        jax.jit(layer.run)(params, x, **{option: True})
    jax.jit(layer.run, static_argnames=option)(params, x, **{option: True})


def test_a_traced_number_is_told_too():
    step, x = rnn.gru_step, jnp.ones((1, 2, 2))
    params = rnn.init_gru(jax.random.key(0), 2, 3)
    with pytest.raises(ValueError, match=r"^unroll is traced"):
        jax.jit(rnn.scan, static_argnums=0)(step, params, x, jnp.zeros((1, 3)), unroll=2)


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


def test_layers_and_directions_of_a_stack_are_named():
    params, x = rnn.init_gru(jax.random.key(0), 3, 4), jnp.ones((2, 5, 3))
    for wrong, told in (
        ([{"forward": params}], r"params has .*expected 'layer_0'"),
        ({"layer_0": params}, r"params\['layer_0'\] has \['bias', .*expected 'forward'"),
        ({"layer_0": {"forward": params, "bckward": params}}, r"has \['bckward', 'forward'\]"),
        ({"layer_0": {}}, r"params\['layer_0'\] has \[\]"),
    ):
        with pytest.raises(ValueError, match=told):
            rnn.stack(rnn.GRU, wrong, x)
    right = {"layer_0": {"forward": params}}
    with pytest.raises(ValueError, match=r"masks\['layer_0'\] has \[\]; expected \['forward'\]"):
        rnn.stack(rnn.GRU, right, x, masks={})
    with pytest.raises(ValueError, match="masks is a list; expected masks by layer"):
        rnn.stack(rnn.GRU, right, x, masks=[1])
    with pytest.raises(ValueError, match=r"cell is <function gru.*expected an rnn\.Cell"):
        rnn.stack(rnn.gru, right, x)
    with pytest.raises(ValueError, match=r"engine is 'scan'; expected an rnn\.Engine"):
        rnn.stack(rnn.GRU, right, x, engine="scan")


def test_params_of_the_other_layer(layer, draw):
    params, x, carry = draw()
    if layer.name == "gru":
        del params["recurrent_bias"]
        hidden = params["recurrent_kernel"].shape[0]
        of_lstm = {name: np.zeros((*value.shape[:-1], 4 * hidden), np.float32) for name, value in params.items()}
        with pytest.raises(ValueError, match=r"^params has .*; these are an LSTM's"):
            run(layer, of_lstm, x, carry)
    else:
        params["recurrent_bias"] = params["bias"]
    with pytest.raises(ValueError, match=r"^params has .*expected"):
        run(layer, params, x, carry)


@pytest.mark.sampled(2)
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


@pytest.mark.parametrize("lengths", [[8, 1, 1], [1, -1, 1], [2**31 - 1, 0, 0]])
def test_known_lengths_out_of_range(layer, draw, lengths):
    for known in (np.array(lengths), jnp.array(lengths)):
        with pytest.raises(ValueError, match=r"^lengths has values from .* expected 0 to 7, as x \(3, 7, 5\)"):
            run(layer, *draw(), lengths=known)


def test_dtype_of_x(layer, draw):
    params, x, carry = draw()
    with pytest.raises(ValueError, match=r"^x .*complex64.*expected"):
        run(layer, params, x + 1j, carry)


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel", "bias"])
def test_dtype_of_params(layer, draw, name):
    params, x, carry = draw()
    with pytest.raises(ValueError, match=rf"^params\['{name}'\] has dtype complex64; expected real numbers"):
        run(layer, params | {name: params[name] + 1j}, x, carry)


def test_known_nan_in_x(layer, draw):
    """Named with its shape; in the padding anything may stand."""
    params, x, carry = draw()
    x[1, 5, 2] = np.nan
    for known in (x, jnp.asarray(x)):
        with pytest.raises(ValueError, match=r"^x \(3, 7, 5\) holds NaN; expected numbers"):
            run(layer, params, known, carry)
        with pytest.raises(ValueError, match=r"^x \(3, 7, 5\) holds NaN"):
            run(layer, params, known, carry, lengths=np.array([7, 6, 7]))
        _, outputs = run(layer, params, known, carry, lengths=np.array([7, 5, 7]))
        assert bool(jnp.isfinite(outputs).all())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("precision", "reverse"), [("float32", False), ("bfloat16", True)])
def test_unknown_nan_in_x_stays_in_its_sequence(layer, draw, precision, reverse):
    """It is not swallowed: from its step on all of that sequence is NaN, and nothing of the others."""
    params, x, carry = draw(hidden=21)

    @jax.jit
    def values_and_gradients(params, x, carry):
        def call(params, x, carry):
            return layer.run(params, x, carry, precision=precision, reverse=reverse)

        results, pull_back = jax.vjp(call, params, x, carry)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))

    sound = values_and_gradients(params, x, carry)
    hurt = x.copy()
    hurt[1, 3, 2] = np.nan
    (end, outputs), (d_params, dx, d_carry) = values_and_gradients(params, hurt, carry)
    others = np.array([0, 2])
    (sound_end, sound_outputs), (_, sound_dx, sound_d_carry) = sound
    for got, want in (
        (outputs, sound_outputs),
        (dx, sound_dx),
        *zip(jax.tree.leaves((end, d_carry)), jax.tree.leaves((sound_end, sound_d_carry)), strict=True),
    ):
        np.testing.assert_array_equal(got[others], want[others])
    after, before = (slice(0, 4), slice(4, 7)) if reverse else (slice(3, 7), slice(0, 3))
    assert bool(jnp.isnan(outputs[1, after]).all())
    np.testing.assert_array_equal(outputs[1, before], sound_outputs[1, before])
    assert all(bool(jnp.isnan(part[1]).all()) for part in jax.tree.leaves(end))
    # The weights' gradients are sums over all sequences.
    assert all(bool(jnp.isnan(value).all()) for value in jax.tree.leaves(d_params))


@pytest.mark.parametrize("name", ["backend", "precision"])
@pytest.mark.parametrize("value", ["float16", "", None, 1, ["scan"]])
def test_unknown_choices(name, value):
    params, x = rnn.init_lstm(jax.random.key(0), 2, 3), jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected one of '"):
        rnn.lstm(params, x, **{name: value})


def test_bfloat16_precision_is_for_float32_arrays(layer, draw):
    params, x, carry = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), draw())
    with pytest.raises(ValueError, match=r"^precision is 'bfloat16', but .* bfloat16; expected float32"):
        layer.run(params, x, carry, precision="bfloat16")


@pytest.mark.parametrize(
    "change",
    [
        {"recurrent_kernel": np.zeros(())},
        {"recurrent_kernel": np.zeros((0, 0))},
        {"bias": None},
        {"bias": np.zeros(3)},
    ],
    ids=["a number", "no units", "missing", "short bias"],
)
def test_explain_refuses_what_the_layer_does(change):
    params = rnn.init_lstm(jax.random.key(0), 2, 3) | change
    params = {name: value for name, value in params.items() if value is not None}
    with pytest.raises(ValueError, match=r"^params"):
        rnn.explain(params, np.ones((1, 2, 2)))


@pytest.mark.parametrize("shape", [(5,), (2, 2), (1, 1, 2, 2)])
def test_explain_refuses_the_same_x(shape):
    with pytest.raises(ValueError, match=r"^x has shape"):
        rnn.explain(rnn.init_lstm(jax.random.key(0), 2, 3), np.ones(shape))
