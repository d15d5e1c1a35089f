"""From config.model to the model that it names; the tables of cells and models."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError, check_name, choose
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
      title: its name for people; where it is '', the config's.
      gates: its gates, in the order of the kernels' blocks, in words.
      step: one step as lines of Python, over NumPy's sigmoid, tanh and split along the last axis;
        x, h and c are [batch, ...], and the other names are the layer's tensors.
    """

    cell: rnn.Cell
    init_options: tuple[str, ...]
    joint_kernels: bool
    title: str = ""
    gates: str = "the cell is not one of seqmnist_jax's own"
    step: tuple[str, ...] = ()


CELLS = {
    "lstm": CellChoice(
        rnn.LSTM,
        ("kernel_init", "time_scales", "forget_bias"),
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
        ("kernel_init", "time_scales"),
        joint_kernels=False,
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
        ("kernel_init", "time_scales"),
        joint_kernels=False,
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
        ("kernel_init", "time_scales"),
        joint_kernels=False,
        title="minGRU",
        gates="z (update: the share of the old h that is kept), n (candidate)",
        step=("z, n = split(x @ kernel + bias, 2)", "h = (1 - sigmoid(z)) * n + sigmoid(z) * h"),
    ),
}


def cell_title(name: str) -> str:
    """A cell's name for people."""
    return (CELLS[name].title if name in CELLS else "") or name


def model_title(flat: Mapping[str, Any]) -> str:
    """A model's name for people, 'GRU 2 x 128, bfloat16', from the flat fields of its config."""
    if flat.get("model.name", "rnn") == "tcn":
        return f"TCN, {flat['model.num_layers']} levels of {flat['model.hidden_size']}"
    layers = "" if flat["model.num_layers"] == 1 else f"{flat['model.num_layers']} x "
    both = " both ways" if flat["model.bidirectional"] else ""
    precision = flat.get("model.precision", "float32")
    exact = "" if precision in ("auto", "float32") else f", {precision}"
    return f"{cell_title(flat['model.cell'])} {layers}{flat['model.hidden_size']}{both}{exact}"


# What only recurrent layers read.
OF_LAYERS = (
    *(f"model.{name}" for name in ("cell", "bidirectional", "kernel_init", "gate_bias", "longest_time_scale")),
    *(f"model.{name}" for name in ("forget_bias", "norm", "dense_init", "precision", "remat", "unroll")),
    "runtime.backend",
)
GATE_BIASES = ("constant", *rnn.TIME_SCALES)


def _precision(name: str) -> str:
    """The precision that config.model.precision means on this process's device.

    'auto' is the fastest that reaches the accuracy of float32: a GPU's kernel multiplies in 16 bits.
    """
    check_name(name, ("auto", *rnn.PRECISIONS), "model.precision")
    if name != "auto":
        return name
    return "tensorfloat32" if jax.default_backend() == "gpu" else "float32"


def _build_engine(config: ml_collections.ConfigDict, cell: rnn.Cell, sequence_length: int) -> rnn.Engine:
    """How the recurrent layers run, from config.runtime.backend and config.model."""
    model, backend = config.model, config.runtime.backend
    check_name(backend, rnn.BACKENDS, "runtime.backend")
    precision = _precision(model.precision)
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
    return rnn.Engine(backend, precision, model.remat, min(model.unroll, sequence_length))


def _build_time_scales(model: ml_collections.ConfigDict, sequence_length: int) -> Callable[..., Array] | None:
    """The initialiser of the keeping gate's bias, from config.model."""
    check_name(model.gate_bias, GATE_BIASES, "model.gate_bias")
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
    check_name(model.kernel_init, rnn.KERNELS, "model.kernel_init")
    check_name(model.norm, NORMS, "model.norm")
    check_name(model.dense_init, DENSE_INITS, "model.dense_init")
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


def build_unread(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The fields of config.model, and the backend, that this model does not read, and by which field that is so."""
    model = config.model
    if model.name == "tcn":
        return dict.fromkeys(OF_LAYERS, "model.name='tcn'")
    of_cell, of_bias = f"model.cell={model.cell!r}", f"model.gate_bias={model.gate_bias!r}"
    options = CELLS[model.cell].init_options
    unread = {"model.kernel_size": f"model.name={model.name!r}"}
    unread |= {} if "kernel_init" in options else {"model.kernel_init": of_cell}
    unread |= {} if "time_scales" in options else {"model.gate_bias": of_cell}
    unread |= {} if "forget_bias" in options else {"model.forget_bias": of_cell}
    unread |= {} if model.gate_bias == "constant" else {"model.forget_bias": of_bias}
    return unread if model.gate_bias in ("log_uniform", "chrono") else unread | {"model.longest_time_scale": of_bias}


MODELS: dict[str, Callable[[ml_collections.ConfigDict, int, int], nn.Module]] = {"rnn": _build_rnn, "tcn": _build_tcn}


def build_model(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> nn.Module:
    """The model that config.model names, for sequences of this length.

    Raises:
      UsageError: an unknown name or an impossible size.
    """
    build = choose(MODELS, config.model.name, "model.name")
    return build(config, sequence_length, num_classes)
