"""Where metrics go. Writers have the methods of clu's MetricWriter, whose module needs TensorFlow.

Scalars are named 'split/metric', as in 'validation/accuracy'.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

Scalars = Mapping[str, float | int]


class MetricWriter(Protocol):
    """The part of clu.metric_writers.MetricWriter that is used here."""

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Records numbers that hold at `step`."""

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Records the distribution of each array's values."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Records texts, in Markdown."""

    def flush(self) -> None:
        """Hands everything recorded so far to the operating system."""

    def close(self) -> None:
        """Flushes and releases what is held."""


class JsonLinesWriter:
    """One JSON object a line for each (step, split): {"step", "split", metrics...}."""

    def __init__(self, path: Path):
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """One event for each split named in `scalars`."""
        events: dict[str, dict[str, Any]] = {}
        for name, value in scalars.items():
            split, _, metric = name.partition("/")
            events.setdefault(split, {"step": step, "split": split})[metric] = value
        for event in events.values():
            self._file.write(json.dumps(event, allow_nan=False) + "\n")
        self._file.flush()  # for who follows the file

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Histograms are for TensorBoard only."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts stand in files of their own."""

    def flush(self) -> None:
        """As MetricWriter."""
        self._file.flush()

    def close(self) -> None:
        """As MetricWriter."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events, by tensorboardX.

    Made at the first record, because importing tensorboardX takes a second.
    """

    def __init__(self, folder: Path, first_step: int):
        """Writes into `folder`; events there from `first_step` on are marked as superseded."""
        self._folder = folder
        self._first_step = first_step
        self._made: Any = None

    @property
    def _writer(self) -> Any:
        if self._made is None:
            from tensorboardX import SummaryWriter

            purge = self._first_step if self._first_step > 0 else None
            self._made = SummaryWriter(str(self._folder), purge_step=purge, write_to_disk=True)
        return self._made

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """As MetricWriter."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """As MetricWriter."""
        for name, values in arrays.items():
            self._writer.add_histogram(name, values, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """As MetricWriter."""
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def flush(self) -> None:
        """As MetricWriter."""
        if self._made is not None:
            self._made.flush()

    def close(self) -> None:
        """As MetricWriter."""
        if self._made is not None:
            self._made.close()


class MultiWriter:
    """Passes everything on to several writers."""

    def __init__(self, writers: Iterable[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """As MetricWriter."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """As MetricWriter."""
        for writer in self._writers:
            writer.write_histograms(step, arrays)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """As MetricWriter."""
        for writer in self._writers:
            writer.write_texts(step, texts)

    def flush(self) -> None:
        """As MetricWriter."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """As MetricWriter."""
        for writer in self._writers:
            writer.close()
