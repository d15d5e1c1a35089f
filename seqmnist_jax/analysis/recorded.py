"""What finished runs have on record and several here look at: their answers to the test images, and their task."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.training import scores
from seqmnist_jax.workdir import caveats, files

Json = dict[str, Any]
# What of the data decides whether two results can be compared, in the names of data.json.
COMPARABLE = ("protocol", "view", "split", "scaling", "selection", "permutation", "permutation_indices")


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model answers to the images of one split: labels int [count], logits float [count, classes]."""

    labels: np.ndarray
    logits: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """The predicted classes, int64 [count]."""
        return self.logits.argmax(-1)

    @functools.cached_property
    def score(self) -> Json:
        """The statistics of `scores.score`."""
        return scores.score(self.logits, self.labels)


def read_answers(workdir: Path) -> Answers:
    """A finished run's answers to the test images, from its predictions.npz.

    Raises:
      WorkdirError: the file is missing or damaged.
    """
    path = workdir / files.PREDICTIONS
    if not path.exists():
        raise files.WorkdirError(f"{path} is missing, the record of the answers to the test images.")
    try:
        with np.load(path, allow_pickle=False) as saved:
            answers = Answers(saved["labels"], saved["logits"])
            if not np.array_equal(saved["predictions"], answers.predictions):
                raise ValueError("its predictions are not those of its logits")
        answers.score  # noqa: B018 - which fails where they don't fit together
    except Exception as e:  # a damaged archive fails in too many ways to name
        raise files.WorkdirError(f"{path} is damaged ({type(e).__name__}: {str(e).strip()}).") from e
    return answers


def is_tested(summary: Json | None) -> bool:
    """Whether a run has read its test images: it is finished, and no trial by which hyperparameters are chosen."""
    return summary is not None and "test_accuracy" in summary


def is_trial(workdir: Path) -> bool:
    """Whether a folder has a trial, whose test images stay unseen: by what it has on record, or else by its place."""
    path = workdir / files.SUMMARY
    return not is_tested(files.read_json(path)) if path.exists() else files.has_trials(workdir.absolute().parent.parent)


def warnings(workdir: Path, facts: Json, step: int | None = None) -> list[str]:
    """What must be said with the result of a run's checkpoint, that of its summary or of this step."""
    summary = files.read_json(workdir / files.SUMMARY) if (workdir / files.SUMMARY).exists() else None
    return caveats.warnings(facts, summary, diverged=(workdir / files.DIVERGED).exists(), step=step)


def task_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The names of data.json in which the tasks of two runs differ; runs of earlier versions don't know all of them."""
    return [name for name in COMPARABLE if name in a and name in b and a[name] != b[name]]
