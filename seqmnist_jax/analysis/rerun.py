"""A run and its rerun: where do they part?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqmnist_jax.analysis.recorded import read_answers
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import Checkpoints, read_saved
from seqmnist_jax.workdir.metrics import read_events

Json = Any
# What differs between any two runs.
TIMES = ("seconds", "steps_per_second")


class Difference(NamedTuple):
    """Where two runs of one config differ first.

    Attributes:
      step: the step.
      what: which of a run's records.
      first, second: the two values; None where one has none.
    """

    step: int
    what: str
    first: Json
    second: Json


def first_difference(a: Path, b: Path) -> Difference | None:
    """The first step at which anything that two runs recorded differs, times aside; None where nothing does.

    Compared are the events of metrics.jsonl, the arrays of the checkpoints that both have, by their
    checksums, and the logits of the test images.

    Args:
      a, b: the work directories of two finished runs of the same config and data.

    Raises:
      WorkdirError, CheckpointError: a file can't be read.
    """
    found = [*_events(a, b), *_arrays(a, b), *_logits(a, b)]
    return min(found, key=lambda difference: difference.step, default=None)


def _events(a: Path, b: Path) -> Iterator[Difference]:
    told = [_scalars(folder) for folder in (a, b)]
    for step, name in sorted(told[0].keys() | told[1].keys()):
        values = [one.get((step, name)) for one in told]
        if values[0] != values[1]:
            yield Difference(step, name, *values)


def _scalars(workdir: Path) -> dict[tuple[int, str], Json]:
    """The values of metrics.jsonl by step and name."""
    return {
        (event["step"], f"{event['split']}/{name}"): value
        for event in read_events(workdir)
        for name, value in event.items()
        if name not in ("step", "split", *TIMES)
    }


def _arrays(a: Path, b: Path) -> Iterator[Difference]:
    found = []
    for workdir in (a, b):
        folder = workdir / files.CHECKPOINTS
        if not folder.is_dir():
            return  # a run of which only the results were kept
        found.append(read_saved(folder, _checksums))
    for step in sorted(found[0].keys() & found[1].keys()):
        for part in found[0][step].keys() & found[1][step].keys():
            first, second = found[0][step][part], found[1][step][part]
            for name in sorted(first.keys() | second.keys()):
                if first.get(name) != second.get(name):
                    digests = (str(one.get(name))[:12] for one in (first, second))
                    yield Difference(step, f"the SHA-256 of the checkpoint's {part} array {name}", *digests)


def _checksums(saved: Checkpoints) -> dict[int, Json]:
    return {step: saved.metadata(step)["checksums"] for step in saved.steps()}


def _logits(a: Path, b: Path) -> Iterator[Difference]:
    logits = [read_answers(workdir).logits for workdir in (a, b)]
    if not np.array_equal(logits[0], logits[1]):
        step = int(files.read_json(a / files.SUMMARY)["best_step"])
        differing = int(np.any(logits[0] != logits[1], axis=-1).sum()) if logits[0].shape == logits[1].shape else None
        yield Difference(step, "the number of test images whose logits differ", 0, differing)
