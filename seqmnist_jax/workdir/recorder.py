"""What a run has to tell while it goes on, to the two places where it is told."""

import os
from collections.abc import Mapping
from pathlib import Path

from seqmnist_jax.workdir.files import METRICS
from seqmnist_jax.workdir.metrics import JsonLinesWriter
from seqmnist_jax.workdir.tensorboard import TensorBoardWriter


class Recorder:
    """Takes a run's scalars for metrics.jsonl and TensorBoard, and all else for TensorBoard alone.

    Attributes:
      tensorboard: takes texts, histograms, images, hyperparameters and the graph.
    """

    def __init__(self, folder: Path, first_step: int, *, writes: bool = True):
        """Records into `folder`, from `first_step` on; nothing where it does not write, as one of several processes."""
        self._metrics = JsonLinesWriter(folder / METRICS if writes else Path(os.devnull))
        self.tensorboard = TensorBoardWriter(folder, first_step, writes=writes)

    def write_scalars(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Records numbers, named 'split/metric', that hold at `step`."""
        self._metrics.write_scalars(step, scalars)
        self.tensorboard.write_scalars(step, scalars)

    def flush(self) -> None:
        """Hands everything recorded so far to the operating system.

        Raises:
          OSError: not all of metrics.jsonl could be written; nothing is lost.
        """
        self._metrics.flush()
        self.tensorboard.flush()

    def close(self) -> None:
        """Flushes and releases what is held."""
        self._metrics.close()
        self.tensorboard.close()
