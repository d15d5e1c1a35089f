"""The sequence classifiers that configs can name, and how they are read.

Above `rnn`, whose layers they are made of, and `devices`; below `training`.
"""

from seqmnist_jax.models.cells import CELLS

__all__ = ["CELLS"]
