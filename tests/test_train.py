"""Whole runs on the embedded digits: what they leave, determinism, stopping and resuming, bad work directories."""

import datetime
import json
import shutil

import jax
import numpy as np
import pytest

from seqmnist_jax.analysis.compare import compare
from seqmnist_jax.analysis.rerun import first_difference
from seqmnist_jax.analysis.trained import load
from seqmnist_jax.cli import text
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import start
from seqmnist_jax.training import train as training
from seqmnist_jax.training.clock import Clock
from seqmnist_jax.training.replicas import QUIET, Diverged, Watch
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.workdir.checkpoints import Checkpoints
from seqmnist_jax.workdir.files import WorkdirError
from tests import tiny
from tests.test_writers import tensorboard_events


def run_in(folder, stop_at=None, **changes):
    """Trains into a folder, quietly; stops once `stop_at` steps are done."""
    run = build_run(tiny.config(**changes))
    done = []

    watch = QUIET._replace(
        show=lambda now: done.append(now.step), should_stop=lambda: bool(stop_at and done) and done[-1] >= stop_at
    )
    return training.train(run, folder, watch=watch)


def events(folder):
    """metrics.jsonl without its times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in rows]


def final_state(folder, **changes):
    run = build_run(tiny.config(**changes))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return restore_state(checkpoints, checkpoints.last_step(), run.learner.template)


def assert_same_state(a, b):
    a, b = (s.replace(key=jax.random.key_data(s.key)) for s in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """An uninterrupted run, to be run again, and its summary."""
    folder, summary = tiny_run
    return shutil.copytree(folder, tmp_path_factory.mktemp("runs") / "whole"), summary


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was asked to stop where it would have reported; what it evaluated; how often it wrote what it is."""
    folder, evaluated, recorded = tmp_path_factory.mktemp("stopped") / "run", [], []
    evaluate, record = training.Programs.evaluate, start.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training.Programs, "evaluate", lambda self, *given: evaluated.append(given[1]) or evaluate(self, *given)
        )
        patch.setattr(start, "record", lambda *given: recorded.append(record(*given)))
        with pytest.raises(training.Stopped):
            run_in(folder, stop_at=20, **{"runtime.dispatch_seconds": 1e-9})
    return folder, evaluated, recorded


def test_what_a_run_leaves(whole):
    folder, summary = whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "data.json", "metrics.jsonl", "checkpoints", "predictions.npz", "summary.json"} <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert not [name for name in names if name.startswith(".")], "nothing half-written is left"
    fields = {"test_accuracy", "test_loss", "last_test_accuracy", "validation_accuracy", "selected_on", "best_step"}
    fields |= {"steps", "train_seconds", "compile_seconds", "steps_per_second", "parameters", "dataset", "seed"}
    fields |= {"versions", "device", "git_commit", "date"}
    assert fields <= set(summary)
    assert datetime.date.fromisoformat(summary["date"]).year >= 2026
    assert summary["dataset"]["source"] == "embedded"
    assert "NOT on MNIST" in summary["dataset"]["warning"]
    assert summary["dataset"]["sizes"] == {"train": 4000, "validation": 500, "test": 500}
    assert summary["selected_on"] == "validation"


def test_events(whole):
    folder, summary = whole
    rows = events(folder)
    assert [(row["step"], row["split"]) for row in rows] == [
        *((step, split) for step in (20, 40, 60) for split in ("train", "validation")),
        (60, "test"),
    ]
    assert rows[-1]["accuracy"] == summary["test_accuracy"]
    assert all(np.isfinite([row["loss"], row["accuracy"]]).all() for row in rows)


def test_tensorboard_has_a_histogram_of_each_tensors_gradient_norms(whole):
    folder, _ = whole
    found = {
        (value.tag, event.step): value.histo.num
        for event in tensorboard_events(folder)
        for value in event.summary.value
        if value.HasField("histo")
    }
    tensors = ["rnn/layer_0/forward/recurrent_kernel", "rnn/layer_0/forward/bias", "norm/scale", "dense/kernel"]
    for kind in ("raw", "clipped"):
        for tensor in tensors:
            for step in (20, 40, 60):
                assert found[(f"gradient_norm_{kind}/{tensor}", step)] == 20, "one norm for each step since the last"


def test_predictions_are_those_of_the_summary(whole):
    folder, summary = whole
    with np.load(folder / "predictions.npz", allow_pickle=False) as saved:
        assert saved["logits"].shape == (500, 10)
        np.testing.assert_array_equal(saved["predictions"], saved["logits"].argmax(-1))
        assert (saved["predictions"] == saved["labels"]).mean() == pytest.approx(summary["test_accuracy"])


def test_best_checkpoint_is_kept_and_is_the_best(whole):
    folder, summary = whole
    validation = {row["step"]: row for row in events(folder) if row["split"] == "validation"}
    best = max(validation, key=lambda s: (validation[s]["accuracy"], -validation[s]["loss"], -s))
    assert summary["best_step"] == best
    assert summary["validation_accuracy"] == validation[best]["accuracy"]
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step() == best
        assert checkpoints.last_step() == tiny.STEPS


def test_an_earlier_best_survives_later_checkpoints(tmp_path):
    """With a rate that destroys what was learned, the best is neither of the last two."""
    summary = run_in(
        tmp_path,
        **{"train.eval_every": 10, "optimizer.name": "sgd", "optimizer.learning_rate": 2.0, "model.norm": "none"},
    )
    validation = {row["step"]: row["accuracy"] for row in events(tmp_path) if row["split"] == "validation"}
    assert validation[summary["best_step"]] == max(validation.values())
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {50, 60, summary["best_step"]}


@pytest.mark.parametrize("stops", [(1,), pytest.param((20,), marks=pytest.mark.slow), (7, 8, 59)])
def test_stopped_anywhere_and_resumed_gives_the_same_bits(whole, tmp_path, stops):
    one_step = {"runtime.dispatch_seconds": 1e-9}
    for stop in stops:
        with pytest.raises(training.Stopped):
            run_in(tmp_path, stop_at=stop, **one_step)
        assert not (tmp_path / "summary.json").exists()
    summary = run_in(tmp_path, **one_step)
    assert_same_state(final_state(tmp_path), final_state(whole[0]))
    assert events(tmp_path) == events(whole[0])
    times = {"train_seconds", "compile_seconds", "evaluate_seconds", "checkpoint_seconds", "steps_per_second", "date"}
    same = {name: value for name, value in summary.items() if name not in times}
    assert same == {name: value for name, value in whole[1].items() if name not in times}


def test_killed_after_a_report_but_before_it_is_saved(whole, stopped, tmp_path):
    """The last checkpoint then is one of before the report, of a run that was asked to stop there."""
    shutil.copytree(stopped[0], tmp_path / "run")
    before = shutil.copytree(stopped[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(training.Stopped):
        run_in(tmp_path / "run", stop_at=21, **{"runtime.dispatch_seconds": 1e-9})
    assert events(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before.rename(tmp_path / "run" / "checkpoints")
    run_in(tmp_path / "run")
    assert events(tmp_path / "run") == events(whole[0])
    assert_same_state(final_state(tmp_path / "run"), final_state(whole[0]))


def test_killed_between_checkpoints_repeats_its_events(whole, tmp_path, monkeypatch):
    """A process that dies after an evaluation but before its checkpoint leaves events that the resumed run drops."""
    save = Checkpoints.save

    def die_at_40(self, state, metadata, validation, first):
        if int(state["training"]["step"]) == 40:
            raise KeyboardInterrupt
        save(self, state, metadata, validation, first=first)

    monkeypatch.setattr(Checkpoints, "save", die_at_40)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path)
    assert events(tmp_path)[-1]["step"] == 40
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 45, "spl')  # a line cut by the kill
    monkeypatch.undo()
    run_in(tmp_path)
    assert events(tmp_path) == events(whole[0])
    assert_same_state(final_state(tmp_path), final_state(whole[0]))


def test_a_finished_run_is_not_run_again(whole):
    folder, summary = whole
    before = (folder / "metrics.jsonl").read_bytes()
    assert run_in(folder) == summary
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_more_steps_are_another_run_where_the_rate_depends_on_them(tmp_path):
    cosine = {"optimizer.schedule": "warmup_cosine", "optimizer.warmup_steps": 5}
    start.record(build_run(tiny.config(**{"train.steps": 20, **cosine})), tmp_path)
    with pytest.raises(WorkdirError, match=r"train\.steps: 20 there, 40 here"):
        run_in(tmp_path, **{"train.steps": 40, **cosine})
    # With a constant rate they play no part, which is nothing to compare them with.
    with pytest.raises(WorkdirError, match=r"schedule: 'warmup_cosine' there, 'constant' here") as caught:
        run_in(tmp_path, **{"train.steps": 40})
    assert "train.steps" not in str(caught.value)


def test_fewer_steps_than_done_are_refused(whole):
    before = (whole[0] / "config.json").read_bytes()
    with pytest.raises(UsageError, match="60 steps already"):
        run_in(whole[0], **{"train.steps": 10})
    assert (whole[0] / "config.json").read_bytes() == before


def test_another_config_is_refused_by_field_and_the_folder_left_alone(whole):
    folder, _ = whole

    def times():
        return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "lock"}

    before = times()
    with pytest.raises(WorkdirError, match=r"model\.hidden_size: 8 there, 9 here"):
        run_in(folder, **{"model.hidden_size": 9})
    assert times() == before


def test_runtime_is_no_part_of_the_identity(whole):
    run_in(whole[0], **{"runtime.checkpoint_every": 7, "runtime.eval_batch_size": 50})


def test_checkpoints_between_evaluations(whole, tmp_path):
    run_in(tmp_path, **{"runtime.checkpoint_every": 25})
    assert events(tmp_path) == events(whole[0])
    assert_same_state(final_state(tmp_path), final_state(whole[0]))


def test_selection_last(tmp_path):
    summary = run_in(tmp_path, **{"data.selection": "last", "train.steps": 20})
    assert (summary["selected_on"], summary["best_step"]) == ("last", 20)
    assert summary["test_accuracy"] == summary["last_test_accuracy"]
    assert summary["validation_accuracy"] is not None


@pytest.mark.parametrize("schedule", ["constant", pytest.param("warmup_cosine", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("cell", "optimizer"),
    [
        ("lstm", "sgd"),
        ("gru", "adam"),
        pytest.param("lstm", "rmsprop", marks=pytest.mark.slow),  # as the runs above
        pytest.param("lstm", "adam", marks=pytest.mark.slow),
        pytest.param("gru", "rmsprop", marks=pytest.mark.slow),
        pytest.param("gru", "sgd", marks=pytest.mark.slow),
    ],
)
def test_every_cell_optimizer_and_schedule_runs(tmp_path, cell, optimizer, schedule):
    changes = {"model.cell": cell, "optimizer.name": optimizer, "optimizer.schedule": schedule}
    changes |= {} if schedule == "constant" else {"optimizer.warmup_steps": 2}
    summary = run_in(tmp_path, **changes, **{"train.steps": 6, "model.gate_bias": "log_uniform"})
    assert np.isfinite(summary["test_loss"])


DIVERGING = {
    "model.norm": "none",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 3e38,
    "optimizer.schedule": "warmup_cosine",
    "optimizer.warmup_steps": 59,
    "optimizer.clip.mask": "none",
}


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, checkpoint_every):
    """The rate rises from zero until it is too much. That checkpoint may have been saved before."""
    with pytest.raises(Diverged) as caught:
        run_in(tmp_path, **DIVERGING, **{"runtime.checkpoint_every": checkpoint_every})
    report = json.loads((tmp_path / "diverged.json").read_text())
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        last = checkpoints.last_step()
    assert str(caught.value) == f"{report['reason']} {tmp_path / 'diverged.json'} says more."
    assert report["last_checkpoint"] == last == report["step"] - 1 > 0
    assert f"diverged at step {last + 1}" in report["reason"]
    assert f"last good checkpoint is of step {last}" in report["reason"]
    assert "rnn/layer_0/forward/" in report["reason"] or "dense/" in report["reason"]
    assert report["learning_rate"] == pytest.approx(3e38 * last / 59, rel=1e-5)
    assert {"rnn/layer_0/forward/kernel", "dense/bias"} <= set(report["gradient_norms"])
    assert len(report["examples"]) == 16
    assert set(report["examples"]) <= set(range(4000))
    state = final_state(tmp_path, **DIVERGING)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert not (tmp_path / "summary.json").exists()


def test_a_step_out_of_the_finite_numbers_is_not_taken(tmp_path):
    """Loss and gradient of the first step are fine; what they lead to is not."""
    changes = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 100, "runtime.checkpoint_every": 1}
    with pytest.raises(Diverged, match=r"at step 1: the loss is 2.* leads out of the finite numbers"):
        run_in(tmp_path, **{**DIVERGING, **changes})
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_how_often_checkpoints_are_made_does_not_decide_which_is_best(tmp_path):
    """Every evaluated model may turn out the best, whatever the checkpoint interval."""
    results = []
    for every in (1, 7, 1000):
        folder = tmp_path / str(every)
        run_in(folder, **{"train.eval_every": 4, "train.steps": 24, "runtime.checkpoint_every": every})
        summary = json.loads((folder / "summary.json").read_text())
        results.append((summary["best_step"], summary["validation_accuracy"], summary["test_accuracy"]))
    assert len(set(results)) == 1


def test_checkpoints_without_a_config_are_not_adopted(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(WorkdirError, match=r"no config\.json"):
        run_in(tmp_path)


def test_checkpoints_of_another_run_are_not_adopted(whole, tmp_path):
    """The configs agree, but the checkpoint itself says whose it is."""
    start.record(build_run(tiny.config(seed=5)), tmp_path)
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(WorkdirError, match="seed: 0 there, 5 here"):
        run_in(tmp_path, **{"seed": 5})


def test_a_longer_run_takes_the_place_of_the_shorter_ones_result(tmp_path):
    """Where the rate does not depend on the number of steps, it is the same run, continued."""
    drop = {"optimizer.schedule": "drop", "optimizer.drop_steps": 50}
    run_in(tmp_path, **{"train.steps": 30, **drop})
    with pytest.raises(training.Stopped):
        run_in(tmp_path, stop_at=40, **{"runtime.dispatch_seconds": 1e-9, **drop})
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "predictions.npz").exists()
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == tiny.STEPS
    summary = run_in(tmp_path, **drop)
    assert summary["steps"] == tiny.STEPS
    assert [row["step"] for row in events(tmp_path) if row["split"] == "validation"] == [20, 40, 60]
    assert [row["step"] for row in events(tmp_path) if row["split"] == "test"] == [tiny.STEPS]


def test_a_checkpoint_from_another_device_can_be_restored(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    for path in (folder / "checkpoints").rglob("_sharding"):
        path.write_text(path.read_text().replace("cpu:0", "cuda:0").replace("TFRT_CPU_0", "cuda:0"))
    final_state(folder)


def test_a_damaged_last_checkpoint_is_set_aside_and_the_one_before_used(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    for name in ("summary.json", "predictions.npz"):
        (folder / name).unlink()
    for path in (folder / "checkpoints" / "60" / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    said = []
    summary = training.train(build_run(tiny.config()), folder, watch=Watch(say=said.append))
    assert [line for line in said if line.startswith("WARNING: Checkpoint 60 is set aside, in ")]
    assert [line for line in said if line.startswith("Resuming at step 40")]
    assert summary["lost_checkpoints"] == [], "it was made again"
    assert first_difference(whole[0], folder) is None
    assert [path.name for path in (folder / "damaged").iterdir()] == ["60-0"]


EQUAL = {"train.eval_every": 10, "optimizer.name": "sgd", "optimizer.learning_rate": 0.0, "model.norm": "none"}


@pytest.fixture(scope="module")
def best_first(tmp_path_factory):
    """A run of which all models are equal."""
    folder = tmp_path_factory.mktemp("best") / "first"
    assert run_in(folder, **EQUAL, **{"train.steps": 50})["best_step"] == 10, "of equals the earliest"
    return folder


@pytest.mark.parametrize("by_an_earlier_start", [False, True])
def test_a_damaged_best_checkpoint_is_said_to_be_lost(best_first, tmp_path, by_an_earlier_start):
    folder = shutil.copytree(best_first, tmp_path / "run")
    (folder / "checkpoints" / "10" / "metadata" / "metadata").unlink()
    run, said = build_run(tiny.config(**EQUAL)), []
    if by_an_earlier_start:  # that was killed before it saved anything
        with Checkpoints(folder / "checkpoints") as checkpoints:
            assert list(checkpoints.set_aside_damaged(run.learner.template.shapes())) == [10]
    summary = training.train(run, folder, watch=Watch(say=said.append))
    assert [line for line in said if "checkpoint 10 was the best by validation" in line]
    assert summary["lost_checkpoints"] == [10]
    assert summary["best_step"] != 10


@pytest.mark.sampled(1)
@pytest.mark.parametrize("changes", [{"data.selection": "last"}, {"data.split": "first:0"}], ids=["last", "none"])
def test_nothing_is_lost_where_no_checkpoint_is_selected(tmp_path, changes):
    run_in(tmp_path, **EQUAL, **changes, **{"train.steps": 30})
    (tmp_path / "checkpoints" / "20" / "metadata" / "metadata").unlink()
    run, said = build_run(tiny.config(**EQUAL, **changes)), []
    assert training.train(run, tmp_path, watch=Watch(say=said.append))["lost_checkpoints"] == []
    assert not [line for line in said if "by validation" in line]


def test_what_is_lost_counts_only_until_a_better_one(tmp_path):
    learning = {"train.eval_every": 10, "model.norm": "none"}
    whole = run_in(tmp_path / "whole", **learning)
    run_in(tmp_path / "run", **learning, **{"train.steps": 20})
    (tmp_path / "run" / "checkpoints" / "10" / "metadata" / "metadata").unlink()
    summary = training.train(build_run(tiny.config(**learning)), tmp_path / "run", watch=QUIET)
    assert summary["best_step"] == whole["best_step"] > 20
    assert summary["lost_checkpoints"] == []


def test_a_run_and_its_rerun_are_compared_to_the_bit(whole, tmp_path):
    # In the longest dispatches; the shortest, of a step each, are those of runs that stop.
    run_in(tmp_path / "same", **{"runtime.dispatch_seconds": 100.0})
    assert events(tmp_path / "same") == events(whole[0])
    assert_same_state(final_state(tmp_path / "same"), final_state(whole[0]))
    result = compare(whole[0], tmp_path / "same")
    assert result["rerun"] == {"first_difference": None}
    assert "nothing they recorded differs" in text.comparison(result)

    path = tmp_path / "same" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[2:]:
        row["loss"] += 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(whole[0], tmp_path / "same")
    assert found["rerun"]["first_difference"]["step"] == 40
    assert "they differ first at step 40: train/loss is" in text.comparison(found)


def test_a_run_resumes_whose_config_has_a_field_that_is_no_more(whole, stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["runtime"]["tfds_dir"] = "/gone"
    path.write_text(json.dumps(config))
    assert load(folder).step == 20
    run_in(folder)
    assert first_difference(whole[0], folder) is None


def test_a_stop_before_a_report_leaves_it_to_the_resumed_run(whole, stopped, tmp_path, monkeypatch):
    """Who asks to stop does not wait for an evaluation. What the run is is written once, and again where it resumes."""
    folder, evaluated, recorded = stopped
    assert (evaluated, events(folder), len(recorded)) == ([], [], 1)
    again, record = [], start.record
    monkeypatch.setattr(start, "record", lambda *given: again.append(record(*given)))
    run_in(shutil.copytree(folder, tmp_path / "run"))
    assert len(again) == 1
    assert first_difference(whole[0], tmp_path / "run") is None


def test_before_a_long_report_there_is_a_checkpoint(whole, tmp_path, monkeypatch):
    """A stop does not wait for its end."""
    evaluate, ends = training.Programs.evaluate, []

    def dies_at_40(self, *given):
        ends.append(evaluate(self, *given))
        if len(ends) == 2:
            raise KeyboardInterrupt
        return ends[-1]

    monkeypatch.setattr(training, "LONG_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training.Programs, "evaluate", dies_at_40)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.last_step(), checkpoints.validation(40)) == (40, None)
    run_in(tmp_path)
    assert len(ends) > 2
    assert events(tmp_path) == events(whole[0])
    assert_same_state(final_state(tmp_path), final_state(whole[0]))


def test_an_end_between_evaluations_is_measured_though_its_report_was_cut_short(tmp_path, monkeypatch):
    evaluate, ends, length = training.Programs.evaluate, [], {"train.steps": 50}

    def dies_at_50(self, *given):
        ends.append(evaluate(self, *given))
        if len(ends) == 3:
            raise KeyboardInterrupt
        return ends[-1]

    run_in(tmp_path / "whole", **length)
    monkeypatch.setattr(training, "LONG_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training.Programs, "evaluate", dies_at_50)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut", **length)
    run_in(tmp_path / "cut", **length)
    assert first_difference(tmp_path / "whole", tmp_path / "cut") is None
    assert events(tmp_path / "cut") == events(tmp_path / "whole")


def test_a_stop_that_comes_in_a_report_waits_for_no_more_steps(whole, tmp_path, monkeypatch):
    evaluate, asked = training.Programs.evaluate, []
    monkeypatch.setattr(training.Programs, "evaluate", lambda self, *given: asked.append(1) or evaluate(self, *given))
    with pytest.raises(training.Stopped, match="at step 20 of 60"):
        training.train(build_run(tiny.config()), tmp_path, watch=QUIET._replace(should_stop=lambda: bool(asked)))
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.validation(20) is not None
    run_in(tmp_path)
    assert events(tmp_path) == events(whole[0])
    assert_same_state(final_state(tmp_path), final_state(whole[0]))


def test_checkpoints_by_time(tmp_path):
    run_in(tmp_path, **{"runtime.checkpoint_seconds": 1e-6, "runtime.dispatch_seconds": 1e-9, "train.steps": 22})
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {20, 21, 22}


def test_training_makes_no_hidden_copies_between_host_and_device(tmp_path):
    """Once compiled, dispatches move nothing but what is asked for explicitly."""
    run = build_run(tiny.config())
    clock = Clock()
    state = jax.jit(run.learner.init)()
    programs = training.Programs([run], state, clock)
    alive = np.array([True])
    state, step, _ = programs.train(state, 0, 3, alive)
    with jax.transfer_guard("disallow"):
        state, step, alive = programs.train(state, step, 3, alive)
    assert (step, alive.tolist()) == (6, [True])
