"""The table of cells, and what config.model.cell names: one of them, or one of the user's own."""

import functools
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError, check_name, did_you_mean, parse_mapping
from seqmnist_jax.models import own_cell
from seqmnist_jax.models.cells import (
    cornn,
    diagonal,
    elman,
    exp_rnn,
    ind_rnn,
    lem,
    lru,
    min_gru,
    min_lstm,
    peephole_lstm,
    s5,
    ur_gru,
    ur_lstm,
)
from seqmnist_jax.rnn.cell import scans_its_step, takes


class CellChoice(NamedTuple):
    """A cell that configs can name, and what is said of it.

    Attributes:
      cell: the recurrence engine's cell.
      joint_kernels: whether its input and recurrent kernel count as one tensor where
        tensors are clipped one by one.
      recurrent: the names of the parameters that say how its state moves on by itself, which train at a rate of their
        own (optimizer.recurrent_rate) and without weight decay; none where its recurrent kernel is one like others.
      title: its name for people; where it is '', the config's.
      gates: its gates, in the order of the kernels' blocks, in words.
      step: one step as lines of Python, over NumPy's sigmoid, tanh and split along the last axis;
        x, h and c are [batch, ...], and the other names are the layer's tensors. Where there are none,
        `build_cell` gives the source of the cell's step.
    """

    cell: rnn.Cell
    joint_kernels: bool = False
    recurrent: tuple[str, ...] = ()
    title: str = ""
    gates: str = "the cell is not one of seqmnist_jax's own"
    step: tuple[str, ...] = ()


def _field(module: ModuleType, title: str, *recurrent: str) -> CellChoice:
    """One of the field's cells, each a module with its equations."""
    return CellChoice(
        module.CELL, recurrent=recurrent, title=title, gates=f"step is its source. {inspect.getdoc(module)}"
    )


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
    "min_gru": _field(min_gru, "minGRU"),
    "min_lstm": _field(min_lstm, "minLSTM"),
    "elman": _field(elman, "Elman"),
    "ur_lstm": _field(ur_lstm, "UR-LSTM"),
    "ur_gru": _field(ur_gru, "UR-GRU"),
    "peephole_lstm": _field(peephole_lstm, "Peephole LSTM"),
    "ind_rnn": _field(ind_rnn, "IndRNN", "recurrent_kernel"),
    "exp_rnn": _field(exp_rnn, "expRNN", "skew"),
    "cornn": _field(cornn, "coRNN"),
    "lem": _field(lem, "LEM"),
    "lru": _field(lru, "LRU", "nu", "theta", "gamma"),
    "s5": _field(s5, "S5", "decay", "omega", "dt"),
    "diagonal": _field(diagonal, "Diagonal recurrence", "nu", "theta"),
}
# The numbers that other fields of the config give, and the largest that model.cell_options may.
OF_FIELDS = ("forget_bias", "sequence_length")
LARGEST = 1e30


def cell_title(name: str) -> str:
    """A cell's name for people."""
    return (CELLS[name].title if name in CELLS else "") or name


def build_own(config: ml_collections.ConfigDict) -> own_cell.Found | None:
    """The user's own cell that config.model.cell names, None where it is one of the package; errors as in `find`."""
    if not own_cell.is_one(config.model.cell):
        return None
    known = config.runtime.get("cell_file", ""), config.model.get("cell_hash", "")  # of a run that was
    return own_cell.find(config.model.cell, *known)


def known_options(cell: rnn.Cell) -> dict[str, float]:
    """The numbers that model.cell_options may set, with their defaults: those that step or init takes by name.

    A layer of its own does not know what its step is given.
    """
    found = {}
    for function in (cell.init, cell.step) if scans_its_step(cell) else (cell.init,):
        for name, argument in inspect.signature(function).parameters.items():
            if type(argument.default) in (int, float) and name not in OF_FIELDS:
                found[name] = argument.default
    return found


@functools.lru_cache(maxsize=256)
def with_options(cell: rnn.Cell, options: tuple[tuple[str, float], ...]) -> rnn.Cell:
    """The cell with other numbers in its equations; for the same ones the same object, by which programs go."""

    def given(function: Any) -> Any:
        taken = {name: value for name, value in options if takes(function, name)}
        return functools.partial(function, **taken) if taken else function

    if scans_its_step(cell):
        return rnn.cell(given(cell.step), given(cell.init), cell.zero_carry)
    return cell._replace(init=given(cell.init))


def _build_options(config: ml_collections.ConfigDict, cell: rnn.Cell) -> tuple[tuple[str, float], ...]:
    """The numbers of config.model.cell_options, which the cell must take."""
    field, text, known = "model.cell_options", config.model.cell_options, known_options(cell)
    example = str(known or {"dt": 0.1})
    options = parse_mapping(text, field, f"{example}, from names to numbers")
    for name, value in options.items():
        if name not in known:
            taken = f"one of: {', '.join(sorted(known))}" if known else "none, for it takes no numbers"
            hint = did_you_mean(str(name), known)
            raise UsageError(f"{field} has {name!r}, but model.cell is {config.model.cell!r}; expected {taken}.{hint}")
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise UsageError(f"{field} has {name!r}: {value!r}; expected a number, as in {example}.")
    return tuple(sorted(options.items()))


def build_cell(config: ml_collections.ConfigDict) -> CellChoice:
    """The cell that config.model.cell names, with the numbers of config.model.cell_options.

    Raises:
      UsageError: there is none of that name, or it takes no such number.
    """
    own = build_own(config)
    if own is not None:
        choice = CellChoice(own.cell, gates="the user's own; step is its source")
    else:
        check_name(config.model.cell, {*CELLS, "MODULE:NAME"}, "model.cell")
        choice = CELLS[config.model.cell]
    options = _build_options(config, choice.cell)
    cell = with_options(choice.cell, options) if options else choice.cell
    return choice._replace(cell=cell, step=choice.step or own_cell.source(choice.cell))
