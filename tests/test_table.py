"""Tables of results: which runs make a row, what a row says, what is refused."""

import csv
import json
import statistics

import pytest

from seqmnist_jax.analysis import results_page, table
from seqmnist_jax.cli import text
from seqmnist_jax.errors import UsageError

IDENTITY = {
    "seed": 0,
    "data.view": "pixel",
    "data.protocol": "seqmnist",
    "model.name": "rnn",
    "model.cell": "gru",
    "model.hidden_size": 128,
    "model.num_layers": 1,
    "model.bidirectional": False,
    "model.precision": "bfloat16",
    "optimizer.learning_rate": 0.008,
    "train.batch_size": 32,
    "train.steps": 5000,
    "content hash of the data": "ab",
}


def make_run(folder, seed, accuracy, identity=(), **changes):
    folder.mkdir(parents=True)
    summary = {
        "test_accuracy": accuracy,
        "validation_accuracy": accuracy - 0.001,
        "selected_on": "validation",
        "steps": 5000,
        "seed": seed,
        "parameters": 50_000,
        "train_seconds": 120.0,
        "device": "2 CPU cores",
        "git_commit": "ab" * 20,
        "versions": {"seqmnist_jax": "0.1.0", "jax": "0.10.2"},
        "date": "2026-11-26",
        "dataset": {"name": "mnist", "permutation": "none", "sizes": {"train": 55_000}, "overrides": []},
        "identity": {**IDENTITY, "seed": seed, **dict(identity)},
        "command": f"python launch.py --config configs/pixel_gru.py --config.seed={seed}",
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def rows_of(patterns):
    found = table.find(patterns)
    assert found.left_out == []
    return table.rows(found.results)


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in ((1, 0.98), (2, 0.99), (3, 0.985)):
        make_run(tmp_path / "runs" / f"gru{seed}", seed, accuracy)
    return tmp_path / "runs"


def test_seeds_of_one_recipe_make_one_row(runs):
    make_run(runs / "other" / "deep", 1, 0.97, identity={"optimizer.learning_rate": 0.001})
    rows = rows_of([str(runs / "*")])
    assert [row["seeds"] for row in rows] == [[1, 2, 3], [1]]
    row = rows[0]
    assert row["test_accuracy"] == pytest.approx(0.985)
    assert row["test_std"] == pytest.approx(statistics.stdev([0.98, 0.99, 0.985]))
    # Student's t with two degrees of freedom: 4.3027 standard errors.
    half = 4.30265 * statistics.stdev([0.98, 0.99, 0.985]) / 3**0.5
    assert row["test_interval"] == pytest.approx([0.985 - half, 0.985 + half], abs=1e-6)
    assert row["epochs"] == pytest.approx(5000 * 32 / 55_000)
    assert row["seconds_per_epoch"] == pytest.approx(120 * 55_000 / (5000 * 32))
    assert row["command"] == "python launch.py --config configs/pixel_gru.py --config.seed=SEED"
    assert rows[1]["test_interval"] is None


def test_times_are_those_of_one_device_and_one_commit_and_the_row_says_whose(runs):
    make_run(runs / "gpu", 4, 0.98, device="1 x GPU", train_seconds=9.0)
    make_run(runs / "later", 5, 0.98, git_commit="cd" * 20 + "+changes", train_seconds=10.0)
    (row,) = rows_of([str(runs)])
    assert row["seeds"] == [1, 2, 3, 4, 5]
    assert (row["train_seconds"], row["device"], row["commit"]) == (120.0, "2 CPU cores", "abababa")
    assert row["timed_seeds"] == [1, 2, 3]
    assert row["devices"] == {"2 CPU cores": [1, 2, 3, 5], "1 x GPU": [4]}
    assert row["warnings"] == ["The seeds differ in device, commit."]
    page = results_page.as_markdown([row])
    assert f"- WARNING: The seeds differ in device, commit. ({row['id']})" in page
    assert "| 3 of 5 | 2.0 min |" in page
    assert "| abababa (seeds 1, 2, 3, 4); cdcdcdc+changes (seed 5) |" in page
    assert f"| [{runs}]({runs}) | 2026-11-26 |" in page


def test_folders_of_a_row_may_be_named_in_two_ways(runs, monkeypatch):
    monkeypatch.chdir(runs)
    (row,) = rows_of(["gru1", "gru2"])
    assert row["folder"] == "."
    (row,) = rows_of(["gru1", str(runs / "gru2")])
    assert row["folder"] == str(runs)


def test_runs_that_are_links_count_and_each_once(runs):
    make_run(runs.parent / "elsewhere" / "gru4", 4, 0.98)
    (runs / "linked").symlink_to(runs.parent / "elsewhere")
    (runs / "gru1" / "circle").symlink_to(runs)
    (row,) = rows_of([str(runs)])
    assert row["seeds"] == [1, 2, 3, 4]


def test_of_as_many_seeds_on_each_the_fastest_device_is_timed(runs):
    for seed in (4, 5, 6):
        make_run(runs / f"gpu{seed}", seed, 0.98, device="1 x GPU", train_seconds=9.0)
    (row,) = rows_of([str(runs)])
    assert (row["train_seconds"], row["timed_seeds"]) == (9.0, [4, 5, 6])


def test_seeds_measured_in_different_precisions_are_told(runs):
    for seed, precision in ((4, "bfloat16"), (5, "float32")):
        make_run(runs / f"measured{seed}", seed, 0.98, eval_precision=precision)
    (row,) = rows_of([str(runs)])
    assert row["warnings"] == ["The seeds differ in precision of evaluation."]


def test_times_of_runs_that_trained_together_are_not_mixed_with_others(runs):
    for seed in (4, 5):
        make_run(runs / f"together{seed}", seed, 0.98, replicas=2, train_seconds=70.0)
    (row,) = rows_of([str(runs)])
    assert (row["train_seconds"], row["timed_seeds"], row["timed_together"]) == (120.0, [1, 2, 3], 1)


def test_seeds_by_another_command_are_told(runs):
    by_flag = "python launch.py --config configs/other.py --config.seed=4 --config.model.cell=gru"
    make_run(runs / "flagged", 4, 0.98, command=by_flag)
    (row,) = rows_of([str(runs)])
    assert row["warnings"] == ["The seeds differ in command."]
    # The config's own seed needs no flag, so that is the same command.
    make_run(runs / "flagged" / "plain", 5, 0.98, command="python launch.py --config configs/pixel_gru.py")
    (row,) = rows_of([str(runs / "gru*"), str(runs / "flagged" / "plain")])
    assert row["warnings"] == []


def test_markdown_says_what_it_must(runs):
    make_run(runs / "literal", 1, 0.999, selected_on="test:128", identity={"data.protocol": "tutorial2018"})
    page = results_page.as_markdown(rows_of([str(runs)]), [{"Model": "S4", "Pixels %": "99.63"}])
    assert "GRU 128, bfloat16" in page
    assert "| 98.50 ± 0.50 | 97.26 to 99.74 | 98.00 to 99.00 |" in page
    assert "tutorial2018 **(selected on test)**" in page
    assert "--config.seed=SEED" in page
    assert "| S4 | 99.63 |" in page
    columns = {line.count("|") for line in page.splitlines()[:4]}
    assert len(columns) == 1


def write_curve(folder, seconds_and_accuracies):
    events = [
        {"step": step, "split": split, "accuracy": accuracy, "seconds": seconds}
        for step, (seconds, accuracy) in enumerate(seconds_and_accuracies)
        for split in ("train", "validation")
    ]
    # Training and test accuracies say nothing of the time to one on validation.
    events = [e | ({"accuracy": 1.0} if e["split"] == "train" else {}) for e in events]
    lines = [json.dumps(event) for event in events]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "spl']))


def test_the_time_to_an_accuracy_is_that_of_its_first_measurement(runs):
    write_curve(runs / "gru1", [(10.0, 0.8), (20.0, 0.91), (30.0, 0.89), (40.0, 0.96), (50.0, 0.985)])
    write_curve(runs / "gru2", [(11.0, 0.9), (21.0, 0.96), (31.0, 0.97)])
    write_curve(runs / "gru3", [(12.0, 0.95), (22.0, 0.97)])
    rows = rows_of([str(runs)])
    assert [rows[0][f"seconds_to_{target}"] for target in (90, 95, 98, 99)] == [
        pytest.approx((20 + 11 + 12) / 3),
        pytest.approx((40 + 21 + 12) / 3),
        None,  # one seed of three had it
        None,
    ]
    assert "| 14.3 s | 24.3 s | - | - | 2 CPU cores | abababa |" in results_page.as_markdown(rows)


def test_without_curves_no_time_to_an_accuracy_is_told(runs):
    rows = rows_of([str(runs)])
    assert rows[0]["seconds_to_90"] is None


def test_departures_from_the_protocol_are_told(runs):
    dataset = {"name": "mnist", "permutation": "numpy:100", "sizes": {"train": 55_000}}
    make_run(runs / "departs", 5, 0.9, dataset={**dataset, "overrides": ["permutation"]})
    (row,) = rows_of([str(runs / "departs")])
    assert row["protocol"] == "seqmnist but permutation numpy:100"


def test_a_row_s_name_and_label_don_t_depend_on_other_rows(runs):
    (alone,) = rows_of([str(runs)])
    flag = "--config.optimizer.learning_rate=0.001"
    command = f"python launch.py --config configs/pixel_gru.py --config.seed=1 {flag}"
    make_run(runs / "slow", 1, 0.97, identity={"optimizer.learning_rate": 0.001}, command=command)
    rows = rows_of([str(runs)])
    assert rows[0] == alone | {"folder": str(runs)}
    assert rows[0]["id"] != rows[1]["id"]
    assert [row["config"] for row in rows] == ["pixel_gru", "pixel_gru, learning_rate=0.001"]
    assert rows[1]["command"] == f"python launch.py --config configs/pixel_gru.py --config.seed=SEED {flag}"


def test_a_field_that_a_later_version_adds_changes_no_name(runs):
    (before,) = rows_of([str(runs)])
    make_run(runs / "later", 4, 0.98, identity={"train.label_smoothing": 0.0, "optimizer.ema_decay": 0.0})
    (after,) = rows_of([str(runs)])
    assert (after["id"], after["seeds"]) == (before["id"], [1, 2, 3, 4])


def test_the_plainest_command_that_names_a_seed_stands_for_all(runs):
    plain = "python launch.py --config configs/pixel_gru.py"
    make_run(runs / "own seed", 10, 0.98, command=plain)
    make_run(runs / "said at length", 11, 0.98, command=f"{plain} --config.seed=11 --config.model.cell=gru")
    (row,) = rows_of([str(runs)])
    assert row["command"] == f"{plain} --config.seed=SEED"


def test_the_seed_stands_behind_a_config_whose_name_has_a_space(tmp_path):
    make_run(tmp_path / "run", 1, 0.98, command="python launch.py --config 'my configs/gru.py'")
    (row,) = rows_of([str(tmp_path)])
    assert row["command"] == "python launch.py --config 'my configs/gru.py' --config.seed=SEED"


def test_a_row_says_in_what_precision_its_device_trained(tmp_path):
    auto = {"model.precision": "float32"}  # of 'auto', as a recipe has it
    make_run(tmp_path / "gpu", 1, 0.98, identity=auto, precision="tensorfloat32")
    make_run(tmp_path / "cpu", 2, 0.98, identity=auto | {"train.batch_size": 64}, precision="float32")
    make_run(tmp_path / "old", 2, 0.98, identity=auto | {"train.batch_size": 16}, versions={"jax": "0.11.2"})
    gpu, cpu, old = sorted(rows_of([str(tmp_path / "*")]), key=lambda row: row["folder"][-3:] != "gpu")
    assert (gpu["model"], cpu["model"], old["model"]) == ("GRU 128, tensorfloat32", "GRU 128", "GRU 128")
    assert {*cpu["versions"], *old["versions"]} == {"0.1.0, jax 0.10.2", "jax 0.11.2"}


def test_csv_has_full_precision(runs, tmp_path):
    rows = rows_of([str(runs)])
    table.write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        (read,) = csv.DictReader(file)
    assert float(read["test_std"]) == rows[0]["test_std"]
    assert read["seeds"] == "1 2 3"


def test_a_repeated_seed_is_refused(runs):
    make_run(runs / "again", 2, 0.99)
    with pytest.raises(UsageError, match=r"again and .*gru2 are the same recipe with the same seed, 2"):
        rows_of([str(runs)])


def test_seeds_set_different_tasks_are_refused(runs):
    dataset = {
        "name": "mnist",
        "permutation": "none",
        "sizes": {"train": 55_000},
        "overrides": [],
        "split": "first:5000",
    }
    make_run(runs / "earlier", 4, 0.99, dataset={**dataset, "split": "last:5000"})
    assert len(rows_of([str(runs)])) == 1, "those of earlier versions don't say their split"
    make_run(runs / "now", 5, 0.99, dataset=dataset)
    with pytest.raises(UsageError, match=r"different tasks \(split '(first|last):5000' against '(first|last):5000'\)"):
        rows_of([str(runs / "earlier"), str(runs / "now")])


def test_more_steps_are_another_recipe(runs):
    make_run(runs / "longer", 2, 0.99, steps=9000)
    assert len(rows_of([str(runs)])) == 2


def test_unfinished_and_damaged_runs_are_left_out_and_named(runs):
    (runs / "begun").mkdir()
    (runs / "begun" / "config.json").write_text("{}")
    make_run(runs / "broken", 5, 0.98, dataset={})
    (runs / "lost").mkdir()
    (runs / "lost" / "diverged.json").write_text('{"seed": 5, "steps": 5000, "identity": null}')
    (runs / "gru1" / "summary.json").write_text('{"test_accuracy": 0.9')
    found = table.find([str(runs / "*")])
    (row,) = table.rows(found.results)
    assert row["seeds"] == [2, 3]
    assert len(found.left_out) == 4
    for name in ("begun", "broken", "gru1", "lost"):
        assert any(f"{name} is not" in why or f"{name}/" in why for why in found.left_out), name
    with pytest.raises(UsageError, match=r"no run found has a result.*\n.*begun is not finished"):
        table.find([str(runs / "begun")])


def test_no_runs_at_all(tmp_path):
    with pytest.raises(UsageError, match="matches no folder with a run"):
        table.find([str(tmp_path / "nothing*")])


def test_columns_for_a_terminal(runs):
    flags = "--config.optimizer.learning_rate=0.001 --config.model.dropout.output_keep=0.8 --config.train.steps=500"
    command = f"python launch.py --config configs/tutorial2018/permuted_gru.py {flags} --config.seed=1"
    make_run(runs / "slow", 1, 0.97, identity={"optimizer.learning_rate": 0.001}, command=command)
    lines = text.table(rows_of([str(runs)]), []).splitlines()
    assert [line.split("  ")[0] for line in lines[:1]] == ["mnist, pixels:"]
    assert lines[1].split() == ["row", "config", "seeds", "validation,", "%", "test,", "%"]
    assert lines[2].split()[1:] == ["pixel_gru", "3", "98.40", "±", "0.50", "98.50", "±", "0.50"]
    assert lines[4].split() == ["with", "learning_rate=0.001,", "output_keep=0.8,", "steps=500"]
    assert max(map(len, lines[:5])) <= 79


def test_published_figures_must_be_there(tmp_path):
    with pytest.raises(UsageError, match="--published"):
        results_page.read_published(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("Model\n")
    with pytest.raises(UsageError, match="no rows"):
        results_page.read_published(tmp_path / "empty.csv")
