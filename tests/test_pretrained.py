"""The model that ships with the repository."""

import json
import re
from pathlib import Path

import pytest

import seqmnist_jax
from seqmnist_jax.analysis.evaluate import evaluate
from seqmnist_jax.data.sources import load_embedded

FOLDER = Path(__file__).parent.parent / "pretrained" / "row_lstm"


def test_it_reads_digits():
    test = load_embedded().test
    assert (seqmnist_jax.load(FOLDER).predict(test.images) == test.labels).mean() > 0.95


def test_it_gives_its_own_result_on_mnist(mnist_dir):
    summary = json.loads((FOLDER / "summary.json").read_text())
    result = evaluate(FOLDER, data_dir=str(mnist_dir))
    # Another version of XLA may round a borderline digit the other way.
    assert result["accuracy"] == pytest.approx(summary["test_accuracy"], abs=5e-4)
    assert result["loss"] == pytest.approx(summary["test_loss"], rel=1e-3)
    assert result["warnings"] == []


def test_on_the_embedded_digits_it_says_that_it_has_seen_them(monkeypatch):
    monkeypatch.delenv("SEQMNIST_DATA_DIR", raising=False)
    result = evaluate(FOLDER, allow_other_data=True)
    if result["source"] == "embedded":
        assert "most of which the model has been trained on" in result["warnings"][0]


def test_it_is_small_and_names_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for path in files:
        assert not re.search(rb"/(home|root|tmp|work|Users)/", path.read_bytes()), path
