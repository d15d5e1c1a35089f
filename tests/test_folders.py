"""What a folder holds is decided before anything is written: runs, sweeps and their members are never lost."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import row_lstm
from seqmnist_jax.analysis.recorded import is_trial
from seqmnist_jax.analysis.rerun import first_difference
from seqmnist_jax.errors import Interrupted, UsageError
from seqmnist_jax.training import plan, sweep
from seqmnist_jax.training.folders import FINISHED, explaining_full_disk, look
from seqmnist_jax.training.replicas import QUIET, Diverged, Job, Watch
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import Stopped, train, train_replicas
from seqmnist_jax.workdir import caveats, files, provenance
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir.checkpoints import Checkpoints
from seqmnist_jax.workdir.files import WorkdirError
from seqmnist_jax.workdir.lock import Moved

FIELDS = {
    "data.source": "embedded",
    "model.hidden_size": 4,
    "train.batch_size": 8,
    "train.steps": 20,
    "train.eval_every": 10,
}
# A rate at which the first step leads out of the finite numbers.
DIVERGING = {"optimizer.name": "sgd", "optimizer.learning_rate": 3e38, "optimizer.clip.mask": "none"}

# A cell that starts where its root has no finite gradient.
ROOTED = """
import jax.numpy as jnp
from seqmnist_jax import rnn

def step(params, h, x):
    h = x @ params["w"] + jnp.sqrt(h * h)
    return h, h

rooted = rnn.cell(step, lambda key, features, hidden_size: {"w": jnp.zeros((features, hidden_size))})
"""


def config_of(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict({**FIELDS, **changes})
    return config


def run_in(folder, stop_at=None, **changes):
    done = []
    watch = QUIET._replace(
        show=lambda now: done.append(now.step), should_stop=lambda: bool(stop_at and done) and done[-1] >= stop_at
    )
    return train(build_run(config_of(**changes)), folder, watch=watch)


def sweep_in(folder, seeds, stop_at=None, said=None, **changes):
    config = config_of(**changes)
    grid = plan.build_sweep(config, seeds)
    done = []
    watch = Watch(
        say=lambda line: None if said is None else said(line),
        show=lambda now: done.append(now.step),
        should_stop=lambda: bool(stop_at and done) and done[-1] >= stop_at,
    )
    return sweep.train_sweep(grid, plan.build_points(config, grid), folder, watch=watch)


def content(folder):
    """All files of a folder, with their bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_in(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache_dir):
    """A sweep over two seeds."""
    folder = tmp_path_factory.mktemp("two") / "sweep"
    sweep_in(folder, "1-2")
    return folder


def test_an_extended_sweep_leaves_its_finished_runs_alone(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "sweep")
    before = content(folder / "replicas")

    def die(line):
        if line.startswith("Compiled"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_in(folder, "1-3", said=die)
    assert content(folder / "replicas").items() >= before.items()
    summary = sweep_in(folder, "1-3")
    assert content(folder / "replicas").items() >= before.items()
    assert [entry["test"]["n"] for entry in summary["ranking"]] == [3]
    # The new one trains by itself, and gives what it gives alone.
    alone = run_in(tmp_path / "alone", seed=3)
    assert summary_of(folder / "replicas" / "seed=3")["test_loss"] == alone["test_loss"]
    assert first_difference(tmp_path / "alone", folder / "replicas" / "seed=3") is None


def test_a_sweep_asked_in_parts_says_what_its_summary_lacks(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "sweep")
    assert not any("not asked for" in warning for warning in summary_of(folder)["warnings"])
    summary = sweep_in(folder, "2")
    assert summary["warnings"][-1].startswith("Of the runs in the folder 1 were not asked for now")


def test_fields_in_another_order_would_name_other_folders(tmp_path):
    def asked(sweep):
        config = config_of(sweep=sweep)
        grid = plan.build_sweep(config)
        return grid, plan.build_points(config, grid)

    grid, points = asked("{'model.hidden_size': (4, 5), 'seed': (1, 2)}")
    files.write_json(tmp_path / files.SWEEP, {"sweep": grid, "config of one run": points[0].run.config})
    assert sweep.survey(grid, points, tmp_path)[0] == "begun"
    with pytest.raises(WorkdirError, match="swept fields"):
        sweep.survey(*asked("{'seed': (1, 2), 'model.hidden_size': (4, 5)}"), tmp_path)


@pytest.mark.slow
def test_one_that_died_among_the_saves_of_a_report_reports_once(two, tmp_path):
    """Of two, one has saved that its report is made, the other has not."""
    with pytest.raises(Stopped):
        sweep_in(tmp_path / "sweep", "1-2", stop_at=10)
    untold = shutil.copytree(tmp_path / "sweep" / "replicas" / "seed=2", tmp_path / "untold")
    with pytest.raises(Stopped):
        sweep_in(tmp_path / "sweep", "1-2", stop_at=11, **{"runtime.dispatch_seconds": 1e-9})
    later = {path.name for path in (tmp_path / "sweep" / "replicas" / "seed=1" / "checkpoints").iterdir()} - {"10"}
    for name in later:
        shutil.rmtree(tmp_path / "sweep" / "replicas" / "seed=1" / "checkpoints" / name)
    shutil.rmtree(tmp_path / "sweep" / "replicas" / "seed=2")
    untold.rename(tmp_path / "sweep" / "replicas" / "seed=2")
    summary = tmp_path / "sweep" / "summary.json"
    summary.write_text("{}")  # the ranking of a sweep whose runs go on is none of theirs
    with pytest.raises(Stopped):  # before it could report
        sweep_in(tmp_path / "sweep", "1-2", stop_at=1)
    assert not summary.exists()
    saved = tmp_path / "sweep" / "replicas" / "seed=1" / "checkpoints"
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 10
    sweep_in(tmp_path / "sweep", "1-2")
    for name in ("seed=1", "seed=2"):
        assert first_difference(two / "replicas" / name, tmp_path / "sweep" / "replicas" / name) is None


def test_a_member_that_was_removed_is_made_anew_to_the_same_bits(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "sweep")
    shutil.rmtree(folder / "replicas" / "seed=2")
    before = content(folder / "replicas" / "seed=1")
    sweep_in(folder, "1-2")
    assert content(folder / "replicas" / "seed=1") == before
    assert summary_of(folder / "replicas" / "seed=2")["replicas"] == 2, "its time is half of what both take"
    for name in ("seed=1", "seed=2"):
        assert first_difference(two / "replicas" / name, folder / "replicas" / name) is None


@pytest.mark.slow
def test_a_member_that_is_left_out_for_a_while_changes_no_other(two, tmp_path):
    with pytest.raises(Stopped):
        sweep_in(tmp_path, "1-2", stop_at=10, **{"runtime.dispatch_seconds": 1e-9})
    sweep_in(tmp_path, "2")
    assert not (tmp_path / "replicas" / "seed=1" / "summary.json").exists()
    sweep_in(tmp_path, "1-2")
    for name in ("seed=1", "seed=2"):
        assert first_difference(two / "replicas" / name, tmp_path / "replicas" / name) is None


@pytest.mark.slow
def test_who_is_further_on_does_not_go_back_for_who_begins(two, tmp_path):
    with pytest.raises(Stopped):
        sweep_in(tmp_path, "1-2", stop_at=15, **{"runtime.dispatch_seconds": 1e-9})
    shutil.rmtree(tmp_path / "replicas" / "seed=2")
    said = []
    sweep_in(tmp_path, "1-2", said=said.append)
    assert [line for line in said if line.startswith("Resuming at step 15")]
    for name in ("seed=1", "seed=2"):
        assert first_difference(two / "replicas" / name, tmp_path / "replicas" / name) is None


def test_a_run_and_a_sweep_do_not_overwrite_each_other(finished, two, tmp_path):
    for folder in (finished, two):
        shutil.copytree(folder, tmp_path / folder.name)
    before = content(tmp_path)
    with pytest.raises(WorkdirError, match="holds a run"):
        sweep_in(tmp_path / "run", "1-2")
    with pytest.raises(WorkdirError, match="holds a sweep, not one run"):
        run_in(tmp_path / "sweep")
    with pytest.raises(WorkdirError, match=r"holds another sweep.*\n  model\.hidden_size: 4 there, 5 here"):
        sweep_in(tmp_path / "sweep", "1-2", **{"model.hidden_size": 5})
    with pytest.raises(WorkdirError, match="swept fields"):
        sweep_in(tmp_path / "sweep", "1-2", sweep="{'optimizer.learning_rate': (0.1, 0.2)}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file; expected a folder"):
        run_in(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert content(tmp_path) == before


def test_other_data_are_told_with_where_they_were(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name, field in (("data.json", "content_hash"), ("config.json", "data_dir")):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(rf'"{field}": "[^"]*"', f'"{field}": "/of/another"', text))
    with pytest.raises(WorkdirError, match=r"read mnist-5k \(embedded\); this command reads mnist-5k \(embedded"):
        run_in(folder)  # which names a folder that this source does not read
    facts = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({**facts, "source": "idx"}))
    with pytest.raises(WorkdirError, match=r"read the files in /of/another; this command reads mnist-5k \(embedded"):
        run_in(folder)


def test_a_protocol_that_was_another_one_makes_another_run(finished, tmp_path):
    folder, told = shutil.copytree(finished, tmp_path / "run"), r"data\.split: 'first:9' there, 'first:500' here"
    facts = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({**facts, "split": "first:9"}))
    with pytest.raises(WorkdirError, match=told):
        run_in(folder)
    (tmp_path / "kept").mkdir()
    summary = summary_of(finished)
    summary["dataset"]["split"] = "first:9"
    (tmp_path / "kept" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(WorkdirError, match=told):
        run_in(tmp_path / "kept")


def test_results_without_checkpoints_stay(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = content(folder)
    assert run_in(folder) == summary_of(finished)
    with pytest.raises(WorkdirError, match="the result of 20 steps, but no checkpoint"):
        run_in(folder, **{"train.steps": 40})
    assert content(folder) == before
    # As results/ keeps them.
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(finished / "summary.json", kept)
    assert run_in(kept) == summary_of(finished)
    with pytest.raises(WorkdirError, match="seed: 0 there, 1 here"):
        run_in(kept, seed=1)
    (kept / "summary.json").write_text("{}")
    with pytest.raises(WorkdirError, match=r"has summary\.json but no config\.json"):
        run_in(kept)


def test_a_result_whose_checkpoints_are_all_damaged_stays(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for path in folder.glob("checkpoints/*/metadata/metadata"):
        path.write_text("{}")
    with pytest.raises(WorkdirError, match="the result of 20 steps, but no checkpoint"):
        run_in(folder, **{"train.steps": 40})
    assert summary_of(folder) == summary_of(finished)
    assert (folder / "predictions.npz").exists()


@pytest.mark.slow
def test_what_diverged_is_told_to_its_own_config_only(tmp_path):
    with pytest.raises(Diverged, match=r"diverged at step 1: .* Try a lower .* (\S*)/run/diverged.json says more"):
        run_in(tmp_path / "run", **DIVERGING)
    assert str(tmp_path) not in (tmp_path / "run" / "diverged.json").read_text()
    before = content(tmp_path / "run")
    with pytest.raises(Diverged, match=r"has diverged\. Training diverged at step 1"):
        run_in(tmp_path / "run", **DIVERGING)
    assert content(tmp_path / "run") == before
    for steps in (40, 20):
        with pytest.raises(Diverged, match="has diverged"):
            run_in(tmp_path / "run", **DIVERGING, **{"train.steps": steps})
    told = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert (told["step"], told["steps"]) == (1, 40), "it is one of the longer runs, and stands in their row"
    sweep_in(tmp_path / "sweep", "1-2", **DIVERGING)
    with pytest.raises(WorkdirError, match=r"holds another sweep.*\n  optimizer.clip.mask"):
        sweep_in(tmp_path / "sweep", "1-2")


@pytest.mark.slow
def test_equations_that_are_not_finite_from_the_start_are_told_as_such(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rooted.py").write_text(ROOTED)
    with pytest.raises(Diverged, match=r"at step 1: .* gradient norm nan.* no rate will mend it"):
        run_in(tmp_path / "run", **{"model.cell": "rooted:rooted"})


@pytest.mark.slow
def test_a_member_that_diverged_keeps_its_place_in_the_program(tmp_path):
    changes = {"optimizer.name": "sgd", "optimizer.clip.mask": "none", "runtime.dispatch_seconds": 1e-9}
    rates = {**changes, "sweep": "{'optimizer.learning_rate': (0.1, 3e38, 0.01)}"}
    whole = sweep_in(tmp_path / "whole", None, **rates)
    with pytest.raises(Stopped):
        sweep_in(tmp_path / "stopped", None, stop_at=7, **rates)
    assert sweep_in(tmp_path / "stopped", None, **rates)["ranking"][0]["test"] == whole["ranking"][0]["test"]
    for rate in (0.1, 0.01):
        name = f"replicas/learning_rate={rate}"
        assert first_difference(tmp_path / "whole" / name, tmp_path / "stopped" / name) is None
    # From Python, too, nobody begins again for one that diverged.
    rates = {"a": 0.1, "b": 3e38}
    runs = {name: build_run(config_of(**{**changes, "optimizer.learning_rate": rate})) for name, rate in rates.items()}
    jobs, done = [Job(run, tmp_path / name) for name, run in runs.items()], []
    watch = QUIET._replace(show=lambda now: done.append(now.step), should_stop=lambda: done[-1] >= 7)
    with pytest.raises(Stopped):
        train_replicas(jobs, watch)
    said = []
    assert train_replicas(jobs, Watch(say=said.append))[1] is None
    assert [line for line in said if line.startswith("Resuming at step 10")]


def test_a_folder_that_is_moved_while_its_run_goes_on_ends_it(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def move(now):
        if now.step >= 5 and not moved.exists():
            os.rename(folder, moved)
            folder.mkdir()

    with pytest.raises(Moved, match=r"run is not the folder any more that this run began in"):
        train(build_run(config_of(**{"runtime.dispatch_seconds": 1e-9})), folder, watch=QUIET._replace(show=move))
    assert list(folder.iterdir()) == []
    assert run_in(moved)["steps"] == 20


def test_an_end_between_evaluations_leaves_no_trace_in_a_longer_run(tmp_path):
    changes = {"train.steps": 30}
    run_in(tmp_path / "straight", **changes)
    # What was measured at this end would be the best.
    run_in(tmp_path / "longer", **{**changes, "train.steps": 15})
    with Checkpoints(tmp_path / "longer" / "checkpoints") as checkpoints:
        state = checkpoints.restore(15, build_run(config_of(**changes)).learner.template.shapes())
        checkpoints.save(state, checkpoints.metadata(15), {"accuracy": 0.99, "loss": 0.1})
    summary = run_in(tmp_path / "longer", **changes)
    assert summary["best_step"] == summary_of(tmp_path / "straight")["best_step"]
    assert first_difference(tmp_path / "straight", tmp_path / "longer") is None


def test_times_name_all_devices_they_were_taken_on(tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        run_in(tmp_path, stop_at=10)
    environment = json.loads((tmp_path / "environment.json").read_text())
    monkeypatch.setattr(provenance, "device", lambda: "1 x GPU")
    summary = run_in(tmp_path)
    assert summary["device"] == f"{environment['device']}; then 1 x GPU"
    assert [sitting["first_step"] for sitting in summary["sittings"]] == [1, 11]
    assert {sitting["precision"] for sitting in summary["sittings"]} == {"float32"}
    assert caveats.warnings({}, summary) == ["The run was made in sittings that differ in device, from steps 1, 11 on."]
    summary["sittings"][1]["eval_precision"] = "bfloat16"
    (warning,) = caveats.warnings({}, summary)
    assert "device, precision of evaluation, from" in warning
    del summary["sittings"][0]["eval_precision"]  # as earlier versions, which don't say
    (warning,) = caveats.warnings({}, summary)
    assert "precision" not in warning
    later = json.loads((tmp_path / "environment.json").read_text())
    assert [one["device"] for one in (later, *later["later"])] == [environment["device"], "1 x GPU"]


def test_logits_that_are_not_finite_at_the_test_are_a_divergence(tmp_path, monkeypatch):
    """Without a validation set nothing is measured before."""
    from seqmnist_jax.training.programs import Programs

    evaluate = Programs.evaluate

    def writable(self, variables, split):
        return [(scores, np.array(logits)) for scores, logits in evaluate(self, variables, split)]

    monkeypatch.setattr(Programs, "evaluate", lambda self, *given: _poisoned(writable(self, *given)))
    changes = {"data.split": "first:0"}
    with pytest.raises(Diverged, match=r"at step 20: the loss on test is not finite: the logits of 1 of 500 images"):
        run_in(tmp_path / "one", **changes)
    assert (tmp_path / "one" / "diverged.json").exists()
    summary = sweep_in(tmp_path / "sweep", "1-2", **changes)
    assert [one["name"] for one in summary["diverged"]] == ["seed=1"]
    assert summary["ranking"][0]["test"]["n"] == 1


def _poisoned(found):
    found[0][1][3, 2] = np.inf
    return found


def test_a_result_is_not_given_to_another_checkpoint(tmp_path):
    changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.0, "model.norm": "none", "train.steps": 30}
    before = run_in(tmp_path, **changes)
    assert before["best_step"] == 10
    for path in (tmp_path / "checkpoints" / "10" / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    said = []
    after = train(build_run(config_of(**changes)), tmp_path, watch=Watch(say=said.append))
    told = [*before["warnings"], "Checkpoint 10, once the best, is lost."]
    assert after == {**before, "lost_checkpoints": [10], "warnings": told} == summary_of(tmp_path)
    assert [line for line in said if "checkpoint 10 is lost, whose result the summary has" in line]


def test_a_result_stands_where_another_checkpoint_is_damaged(finished, tmp_path):
    folder, before = shutil.copytree(finished, tmp_path / "run"), summary_of(finished)
    other = next(step for step in (10, 20) if step != before["best_step"])
    (folder / "checkpoints" / str(other) / "metrics" / "metrics").write_text("{")
    said = []
    assert train(build_run(config_of()), folder, watch=Watch(say=said.append)) == before == summary_of(folder)
    assert [line for line in said if line.startswith(f"WARNING: Checkpoint {other} is set aside")]


def test_the_result_of_an_earlier_version_is_known_again(finished, tmp_path):
    summary = summary_of(finished)
    (tmp_path / "kept").mkdir()
    for field in ("train.noise", "model.memory"):
        assert summary["identity"].pop(field) == configs.ADDED[field]
    (tmp_path / "kept" / "summary.json").write_text(json.dumps(summary))
    run = build_run(config_of())
    assert look(run, tmp_path / "kept") == FINISHED
    assert train(run, tmp_path / "kept", watch=QUIET) == summary


def test_a_sweep_is_refused_where_a_file_is(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is a file; expected a folder"):
        sweep_in(tmp_path / "file", "1-2")


def test_trials_are_those_of_a_sweep_and_no_folder_of_that_name(tmp_path):
    for folder in ("trials/a", "sweep/trials/b", "sweep/replicas/c", "my/trials/replicas/d"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "summary.json").write_text('{"test_accuracy": 0.9}')
    (tmp_path / "sweep" / "sweep.json").touch()
    (tmp_path / "my" / "trials" / "sweep.json").write_text('{"trials": false}')
    assert {path.parent.name for path in files.under(tmp_path, "summary.json")} == {"a", "c", "d"}
    own = tmp_path / "my" / "trials" / "replicas" / "d"
    assert not is_trial(own)
    (own / "summary.json").unlink()
    assert not is_trial(own)
    (tmp_path / "my" / "trials" / "sweep.json").unlink()
    (tmp_path / "my" / "sweep.json").touch()
    assert is_trial(own)


def test_a_file_that_can_t_be_written_is_named_by_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.write_bytes(tmp_path / "nowhere" / "page.html", b"")
    assert caught.value.filename == str(tmp_path / "nowhere" / "page.html")


def test_a_full_disk_is_told_of_a_folder_named_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted, match="the same command resumes"), explaining_full_disk([Path("runs/x")]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "runs" / "x" / "checkpoints"))
