"""The sequence classifiers that configs can name, and how they are read.

Above `rnn`, whose layers they are made of, and `devices`; below `training`.
"""

from seqmnist_jax.models.build import build_model
from seqmnist_jax.models.cells import CELLS, CellChoice

__all__ = ["CELLS", "CellChoice", "build_model"]
