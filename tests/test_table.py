"""Tables of results: which runs make a row, what a row says, what is refused."""

import csv
import json
import statistics

import pytest

from seqmnist_jax.analysis import table
from seqmnist_jax.errors import UsageError
from seqmnist_jax.workdir.files import WorkdirError

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
        "dataset": {"name": "mnist", "permutation": "none", "sizes": {"train": 55_000}, "overrides": []},
        "identity": {**IDENTITY, "seed": seed, **dict(identity)},
        "command": f"python launch.py --config configs/pixel_gru.py --config.seed={seed}",
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in ((1, 0.98), (2, 0.99), (3, 0.985)):
        make_run(tmp_path / "runs" / f"gru{seed}", seed, accuracy)
    return tmp_path / "runs"


def test_seeds_of_one_recipe_make_one_row(runs):
    make_run(runs / "other" / "deep", 1, 0.97, identity={"optimizer.learning_rate": 0.001})
    rows = table.rows(table.find([str(runs / "*")]))
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


def test_times_are_those_of_the_fastest_device(runs):
    make_run(runs / "gpu", 4, 0.98, device="1 x GPU", train_seconds=9.0)
    (row,) = table.rows(table.find([str(runs)]))
    assert row["seeds"] == [1, 2, 3, 4]
    assert (row["train_seconds"], row["device"]) == (9.0, "1 x GPU")


def test_markdown_says_what_it_must(runs):
    make_run(runs / "literal", 1, 0.999, selected_on="test:128", identity={"data.protocol": "tutorial2018"})
    text = table.as_markdown(table.rows(table.find([str(runs)])), [{"Model": "S4", "Pixels %": "99.63"}])
    assert "GRU 128, bfloat16" in text
    assert "98.50 ± 0.50" in text
    assert "tutorial2018 **(selected on test)**" in text
    assert "--config.seed=SEED" in text
    assert "| S4 | 99.63 |" in text
    columns = {line.count("|") for line in text.splitlines()[:4]}
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
    rows = table.rows(table.find([str(runs)]))
    assert [rows[0][f"seconds_to_{target}"] for target in (90, 95, 98, 99)] == [
        pytest.approx((20 + 11 + 12) / 3),
        pytest.approx((40 + 21 + 12) / 3),
        None,  # one seed of three had it
        None,
    ]
    assert "| 14.3 s | 24.3 s | - | - | 2 CPU cores |" in table.as_markdown(rows)


def test_without_curves_no_time_to_an_accuracy_is_told(runs):
    rows = table.rows(table.find([str(runs)]))
    assert rows[0]["seconds_to_90"] is None
    assert "first read so well" not in table.as_markdown(rows)


def test_departures_from_the_protocol_are_told(runs):
    dataset = {"name": "mnist", "permutation": "numpy:100", "sizes": {"train": 55_000}}
    make_run(runs / "new", 5, 0.9, dataset={**dataset, "overrides": ["permutation"]})
    make_run(runs / "old", 6, 0.9, dataset=dataset, identity={"data.permutation": "numpy:100", "data.split": None})
    rows = table.rows(table.find([str(runs / "new"), str(runs / "old")]))
    assert {row["protocol"] for row in rows} == {"seqmnist but permutation numpy:100"}


def test_recipes_that_share_a_name_are_told_apart(runs):
    make_run(runs / "slow", 1, 0.97, identity={"optimizer.learning_rate": 0.001})
    make_run(runs / "lstm", 1, 0.96, identity={"model.cell": "lstm"})
    rows = table.rows(table.find([str(runs)]))
    assert [(row["model"], row["recipe"]) for row in rows] == [
        ("GRU 128, bfloat16", "learning_rate 0.008"),
        ("GRU 128, bfloat16", "learning_rate 0.001"),
        ("LSTM 128, bfloat16", ""),
    ]
    assert "| GRU 128, bfloat16 (learning_rate 0.001) |" in table.as_markdown(rows)


def test_the_plainest_command_that_names_a_seed_stands_for_all(runs):
    plain = "python launch.py --config configs/pixel_gru.py"
    make_run(runs / "own seed", 10, 0.98, command=plain)
    make_run(runs / "said at length", 11, 0.98, command=f"{plain} --config.seed=11 --config.model.cell=gru")
    (row,) = table.rows(table.find([str(runs)]))
    assert row["command"] == f"{plain} --config.seed=SEED"


def test_csv_has_full_precision(runs, tmp_path):
    rows = table.rows(table.find([str(runs)]))
    table.write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        (read,) = csv.DictReader(file)
    assert float(read["test_std"]) == rows[0]["test_std"]
    assert read["seeds"] == "1 2 3"


def test_a_repeated_seed_is_refused(runs):
    make_run(runs / "again", 2, 0.99)
    with pytest.raises(UsageError, match=r"again and .*gru2 are the same recipe with the same seed, 2"):
        table.rows(table.find([str(runs)]))


def test_more_steps_are_another_recipe(runs):
    make_run(runs / "longer", 2, 0.99, steps=9000)
    assert len(table.rows(table.find([str(runs)]))) == 2


def test_unfinished_runs_are_named(runs):
    (runs / "begun").mkdir()
    (runs / "begun" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not finished.*\n.*begun"):
        table.find([str(runs / "*")])


def test_no_runs_at_all(tmp_path):
    with pytest.raises(UsageError, match="matches no folder with a run"):
        table.find([str(tmp_path / "nothing*")])


def test_a_damaged_summary_is_named(runs):
    (runs / "gru1" / "summary.json").write_text('{"test_accuracy": 0.9')
    with pytest.raises(WorkdirError, match="gru1"):
        table.find([str(runs)])


def test_published_figures_must_be_there(tmp_path):
    with pytest.raises(UsageError, match="--published"):
        table.read_published(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("Model\n")
    with pytest.raises(UsageError, match="no rows"):
        table.read_published(tmp_path / "empty.csv")
