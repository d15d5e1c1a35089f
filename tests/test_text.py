"""What people read: a fact a line, within 79 columns, every number with a name."""

import pytest

from seqmnist_jax.cli import describe, text
from seqmnist_jax.training.clock import Clock, Progress
from seqmnist_jax.training.run import build_run
from seqmnist_jax.workdir import config as configs
from tests import tiny

SUMMARY = {
    "test_accuracy": 0.9541,
    "test_accuracy_interval": [0.9498, 0.958],
    "test_loss": 0.1652,
    "last_test_accuracy": 0.9253,
    "validation_accuracy": 0.9622,
    "selected_on": "validation",
    "best_step": 83_750,
    "steps": 90_000,
    "train_seconds": 5_342.5,
    "steps_per_second": 1_948.5,
    "compile_seconds": 0.4,
    "device": "2 CPU cores, AMD EPYC",
    "dataset": {"name": "mnist", "sizes": {"test": 10_000}},
}


def test_a_summary_s_numbers_have_names():
    lines = text.result(SUMMARY).splitlines()
    assert max(map(len, lines)) <= 79
    assert "over images          94.98% to 95.80%, 95 % Wilson interval" in lines
    assert "last checkpoint      test accuracy 92.53%" in lines
    names = [line.split("  ")[0] for line in lines]
    assert len(set(names)) == len(names) == 10


@pytest.mark.parametrize("step", [250, 90_000])
def test_a_progress_line_fits_on_a_terminal(step):
    progress = Progress(0, 90_000, Clock())
    progress.advance(step, step / 1948.5)
    scores = {f"{split}/{name}": 0.9999 for split in ("train", "validation") for name in ("loss", "accuracy")}
    line = progress.line(scores)
    assert len(line) <= 79
    assert line.startswith(f"step {step:>6,}/90,000  train 1.000 99.99%  val 1.000 99.99%  1,948/s  0:0")


def test_a_comparison_is_a_square():
    run = {"accuracy": 0.9, "accuracy_interval": [0.89, 0.91], "loss": 0.3, "calibration_error": 0.0041}
    run |= {"best_step": 500, "selected_on": "validation"}
    result = {
        **{"examples": 10_000, "dataset": "mnist", "content_hash": "ab" * 32, "verdict": "Alike.", "rerun": None},
        **{"first": {**run, "workdir": "runs/a"}, "second": {**run, "workdir": "runs/b"}, "warnings": []},
        "mcnemar": {"both": 8_100, "only_a": 966, "only_b": 539, "neither": 395},
    }
    lines = text.comparison(result).splitlines()
    assert max(map(len, lines)) <= 79
    place = lines.index("images       second right  second wrong")
    assert [line.split()[2:] for line in lines[place + 1 : place + 3]] == [["8,100", "966"], ["539", "395"]]


@pytest.fixture(scope="module")
def described():
    run = build_run(tiny.config(**{"optimizer.learning_rate": 0.02}))
    return run, describe.describe(run, {"train.steps": tiny.STEPS})


def test_a_description_marks_what_is_no_default(described):
    lines = text.description(*described).splitlines()
    told = {line.split()[1]: line for line in lines if line.startswith(("* ", "+ "))}
    assert told["train.steps"].split() == ["*", "train.steps", "60", "(default", "5000)"]
    assert told["optimizer.learning_rate"].split() == ["+", "optimizer.learning_rate", "0.02", "(default", "0.001)"]
    assert "model.cell" not in told
    left = len(configs.defaults()) - len(told)
    assert f"{left} other fields have their defaults; --explain tells all." in lines


def test_explain_has_each_field_and_the_words_of_the_default_config(described):
    words = text.description(*described, explain=True)
    assert max(len(line) for line in words.splitlines() if line.startswith("  # ")) <= 79
    assert all(f" {field} " in words for field in configs.defaults())
    meanings = configs.meanings()
    assert meanings["optimizer.clip.norm"] == "The largest gradient norm of one unit."
    assert meanings["seed"].startswith("All randomness of a run")
    assert meanings["model.dropout.input_keep"].startswith("Variational dropout")
    assert set(meanings) <= set(configs.defaults())
    comments = sum(line.startswith("    # ") for line in configs.DEFAULT.read_text().splitlines())
    assert comments > len(meanings) > 40
    assert "  # The largest gradient norm of one unit.\n" in words
