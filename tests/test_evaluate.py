"""What a trained model is worth, from its work directory alone; foreign data are refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import seqmnist_jax
from configs import row_lstm
from seqmnist_jax.analysis.evaluate import decided_at, evaluate
from seqmnist_jax.data.embedded import FOLDER
from seqmnist_jax.data.idx import write_idx
from seqmnist_jax.data.sources import load_embedded
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train
from tests.untrained import random_images, write_run


@pytest.fixture
def trained(tiny_run):
    return tiny_run


@pytest.fixture
def copy(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    return folder


def test_evaluate_gives_what_training_wrote(trained):
    folder, summary = trained
    result = evaluate(folder)
    assert result["accuracy"] == summary["test_accuracy"]
    assert result["loss"] == summary["test_loss"]
    assert result["checkpoint_step"] == summary["best_step"]
    assert "NOT on MNIST" in result["warnings"][0]
    assert evaluate(folder, split="validation")["accuracy"] == summary["validation_accuracy"]
    assert evaluate(folder, split="train")["examples"] == 4000


def test_a_loaded_model_predicts_what_training_wrote(trained):
    folder, _ = trained
    model = seqmnist_jax.load(folder)
    test = load_embedded().test
    with np.load(folder / "predictions.npz") as saved:
        np.testing.assert_array_equal(model.predict(test.images), saved["predictions"])
        np.testing.assert_array_equal(model.logits(test.images), saved["logits"])


def test_other_data_are_refused_unless_allowed(trained, tmp_path):
    folder, _ = trained
    data = load_embedded()
    for prefix, part in (("train", data.train), ("t10k", data.test)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", part.images[::-1].copy())
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", part.labels[::-1].copy())
    with pytest.raises(UsageError, match="--allow_other_data"):
        evaluate(folder, data_dir=str(tmp_path))
    result = evaluate(folder, data_dir=str(tmp_path), allow_other_data=True)
    assert result["accuracy"] == pytest.approx(trained[1]["test_accuracy"]), "the same images in another order"
    assert result["data_of_the_run"] is False


def test_unknown_split(trained):
    with pytest.raises(UsageError, match="train, validation, test"):
        evaluate(trained[0], split="tset")


def test_evaluation_leaves_the_work_directory_as_it_was(copy):
    before = sorted((str(p), p.stat().st_mtime_ns) for p in copy.rglob("*"))
    evaluate(copy)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in copy.rglob("*")) == before


def test_an_embedded_run_is_evaluated_on_embedded_data_whatever_the_environment_names(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQMNIST_DATA_DIR", str(tmp_path / "elsewhere"))
    assert evaluate(trained[0])["accuracy"] == trained[1]["test_accuracy"]


def test_a_model_of_the_embedded_digits_says_so_on_other_data(trained, tmp_path):
    """Evaluated on another set it is still no MNIST model."""
    data = load_embedded()
    for prefix, part in (("train", data.train), ("t10k", data.test)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", part.images[:100].copy())
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", part.labels[:100].copy())
    result = evaluate(trained[0], data_dir=str(tmp_path), allow_other_data=True)
    assert result["examples"] == 100
    assert "NOT on MNIST" in result["warnings"][0]


def test_images_of_another_size_are_refused(trained, tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((20, 8, 8), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.zeros(20, np.uint8))
    with pytest.raises(UsageError, match="8, 8"):
        evaluate(trained[0], data_dir=str(tmp_path), allow_other_data=True)


def test_how_soon_images_are_known(tmp_path):
    folder = write_run(tmp_path / "run")
    result, model = evaluate(folder), seqmnist_jax.load(folder)
    images, labels, anytime = random_images(20, seed=1), np.arange(20) % 10, result["anytime"]  # as test images
    assert len(anytime["accuracy"]) == len(anytime["entropy"]) == 7
    assert anytime["accuracy"][-1] == pytest.approx(result["accuracy"], abs=1e-6)
    # At step t it is what the network says of an image that ends there.
    x = model.learner.view(jnp.asarray(images))
    ends = [np.asarray(model.learner.model.apply(model.variables, x[:, :step]), np.float64) for step in range(1, 8)]
    for step, logits in enumerate(ends):
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert anytime["accuracy"][step] == pytest.approx((logits.argmax(-1) == labels).mean(), abs=1e-6)
        assert anytime["entropy"][step] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-4)
    # Half of them have, by the median step and not before it, the class that they end with.
    decided = decided_at(np.argmax(ends, -1).T)
    assert (decided <= anytime["median"]).mean() >= 0.5 > (decided < anytime["median"]).mean()
    json.dumps(result)


def test_who_reads_both_ways_knows_nothing_before_the_end(tmp_path):
    assert evaluate(write_run(tmp_path / "run", **{"model.bidirectional": True}))["anytime"] is None


def test_a_moved_data_folder_is_found_by_the_environment(tmp_path, monkeypatch):
    for name in ("first", "second"):
        shutil.copytree(FOLDER, tmp_path / name)
    config = row_lstm.get_config()
    config.runtime.data_dir = str(tmp_path / "first")
    config.data.split = "first:500"
    config.train.steps = 2
    summary = train(build_run(config), tmp_path / "run", watch=QUIET)
    assert evaluate(tmp_path / "run")["accuracy"] == summary["test_accuracy"]
    shutil.rmtree(tmp_path / "first")
    monkeypatch.setenv("SEQMNIST_DATA_DIR", str(tmp_path / "second"))
    assert evaluate(tmp_path / "run")["accuracy"] == summary["test_accuracy"]
