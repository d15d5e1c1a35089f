"""What a trained model is worth, from nothing but its work directory and data."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special

from seqmnist_jax.analysis.recorded import is_trial, warnings
from seqmnist_jax.analysis.trained import TrainedModel, load
from seqmnist_jax.data.sources import Dataset, build_dataset_of_run, build_request, find_data_dir, load_dataset
from seqmnist_jax.data.task import SPLITS, split_part
from seqmnist_jax.errors import SeqMnistError, UsageError
from seqmnist_jax.training.scores import score

Json = dict[str, Any]


def evaluate(workdir: Path, *, split: str = "test", data_dir: str = "", allow_other_data: bool = False) -> Json:
    """What a run's selected checkpoint is worth on one split.

    The result has the statistics of `scores.score` and, as 'anytime', those of `anytime`.

    Args:
      workdir: the run.
      split: 'train', 'validation' or 'test'.
      data_dir: a folder of IDX files; '' means the one the run was trained from.
      allow_other_data: accept data with another content hash, as for a test of transfer.

    Raises:
      UsageError: an unknown or empty split, or other data than the run's.
      DataError, WorkdirError, CheckpointError: a file is missing or damaged.
    """
    if split not in SPLITS:
        raise UsageError(f"--split is {split!r}; expected one of: {', '.join(SPLITS)}.")
    workdir = Path(workdir).expanduser()
    model = load(workdir)
    facts = model.facts
    if split == "test" and is_trial(workdir):
        raise UsageError(
            f"{workdir} is a trial, by which hyperparameters are chosen, so its test images stay unseen; expected "
            "--split=validation."
        )
    if data_dir:
        dataset = load_dataset(
            "idx", dataclasses.replace(build_request(model.config), data_dir=find_data_dir(data_dir))
        )
    else:
        dataset = build_dataset_of_run(model.config, facts["source"], facts["content_hash"])
    same = dataset.content_hash == facts["content_hash"]
    if not same and not allow_other_data:
        raise UsageError(
            f"These data are not those of the run: {dataset.name} ({dataset.source}, content "
            f"{dataset.content_hash[:12]}) against {facts['name']} ({facts['source']}, content "
            f"{facts['content_hash'][:12]}). Name the right folder by --data_dir, or evaluate on these all "
            "the same with --allow_other_data."
        )
    if list(dataset.image_shape) != facts["image_shape"]:
        raise UsageError(f"These images are {dataset.image_shape}; the model reads {tuple(facts['image_shape'])}.")
    part = split_part(dataset, facts["split"], split)
    if not len(part):
        raise UsageError(f"The {split} split of these data is empty (split {facts['split']}).")
    logits = model.logits(part.images)
    if not np.isfinite(logits).all():
        raise SeqMnistError(f"{workdir}, checkpoint {model.step}: its logits on the {split} images are not finite.")
    scores = score(logits, part.labels)
    return {
        "workdir": str(workdir),
        "checkpoint_step": model.step,
        "split": split,
        "examples": len(part),
        **scores,
        "anytime": anytime(model, part.images, part.labels),
        "dataset": dataset.name,
        "source": dataset.source,
        "content_hash": dataset.content_hash,
        "data_of_the_run": same,
        "warnings": [*warnings(workdir, facts, model.step), *model.warnings, *_other_data(facts, dataset)],
    }


def anytime(model: TrainedModel, images: np.ndarray, labels: np.ndarray) -> Json | None:
    """How soon a model knows the images; None of one that reads both ways.

    Args:
      model: the model.
      images: uint8 [count, height, width].
      labels: int [count].

    Returns:
      accuracy [time], of what is most probable after each step; entropy [time], the mean of that of the predicted
      classes, in nats; decided [time], the share of images whose most probable class is, from that step on, what it is
      at the end; median, the step at which that holds of half.
    """
    if not model.reads_forwards:
        return None
    size = model.config.runtime.eval_batch_size  # so that not all probabilities are in memory at once
    accuracy = entropy = np.float64(0.0)
    settled = []
    for start in range(0, len(images), size):
        p = model.read(images[start : start + size])
        predictions = p.argmax(-1)
        accuracy = accuracy + (predictions == labels[start : start + size, None]).sum(0)
        entropy = entropy + scipy.special.entr(p).sum((0, -1), dtype=np.float64)
        settled.append(decided_at(predictions))
    steps, count = np.concatenate(settled), len(images)
    decided = np.bincount(steps - 1, minlength=predictions.shape[1]).cumsum()
    curves = {"accuracy": accuracy / count, "entropy": entropy / count, "decided": decided / count}
    median = int(np.argmax(2 * decided >= count)) + 1
    return {name: curve.tolist() for name, curve in curves.items()} | {"median": median}


def decided_at(predictions: np.ndarray) -> np.ndarray:
    """The first step, counted from 1, from which the predicted class stays the last one; of int [count, time]."""
    other = predictions != predictions[:, -1:]
    # From the end: how many steps before the last one that says something else.
    return predictions.shape[1] - np.where(other.any(1), other[:, ::-1].argmax(1), predictions.shape[1]) + 1


def _other_data(facts: Json, dataset: Dataset) -> list[str]:
    """What must be said of a data set that is not that of the model's facts."""
    if dataset.content_hash == facts["content_hash"]:
        return []
    seen = ""
    if dataset.source == "embedded" and facts["name"] == "mnist":
        seen = " They are 500 of MNIST's training images, most of which the model has been trained on."
    return [f"Measured on other data ({dataset.name}) than the run's own test set ({facts['name']}).{seen}"]
