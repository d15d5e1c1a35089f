"""Ten training steps of row_lstm against a loop in NumPy float64, backward pass and all, from the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import row_lstm
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import data_key

pytestmark = pytest.mark.full_compiler

STEPS = 10


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def loss_and_gradients(p, x, labels):
    """Forward and backward through LSTM (gates i, f, g, o), frozen norm and dense layer."""
    batch, time, _ = x.shape
    h = np.zeros((batch, p["U"].shape[0]))
    c = np.zeros_like(h)
    tape = []
    for t in range(time):
        i, f, g, o = np.split(x[:, t] @ p["W"] + h @ p["U"] + p["b"], 4, axis=1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        old_c, old_h = c, h
        c = f * c + i * g
        h = o * np.tanh(c)
        tape.append((i, f, g, o, old_c, old_h, c))
    root = np.sqrt(1.0 + 1e-3)
    normed = p["gamma"] * h / root + p["beta"]
    logits = normed @ p["V"] + p["d"]
    shifted = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(batch), labels]).mean()

    d_logits = (probabilities - np.eye(10)[labels]) / batch
    g_ = {name: np.zeros_like(value) for name, value in p.items()}
    g_["V"], g_["d"] = normed.T @ d_logits, d_logits.sum(0)
    d_normed = d_logits @ p["V"].T
    g_["gamma"], g_["beta"] = (d_normed * h / root).sum(0), d_normed.sum(0)
    dh = d_normed * p["gamma"] / root
    dc = np.zeros_like(dh)
    for t in reversed(range(time)):
        i, f, g, o, old_c, old_h, c = tape[t]
        tanh_c = np.tanh(c)
        dc = dc + dh * o * (1 - tanh_c**2)
        dz = np.concatenate(
            [dc * g * i * (1 - i), dc * old_c * f * (1 - f), dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)], axis=1
        )
        g_["W"] += x[:, t].T @ dz
        g_["U"] += old_h.T @ dz
        g_["b"] += dz.sum(0)
        dh, dc = dz @ p["U"].T, dc * f
    return loss, g_


def train(p, batches, rate=0.02, clip=2.0, decay=0.9, epsilon=1e-10):
    mean_square = {name: np.ones_like(value) for name, value in p.items()}
    for x, labels in batches:
        _, grads = loss_and_gradients(p, x, labels)
        # TF1's LSTM holds both kernels in one tensor; its bias is another. The rest is not clipped.
        kernels = np.sqrt((grads["W"] ** 2).sum() + (grads["U"] ** 2).sum())
        bias = np.sqrt((grads["b"] ** 2).sum())
        for names, norm in ((("W", "U"), kernels), (("b",), bias)):
            for name in names:
                grads[name] = grads[name] * clip / max(norm, clip)
        for name in p:
            mean_square[name] = decay * mean_square[name] + (1 - decay) * grads[name] ** 2
            p[name] = p[name] - rate * grads[name] / np.sqrt(mean_square[name] + epsilon)
    return p


def flat(params):
    layer = params["rnn"]["layer_0"]["forward"]
    tree = {
        "W": layer["kernel"],
        "U": layer["recurrent_kernel"],
        "b": layer["bias"],
        "gamma": params["norm"]["scale"],
        "beta": params["norm"]["bias"],
        "V": params["dense"]["kernel"],
        "d": params["dense"]["bias"],
    }
    return {name: np.asarray(value, np.float64) for name, value in tree.items()}


@functools.cache
def run_both(clip):
    config = row_lstm.get_config()
    config.data.source = "embedded"
    config.optimizer.clip.norm = clip
    run = build_run(config)
    learner, data = run.learner, run.task.part("train")
    state = jax.jit(learner.init)()
    orders, offset, _ = ExampleStream(data_key(state), len(data), run.batch_size).window(0)
    start = flat(state.params)
    order = np.asarray(orders)
    batches = []
    for k in range(STEPS):
        chosen = order[k * run.batch_size : (k + 1) * run.batch_size]
        batches.append((data.images[chosen] / 255.0, data.labels[chosen].astype(int)))
    expected = train(dict(start), batches, clip=clip)
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    many = jax.jit(learner.train_steps())
    state, finite = many(state, learner.hyper, images, labels, orders, jnp.int32(offset), jnp.int32(STEPS))
    assert finite
    assert int(state.step) == STEPS
    return start, expected, flat(state.params)


def worst_difference(expected, found):
    return {name: np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max() for name in expected}


def test_ten_steps_of_row_lstm():
    start, expected, found = run_both(clip=2.0)
    differences = worst_difference(expected, found)
    assert max(differences.values()) <= 1e-4, differences
    # The steps themselves are small, so the movement too must agree.
    for name in expected:
        moved = np.abs(expected[name] - start[name]).max()
        assert moved > 5e-4, f"{name} hardly moved in ten steps: {moved}"
        assert np.abs(found[name] - expected[name]).max() <= 2e-3 * moved, name


def test_ten_steps_with_a_clip_that_bites():
    _, free, _ = run_both(clip=2.0)
    _, expected, found = run_both(clip=0.05)
    differences = worst_difference(expected, found)
    assert max(differences.values()) <= 1e-4, differences
    assert np.abs(free["U"] - expected["U"]).max() > 1e-3
