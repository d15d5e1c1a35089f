"""The clip in each unit and mask, TF1's RMSProp, the schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from seqmnist_jax import rnn
from seqmnist_jax.training.optimizers import build_hyperparameters, build_optimizer, build_unread


def tree(cell="lstm", scale=1.0):
    init = rnn.init_lstm if cell == "lstm" else rnn.init_gru
    params = {
        "rnn": {"layer_0": {"forward": jax.eval_shape(lambda: init(jax.random.key(0), 3, 4))}},
        "norm": {"scale": np.ones(4), "bias": np.ones(4)},
        "dense": {"kernel": np.ones((4, 10)), "bias": np.ones(10)},
    }
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw.standard_normal(leaf.shape), jnp.float32), params)


def clipped(gradients, norm, mask, unit, cell="lstm"):
    """What plain SGD with rate 1 subtracts."""
    config = default.get_config()
    config.model.cell = cell
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1.0
    config.optimizer.clip.norm, config.optimizer.clip.mask, config.optimizer.clip.unit = norm, mask, unit
    optimizer = build_optimizer(config)(build_hyperparameters(config))
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    return jax.tree.map(lambda update: -update, updates)


def norm_of(*tensors):
    return float(np.sqrt(sum((np.asarray(t, np.float64) ** 2).sum() for t in tensors)))


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_a_small_gradient_passes_bit_for_bit():
    gradients = tree(scale=1e-3)
    for unit in ("tensor", "layer", "group"):
        jax.tree.map(same, clipped(gradients, 2.0, "all", unit), gradients)


def test_recurrent_mask_leaves_norm_and_dense_alone():
    gradients = tree(scale=100.0)
    result = clipped(gradients, 2.0, "recurrent", "tensor")
    jax.tree.map(same, (result["norm"], result["dense"]), (gradients["norm"], gradients["dense"]))
    assert norm_of(result["rnn"]["layer_0"]["forward"]["bias"]) == pytest.approx(2.0, rel=1e-5)


def test_all_but_dense_clips_the_norm_layer_too():
    gradients = tree(scale=100.0)
    result = clipped(gradients, 2.0, "all_but_dense", "tensor")
    jax.tree.map(same, result["dense"], gradients["dense"])
    assert norm_of(result["norm"]["scale"]) == pytest.approx(2.0, rel=1e-5)


def test_mask_none_clips_nothing():
    gradients = tree(scale=100.0)
    jax.tree.map(same, clipped(gradients, 2.0, "none", "tensor"), gradients)


def test_unit_tensor_takes_the_lstm_kernels_as_one():
    gradients = tree(scale=100.0)
    layer = clipped(gradients, 2.0, "recurrent", "tensor")["rnn"]["layer_0"]["forward"]
    assert norm_of(layer["kernel"], layer["recurrent_kernel"]) == pytest.approx(2.0, rel=1e-5)
    assert norm_of(layer["bias"]) == pytest.approx(2.0, rel=1e-5)
    before = gradients["rnn"]["layer_0"]["forward"]
    ratio = norm_of(before["kernel"]) / norm_of(before["recurrent_kernel"])
    assert norm_of(layer["kernel"]) / norm_of(layer["recurrent_kernel"]) == pytest.approx(ratio, rel=1e-5)


def test_unit_tensor_takes_each_gru_tensor_alone():
    layer = clipped(tree("gru", scale=100.0), 2.0, "recurrent", "tensor", "gru")["rnn"]["layer_0"]["forward"]
    for tensor in layer.values():
        assert norm_of(tensor) == pytest.approx(2.0, rel=1e-5)


def test_unit_layer_takes_a_layer_as_one_buffer():
    result = clipped(tree("gru", scale=100.0), 2.0, "all", "layer", "gru")
    for layer in (result["rnn"]["layer_0"]["forward"], result["norm"], result["dense"]):
        assert norm_of(*layer.values()) == pytest.approx(2.0, rel=1e-5)


def test_unit_layer_of_models_whose_layers_lie_deeper():
    layer = {"kernel": 100 * jnp.ones((4, 4)), "bias": jnp.ones(4)}
    block = {"norm": dict(layer), "rnn": {"layer_0": {"forward": dict(layer), "backward": dict(layer)}}}
    result = clipped({"hidden": {"dense_0": dict(layer), "dense_1": dict(layer)}, "stage": block}, 2.0, "all", "layer")
    layers = *result["hidden"].values(), result["stage"]["norm"], result["stage"]["rnn"]["layer_0"]
    for one in layers:
        assert norm_of(*jax.tree.leaves(one)) == pytest.approx(2.0, rel=1e-5)


def test_a_clip_of_nothing_has_no_norm():
    config = default.get_config()
    for name, mask, reads in (
        ("linear", "all_but_dense", False),
        ("mlp", "all_but_dense", True),
        ("mlp", "none", False),
    ):
        config.model.name, config.optimizer.clip.mask = name, mask
        assert ("optimizer.clip.norm" not in build_unread(config)) == reads


def test_unit_group_is_one_norm_over_everything_masked():
    gradients = tree(scale=100.0)
    result = clipped(gradients, 2.0, "all", "group")
    assert norm_of(*jax.tree.leaves(result)) == pytest.approx(2.0, rel=1e-5)
    reference, _ = optax.clip_by_global_norm(2.0).update(gradients, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, reference)


def test_a_zero_gradient_stays_zero():
    zeros = jax.tree.map(jnp.zeros_like, tree())
    jax.tree.map(same, clipped(zeros, 1.0, "all", "tensor"), zeros)


def test_rmsprop_is_that_of_tf1():
    """Mean square from one, decay 0.9, epsilon 1e-10 inside the root, no momentum."""
    config = default.get_config()
    config.optimizer.clip.mask = "none"
    config.optimizer.learning_rate = 0.02
    optimizer = build_optimizer(config)(build_hyperparameters(config))
    params = {"dense": {"kernel": jnp.array([1.0, -2.0, 3.0])}}
    state = optimizer.init(params)
    value, mean_square = np.array([1.0, -2.0, 3.0]), np.ones(3)
    for step in range(5):
        gradient = np.array([0.5, -0.1 * step, 1e-6])
        updates, state = optimizer.update({"dense": {"kernel": jnp.asarray(gradient, jnp.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        value = value - 0.02 * gradient / np.sqrt(mean_square + 1e-10)
    np.testing.assert_allclose(params["dense"]["kernel"], value, rtol=1e-6)


def rates(config, count):
    config.optimizer.name = "sgd"
    config.optimizer.clip.mask = "none"
    optimizer = build_optimizer(config)(build_hyperparameters(config))
    gradient = {"dense": {"kernel": jnp.ones(1)}}
    state, found = optimizer.init(gradient), []
    for _ in range(count):
        updates, state = optimizer.update(gradient, state)
        found.append(-float(updates["dense"]["kernel"][0]))
    return found


def test_warmup_and_cosine():
    config = default.get_config()
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.learning_rate = 0.5
    config.optimizer.warmup_steps = 4
    config.train.steps = 20
    found = rates(config, 21)
    assert found[0] == 0.0
    assert found[4] == pytest.approx(0.5) == max(found)
    assert found[12] == pytest.approx(0.5 * (0.5 + 0.5 * 0.01), rel=1e-3)
    assert found[20] == pytest.approx(0.005, rel=1e-3)


def test_a_drop():
    config = default.get_config()
    config.optimizer.schedule = "drop"
    config.optimizer.learning_rate, config.optimizer.final_fraction = 0.5, 0.1
    config.optimizer.drop_steps = 3
    assert rates(config, 5) == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05])


@pytest.mark.slow
def test_hyperparameters_may_be_traced():
    """The numbers are leaves: one compiled update serves all of their values, and vmap sweeps them."""
    config = default.get_config()
    make, hyper = build_optimizer(config), build_hyperparameters(config)
    gradients = tree(scale=10.0)

    def update(hyper):
        optimizer = make(hyper)
        return optimizer.update(gradients, optimizer.init(gradients), gradients)[0]

    swept = hyper.replace(learning_rate=jnp.array([1e-3, 1e-2]), clip_norm=jnp.array([1.0, 0.1]))
    axes = jax.tree.map(lambda leaf: 0 if isinstance(leaf, jax.Array) else None, swept)
    together = jax.vmap(update, in_axes=(axes,))(swept)
    for i in range(2):
        alone = update(hyper.replace(learning_rate=swept.learning_rate[i], clip_norm=swept.clip_norm[i]))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), together, alone)


def test_recurrent_parameters_have_a_rate_of_their_own_and_no_decay():
    config = default.get_config()
    config.model.cell = "exp_rnn"
    config.optimizer.name = "adamw"
    config.optimizer.clip.mask = "none"
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.5, 0.1
    params = {"rnn": {"layer_0": {"forward": {"kernel": jnp.ones((2, 2)), "skew": jnp.ones(3)}}}, "skew": jnp.ones(3)}
    gradients = jax.tree.map(jnp.ones_like, params)
    found = {}
    for rate in (1.0, 0.25):
        config.optimizer.recurrent_rate = rate
        optimizer = build_optimizer(config)(build_hyperparameters(config))
        found[rate], _ = optimizer.update(gradients, optimizer.init(params), params)
    whole, slow = (found[rate]["rnn"]["layer_0"]["forward"] for rate in (1.0, 0.25))
    np.testing.assert_allclose(whole["kernel"], -0.5 * (1 + 0.1), rtol=1e-5)
    np.testing.assert_allclose(whole["skew"], -0.5, rtol=1e-5)
    same(slow["skew"], 0.25 * whole["skew"])
    same(slow["kernel"], whole["kernel"])
    same(found[1.0]["skew"], found[0.25]["skew"])


def test_a_recurrent_matrix_does_not_decay():
    config = default.get_config()
    config.model.cell, config.optimizer.name = "lru", "adamw"
    optimizer = build_optimizer(config)(build_hyperparameters(config))
    params = {"rnn": {"nu": jnp.ones((2, 2)), "kernel": jnp.ones((2, 2))}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert not np.any(updates["rnn"]["nu"])
    assert np.all(updates["rnn"]["kernel"] < 0)
