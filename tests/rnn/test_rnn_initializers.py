import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models.cells.min_gru import CELL as MIN_GRU

FEATURES, HIDDEN = 28, 64


# Nothing here depends on how a layer runs.
@pytest.fixture(params=["lstm", "gru"], scope="module")
def layer(request, make_layer):
    return make_layer(request.param)


def gate_blocks(array, gates):
    return np.split(np.asarray(array), gates, axis=-1)


@pytest.mark.parametrize("kernel_init", ["glorot_uniform", "orthogonal"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtype(layer, kernel_init, dtype):
    params = layer.init(jax.random.key(0), 5, 6, kernel_init=kernel_init, dtype=dtype)
    columns = layer.gates * 6
    shapes = {"kernel": (5, columns), "recurrent_kernel": (6, columns), "bias": (columns,)}
    if layer.name == "gru":
        shapes["recurrent_bias"] = (columns,)
    assert {name: value.shape for name, value in params.items()} == shapes
    assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}


def test_known_kernel_initialisers():
    assert set(rnn.KERNELS) == {"glorot_uniform", "orthogonal"}


def test_glorot_fills_the_joint_limit(layer):
    params = layer.init(jax.random.key(0), FEATURES, HIDDEN)
    limit = math.sqrt(6 / (FEATURES + HIDDEN + layer.gates * HIDDEN))
    for name in ("kernel", "recurrent_kernel"):
        values = np.asarray(params[name])
        assert 0.995 * limit < values.max() <= limit
        assert -limit <= values.min() < -0.995 * limit
        np.testing.assert_allclose(values.std(), limit / math.sqrt(3), rtol=0.03)
        assert abs(values.mean()) < 0.03 * limit


def test_orthogonal_block_by_block(layer):
    params = layer.init(jax.random.key(0), FEATURES, HIDDEN, kernel_init="orthogonal")
    for block in gate_blocks(params["recurrent_kernel"], layer.gates):
        np.testing.assert_allclose(block.T @ block, np.eye(HIDDEN), atol=1e-5)
    for block in gate_blocks(params["kernel"], layer.gates):
        np.testing.assert_allclose(block @ block.T, np.eye(FEATURES), atol=1e-5)


def test_orthogonal_with_more_features_than_units(layer):
    params = layer.init(jax.random.key(0), 9, 4, kernel_init="orthogonal")
    for block in gate_blocks(params["kernel"], layer.gates):
        np.testing.assert_allclose(block.T @ block, np.eye(4), atol=1e-5)


def test_orthogonal_with_one_feature_is_a_unit_vector_per_gate(layer):
    params = layer.init(jax.random.key(0), 1, HIDDEN, kernel_init="orthogonal")
    for block in gate_blocks(params["kernel"], layer.gates):
        np.testing.assert_allclose(np.linalg.norm(block), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel"])
@pytest.mark.parametrize("kernel_init", ["glorot_uniform", "orthogonal"])
def test_gates_are_drawn_independently(layer, kernel_init, name):
    params = layer.init(jax.random.key(0), HIDDEN, HIDDEN, kernel_init=kernel_init)
    blocks = gate_blocks(params[name], layer.gates) + gate_blocks(params["recurrent_kernel"], layer.gates)
    flat = [block.ravel() for block in (blocks if name == "kernel" else blocks[: layer.gates])]
    correlations = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlations).max() < 0.1


@pytest.mark.parametrize("forget_bias", [1.0, 0.0, 2.5])
def test_forget_bias_is_stored_in_its_quarter_alone(forget_bias):
    bias = np.asarray(rnn.init_lstm(jax.random.key(0), 5, 6, forget_bias=forget_bias)["bias"])
    np.testing.assert_array_equal(bias[6:12], np.full(6, forget_bias))
    np.testing.assert_array_equal(np.delete(bias, np.s_[6:12]), np.zeros(18))


def test_default_biases():
    lstm = rnn.init_lstm(jax.random.key(0), 5, 6)
    np.testing.assert_array_equal(lstm["bias"], np.repeat([0, 1, 0, 0], 6))
    gru = rnn.init_gru(jax.random.key(0), 5, 6)
    np.testing.assert_array_equal(gru["bias"], np.zeros(18))
    np.testing.assert_array_equal(gru["recurrent_bias"], np.zeros(18))


@pytest.mark.parametrize("steps", [2, 28, 784])
def test_time_scales_are_uniform_in_the_logarithm(steps):
    bias = np.asarray(rnn.log_uniform_time_scales(steps)(jax.random.key(0), (4000,)))
    top = math.log(steps)
    assert 0.0 <= bias.min() < 0.01 * top
    assert 0.99 * top < bias.max() <= np.float32(top)
    # A tenth of all units in each tenth of the range, within five standard deviations.
    counts, _ = np.histogram(bias, bins=10, range=(0.0, top * (1 + 1e-6)))
    assert np.all(np.abs(counts - 400) < 5 * math.sqrt(4000 * 0.1 * 0.9))


@pytest.mark.parametrize("steps", [1, 0, -5])
def test_time_scales_need_two_steps(steps):
    with pytest.raises(ValueError, match="sequence_length"):
        rnn.log_uniform_time_scales(steps)


@pytest.mark.parametrize("name", rnn.TIME_SCALES)
@pytest.mark.parametrize("cell", [rnn.LSTM, rnn.GRU, MIN_GRU], ids=["lstm", "gru", "min_gru"])
def test_time_scales_by_name(cell, name):
    def make(time_scales):
        shape = {"num_layers": 2, "bidirectional": False}
        return rnn.init_stack(jax.random.key(0), cell, 2, 8, **shape, time_scales=time_scales)

    jax.tree.map(np.testing.assert_array_equal, make((name, 28)), make(rnn.TIME_SCALES[name](28)))


@pytest.mark.parametrize("given", ["log_uniform", 28, ("log", 28), ("chrono",), ("chrono", 1), ("chrono", "28")])
def test_time_scales_that_are_none_are_named(given):
    with pytest.raises(ValueError, match=r"^time_scales is|^sequence_length is"):
        rnn.init_gru(jax.random.key(0), 2, 8, time_scales=given)


def test_time_scales_of_a_gru_go_into_the_update_gate_alone():
    params = rnn.init_gru(jax.random.key(0), 1, 256, time_scales=rnn.log_uniform_time_scales(784))
    reset, update, candidate = gate_blocks(params["bias"], 3)
    assert np.all((update >= 0) & (update <= np.float32(math.log(784))))
    assert update.max() - update.min() > 0.9 * math.log(784)
    assert not reset.any()
    assert not candidate.any()
    assert not np.asarray(params["recurrent_bias"]).any()


@pytest.mark.parametrize("forget_bias", [1.0, 50.0])
def test_time_scales_of_an_lstm_replace_the_forget_bias_and_mirror_it_at_the_input(forget_bias):
    time_scales = rnn.log_uniform_time_scales(784)
    params = rnn.init_lstm(jax.random.key(0), 1, 256, forget_bias=forget_bias, time_scales=time_scales)
    write, forget, candidate, output = gate_blocks(params["bias"], 4)
    assert np.all((forget >= 0) & (forget <= np.float32(math.log(784))))
    assert forget.max() - forget.min() > 0.9 * math.log(784)
    np.testing.assert_array_equal(write, -forget)
    assert not candidate.any()
    assert not output.any()


def test_time_scales_leave_the_kernels_as_they_are(layer):
    plain = layer.init(jax.random.key(3), 5, 6)
    scaled = layer.init(jax.random.key(3), 5, 6, time_scales=rnn.log_uniform_time_scales(28))
    for name in ("kernel", "recurrent_kernel"):
        np.testing.assert_array_equal(plain[name], scaled[name])


def test_time_scales_hold_the_state_that_long():
    # With zero input and no other weights an update gate of bias b keeps z = sigmoid(b) per step,
    # so after 1 + e^b steps about 1/e of the state is left (exactly 1/4 for two steps).
    bias = jnp.log(jnp.array([1.0, 9.0, 99.0]))
    params = {name: jnp.zeros(shape) for name, shape in {"kernel": (1, 9), "recurrent_kernel": (3, 9)}.items()}
    params |= {"bias": jnp.concatenate([jnp.zeros(3), bias, jnp.zeros(3)]), "recurrent_bias": jnp.zeros(9)}
    _, outputs = rnn.gru(params, jnp.zeros((1, 100, 1)), jnp.ones((1, 3)))
    for unit, steps in enumerate([2, 10, 100]):
        np.testing.assert_allclose(outputs[0, steps - 1, unit], (1 - 1 / steps) ** steps, rtol=1e-4)


@pytest.mark.parametrize("kernel_init", ["glorot_uniform", "orthogonal"])
def test_params_are_a_function_of_the_key(layer, kernel_init):
    def make(seed):
        time_scales = rnn.log_uniform_time_scales(28)
        return layer.init(jax.random.key(seed), 5, 6, kernel_init=kernel_init, time_scales=time_scales)

    jax.tree.map(np.testing.assert_array_equal, make(1), make(1))
    for name in ("kernel", "recurrent_kernel", "bias"):
        assert not np.array_equal(make(1)[name], make(2)[name])


def test_init_under_jit(layer):
    jitted = jax.jit(layer.init, static_argnums=(1, 2))(jax.random.key(1), 5, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, layer.init(jax.random.key(1), 5, 6))


@pytest.mark.parametrize(
    ("features", "hidden", "name"), [(0, 6, "features"), (-1, 6, "features"), (5, 0, "hidden_size")]
)
def test_sizes_below_one_are_named(layer, features, hidden, name):
    with pytest.raises(ValueError, match=rf"^{name} is "):
        layer.init(jax.random.key(0), features, hidden)


def test_unknown_kernel_init_is_named(layer):
    with pytest.raises(ValueError, match=r"kernel_init.*'glorot'.*glorot_uniform"):
        layer.init(jax.random.key(0), 5, 6, kernel_init="glorot")
