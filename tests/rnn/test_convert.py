"""Converted weights compute the same function in PyTorch, Keras, Flax and here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from seqmnist_jax import rnn
from seqmnist_jax.rnn import convert

FEATURES, HIDDEN = 5, 6


# Nothing here depends on how a layer runs.
@pytest.fixture(params=["lstm", "gru"], scope="session")
def layer(request, make_layer):
    return make_layer(request.param)


@pytest.fixture(scope="session")
def draw(layer, make_draw):
    return make_draw(layer)


# An LSTM has no reset gate.
of_a_gru = pytest.mark.parametrize("layer", ["gru"], indirect=True)


def assert_same(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-5)


def assert_equal_params(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def normal(shape, seed):
    return (0.5 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def reset_before(params):
    return {name: value for name, value in params.items() if name != "recurrent_bias"}


@pytest.fixture
def ours(layer, draw):
    """(params, x, outputs) of our own layer."""
    params, x, _ = draw()
    return params, x, layer.run(params, x)[1]


# PyTorch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is one of the libraries to convert from")


@pytest.fixture
def torch_module(torch, layer):
    """Makes an nn.LSTM or nn.GRU with random weights, biases included."""

    def make(**options):
        torch.manual_seed(0)
        module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[layer.name]
        module = module(FEATURES, HIDDEN, batch_first=True, **options)
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_(0, 0.5)
        return module

    return make


def run_torch(torch, module, x):
    with torch.no_grad():
        return module(torch.from_numpy(x))[0].numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_from_torch(torch, torch_module, layer, ours, bias):
    _, x, _ = ours
    module = torch_module(bias=bias)
    # Parameters, unlike the state_dict's tensors, need gradients: both are read.
    for weights in (module.state_dict(), dict(module.named_parameters())):
        params = convert.from_torch(weights)
        assert all(isinstance(value, jax.Array) for value in params.values())
        assert_same(layer.run(params, x)[1], run_torch(torch, module, x))


def test_to_torch(torch, torch_module, ours):
    params, x, outputs = ours
    module = torch_module()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in convert.to_torch(params).items()})
    assert_same(outputs, run_torch(torch, module, x))


SEVERAL = {"num_layers": 2, "bidirectional": True}
PLACES = [
    (f"layer_{index}", direction, {"layer": index, "reverse": direction == "backward"})
    for index in range(2)
    for direction in ("forward", "backward")
]


@pytest.fixture
def cell(layer):
    return {"lstm": rnn.LSTM, "gru": rnn.GRU}[layer.name]


def test_from_torch_in_layers_and_directions(torch, torch_module, cell, ours):
    _, x, _ = ours
    module = torch_module(**SEVERAL)
    params = {}
    for name, direction, place in PLACES:
        params.setdefault(name, {})[direction] = convert.from_torch(module.state_dict(), **place)
    outputs = rnn.stack(cell, params, x, return_sequences=True)
    assert_same(outputs, run_torch(torch, module, x))


def test_to_torch_in_layers_and_directions(torch, torch_module, cell, ours):
    _, x, _ = ours
    params = rnn.init_stack(jax.random.key(0), cell, FEATURES, HIDDEN, **SEVERAL)
    params = jax.tree.map(lambda value: normal(value.shape, value.size), params)
    weights = {}
    for name, direction, place in PLACES:
        weights |= convert.to_torch(params[name][direction], **place)
    module = torch_module(**SEVERAL)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    assert_same(rnn.stack(cell, params, x, return_sequences=True), run_torch(torch, module, x))


def test_torch_names_and_biases(layer, ours):
    params, _, _ = ours
    weights = convert.to_torch(params, layer=1, reverse=True)
    assert list(weights) == [
        "weight_ih_l1_reverse",
        "weight_hh_l1_reverse",
        "bias_ih_l1_reverse",
        "bias_hh_l1_reverse",
    ]
    np.testing.assert_array_equal(weights["bias_ih_l1_reverse"], params["bias"])
    recurrent_bias = params["recurrent_bias"] if layer.name == "gru" else np.zeros_like(params["bias"])
    np.testing.assert_array_equal(weights["bias_hh_l1_reverse"], recurrent_bias)
    assert_equal_params(convert.from_torch(weights, layer=1, reverse=True), params)


def test_other_torch_layers_play_no_part(ours):
    params, _, _ = ours
    # Layer 11's names begin as layer 1's do, and the reversed ones as the others.
    weights = convert.to_torch(params, layer=1) | {"weight_ih_l11": None, "weight_hr_l1_reverse": None}
    assert_equal_params(convert.from_torch(weights, layer=1), params)


@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.state_dict()])
@pytest.mark.parametrize("prefix", ["net.0", "net.0."])
def test_torch_layers_within_a_model(torch, torch_module, given, prefix):
    module = torch_module(num_layers=2)
    model = torch.nn.ModuleDict({"net": torch.nn.ModuleList([module, torch.nn.Linear(3, 3)])})
    for index in range(2):
        params = convert.from_torch(given(model), layer=index, prefix=prefix)
        assert_equal_params(params, convert.from_torch(module, layer=index))
        weights = convert.to_torch(params, layer=index, prefix=prefix)
        assert weights.keys() < model.state_dict().keys()
        assert_equal_params(convert.from_torch(weights, layer=index, prefix=prefix), params)


@pytest.mark.parametrize("options", [{}, {"layer": None}])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_cells(torch, layer, ours, options, bias):
    _, x, _ = ours
    cell = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[layer.name](FEATURES, HIDDEN, bias=bias)
    state, outputs = None, []
    for step in torch.from_numpy(x).unbind(1):
        state = cell(step, state)
        outputs.append(state[0] if layer.name == "lstm" else state)
    params = convert.from_torch(cell.state_dict(), **options)
    assert_same(layer.run(params, x)[1], torch.stack(outputs, 1).detach().numpy())
    back = {name: torch.from_numpy(array) for name, array in convert.to_torch(params, layer=None).items()}
    if bias:
        cell.load_state_dict(back)  # which refuses other names and shapes
        assert_equal_params(convert.from_torch(cell), params)


def test_torch_tensors_of_bfloat16(torch, torch_module):
    module = torch_module().bfloat16()
    params = convert.from_torch(module)
    expected = convert.from_torch(module.float())
    assert all(value.dtype == jnp.bfloat16 for value in params.values())
    for name in ("kernel", "recurrent_kernel"):  # an LSTM's two biases are added in the dtype they have
        np.testing.assert_array_equal(np.asarray(params[name], np.float32), expected[name])


def test_torch_errors(layer, ours):
    params, _, _ = ours
    weights = convert.to_torch(params)
    rows = layer.gates * HIDDEN

    def check(change, match, **options):
        with pytest.raises(ValueError, match=match):
            convert.from_torch(change, **options)

    def without(*names):
        return {name: value for name, value in weights.items() if name not in names}

    check(without("weight_ih_l0"), r"^weights lacks \['weight_ih_l0'\]; expected \['bias_hh_l0', ")
    check(without("bias_hh_l0"), r"^weights lacks \['bias_hh_l0'\]")
    check(weights, r"^weights lacks \['weight_hh_l1', 'weight_ih_l1'\]", layer=1)
    check(weights, r"^weights lacks .*'weight_ih_l0_reverse'", reverse=True)
    check(weights, r"^layer is -1; expected at least 0", layer=-1)
    check(weights | {"weight_hr_l0": None}, r"^weights has unexpected \['weight_hr_l0'\]; expected ")
    check([weights], r"^weights is a list; expected a module of PyTorch or its state_dict\(\)")
    # Of a larger model: where in it such weights are is told.
    nested = {f"{place}.{name}": value for name, value in weights.items() for place in ("module.lstm", "head")}
    hint = r"^weights lacks .*; there is one at prefix='head.' or 'module.lstm.'$"
    check(nested, hint)
    check(nested, hint, prefix="lstm")
    check(weights, r"^weights lacks .*'net.weight_ih_l0'\]; there is one at prefix=''$", prefix="net")
    cells = {f"cells.1.{name}": value for name, value in convert.to_torch(params, layer=None).items()}
    check(cells, r"^weights lacks .*; there is one at prefix='cells.1.'$")
    check(weights, r"^reverse is True; expected False for a cell", layer=None, reverse=True)
    check(
        weights | {"weight_hh_l0": np.zeros((6, 6))},  # nn.RNN's
        r"^weight_hh_l0 has shape \(6, 6\); expected \[gates \* hidden, hidden\] with 4 gates \(LSTM\) or 3 \(GRU\)",
    )
    check(weights | {"weight_hh_l0": params["recurrent_kernel"]}, rf"^weight_hh_l0 has shape \(6, {rows}\)")
    check(weights | {"weight_ih_l0": params["kernel"]}, rf"^weight_ih_l0 has .*\(5, {rows}\); .*\[{rows}, features\]")
    check(weights | {"bias_hh_l0": np.zeros(7)}, rf"^bias_hh_l0 has shape \(7,\); expected \[{rows}\]")


# Keras: its layers where it is installed, and everywhere its equations, from the sources of 3.15.


def logistic(a):
    return 1.0 / (1.0 + np.exp(-a))


def run_keras_equations(name, weights, x, reset_after=True):
    kernel, recurrent_kernel, bias = weights
    n = recurrent_kernel.shape[0]
    h = c = np.zeros((x.shape[0], n))
    outputs = []
    for t in range(x.shape[1]):
        if name == "lstm":
            i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=-1)
            c = logistic(f) * c + logistic(i) * np.tanh(g)
            h = logistic(o) * np.tanh(c)
        else:
            input_bias, recurrent_bias = bias if reset_after else (bias, np.zeros(3 * n))
            x_z, x_r, x_h = np.split(x[:, t] @ kernel + input_bias, 3, axis=-1)
            h_z, h_r, h_h = np.split(h @ recurrent_kernel + recurrent_bias, 3, axis=-1)
            z, r = logistic(x_z + h_z), logistic(x_r + h_r)
            candidate = np.tanh(x_h + (r * h_h if reset_after else (r * h) @ recurrent_kernel[:, 2 * n :]))
            h = z * h + (1 - z) * candidate
        outputs.append(h)
    return np.stack(outputs, axis=1)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # it writes its settings on import
        yield pytest.importorskip("keras", reason="Keras is one of the libraries to convert from")


@pytest.fixture(params=["equations", "keras"])
def run_keras(request, layer):
    """A function (weights, x, reset_after) -> outputs, and weights' shapes as Keras itself has them."""
    if request.param == "equations":
        return lambda weights, x, reset_after=True: run_keras_equations(layer.name, weights, x, reset_after)
    keras = request.getfixturevalue("keras")

    def run(weights, x, reset_after=True):
        if layer.name == "lstm":
            peer = keras.layers.LSTM(HIDDEN, return_sequences=True)
        else:
            peer = keras.layers.GRU(HIDDEN, return_sequences=True, reset_after=reset_after)
        peer.build(x.shape)
        assert [np.shape(w) for w in peer.get_weights()] == [np.shape(w) for w in weights]
        peer.set_weights(weights)
        np.testing.assert_array_equal(peer.get_weights()[0], weights[0])
        return np.asarray(peer(x))

    return run


def keras_weights(layer, reset_after=True):
    columns = layer.gates * HIDDEN
    bias = (2, columns) if layer.name == "gru" and reset_after else (columns,)
    return [normal(shape, seed) for seed, shape in enumerate([(FEATURES, columns), (HIDDEN, columns), bias])]


def run_reset_before(params, x):
    """The GRU of Cho et al. 2014 in our layout; h' = (1 - z) n + z h."""
    h = np.zeros((x.shape[0], HIDDEN))
    u_r, u_z, u_n = np.split(params["recurrent_kernel"], 3, axis=-1)
    outputs = []
    for t in range(x.shape[1]):
        x_r, x_z, x_n = np.split(x[:, t] @ params["kernel"] + params["bias"], 3, axis=-1)
        r, z = logistic(x_r + h @ u_r), logistic(x_z + h @ u_z)
        h = (1 - z) * np.tanh(x_n + (r * h) @ u_n) + z * h
        outputs.append(h)
    return np.stack(outputs, axis=1)


def test_from_keras(run_keras, layer, ours):
    _, x, _ = ours
    weights = keras_weights(layer)
    params = convert.from_keras(weights)
    assert all(isinstance(value, jax.Array) for value in params.values())
    assert_same(layer.run(params, x)[1], run_keras(weights, x))


def test_to_keras(run_keras, ours):
    params, x, outputs = ours
    weights = convert.to_keras(params)
    assert_same(outputs, run_keras(weights, x))
    assert_equal_params(convert.from_keras(weights), params)


@of_a_gru
def test_from_keras_reset_before(run_keras, layer, ours):
    _, x, _ = ours
    weights = keras_weights(layer, reset_after=False)
    params = {name: np.asarray(value) for name, value in convert.from_keras(weights).items()}
    assert set(params) == {"kernel", "recurrent_kernel", "bias"}
    assert_same(run_reset_before(params, x), run_keras(weights, x, reset_after=False))


@of_a_gru
def test_to_keras_reset_before(run_keras, ours):
    params, x, _ = ours
    params = reset_before(params)
    weights = convert.to_keras(params)
    assert_same(run_reset_before(params, x), run_keras(weights, x, reset_after=False))
    assert_equal_params(convert.from_keras(weights), params)


def test_from_keras_of_a_cudnn_layer(layer):
    """Its kernels are cuDNN's matrices, [hidden, features] of each gate, in Keras' shape; its biases are in one row."""

    def stored(kernel):
        gates = np.split(kernel, layer.gates, axis=1)
        return np.concatenate([np.ravel(gate.T).reshape(gate.shape) for gate in gates], axis=1)

    kernel, recurrent_kernel, bias = keras_weights(layer)
    if layer.name == "lstm":  # which has them twice
        biases, bias = [bias, 2 * bias], bias + 2 * bias
    else:
        biases = list(bias)
    params = convert.from_keras([stored(kernel), stored(recurrent_kernel), np.concatenate(biases)])
    assert_equal_params(params, convert.from_keras([kernel, recurrent_kernel, bias]))


def test_keras_without_bias(layer, ours):
    _, x, _ = ours
    weights = keras_weights(layer)
    params = convert.from_keras(weights[:2])
    assert_same(layer.run(params, x)[1], run_keras_equations(layer.name, [*weights[:2], 0 * weights[2]], x))


def test_keras_gives_its_own_weights(keras, layer, ours):
    """With a layer as Keras makes it, without bias and with its unit_forget_bias."""
    _, x, _ = ours
    for options in ({}, {"use_bias": False}):
        peer = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[layer.name](
            HIDDEN, return_sequences=True, **options
        )
        theirs = np.asarray(peer(x))
        assert_same(layer.run(convert.from_keras(peer.get_weights()), x)[1], theirs)


@of_a_gru
def test_keras_without_bias_does_not_tell_the_reset(layer):
    weights = keras_weights(layer)
    assert "recurrent_bias" in convert.from_keras(weights[:2], reset_after=True)
    assert "recurrent_bias" not in convert.from_keras(weights[:2], reset_after=False)


@of_a_gru
def test_keras_bias_contradicts_reset_after(layer):
    with pytest.raises(ValueError, match=r"^bias has shape \(2, 18\); expected \[18\]"):
        convert.from_keras(keras_weights(layer), reset_after=False)
    with pytest.raises(ValueError, match=r"^bias has shape \(18,\); expected \[2, 18\]"):
        convert.from_keras(keras_weights(layer, reset_after=False), reset_after=True)


def test_keras_errors(layer):
    kernel, recurrent_kernel, bias = keras_weights(layer)
    columns = layer.gates * HIDDEN

    def check(weights, match):
        with pytest.raises(ValueError, match=match):
            convert.from_keras(weights)

    check(2 * [kernel, recurrent_kernel, bias], r"^weights has 6 arrays; expected kernel, recurrent_kernel and")
    check([kernel], r"^weights has 1 arrays")
    check(object(), r"^weights is a object; expected what a layer's get_weights\(\) gives")
    check(
        [kernel, kernel, bias], rf"^recurrent_kernel has shape \(5, {columns}\); expected \[hidden, gates \* hidden\]"
    )
    check([kernel[:, :0], recurrent_kernel[:0, :0], bias[..., :0]], r"^recurrent_kernel has shape \(0, 0\)")
    check([kernel.T, recurrent_kernel, bias], rf"^kernel has shape \({columns}, 5\); expected \[features, {columns}\]")
    check([kernel, recurrent_kernel, bias[..., 1:]], r"^bias has shape .*; expected \[")
    check([kernel, recurrent_kernel, bias[None]], r"^bias has shape .*; expected \[")
    check([kernel, recurrent_kernel, np.float32(0)], rf"^bias has shape \(\); expected \[{columns}\]")


# Flax.


@pytest.fixture
def flax_cell(request):
    return linen.RNN(request.param(features=HIDDEN))


with_flax_cells = pytest.mark.parametrize(
    ("layer", "flax_cell"),
    [("lstm", linen.LSTMCell), ("lstm", linen.OptimizedLSTMCell), ("gru", linen.GRUCell)],
    indirect=True,
)


def flax_params(flax_cell, x):
    params = flax_cell.init(jax.random.key(0), x)["params"]["cell"]
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [normal(leaf.shape, seed) for seed, leaf in enumerate(leaves)])


def run_flax(flax_cell, params, x):
    return flax_cell.apply({"params": {"cell": params}}, x)


@with_flax_cells
def test_from_flax(flax_cell, layer, ours):
    _, x, _ = ours
    theirs = flax_params(flax_cell, x)
    params = convert.from_flax(theirs)
    assert all(isinstance(value, jax.Array) for value in params.values())
    assert_same(layer.run(params, x)[1], run_flax(flax_cell, theirs, x))


@with_flax_cells
def test_to_flax(flax_cell, ours):
    params, x, outputs = ours
    theirs = convert.to_flax(params)
    # Flax would not mind a surplus entry.
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, flax_params(flax_cell, x))
    assert_same(outputs, run_flax(flax_cell, theirs, x))


@with_flax_cells
def test_flax_round_trip(flax_cell, layer, ours):
    """What Flax stores comes back; of ours, the GRU's biases of r and z only as their sum."""
    params, x, _ = ours
    theirs = flax_params(flax_cell, x)
    back = convert.to_flax(convert.from_flax(theirs))
    jax.tree.map(np.testing.assert_array_equal, back, theirs)

    if layer.name == "gru":
        recurrent_bias = params["recurrent_bias"].copy()
        recurrent_bias[: 2 * HIDDEN] = 0
        moved = params["recurrent_bias"] - recurrent_bias
        params = params | {"bias": params["bias"] + moved, "recurrent_bias": recurrent_bias}
    assert_equal_params(convert.from_flax(convert.to_flax(params)), params)


def test_flax_errors(layer, ours):
    params, _, _ = ours
    theirs = convert.to_flax(params)
    gate = "g" if layer.name == "lstm" else "n"

    def check(change, match):
        with pytest.raises(ValueError, match=match):
            convert.from_flax(change)

    def kernel(name, shape):
        return theirs | {name: theirs[name] | {"kernel": np.zeros(shape)}}

    less = {name: value for name, value in theirs.items() if name != f"h{gate}"}
    check(less, rf"^params lacks \['h{gate}'\]; expected \['h")
    check(theirs | {"cell": {}}, r"^params has unexpected \['cell'\]; expected \['h")
    whole = {"params": {"cell": less}}  # as linen's RNN has it
    check(whole, rf"^params\['params'\]\['cell'\] lacks \['h{gate}'\]; expected \['h")
    check({"params": {"RNN_0": {"cell": theirs}, "Dense_0": {}}}, r"^params\['params'\] has \['Dense_0', 'RNN_0'\]; .*")
    check([theirs], r"^params is a list; expected a mapping")
    check(theirs | {f"h{gate}": {"kernel": np.zeros((6, 6))}}, rf"^params\['h{gate}'\] lacks \['bias'\]")
    check(theirs | {f"i{gate}": np.zeros((5, 6))}, rf"^params\['i{gate}'\] lacks .*'kernel'")
    check(kernel(f"i{gate}", (4, 6)), rf"^params\['i{gate}'\]\['kernel'\] has shape \(4, 6\); expected \[5, 6\]")
    check(kernel(f"h{gate}", (5, 6)), rf"^params\['h{gate}'\]\['kernel'\] has shape \(5, 6\); expected \[6, 6\]")
    check(kernel(f"h{gate}", ()), rf"^params\['h{gate}'\]\['kernel'\] has shape \(\); expected \[6, 6\]")
    bias = theirs | {f"h{gate}": theirs[f"h{gate}"] | {"bias": np.zeros(7)}}
    check(bias, rf"^params\['h{gate}'\]\['bias'\] has shape \(7,\); expected \[6\]")


def test_flax_has_no_bias_where_the_other_map_has_it(layer, ours):
    params, _, _ = ours
    name = {"lstm": "ii", "gru": "hr"}[layer.name]
    theirs = convert.to_flax(params)
    with pytest.raises(ValueError, match=rf"^params\['{name}'\] has unexpected \['bias'\]; expected \['kernel'\]"):
        convert.from_flax(theirs | {name: theirs[name] | {"bias": np.zeros(6)}})


def test_flax_minimal_gated_unit_is_neither():
    cell = linen.MGUCell(features=HIDDEN)
    params = cell.init(jax.random.key(0), jnp.zeros((1, HIDDEN)), jnp.zeros((1, FEATURES)))["params"]
    with pytest.raises(ValueError, match=r"^params has \['hf', 'hn', 'if', 'in'\]; expected the maps of one cell: "):
        convert.from_flax(params)


def nnx_layer(cell):
    """An nnx.RNN with random weights, biases included."""
    layer = nnx.RNN(cell(FEATURES, HIDDEN, rngs=nnx.Rngs(0)))
    state = nnx.state(layer, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    nnx.update(layer, jax.tree.unflatten(tree, [normal(leaf.shape, seed) for seed, leaf in enumerate(leaves)]))
    return layer


with_nnx_cells = pytest.mark.parametrize(
    ("layer", "cell"),
    [("lstm", nnx.LSTMCell), ("lstm", nnx.OptimizedLSTMCell), ("gru", nnx.GRUCell)],
    indirect=["layer"],
)


@with_nnx_cells
def test_from_nnx(layer, cell, ours):
    _, x, _ = ours
    theirs = nnx_layer(cell)
    params = convert.from_flax(nnx.state(theirs, nnx.Param))
    assert_same(layer.run(params, x)[1], theirs(jnp.asarray(x)))
    # All that a user may have at hand, among it states of a random number generator.
    for state in (nnx.state(theirs), nnx.state(theirs.cell), nnx.to_pure_dict(nnx.state(theirs))):
        assert_equal_params(convert.from_flax(state), params)


@with_nnx_cells
def test_to_nnx(layer, cell, ours):
    params, x, _ = ours
    if layer.name == "gru":  # nnx has no bias of hn
        params = params | {"recurrent_bias": params["recurrent_bias"] * (np.arange(3 * HIDDEN) < 2 * HIDDEN)}
    theirs = nnx_layer(cell)
    converted = convert.to_flax(params, cell=f"nnx.{cell.__name__}")
    assert jax.tree.map(jnp.shape, converted) == nnx.to_pure_dict(
        jax.tree.map(jnp.shape, nnx.state(theirs.cell, nnx.Param))
    )
    nnx.update(theirs.cell, converted)
    assert_same(layer.run(params, x)[1], theirs(jnp.asarray(x)))
    back = convert.to_flax(convert.from_flax(converted), cell=f"nnx.{cell.__name__}")
    jax.tree.map(np.testing.assert_array_equal, back, converted)


def test_nnx_errors(layer, ours):
    params, _, _ = ours

    def check(call, match):
        with pytest.raises(ValueError, match=match):
            call()

    other = {"lstm": "nnx.GRUCell", "gru": "nnx.OptimizedLSTMCell"}[layer.name]
    check(lambda: convert.to_flax(params, cell=other), rf"^cell is '{other}'; expected one of \('linen', 'nnx.")
    if layer.name == "gru":
        check(lambda: convert.to_flax(params, cell="nnx.GRUCell"), r"^params\['recurrent_bias'\] is not zero for n")
        theirs = convert.to_flax(params | {"recurrent_bias": np.zeros(3 * HIDDEN)}, cell="nnx.GRUCell")
    else:
        theirs = convert.to_flax(params, cell="nnx.OptimizedLSTMCell")
    columns = layer.gates * HIDDEN
    check(
        lambda: convert.from_flax({"dense_i": theirs["dense_i"]}),
        r"^params lacks \['dense_h'\]; expected \['dense_h', ",
    )
    square = theirs | {"dense_h": theirs["dense_h"] | {"kernel": np.zeros((HIDDEN + 1, columns))}}
    check(
        lambda: convert.from_flax(square),
        rf"^params\['dense_h'\]\['kernel'\] has shape \(7, {columns}\); expected \[hidden, ",
    )


@of_a_gru
def test_refusals_of_a_gru_name_no_lstm(ours):
    params, _, _ = ours
    with_nnx = convert.to_flax(convert.from_flax(nnx.state(nnx_layer(nnx.GRUCell))), cell="nnx.GRUCell")
    for theirs in (convert.to_flax(params), with_nnx):
        for name in theirs:
            less = {other: value for other, value in theirs.items() if other != name}
            for change in (less, theirs | {name: {}}, theirs | {"other": {}}):
                with pytest.raises(ValueError, match=r"^params") as caught:
                    convert.from_flax(change)
                assert "'ig'" not in str(caught.value)


# What holds for all three.

for_each_library = pytest.mark.parametrize("library", ["torch", "keras", "flax"])


def functions(library):
    return getattr(convert, f"from_{library}"), getattr(convert, f"to_{library}")


@for_each_library
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_is_kept(library, draw, dtype):
    from_them, to_them = functions(library)
    params, _, _ = draw()
    with jax.enable_x64(True):
        params = {name: jnp.asarray(value, dtype) for name, value in params.items()}
        theirs = to_them(params)
        assert all(type(leaf) is np.ndarray and leaf.dtype == dtype for leaf in jax.tree.leaves(theirs))
        assert all(value.dtype == dtype for value in from_them(theirs).values())
    # JAX's own rule without float64.
    assert all(value.dtype == "float32" for value in from_them(to_them(draw(dtype=np.float64)[0])).values())


def test_absent_biases_have_the_kernels_dtype(draw):
    params, _, _ = draw(dtype=np.float16)
    weights = {name: array for name, array in convert.to_torch(params).items() if name.startswith("weight")}
    for converted in (convert.from_torch(weights), convert.from_keras(convert.to_keras(params)[:2])):
        assert converted.keys() == params.keys()
        assert all(value.dtype == "float16" for value in converted.values())


@for_each_library
def test_nothing_is_shared(library, draw):
    from_them, to_them = functions(library)
    # One feature: a kernel that is laid out the same after transposing.
    params, _, _ = draw(features=1)
    before = {name: value.copy() for name, value in params.items()}
    theirs = to_them(params)
    converted = from_them(theirs)
    kept = {name: np.array(value) for name, value in converted.items()}
    for array in jax.tree.leaves(theirs):
        assert array.flags.c_contiguous
        array += 1
    assert_equal_params(params, before)
    assert_equal_params(converted, kept)


@for_each_library
def test_errors_of_our_params(library, layer, ours):
    params, _, _ = ours
    _, to_them = functions(library)
    columns = layer.gates * HIDDEN

    def check(change, match):
        with pytest.raises(ValueError, match=match):
            to_them(change)

    for name in ("kernel", "recurrent_kernel", "bias"):
        less = {key: value for key, value in params.items() if key != name}
        check(less, rf"^params lacks \['{name}'\]; expected \['bias', 'kernel', 'recurrent_kernel'\]")
    check(params | {"peephole": params["bias"]}, r"^params has unexpected \['peephole'\]; expected")
    check({"forward": params}, r"^params lacks \[.*\] and has unexpected \['forward'\]")
    check(
        params | {"recurrent_kernel": np.zeros((6, 6))},
        r"^params\['recurrent_kernel'\] has shape \(6, 6\); expected \[hidden, gates \* hidden\] with 4 gates",
    )
    check(
        params | {"kernel": np.zeros((5, 7))}, rf"^params\['kernel'\] has .*\(5, 7\); expected \[features, {columns}\]"
    )
    check(
        params | {"bias": np.zeros((2, columns))}, rf"^params\['bias'\] has .*\(2, {columns}\); expected \[{columns}\]"
    )
    if layer.name == "gru":
        check(
            params | {"recurrent_bias": np.zeros(7)}, r"^params\['recurrent_bias'\] has shape \(7,\); expected \[18\]"
        )
    else:
        surplus = params | {"recurrent_bias": params["bias"]}
        check(surplus, r"^params of an LSTM has unexpected \['recurrent_bias'\]")


@of_a_gru
@pytest.mark.parametrize(("function", "library"), [(convert.to_torch, "PyTorch"), (convert.to_flax, "Flax")])
def test_no_reset_before_elsewhere(function, library, ours):
    params, _, _ = ours
    with pytest.raises(ValueError, match=rf"^params lacks 'recurrent_bias': .*before.* as {library} has no other"):
        function(reset_before(params))
