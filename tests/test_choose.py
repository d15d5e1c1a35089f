"""Fields of a sweep that go together, hyperparameters that trials choose first, and the page that tells of them."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from benchmarks import bakeoff as bakeoff_page
from configs import bakeoff, row_lstm
from seqmnist_jax.analysis import table
from seqmnist_jax.analysis.evaluate import evaluate
from seqmnist_jax.analysis.rerun import first_difference
from seqmnist_jax.cli import text
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models.build import build_model
from seqmnist_jax.training import jobs, plan, programs, sweep
from seqmnist_jax.training.folders import BEGUN, look
from seqmnist_jax.training.replicas import QUIET, Watch
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import Stopped, train
from seqmnist_jax.workdir.files import WorkdirError
from tests.tiny import QUICK

CELLS = "model.cell, model.hidden_size"
SWEEP = f"{{'{CELLS}': (('gru', 8), ('lstm', 6)), 'seed': (2, 1)}}"
RATES = "{'optimizer.learning_rate': (0.1, 3e38, 0.01)}"
RATE = "optimizer.learning_rate"


def config_of(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "embedded",
            "model.norm": "none",
            "optimizer.name": "sgd",
            "optimizer.clip.mask": "none",
            "model.hidden_size": 4,
            "optimizer.schedule": "warmup_cosine",
            "train.batch_size": 16,
            "train.steps": 20,
            "train.eval_every": 5,
            "sweep": SWEEP,
            "choose": RATES,
            "choose_steps": 10,
            **changes,
        }
    )
    return config


def built(**changes):
    config = config_of(**changes)
    grid = plan.build_sweep(config)
    return grid, plan.build_points(config, grid)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, cache_dir):
    """A sweep of two cells and two seeds, whose rates three trials choose: folder, summary, lines, splits read."""
    folder, lines, splits = tmp_path_factory.mktemp("chosen"), [], []
    with pytest.MonkeyPatch.context() as patch:
        evaluate = programs.Programs.evaluate

        def watched(self, variables, split):
            splits.append((any(line.startswith("Chosen") for line in lines), split))
            return evaluate(self, variables, split)

        patch.setattr(programs.Programs, "evaluate", watched)
        summary = sweep.train_sweep(*built(), folder, watch=Watch(say=lines.append))
    return folder, summary, lines, splits


def read(folder, name="summary.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_names_of_fields_that_go_together_leave_out_what_is_empty():
    cells = """(('gru', ''), ('lru', "{'r_min': 0.5, 'r_max': 0.9}"))"""
    _, points = built(sweep=f"{{'model.cell, model.cell_options': {cells}}}")
    assert [point.name for point in points] == ["cell=gru", "cell=lru,cell_options=r_min=0.5,r_max=0.9"]


@pytest.mark.slow
def test_each_run_and_each_trial_has_its_folder(chosen):
    folder, _, _, _ = chosen
    cells = ("cell=gru,hidden_size=8", "cell=lstm,hidden_size=6")
    names = {path.name for path in (folder / "replicas").iterdir()}
    assert names == {f"{cell},seed={seed}" for cell in cells for seed in (1, 2)}
    tried = {path.name for path in (folder / "trials" / "replicas").iterdir()}
    assert tried == {f"{cell},learning_rate={rate}" for cell in cells for rate in (0.01, 0.1, 3e38)}


def test_the_best_by_validation_is_taken_and_stands_in_the_record(chosen):
    folder, summary, lines, _ = chosen
    for run in (folder / "replicas").iterdir():
        choice, flat = read(run)["choice"], read(run, "config.json")
        assert flat["optimizer"]["learning_rate"] == choice["chosen"][RATE]
        assert (flat["sweep"], flat["choose"], flat["choose_steps"]) == ("", "", 0)
        assert (choice["steps"], choice["seed"]) == (10, 2)
        recipe = run.name.rpartition(",seed=")[0]
        found = {}
        for one in choice["candidates"]:
            trial = folder / "trials" / "replicas" / f"{recipe},learning_rate={one[RATE]}"
            measured = read(trial)["validation_accuracy"] if (trial / "summary.json").exists() else None
            assert one["validation_accuracy"] == measured
            found[one[RATE]] = measured
        assert found.pop(3e38) is None
        assert choice["chosen"][RATE] == max(sorted(found), key=found.get)  # of equal ones the first: the smaller
    assert {entry["choice"]["chosen"][RATE] == entry["changes"][RATE] for entry in summary["ranking"]} == {True}
    assert sum(line.startswith("Chosen for cell=") for line in lines) == 2
    assert "3e+38 (diverged)" in text.sweep(summary)


def test_trials_read_no_test_images(chosen):
    folder, _, _, splits = chosen
    assert {split for tests, split in splits if not tests} == {"validation"}
    assert "test" in {split for tests, split in splits if tests}
    for trial in (folder / "trials" / "replicas").glob("*"):
        assert not (trial / "predictions.npz").exists()
        assert '"test"' not in (trial / "metrics.jsonl").read_text()
    assert not [name for name in read(next((folder / "trials" / "replicas").glob("*0.1"))) if "test_" in name]


def test_nobody_measures_a_trial_on_test_images(chosen):
    trial = next((chosen[0] / "trials" / "replicas").glob("*0.1"))
    with pytest.raises(UsageError, match=r"is a trial.*--split=validation"):
        evaluate(trial)
    assert evaluate(trial, split="validation")["accuracy"] == read(trial)["validation_accuracy"]


def test_tables_leave_trials_out(chosen, tmp_path):
    folder, _, _, _ = chosen
    found = table.find([str(folder)])
    assert found.left_out == []
    rows = table.rows(found.results)
    assert sorted(row["model"] for row in rows) == ["GRU 8", "LSTM 6"]
    assert all(row["seeds"] == [1, 2] and row["learning_rate"] == row["choice"]["chosen"][RATE] for row in rows)
    # Who asks for a trial as for a run is told what it is.
    trial = next((folder / "trials" / "replicas").glob("cell=gru*=0.01"))
    config = config_of(sweep="", choose="", choose_steps=0)
    config.update(read(trial, "config.json"))
    with pytest.raises(WorkdirError, match="holds a trial"):
        train(build_run(config), trial, watch=QUIET)
    stopped = shutil.copytree(folder / "trials", tmp_path / "trials") / "replicas" / trial.name
    (stopped / "summary.json").unlink()
    with pytest.raises(WorkdirError, match="holds a trial"):
        train(build_run(config), stopped, watch=QUIET)


def test_a_stopped_sweep_makes_no_trial_twice_and_ends_alike(chosen, tmp_path):
    folder, summary, _, _ = chosen
    one_cell = {"sweep": f"{{'{CELLS}': (('gru', 8),), 'seed': (2, 1)}}"}
    grid, points = built(**one_cell)
    for stop in (2, 6):  # among the trials, and among the runs
        shown = []
        watch = Watch(
            say=lambda line: None,
            show=lambda now, shown=shown: shown.append(now.step),
            should_stop=lambda shown=shown, stop=stop: len(shown) >= stop,
        )
        with pytest.raises(Stopped):
            sweep.train_sweep(grid, points, tmp_path, watch=watch)
        with pytest.raises(WorkdirError, match="holds a sweep"):
            look(build_run(config_of(sweep="", choose="", choose_steps=0)), tmp_path)
        with pytest.raises(WorkdirError, match="choose_steps: 10 there, 11 here"):
            sweep.survey(*built(**one_cell, choose_steps=11), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials" / "replicas").glob("*/summary.json")}
    assert len(times) == 2
    assert list((tmp_path / "replicas").iterdir()), "the second stop was among the runs"
    resumed = sweep.train_sweep(*built(**one_cell), tmp_path, watch=QUIET)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [entry["choice"] for entry in resumed["ranking"]] == [
        entry["choice"] for entry in summary["ranking"] if entry["changes"]["model.cell"] == "gru"
    ]
    for run in (tmp_path / "replicas").iterdir():
        assert first_difference(folder / "replicas" / run.name, run) is None


def test_what_else_a_folder_may_be_asked_for(chosen, tmp_path):
    folder = shutil.copytree(chosen[0], tmp_path / "sweep")
    lines = []
    again = sweep.train_sweep(*built(), folder, watch=Watch(say=lines.append))
    assert again == chosen[1]
    assert not any("Compiled" in line for line in lines)
    for changes, why in (
        ({"choose": "", "choose_steps": 0}, "candidates"),
        ({"choose": "{'optimizer.learning_rate': (0.1, 3e38)}"}, "candidates"),
        ({"choose": "{'optimizer.weight_decay': (0.1, 0.2)}", "optimizer.name": "adamw"}, "differs in"),
        ({"choose_steps": 11}, "steps"),
    ):
        with pytest.raises((WorkdirError, UsageError), match=why):
            sweep.survey(*built(**changes), folder)
    # A run of the sweep has its choice on record, so that the trials may go.
    shutil.rmtree(folder / "trials")
    with pytest.raises(WorkdirError, match="choose_steps: 10 there, 11 here"):
        sweep.train_sweep(*built(choose_steps=11), folder, watch=QUIET)
    assert sweep.train_sweep(*built(), folder, watch=Watch(say=lines.append)) == chosen[1]
    assert not any("Compiled" in line for line in lines)
    # What is on record counts for other seeds of the recipe too, whatever trials would say now.
    more = {"sweep": f"{{'{CELLS}': (('gru', 8), ('lstm', 6)), 'seed': (1, 3)}}"}
    assert plan.trials_in_words(plan.decide(built(**more)[1], folder)) == ""
    assert sweep.survey(*built(**more), folder)[0] == BEGUN
    # So has one that diverged.
    ended = folder / "replicas" / plan.decide(built()[1], folder)[0].name
    (ended / "summary.json").rename(ended / "diverged.json")
    decided = plan.decide(built()[1], folder)
    assert plan.trials_in_words(decided) == ""
    assert {point.overrides[RATE] == point.run.choice["chosen"][RATE] for point in decided} == {True}


@pytest.mark.slow
def test_groups_of_trials_run_as_jobs(chosen, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    swept = f"{{'{CELLS}': (('gru', 8),), 'seed': (2, 1)}}"
    executor = jobs.make_executor("local", "{'timeout_min': 5}", tmp_path / "jobs")
    sweep.train_sweep(*built(sweep=swept), tmp_path, executor=executor, watch=QUIET)
    (choice,) = {json.dumps(read(run)["choice"]) for run in (tmp_path / "replicas").iterdir()}
    name = "cell=gru,hidden_size=8,seed=1"
    assert json.loads(choice) == read(chosen[0] / "replicas" / name)["choice"]
    assert first_difference(tmp_path / "replicas" / name, chosen[0] / "replicas" / name) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": "{'model.cell, model.hidden_siz': (('gru', 8),)}"}, "Did you mean 'model.hidden_size'"),
        ({"sweep": "{'model.cell, model.hidden_size': (('gru',),)}"}, "expected a tuple of 2 values"),
        ({"sweep": "{'model.cell, model.hidden_size': ('gru', 8)}"}, "expected a tuple of 2 values"),
        ({"sweep": "{'model.cell, model.hidden_size': (('gru', 8), ('gru', 8))}"}, "twice; expected different values"),
        ({"sweep": "{'model.cell, model.hidden_size': (('gru', 8),), 'model.cell': ('lstm',)}"}, "'model.cell' twice"),
        ({"sweep": "{'seed, model.hidden_size': ((1, 8),)}"}, "expected the seed by itself"),
        ({"sweep": "{'model.cell, model.hidden_size': (('gru', 'wide'),)}"}, "expected a value of type int"),
        ({"sweep": "{'choose_steps': (1, 2)}"}, "no field that makes a run another"),
        ({"sweep": ""}, "neither --seeds nor config.sweep"),
        ({"choose_steps": 0}, "go together; set both or neither"),
        ({"choose": ""}, "go together; set both or neither"),
        ({"choose": "{'optimizer.learning_rat': (1.0, 2.0)}"}, "Did you mean 'optimizer.learning_rate'"),
        ({"choose": "{'model.num_layers': (1, 2)}"}, "is no hyperparameter"),
        ({"choose": "{'optimizer.learning_rate': ('fast', 1.0)}"}, "expected numbers"),
        ({"choose": "{'optimizer.learning_rate': (0.1, -1.0)}"}, "optimizer.learning_rate is -1.0"),
        ({"choose": RATES, "sweep": "{'optimizer.learning_rate': (1.0, 2.0)}"}, "the sweep names too"),
        ({"data.selection": "test:100"}, "choose needs validation images"),
        ({"sweep": "{'data.selection': ('validation', 'test:100')}"}, "choose needs validation images"),
    ],
)
def test_impossible_requests(changes, message):
    with pytest.raises(UsageError, match=message):
        built(**changes)


@pytest.mark.parametrize("name", bakeoff.MODELS)
def test_the_models_of_the_bakeoff_have_one_size(name):
    config = bakeoff.get_config()
    config.runtime.backend = "auto" if name in ("mlp", "linear", "min_gru") else "scan"  # which compiles no kernel
    for field, value in zip(bakeoff.FIELDS, bakeoff.MODELS[name], strict=True):
        section, field_name = field.split(".")
        config[section][field_name] = value
    model = build_model(config, 784, 10)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 784, 1), np.float32)))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 7850 if name == "linear" else abs(count / 68_000 - 1) < 0.025


def test_the_page_of_the_bakeoff(chosen, tmp_path):
    assert "no results yet" in bakeoff_page.page(*bakeoff_page.read(tmp_path), "")
    results = tmp_path / "results"
    results.mkdir()
    (results / "introduction.md").write_text("# The bake-off\n")
    for run in (chosen[0] / "replicas").iterdir():
        kept = results / run.name
        kept.mkdir()
        for name in ("summary.json", "metrics.jsonl"):
            shutil.copy(run / name, kept)
    # All seeds of one recipe diverge; its record alone is kept.
    lost = {"optimizer.learning_rate": 3e38, "sweep": "{'seed': (1, 2)}", "choose": "", "choose_steps": 0}
    sweep.train_sweep(*built(**lost), tmp_path / "lost", watch=QUIET)
    for run in (tmp_path / "lost" / "replicas").iterdir():
        (results / run.name).mkdir()
        shutil.copy(run / "diverged.json", results / run.name)
    bakeoff_page.write(results, tmp_path / "page")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# The bake-off\n\n## MNIST-5k, rows\n\n| Row | Model | Parameters | Rate |")
    assert sum(line.startswith("| `r") and line.count("|") == 15 for line in page.splitlines()) == 2
    assert "- LSTM 4, learning rate 3e+38, seed 2: diverged." in page
    assert re.search(r"- `r\w{6}`, GRU 8: learning_rate 0\.", page)
    assert (tmp_path / "page.svg").exists() == ("page.svg" in page)


@pytest.mark.parametrize(
    ("swept", "first", "then", "plain"),
    [
        ("optimizer.clip.mask", "'none', 'all'", "'all'", {}),
        ("optimizer.clip.mask", "'all'", "'none', 'all'", {}),
        ("optimizer.schedule", "'constant', 'warmup_cosine'", "'warmup_cosine'", {}),
        ("train.steps", "10, 20", "20", {"optimizer.warmup_steps": 15}),
    ],
)
def test_what_a_swept_field_decides_makes_no_other_sweep(tmp_path, swept, first, then, plain):
    fields = {"choose": "", "choose_steps": 0, "optimizer.clip.mask": "all", "optimizer.clip.norm": 1.0, **plain}
    grid, points = built(**fields, sweep=f"{{'{swept}': ({first},)}}")
    sweep._record_sweep(grid, points, tmp_path, [])
    assert sweep.survey(*built(**fields, sweep=f"{{'{swept}': ({then},)}}"), tmp_path)[0] == BEGUN
    with pytest.raises(WorkdirError, match=r"train\.batch_size: 16 there, 8 here"):
        sweep.survey(*built(**fields, sweep=f"{{'{swept}': ({then},)}}", **{"train.batch_size": 8}), tmp_path)


@pytest.mark.parametrize("field", ["seed", "model.cell", RATE])
def test_a_value_that_the_sweep_would_overrule_is_refused(field):
    config = config_of()
    with pytest.raises(UsageError, match=f"^{re.escape(field)} is given, but the sweep has values of its own"):
        plan.build_points(config, plan.build_sweep(config), [field])


def test_trials_are_of_their_own_length():
    traced = {"sweep": "{'train.steps': (20, 40)}", "runtime.profile_steps": "12:14"}
    _, points = built(**traced)
    assert [len(point.trials) for point in points] == [3, 3]
    assert [trial.name for trial in plan.all_trials(points)] == [f"learning_rate={rate}" for rate in (0.01, 0.1, 3e38)]
    config = config_of(**{"optimizer.warmup_steps": 15})
    grid = plan.build_sweep(config)
    with pytest.raises(UsageError, match=r"^In the trials, of choose_steps = 10: optimizer\.warmup_steps is 15"):
        plan.build_points(config, grid, ["optimizer.warmup_steps"])
