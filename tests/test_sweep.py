"""Many runs by one command: which there are, that each is what it would be alone, divergence, bad requests."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import row_lstm
from seqmnist_jax.analysis import table
from seqmnist_jax.analysis.evaluate import evaluate
from seqmnist_jax.cli import text
from seqmnist_jax.devices import memory
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import plan, sweep
from seqmnist_jax.training.replicas import QUIET, Watch
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.training.train import Stopped, train
from seqmnist_jax.workdir.checkpoints import Checkpoints
from seqmnist_jax.workdir.files import WorkdirError

RATES = {"sweep": "{'optimizer.learning_rate': (0.01, 0.002)}", "optimizer.ema_decay": 0.9}


def small_config(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "embedded",
            "model.hidden_size": 8,
            "train.batch_size": 16,
            "train.steps": 20,
            "train.eval_every": 10,
            **changes,
        }
    )
    return config


def run_sweep(folder, seeds=None, **changes):
    config = small_config(**changes)
    swept = plan.build_sweep(config, seeds)
    lines = []
    members = plan.build_points(config, swept)
    summary = sweep.train_sweep(swept, members, folder, watch=Watch(say=lines.append))
    return summary, members, lines


def final_params(folder, run):
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return restore_state(checkpoints, checkpoints.last_step(), run.learner.template).params


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(np.asarray(y)).max())


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache_dir):
    """Two rates, two seeds: a folder, its summary and members."""
    folder = tmp_path_factory.mktemp("swept")
    return folder, *run_sweep(folder, "1-2", **RATES)


def test_one_program_and_one_folder_each(swept):
    folder, summary, members, lines = swept
    assert lines[0].startswith("4 runs in 1 program,")
    assert len(members) == 4
    names = {path.name for path in (folder / "replicas").iterdir()}
    assert names == {f"seed={seed},learning_rate={rate}" for seed in (1, 2) for rate in (0.01, 0.002)}
    assert json.loads((folder / "summary.json").read_text()) == summary
    told = [json.loads((folder / "replicas" / name / "summary.json").read_text()) for name in names]
    assert len({one["test_loss"] for one in told}) == 4, "another seed gives another run"


def test_each_is_what_it_is_alone(swept, tmp_path):
    folder, _, members, _ = swept
    member = members[3]
    alone = train(member.run, tmp_path / member.name, watch=QUIET)
    together = json.loads((folder / "replicas" / member.name / "summary.json").read_text())
    params = final_params(folder / "replicas" / member.name, member.run)
    assert_close(params, final_params(tmp_path / member.name, member.run), 1e-4)
    assert together["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-3)
    assert together["identity"] == alone["identity"]
    assert (together["replicas"], alone["replicas"]) == (4, 1)


def test_replicas_are_runs_like_any(swept):
    folder, _, members, _ = swept
    result = evaluate(folder / "replicas" / members[1].name)
    stored = json.loads((folder / "replicas" / members[1].name / "summary.json").read_text())
    assert result["accuracy"] == stored["test_accuracy"]
    rows = table.rows(table.find([str(folder)]).results)
    assert sorted(row["seeds"] for row in rows) == [[1, 2], [1, 2]]
    with pytest.raises(WorkdirError, match="holds a sweep; name one of its runs"):
        evaluate(folder)


def test_ranking_is_by_validation(swept):
    _, summary, _, _ = swept
    means = [entry["validation"]["mean"] for entry in summary["ranking"]]
    assert means == sorted(means, reverse=True)
    assert [entry["test"]["n"] for entry in summary["ranking"]] == [2, 2]
    assert "optimizer.learning_rate=0.01" in text.sweep(summary)


def test_of_one_recipe_each_run_has_a_line(swept):
    _, summary, members, _ = swept
    assert members[0].name not in text.sweep(summary)
    entry = summary["ranking"][0]
    lines = text.sweep({**summary, "ranking": [entry]}).splitlines()
    shown = {line.split()[0]: float(line.split()[-1]) for line in lines if line.startswith("  seed")}
    assert list(shown) == entry["replicas"]
    assert sum(shown.values()) / 2 == pytest.approx(100 * entry["test"]["mean"], abs=0.01)


def test_finished_sweeps_are_passed_over(swept):
    folder, summary, _, _ = swept
    again, _, lines = run_sweep(folder, "1-2", **RATES)
    assert again == summary
    assert any("is finished" in line for line in lines)
    assert not any("Compiled" in line for line in lines)


def test_recipes_of_which_a_seed_diverged_come_last(swept, tmp_path):
    folder = shutil.copytree(swept[0], tmp_path / "sweep")
    best, other = (entry["changes"]["optimizer.learning_rate"] for entry in swept[1]["ranking"])
    lost = folder / "replicas" / f"seed=2,learning_rate={best}"
    (lost / "summary.json").unlink()
    shutil.rmtree(lost / "checkpoints")
    (lost / "diverged.json").write_text(json.dumps({"reason": "Training diverged at step 1"}))
    again, _, _ = run_sweep(folder, "1-2", **RATES)
    found = [(entry["changes"]["optimizer.learning_rate"], entry["diverged"]) for entry in again["ranking"]]
    assert found == [(other, []), (best, [lost.name])]


def test_what_changes_the_program_makes_groups(tmp_path):
    changes = {"sweep": "{'model.hidden_size': (4, 6), 'model.dropout.output_keep': (1.0, 0.9, 0.8)}"}
    config, lines = small_config(**changes), []
    members = plan.build_points(config, plan.build_sweep(config))
    watch = Watch(say=lines.append, should_stop=lambda: True)
    with pytest.raises(Stopped):
        sweep.train_sweep(plan.build_sweep(config), members, tmp_path, watch=watch)
    # Nothing dropped is another program than something dropped.
    assert lines[0].startswith("6 runs in 4 programs")
    assert [member.run.config["model"]["hidden_size"] for member in members] == [4, 4, 4, 6, 6, 6]


def test_a_diverged_replica_hurts_no_other(tmp_path):
    changes = {"sweep": "{'optimizer.learning_rate': (0.01, 3e38)}", "optimizer.name": "sgd"}
    summary, members, lines = run_sweep(tmp_path / "sweep", **changes)
    ((name, reason),) = [(one["name"], one["reason"]) for one in summary["diverged"]]
    assert name == members[1].name
    assert "diverged at step" in reason
    assert any(line.startswith(name) for line in lines)
    alone = train(members[0].run, tmp_path / "alone", watch=QUIET)
    together = json.loads((tmp_path / "sweep" / "replicas" / members[0].name / "summary.json").read_text())
    assert together["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-3)
    assert not (tmp_path / "sweep" / "replicas" / name / "summary.json").exists()
    # Again: what diverged is not tried again, and the table leaves it out.
    assert run_sweep(tmp_path / "sweep", **changes)[0] == summary
    assert len(table.rows(table.find([str(tmp_path / "sweep")]).results)) == 1


@pytest.mark.slow
def test_runs_that_all_diverge_are_reported(tmp_path):
    changes = {"optimizer.learning_rate": 3e38, "optimizer.name": "sgd", "sweep": "{'model.hidden_size': (4, 5)}"}
    summary, members, _ = run_sweep(tmp_path, "1-2", **changes)
    assert [one["name"] for one in summary["diverged"]] == [member.name for member in members]
    assert summary["ranking"] == []
    assert text.sweep(summary).count("DIVERGED") == 4


def test_replicas_that_do_not_fit_train_in_chunks(swept, tmp_path, monkeypatch):
    _, whole, _, _ = swept
    needed = []

    def few(compiled, measure=memory.needed_bytes):
        needed.append(measure(compiled))
        return needed[-1]

    monkeypatch.setattr(memory, "needed_bytes", few)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed[0] - 1 if needed else 2**40)
    rates = {"sweep": "{'optimizer.learning_rate': (0.01, 0.002)}", "optimizer.ema_decay": 0.9}
    summary, _, lines = run_sweep(tmp_path, "1-2", **rates)
    assert any("these 4 replicas train in chunks, of 2 and 2" in line for line in lines)
    assert len(needed) == 3
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert list(map(len, told["together"])) == [2, 2]
    # They stay apart: one that is made anew where more would fit comes to the same bits.
    lost = tmp_path / "replicas" / told["together"][0][1]
    before = np.load(lost / "predictions.npz")["logits"]
    shutil.rmtree(lost)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: 2**40)
        run_sweep(tmp_path, "1-2", **rates)
    np.testing.assert_array_equal(np.load(lost / "predictions.npz")["logits"], before)
    for one, other in zip(summary["ranking"], whole["ranking"], strict=True):
        assert one["test"]["mean"] == pytest.approx(other["test"]["mean"], abs=0.01)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(memory.TooLarge, match=r"need .* MiB available"):
        run_sweep(tmp_path / "none", "1-2", **rates)


@pytest.mark.slow  # of two seeds tests/test_folders.py has the same
def test_a_stopped_sweep_goes_on_where_it_was(swept, tmp_path):
    folder, summary, members, _ = swept
    config = small_config(**{"optimizer.ema_decay": 0.9, "sweep": "{'optimizer.learning_rate': (0.01, 0.002)}"})
    values = plan.build_sweep(config, "1-2")
    seen = []
    with pytest.raises(Stopped, match="Stopped at step"):
        sweep.train_sweep(
            values,
            plan.build_points(config, values),
            tmp_path,
            watch=Watch(
                say=lambda line: None, show=lambda now: seen.append(now.step), should_stop=lambda: seen[-1] >= 10
            ),
        )
    # One of them loses its last checkpoint, as if the process had died among them.
    replica = tmp_path / "replicas" / members[2].name / "checkpoints"
    newest = max(int(path.name) for path in replica.iterdir() if path.name.isdigit())
    for path in sorted((replica / str(newest)).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (replica / str(newest)).rmdir()
    # The ranking of a sweep whose runs go on is none of theirs.
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(Stopped):
        sweep.train_sweep(
            values, plan.build_points(config, values), tmp_path, watch=QUIET._replace(should_stop=lambda: True)
        )
    assert not (tmp_path / "summary.json").exists()
    resumed = sweep.train_sweep(values, plan.build_points(config, values), tmp_path, watch=QUIET)
    for member in members:
        params = (final_params(where / "replicas" / member.name, member.run) for where in (tmp_path, folder))
        assert_close(*params, tolerance=0.0)
    assert [entry["test"] for entry in resumed["ranking"]] == [entry["test"] for entry in summary["ranking"]]


@pytest.mark.parametrize(
    ("text", "seeds"), [("1", (1,)), ("1,2,5", (1, 2, 5)), ("1-4", (1, 2, 3, 4)), ("7, 1-2", (7, 1, 2))]
)
def test_seeds(text, seeds):
    assert plan.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "4-1", "1,1", "1-3,2", "1.5", "-1", "1,,2", "1-99999"])
def test_impossible_seeds(text):
    with pytest.raises(UsageError, match="--seeds"):
        plan.parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'optimizer.learning_rat': (1, 2)}", "Did you mean 'optimizer.learning_rate'"),
        ("{'runtime.backend': ('scan', 'fused')}", "no field that makes a run another"),
        ("{'seed': 3}", "expected a tuple of values"),
        ("{'seed': ()}", "expected a tuple of values"),
        ("{'seed': (1, 1)}", "has 1 of seed twice"),
        ("{'seed': (1,", "expected a mapping"),
        ("[1, 2]", "expected a mapping"),
        (
            "{'optimizer.learning_rate': ('fast',)}",
            "'fast' for optimizer.learning_rate; expected a value of type float",
        ),
        ("{'model.cell': ('lstm', 'gur')}", "Did you mean 'gru'"),
        ("{'optimizer.learning_rate': (0.1, -1.0)}", "optimizer.learning_rate is -1.0"),
        (
            f"{{'seed': {tuple(range(200))}, 'optimizer.learning_rate': {tuple(i / 1000 for i in range(1, 100))}}}",
            "at most",
        ),
    ],
)
def test_impossible_sweeps(text, message):
    config = small_config(sweep=text)
    with pytest.raises(UsageError, match=message):
        plan.build_points(config, plan.build_sweep(config))


def test_seeds_are_named_once():
    with pytest.raises(UsageError, match="both name seeds"):
        plan.build_sweep(small_config(sweep="{'seed': (1, 2)}"), "1-2")
