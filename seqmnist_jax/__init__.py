"""Sequential MNIST in JAX: results that can be compared, and speed.

`load(workdir)` gives a trained model; `seqmnist_jax.rnn` is the recurrence engine.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqmnist_jax.analysis.trained import TrainedModel

__version__ = "0.1.0"


def load(workdir: str | Path) -> TrainedModel:
    """The trained model of a run: its selected checkpoint, ready to read images.

    >>> import seqmnist_jax
    >>> from seqmnist_jax.data.sources import load_embedded
    >>> model = seqmnist_jax.load("pretrained/row_lstm")
    >>> images = load_embedded().test.images[:3]  # uint8 [count, 28, 28]
    >>> model.predict(images)
    array([3, 9, 3])
    >>> model.read(images).shape  # the probabilities of each class after each step
    (3, 28, 10)
    >>> model.features(images).shape  # what the dense layer sees
    (3, 64)
    >>> sorted(model.params)
    ['dense', 'norm', 'rnn']

    See `seqmnist_jax.analysis.trained.TrainedModel` for all that it can be asked.

    Args:
      workdir: a folder that `launch.py --mode=train` made. While it trains, this is the best so far.

    Raises:
      WorkdirError: it is no work directory.
      CheckpointError: it has no checkpoint, or the checkpoint can't be read.
      UsageError: its cell is one of your own, and that can't be imported.
    """
    # Imported here, so that `from seqmnist_jax import rnn` costs JAX and nothing more.
    from seqmnist_jax.analysis import trained

    model = trained.load(workdir)
    for warning in model.warnings:
        warnings.warn(warning, stacklevel=2)
    return model
