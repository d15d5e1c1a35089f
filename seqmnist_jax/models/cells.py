"""The table of cells, and what config.model.cell names: one of them, or one of the user's own."""

from typing import NamedTuple

import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.errors import check_name
from seqmnist_jax.models import own_cell


class CellChoice(NamedTuple):
    """A cell that configs can name, and what is said of it.

    Attributes:
      cell: the recurrence engine's cell.
      joint_kernels: whether its input and recurrent kernel count as one tensor where
        tensors are clipped one by one.
      title: its name for people; where it is '', the config's.
      gates: its gates, in the order of the kernels' blocks, in words.
      step: one step as lines of Python, over NumPy's sigmoid, tanh and split along the last axis;
        x, h and c are [batch, ...], and the other names are the layer's tensors.
    """

    cell: rnn.Cell
    joint_kernels: bool = False
    title: str = ""
    gates: str = "the cell is not one of seqmnist_jax's own"
    step: tuple[str, ...] = ()


CELLS = {
    "lstm": CellChoice(
        rnn.LSTM,
        joint_kernels=True,
        title="LSTM",
        gates="i (input), f (forget; its bias is stored whole, nothing is added at run time), g (candidate), "
        "o (output)",
        step=(
            "i, f, g, o = split(x @ kernel + h @ recurrent_kernel + bias, 4)",
            "c = sigmoid(f) * c + sigmoid(i) * tanh(g)",
            "h = sigmoid(o) * tanh(c)",
        ),
    ),
    "gru": CellChoice(
        rnn.GRU,
        title="GRU",
        gates="r (reset), z (update: the share of the old h that is kept), n (candidate); the reset acts after the "
        "product with h (reset_after), as in cuDNN and PyTorch",
        step=(
            "x_r, x_z, x_n = split(x @ kernel + bias, 3)",
            "h_r, h_z, h_n = split(h @ recurrent_kernel + recurrent_bias, 3)",
            "r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)",
            "h = (1 - z) * tanh(x_n + r * h_n) + z * h",
        ),
    ),
    "gru_reset_before": CellChoice(
        rnn.GRU_RESET_BEFORE,
        title="GRU (reset before)",
        gates="r (reset), z (update: the share of the old h that is kept), n (candidate); the reset acts "
        "before the product with h, as in Cho et al. 2014",
        step=(
            "x_r, x_z, x_n = split(x @ kernel + bias, 3)",
            "u_r, u_z, u_n = split(recurrent_kernel, 3)",
            "r, z = sigmoid(x_r + h @ u_r), sigmoid(x_z + h @ u_z)",
            "h = (1 - z) * tanh(x_n + (r * h) @ u_n) + z * h",
        ),
    ),
    "min_gru": CellChoice(
        rnn.MIN_GRU,
        title="minGRU",
        gates="z (update: the share of the old h that is kept), n (candidate)",
        step=("z, n = split(x @ kernel + bias, 2)", "h = (1 - sigmoid(z)) * n + sigmoid(z) * h"),
    ),
}


def cell_title(name: str) -> str:
    """A cell's name for people."""
    return (CELLS[name].title if name in CELLS else "") or name


def build_own(config: ml_collections.ConfigDict) -> own_cell.Found | None:
    """The user's own cell that config.model.cell names, None where it is one of the package; errors as in `find`."""
    if not own_cell.is_one(config.model.cell):
        return None
    return own_cell.find(config.model.cell, config.runtime.get("cell_file", ""))


def build_cell(config: ml_collections.ConfigDict) -> CellChoice:
    """The cell that config.model.cell names.

    Raises:
      UsageError: there is none of that name.
    """
    own = build_own(config)
    if own is not None:
        return CellChoice(own.cell, gates="the user's own; step is its source", step=own_cell.source(own.cell))
    check_name(config.model.cell, {*CELLS, "MODULE:NAME"}, "model.cell")
    return CELLS[config.model.cell]
