"""Sequential MNIST in JAX: results that can be compared, and speed.

`load(workdir)` gives a trained model; `seqmnist_jax.rnn` is the recurrence engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqmnist_jax.evaluate import TrainedModel

__version__ = "0.1.0"


def load(workdir: str | Path) -> TrainedModel:
    """The trained model of a run; see `seqmnist_jax.evaluate.load`."""
    # Imported here, so that `from seqmnist_jax import rnn` costs JAX and nothing more.
    from seqmnist_jax import evaluate

    return evaluate.load(workdir)
