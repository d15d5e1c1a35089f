"""What longer recipes add to a step: averaged parameters, smoothed labels, batches in parts, gate biases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqmnist_jax
from configs import row_lstm
from seqmnist_jax import rnn
from seqmnist_jax.analysis.evaluate import evaluate
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import train as training
from seqmnist_jax.training.replicas import Watch
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import data_key, restore_state
from seqmnist_jax.training.step import _gradients
from seqmnist_jax.workdir.checkpoints import Checkpoints


def small_config(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "embedded",
            "model.hidden_size": 8,
            "model.norm": "none",
            "train.batch_size": 12,
            "train.steps": 20,
            "train.eval_every": 10,
            **changes,
        }
    )
    return config


def after(count, **changes):
    """The states before and after `count` steps."""
    run = build_run(small_config(**changes))
    learner, data = run.learner, run.task.part("train")
    state = jax.jit(learner.init)()
    orders, offset, _ = ExampleStream(data_key(state), len(data), run.batch_size).window(0)
    advance = jax.jit(learner.train_steps())
    states = [state]
    for step in range(count):
        start = jnp.int32(offset + step * run.batch_size)
        state, finite = advance(state, learner.hyper, data.images, data.labels, orders, start, jnp.int32(1))
        assert finite
        states.append(state)
    return states


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_average_follows_the_parameters():
    states = after(6, **{"optimizer.ema_decay": 0.3})
    average = states[0].params
    assert_close(states[0].ema_params, average)
    for step, state in enumerate(states[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * np.asarray(a, np.float64) + (1 - d) * p, average, state.params)
        assert_close(state.ema_params, average, rtol=1e-5, atol=1e-7)
    assert states[-1].variables["params"] is states[-1].ema_params


def test_average_changes_nothing_about_training():
    plain, averaged = after(3)[-1], after(3, **{"optimizer.ema_decay": 0.99})[-1]
    assert_close(plain.params, averaged.params, rtol=0, atol=0)
    assert plain.ema_params is None


def test_average_is_what_is_measured_saved_and_resumed(tmp_path):
    changes = {"optimizer.ema_decay": 0.9}

    def run_into(folder, stop_at=None):
        asked = []
        return training.train(
            build_run(small_config(**changes)),
            folder,
            watch=Watch(
                say=lambda line: None,
                show=lambda now: asked.append(now.step),
                should_stop=lambda: stop_at is not None and asked[-1] >= stop_at,
            ),
        )

    summary = run_into(tmp_path / "whole")
    assert evaluate(tmp_path / "whole")["accuracy"] == summary["test_accuracy"]
    model = seqmnist_jax.load(tmp_path / "whole")
    with Checkpoints(tmp_path / "whole" / "checkpoints", read_only=True) as checkpoints:
        state = restore_state(checkpoints, model.step, build_run(small_config(**changes)).learner.template)
    assert_close(model.params, state.ema_params, rtol=0, atol=0)
    assert any(
        np.any(np.asarray(a) != np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (model.params, state.params)), strict=True)
    )

    with pytest.raises(training.Stopped):
        run_into(tmp_path / "parts", stop_at=10)
    resumed = run_into(tmp_path / "parts")
    assert resumed["test_loss"] == summary["test_loss"]


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_smoothed_labels(smoothing):
    run = build_run(small_config(**{"train.label_smoothing": smoothing}))
    state, data = jax.jit(run.learner.init)(), run.task.part("train")
    images, labels = data.images[:12], data.labels[:12]
    loss, _ = jax.jit(run.learner.gradient_report())(state, run.learner.hyper, images, labels)
    logits = np.asarray(run.learner.predict_logits(12)(state.variables, jnp.asarray(images)), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = log_p[np.arange(12), labels]
    expected = -((1 - smoothing) * right + smoothing * log_p.mean(-1)).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_parts_of_a_batch_add_up_to_it():
    whole = after(3)[-1]
    for parts in (2, 12):
        divided = after(3, **{"train.accumulate": parts})[-1]
        assert_close(divided.params, whole.params, rtol=1e-4, atol=1e-6)
        assert_close(divided.metrics.compute(), whole.metrics.compute(), rtol=1e-4)


def test_parts_drop_different_units():
    changes = {"model.dropout.output_keep": 0.5, "train.accumulate": 2, "train.batch_size": 2}
    run = build_run(small_config(**changes))
    learner, data = run.learner, run.task.part("train")
    twice = learner.view(jnp.stack([data.images[0]] * 2))
    labels = jnp.int32([data.labels[0]] * 2)
    logits = _gradients(learner.spec, jax.jit(learner.init)(), learner.hyper, twice, labels).logits
    assert np.any(np.asarray(logits[0] != logits[1]))


def test_parts_with_random_lengths_and_batch_norm_train():
    state = after(3, **{"train.accumulate": 3, "data.min_length": 5, "model.norm": "batch"})[-1]
    assert int(state.step) == 3
    assert float(np.abs(state.batch_stats["norm"]["mean"]).max()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.accumulate": 5}, "train.accumulate is 5; expected a divisor of train.batch_size = 12"),
        ({"train.accumulate": 0}, "train.accumulate is 0"),
        ({"optimizer.ema_decay": 1.0}, "optimizer.ema_decay is 1.0; expected 0"),
        ({"optimizer.ema_decay": -0.1}, "optimizer.ema_decay is -0.1"),
        ({"train.label_smoothing": 1.0}, "train.label_smoothing is 1.0"),
        ({"train.label_smoothing": float("nan")}, "train.label_smoothing is nan"),
        ({"model.gate_bias": "log-uniform"}, "Did you mean 'log_uniform'"),
        ({"model.gate_bias": "chrono", "model.longest_time_scale": 1}, "model.longest_time_scale is 1"),
        ({"model.name": "transformer"}, "model.name is 'transformer'; expected one of: deep, linear, mlp, rnn, tcn"),
        ({"model.name": "tcn", "model.kernel_size": 1}, "model.kernel_size is 1"),
        ({"model.name": "tcn", "model.dropout.state_keep": 0.5}, "state_keep is 0.5, but a TCN has no such place"),
        ({"model.name": "linear", "model.dropout.output_keep": 0.5}, "output_keep is 0.5, but model.name='linear' has"),
        ({"model.cell_options": "{'dt': 1}"}, "has 'dt', but model.cell is 'lstm'; expected none, for it takes no"),
        ({"model.cell": "lem", "model.cell_options": "{'dtt': 1}"}, "expected one of: dt. Did you mean 'dt'?"),
        (
            {"model.cell": "lem", "model.cell_options": "{'dt': '1'}"},
            "has 'dt': '1'; expected a number, as in {'dt': 0",
        ),
        ({"model.cell": "lem", "model.cell_options": "{'dt': 1e400}"}, "has 'dt': inf; expected a number"),
        ({"model.cell": "lem", "model.cell_options": "dt=1"}, "model.cell_options is 'dt=1'; expected a mapping"),
        ({"model.name": "tcn", "model.cell_options": "{'dt': 1}"}, "model.cell_options"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(UsageError, match=message):
        build_run(small_config(**changes))


def test_chrono_biases_are_uniform_in_the_steps():
    bias = np.asarray(rnn.TIME_SCALES["chrono"](784)(jax.random.key(0), (4000,)), np.float64)
    counts, _ = np.histogram(np.exp(bias), bins=10, range=(1.0, 783.0))
    assert counts.sum() == 4000
    assert np.all(np.abs(counts - 400) < 5 * math.sqrt(4000 * 0.1 * 0.9))


def test_uniform_gates_are_uniform():
    units = 512
    bias = np.asarray(rnn.TIME_SCALES["uniform"](784)(jax.random.key(0), (units,)), np.float64)
    gates = 1 / (1 + np.exp(-bias))
    assert gates.min() >= 1 / units - 1e-6
    assert gates.max() <= 1 - 1 / units + 1e-6
    counts, _ = np.histogram(gates, bins=8, range=(0, 1))
    assert np.all(np.abs(counts - units / 8) < 5 * math.sqrt(units / 8))


@pytest.mark.parametrize("name", list(rnn.TIME_SCALES))
def test_time_scales_reach_the_model(name):
    for cell in ("lstm", "gru", "min_gru"):
        run = build_run(small_config(**{"model.cell": cell, "model.gate_bias": name, "model.hidden_size": 64}))
        bias = np.asarray(run.learner.init().params["rnn"]["layer_0"]["forward"]["bias"])
        assert len(set(bias[bias != 0].tolist())) >= 60
    longest = build_run(small_config(**{"model.gate_bias": "log_uniform", "model.longest_time_scale": 10**6}))
    assert np.asarray(longest.learner.init().params["rnn"]["layer_0"]["forward"]["bias"]).max() > math.log(1000)
