"""The cells that configs can name: `CELLS` is their table; each of the field's is a module of equations."""

from seqmnist_jax.models.cells.registry import CELLS, build_cell, build_own, cell_title, known_options

__all__ = ["CELLS", "build_cell", "build_own", "cell_title", "known_options"]
