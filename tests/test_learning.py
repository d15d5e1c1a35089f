"""What steps learn from: dropout, random lengths, AdamW, recorded norms, deeper models, selection on test images."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seqmnist_jax
from configs import default, row_lstm
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import train as training
from seqmnist_jax.training.optimizers import DROPOUT_PLACES, build_hyperparameters, build_optimizer, clip_state
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import TrainMetrics, restore_state
from seqmnist_jax.training.step import train_step
from seqmnist_jax.workdir.checkpoints import Checkpoints

BATCH, TIME = 8, 28
DROPOUT = {"model.dropout.input_keep": 0.8, "model.dropout.output_keep": 0.7, "model.dropout.state_keep": 0.6}
ALL_KEPT = dict.fromkeys(DROPOUT, 1.0)
STILL = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.0, "model.norm": "none"}


def small_config(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "embedded",
            "model.hidden_size": 8,
            "train.batch_size": BATCH,
            "train.steps": 8,
            "train.eval_every": 4,
            **changes,
        }
    )
    return config


def started(**changes):
    """A run's learner, its first state, and a jitted step over batches of its training images."""
    run = build_run(small_config(**changes))
    part = run.task.part("train")
    step = jax.jit(functools.partial(train_step, run.learner.spec))

    def take(state, batch):
        """The state after one step on the batch of this number, its metrics its own."""
        x, labels = inputs(batch)
        state, finite = step(state.replace(metrics=TrainMetrics.empty()), run.learner.hyper, x, labels)
        assert bool(finite)
        return state

    def inputs(batch):
        rows = slice(batch * BATCH, (batch + 1) * BATCH)
        return run.learner.view(jnp.asarray(part.images[rows])), jnp.asarray(part.labels[rows], jnp.int32)

    return SimpleNamespace(run=run, learner=run.learner, state=jax.jit(run.learner.init)(), take=take, inputs=inputs)


def loss_of(state):
    return float(state.metrics.compute()["loss"])


def assert_same_state(a, b):
    a, b = (s.replace(key=jax.random.key_data(s.key)) for s in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def train_in(folder, stop_at=None, **changes):
    """A quiet run in a folder, a step a dispatch; asked to stop once `stop_at` steps are done."""
    changes = {"runtime.dispatch_seconds": 1e-9, "runtime.checkpoint_every": 1, **changes}
    done = [0]
    watch = QUIET._replace(
        show=lambda now: done.append(now.step), should_stop=lambda: stop_at is not None and done[-1] >= stop_at
    )
    return training.train(build_run(small_config(**changes)), folder, watch=watch)


def events(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in rows]


def final_state(folder, **changes):
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return restore_state(checkpoints, checkpoints.last_step(), build_run(small_config(**changes)).learner.template)


class Spy:
    """A model that notes how it is applied."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def apply(self, variables, x, **options):
        self.seen.append(options)
        return self.model.apply(variables, x, **options)


def spied_steps(count, **changes):
    """What the model was given at each of `count` steps taken outside jit, and the states after them."""
    case = started(**changes)
    spy, state, states = Spy(case.learner.model), case.state, []
    learning = case.learner.spec._replace(model=spy)
    for batch in range(count):
        x, labels = case.inputs(batch)
        state, _ = train_step(learning, state.replace(metrics=TrainMetrics.empty()), case.learner.hyper, x, labels)
        states.append(state)
    return case, spy.seen, states


def traced(**changes):
    """What the model is given in a step that is only traced, so that nothing is compiled."""
    run = build_run(small_config(**changes))
    learner, part = run.learner, run.task.part("train")
    spy = Spy(learner.model)
    spec = learner.spec._replace(model=spy)
    x, labels = learner.view(part.images[:BATCH]), part.labels[:BATCH].astype(np.int32)
    jax.eval_shape(lambda s: train_step(spec, s, learner.hyper, x, labels), learner.template)
    return run, spy.seen[0]


# Dropout.


def test_keeping_all_is_training_without_dropout_bit_for_bit():
    plain, kept = started(), started(**ALL_KEPT)
    assert kept.learner.spec.drops == frozenset()
    a, b = plain.state, kept.state
    for batch in range(3):
        a, b = plain.take(a, batch), kept.take(b, batch)
    assert_same_state(a, b)


def test_what_is_not_dropped_is_not_asked_for():
    def keep_with(**changes):
        return [None if p is None else pytest.approx(float(p)) for p in traced(**changes)[1]["keep"]]

    assert keep_with(**ALL_KEPT) == [None, None, None]
    assert keep_with(**{"model.dropout.output_keep": 0.5}) == [None, 0.5, None]
    assert keep_with(**DROPOUT) == [0.8, 0.7, 0.6]


def test_masks_are_fresh_at_every_step_and_follow_from_seed_and_step():
    case = started(**DROPOUT, **STILL)
    state, losses = case.state, []
    for _ in range(4):
        state = case.take(state, batch=0)  # the same images and, at rate zero, the same parameters
        losses.append(loss_of(state))
    assert len(set(losses)) == 4
    again = [loss_of(case.take(case.state.replace(step=jnp.int32(k)), batch=0)) for k in (3, 2, 1, 0)]
    assert again[::-1] == losses
    other = case.state.replace(key=jax.random.key(1))
    assert loss_of(case.take(other, batch=0)) != losses[0]
    plain = started(**STILL)
    assert loss_of(plain.take(plain.take(plain.state, 0), 0)) == loss_of(plain.take(plain.state, 0))


@pytest.mark.slow
def test_dropout_and_random_lengths_stopped_and_resumed_are_the_same_run(tmp_path):
    changes = {**DROPOUT, "data.min_length": 5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_in(whole, **changes)
    with pytest.raises(training.Stopped):
        train_in(parts, stop_at=5, **changes)
    with Checkpoints(parts / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.last_step() == 5
    train_in(parts, **changes)
    assert_same_state(final_state(parts, **changes), final_state(whole, **changes))
    assert events(parts) == events(whole)


# Random lengths.


@pytest.mark.slow
def test_lengths_are_drawn_anew_from_the_least_to_the_whole():
    case, seen, states = spied_steps(4, **{"data.min_length": 25}, **STILL)
    lengths = np.stack([options["lengths"] for options in seen])
    assert lengths.shape == (4, BATCH)
    assert np.issubdtype(lengths.dtype, np.integer)
    assert set(np.unique(lengths).tolist()) == {25, 26, 27, 28}
    assert len(np.unique(lengths, axis=0)) == 4
    # What is learned from is the sequences cut there.
    x, labels = case.inputs(0)
    model, variables = case.learner.model, case.state.variables
    logits = jnp.concatenate([model.apply(variables, x[b : b + 1, :n]) for b, n in enumerate(lengths[0])])
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert loss_of(states[0]) == pytest.approx(float(expected), rel=1e-5)


def test_without_a_least_length_sequences_are_whole():
    case, options = traced()
    assert case.learner.spec.min_length is None
    assert options["lengths"] is None


def test_the_least_length_of_the_whole_sequence_crops_nothing():
    cut, plain = started(**{"data.min_length": TIME}), started()
    a, b = cut.state, plain.state
    for batch in range(3):
        a, b = cut.take(a, batch), plain.take(b, batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)
    assert loss_of(a) == pytest.approx(loss_of(b), rel=1e-5)


@pytest.mark.parametrize("value", [-1, TIME + 1])
def test_an_impossible_least_length(value):
    with pytest.raises(UsageError, match=r"data\.min_length"):
        build_run(small_config(**{"data.min_length": value}))


# AdamW.


def adam_case(name, decay):
    """Parameters after three steps, and the gradients that led there."""
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "optimizer.name": name,
            "optimizer.weight_decay": decay,
            "optimizer.learning_rate": 0.03,
            "optimizer.clip.mask": "none",
        }
    )
    rng = np.random.default_rng(0)
    shapes = {
        "rnn": {"layer_0": {"forward": {"kernel": (3, 8), "recurrent_kernel": (2, 8), "bias": (8,)}}},
        "norm": {"scale": (2,), "bias": (2,)},
        "dense": {"kernel": (2, 10), "bias": (10,)},
    }

    def noise():
        return jax.tree.map(lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=_is_shape)

    start, gradients = noise(), [noise() for _ in range(3)]
    optimizer = build_optimizer(config)(build_hyperparameters(config))
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return start, gradients, params


def _is_shape(node):
    return isinstance(node, tuple)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_takes_the_decay_off_kernels_beside_the_update(decay):
    start, gradients, found = adam_case("adamw", decay)
    rate, beta1, beta2, epsilon = 0.03, 0.9, 0.999, 1e-8

    def by_hand(path, p, *gs):
        p, m, v = p.astype(np.float64), 0.0, 0.0
        own = decay if path[-1].key in ("kernel", "recurrent_kernel") else 0.0
        for t, g in enumerate(gs, start=1):
            m = beta1 * m + (1 - beta1) * g.astype(np.float64)
            v = beta2 * v + (1 - beta2) * g.astype(np.float64) ** 2
            update = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
            p = p - rate * (update + own * p)
        return p

    expected = jax.tree_util.tree_map_with_path(by_hand, start, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_adamw_without_decay_is_adam():
    jax.tree.map(np.testing.assert_array_equal, adam_case("adamw", 0.0)[2], adam_case("adam", 0.3)[2])


# The norms on record.


def test_gradient_norms_are_those_of_the_last_steps():
    window, count = 4, 6
    case = started(**STILL, **{"train.eval_every": window, "optimizer.clip.norm": 1.0})
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(case.state.params)[0]
    ]
    kernels = [i for i, name in enumerate(names) if name.startswith("rnn/") and name.endswith("kernel")]
    others = [[i] for i, name in enumerate(names) if name.startswith("rnn/") and i not in kernels]
    assert len(kernels) == 2

    @jax.jit
    def raw_norms(params, x, labels):
        def loss(params):
            logits = case.learner.model.apply({"params": params}, x)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(jax.grad(loss)(params))])

    raw = np.stack([np.asarray(raw_norms(case.state.params, *case.inputs(k))) for k in range(count)])
    # A threshold that some steps pass and others do not.
    largest = np.max([np.linalg.norm(raw[:, group], axis=1) for group in (kernels, *others)], axis=0)
    threshold = float(np.sort(largest)[2:4].mean())
    clipped = raw.copy()
    for group in (kernels, *others):
        norm = np.linalg.norm(raw[:, group], axis=1, keepdims=True)
        clipped[:, group] *= threshold / np.maximum(norm, threshold)

    hyper = case.learner.hyper.replace(clip_norm=jnp.float32(threshold))
    step = jax.jit(functools.partial(train_step, case.learner.spec))
    state = case.state
    assert state.gradient_norms.shape == (window, 2, len(names))
    for k in range(count):
        state, _ = step(state, hyper, *case.inputs(k))
        np.testing.assert_array_equal(state.gradient_norms[k % window], np.stack(clip_state(state.opt_state)))
    norms = np.asarray(state.gradient_norms)
    for k in range(count - window, count):
        np.testing.assert_allclose(norms[k % window, 0], raw[k], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(norms[k % window, 1], clipped[k], rtol=1e-4, atol=1e-7)
    assert (norms[:, 1] <= norms[:, 0]).all()
    metrics = state.metrics.compute()
    assert float(metrics["clipped_share"]) == pytest.approx((largest > threshold).mean()) == pytest.approx(0.5)
    assert float(metrics["gradient_norm"]) == pytest.approx(np.linalg.norm(raw, axis=1).mean(), rel=1e-4)


def test_clipped_share_is_that_of_the_rows_that_differ(tmp_path):
    changes = {"optimizer.clip.norm": 0.15, "train.steps": 4, "train.eval_every": 4}
    train_in(tmp_path, **changes)
    norms = np.asarray(final_state(tmp_path, **changes).gradient_norms)
    share = (norms[:, 1] < norms[:, 0]).any(axis=1).mean()
    row = next(row for row in events(tmp_path) if row["split"] == "train")
    assert row["clipped_share"] == pytest.approx(share)


# Impossible values.


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("place", DROPOUT_PLACES)
def test_an_impossible_probability(place, value):
    with pytest.raises(UsageError, match=rf"model\.dropout\.{place}"):
        build_run(small_config(**{f"model.dropout.{place}": value}))


@pytest.mark.parametrize("name", ["num_layers", "unroll"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_impossible_number_of_layers_or_steps(name, value):
    with pytest.raises(UsageError, match=rf"model\.{name}"):
        build_run(small_config(**{f"model.{name}": value}))


@pytest.mark.parametrize("selection", ["test:0", "test:x", "test:-1", "test:"])
def test_an_impossible_selection(selection):
    with pytest.raises(UsageError, match=r"data\.selection"):
        build_run(small_config(**{"data.selection": selection}))


# Whole runs.


@pytest.mark.slow
def test_two_layers_both_ways_train_and_are_restored(tmp_path):
    changes = {"model.num_layers": 2, "model.bidirectional": True, "model.norm": "batch"}
    summary = train_in(tmp_path, **changes, **DROPOUT, **{"train.steps": 4})
    state = final_state(tmp_path, **changes, **DROPOUT)
    assert set(state.params["rnn"]) == {"layer_0", "layer_1"}
    assert set(state.params["rnn"]["layer_1"]) == {"forward", "backward"}
    assert state.params["rnn"]["layer_1"]["backward"]["kernel"].shape == (16, 32)
    start = build_run(small_config(**changes, **DROPOUT)).learner.init()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params["rnn"], start.params["rnn"])
    assert all(jax.tree.leaves(moved))
    model = seqmnist_jax.load(tmp_path)
    assert model.step == summary["best_step"]
    images = build_run(small_config()).task.part("test").images
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as saved:
        np.testing.assert_allclose(model.logits(images), saved["logits"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(model.predict(images), saved["predictions"])


def test_selection_on_the_first_test_images_says_so(tmp_path):
    changes = {"data.selection": "test:8", "train.steps": 4, "train.eval_every": 2}
    summary = train_in(tmp_path, **changes)
    rows = events(tmp_path)
    assert summary["selected_on"] == "test:8"
    assert summary["validation_accuracy"] is None
    assert summary["dataset"]["selection"] == "test:8"
    assert [(row["step"], row["split"]) for row in rows] == [
        *((step, split) for step in (2, 4) for split in ("train", "test:8")),
        (4, "test"),
    ]
    measured = {row["step"]: row for row in rows if row["split"] == "test:8"}
    best = max(measured, key=lambda s: (measured[s]["accuracy"], -measured[s]["loss"], -s))
    assert summary["best_step"] == best
    # The measure is that of the selected model on just these images.
    part = build_run(small_config()).task.part("test")[:8]
    model = seqmnist_jax.load(tmp_path)
    assert model.step == best
    assert (model.predict(part.images) == part.labels).mean() == pytest.approx(measured[best]["accuracy"])
