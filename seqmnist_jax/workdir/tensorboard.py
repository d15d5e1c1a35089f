"""TensorBoard's event files, by tensorboardX."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.workdir.graph import load_tensorboardx

Scalars = Mapping[str, float | int]
Hparams = Mapping[str, float | int | bool | str]

# A histogram's bins, each a tenth wider than the one before on either side of zero, as TensorFlow's.
_RISING = 1e-12 * 1.1 ** np.arange(774)
BINS = np.concatenate([-_RISING[::-1], [0.0], _RISING])


class TensorBoardWriter:
    """TensorBoard events, by tensorboardX.

    What can't be written is dropped, with one warning: the numbers stand in metrics.jsonl too. Files are
    made at the first record, because importing tensorboardX takes a while.
    """

    def __init__(self, folder: Path, first_step: int, *, writes: bool = True):
        """Writes into `folder`, unless it is not to; events there from `first_step` on are marked as superseded."""
        self._writes = writes
        self._folder = folder
        self._first_step = first_step
        self._files = 0
        self._open_file: Any = None
        self._has_warned = False

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Records numbers that hold at `step`."""
        self._write(step, lambda make: [make.scalar(name, value) for name, value in scalars.items()])

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray], bins: Any = BINS) -> None:
        """Records each array's distribution, in bins with these bounds, or in so many equal ones."""
        self._write(step, lambda make: [make.histogram(name, values, bins) for name, values in arrays.items()])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Records texts, in Markdown."""
        self._write(step, lambda make: [make.text(name, text) for name, text in texts.items()])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Records images, each uint8 [height, width, 3]."""
        self._write(step, lambda make: [make.image(name, pixels, dataformats="HWC") for name, pixels in images.items()])

    def write_hparams(self, hparams: Hparams) -> None:
        """Records what the run is, for a comparison with others."""
        # The start of a session alone: without the experiment TensorBoard finds out itself what differs, and shows
        # that first; the end comes later.
        self._write(0, lambda make: make.hparams(hparams, {})[1:2])

    def write_end(self, step: int) -> None:
        """Records that the run has come to its end."""
        self._write(step, lambda make: make.hparams({}, {})[2:])

    def write_graph(self, graph_def: Any) -> None:
        """Records the program as a graph, a GraphDef."""
        if not self._writes:
            return
        content = graph_def.SerializeToString()
        self._write_events(lambda event: [event(graph_def=content)])

    def _write(self, step: int, summaries: Callable[[Any], Iterable[Any]]) -> None:
        """Writes what `summaries` makes with tensorboardX.summary."""
        if not self._writes:
            return
        load_tensorboardx()
        from tensorboardX import summary

        made = summaries(summary)
        self._write_events(lambda event: [event(step=step, summary=one) for one in made])

    def _write_events(self, events: Callable[[Any], Iterable[Any]]) -> None:
        """Writes what `events` makes with the class of events, dated now."""
        load_tensorboardx()
        from tensorboardX.proto.event_pb2 import Event

        with self._forgiving():
            if self._open_file is None:
                self._start()
            for event in events(Event):
                event.wall_time = time.time()
                self._open_file.write_event(event)

    def _start(self) -> None:
        """Begins a file of a name that no other has, whatever the clock says."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._files += 1
        suffix = f".{os.getpid()}.{self._first_step}.{self._files}"
        self._open_file = EventsWriter(str(self._folder / "events"), suffix)
        if self._first_step > 0 and self._files == 1:
            # TensorBoard then forgets what an earlier session said of these steps.
            start = SessionLog(status=SessionLog.START)
            self._open_file.write_event(Event(step=self._first_step, wall_time=time.time(), session_log=start))

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if not self._has_warned:
                warnings.warn(f"TensorBoard's events in {self._folder} can't all be written ({e}).", stacklevel=2)
            self._has_warned = True
            # Half a record would spoil all after it.
            self._open_file = None

    def flush(self) -> None:
        """Hands everything recorded so far to the operating system."""
        with self._forgiving():
            if self._open_file is not None:
                self._open_file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        with self._forgiving():
            if self._open_file is not None:
                self._open_file.close()
