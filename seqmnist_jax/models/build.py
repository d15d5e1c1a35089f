"""From config.model to the model that it names; the tables of cells and models."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError, choose
from seqmnist_jax.models.classifier import DENSE_INITS, NORMS, SequenceClassifier
from seqmnist_jax.models.tcn import TCN

Array = jax.Array


class CellChoice(NamedTuple):
    """A cell that configs can name.

    Attributes:
      cell: the recurrence engine's cell.
      init_options: the options of its initialiser that come from the config.
      joint_kernels: whether its input and recurrent kernel count as one tensor where
        tensors are clipped one by one.
    """

    cell: rnn.Cell
    init_options: tuple[str, ...]
    joint_kernels: bool


CELLS = {
    "lstm": CellChoice(rnn.LSTM, ("kernel_init", "time_scales", "forget_bias"), joint_kernels=True),
    "gru": CellChoice(rnn.GRU, ("kernel_init", "time_scales"), joint_kernels=False),
    "gru_reset_before": CellChoice(rnn.GRU_RESET_BEFORE, ("kernel_init", "time_scales"), joint_kernels=False),
    "min_gru": CellChoice(rnn.MIN_GRU, ("kernel_init", "time_scales"), joint_kernels=False),
}
GATE_BIASES = ("constant", *rnn.TIME_SCALES)


def _build_engine(config: ml_collections.ConfigDict, cell: rnn.Cell, sequence_length: int) -> rnn.Engine:
    """How the recurrent layers run, from config.runtime.backend and config.model."""
    model, backend = config.model, config.runtime.backend
    choose(dict.fromkeys(rnn.BACKENDS), backend, "runtime.backend")
    choose(dict.fromkeys(rnn.PRECISIONS), model.precision, "model.precision")
    if backend not in cell.backends:
        expected = " or ".join(map(repr, cell.backends))
        raise UsageError(f"runtime.backend is {backend!r}, but model.cell is {model.cell!r}; expected {expected}.")
    if backend in ("fused", "native"):
        only_scan = {
            "model.unroll is above 1": model.unroll > 1,
            "model.dropout.state_keep is below 1": model.dropout.state_keep < 1.0,
        }
        for reason, holds in only_scan.items():
            if holds:
                raise UsageError(f"runtime.backend is {backend!r}, but {reason}; expected 'scan' or 'auto'.")
    if backend == "native" and rnn.native_problem() is not None:
        raise UsageError(
            f"runtime.backend is 'native', but {rnn.native_problem()}; expected 'auto', 'fused' or 'scan'."
        )
    return rnn.Engine(backend, model.precision, model.remat, min(model.unroll, sequence_length))


def _build_time_scales(model: ml_collections.ConfigDict, sequence_length: int) -> Callable[..., Array] | None:
    """The initialiser of the keeping gate's bias, from config.model."""
    choose(dict.fromkeys(GATE_BIASES), model.gate_bias, "model.gate_bias")
    if model.gate_bias == "constant":
        return None
    longest = model.longest_time_scale or sequence_length
    if longest < 2:
        where = "model.longest_time_scale" if model.longest_time_scale else "the sequence length of this view"
        raise UsageError(
            f"model.gate_bias is {model.gate_bias!r}, but {where} is {longest}; expected at least 2 steps."
        )
    return rnn.TIME_SCALES[model.gate_bias](longest)


def _build_rnn(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> SequenceClassifier:
    model = config.model
    choice = choose(CELLS, model.cell, "model.cell")
    choose(rnn.KERNELS, model.kernel_init, "model.kernel_init")
    choose(dict.fromkeys(NORMS), model.norm, "model.norm")
    choose(DENSE_INITS, model.dense_init, "model.dense_init")
    options = {
        "kernel_init": model.kernel_init,
        "forget_bias": model.forget_bias,
        "time_scales": _build_time_scales(model, sequence_length),
    }
    shape = {"num_layers": model.num_layers, "bidirectional": model.bidirectional}
    hidden_size, init_options = model.hidden_size, {name: options[name] for name in choice.init_options}

    def init_layers(key: Array, features: int) -> rnn.Layers:
        return rnn.init_stack(key, choice.cell, features, hidden_size, **shape, **init_options)

    return SequenceClassifier(
        choice.cell,
        init_layers,
        hidden_size,
        num_classes,
        dense_init=model.dense_init,
        norm=model.norm,
        engine=_build_engine(config, choice.cell, sequence_length),
    )


def _build_tcn(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> TCN:
    del sequence_length
    model = config.model
    for name in ("input_keep", "state_keep"):
        if model.dropout[name] < 1.0:
            raise UsageError(f"model.dropout.{name} is {model.dropout[name]}, but a TCN only has output_keep.")
    return TCN(
        channels=model.hidden_size, levels=model.num_layers, kernel_size=model.kernel_size, num_classes=num_classes
    )


MODELS: dict[str, Callable[[ml_collections.ConfigDict, int, int], nn.Module]] = {"rnn": _build_rnn, "tcn": _build_tcn}


def build_model(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> nn.Module:
    """The model that config.model names, for sequences of this length.

    Raises:
      UsageError: an unknown name or an impossible size.
    """
    build = choose(MODELS, config.model.name, "model.name")
    return build(config, sequence_length, num_classes)
