"""From config.model to the model that it names; the table of models."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError, check_name, choose
from seqmnist_jax.models import own_cell
from seqmnist_jax.models.cells import build_cell, cell_title
from seqmnist_jax.models.classifier import DENSE_INITS, NORMS, SequenceClassifier
from seqmnist_jax.models.tcn import TCN
from seqmnist_jax.rnn.cell import takes

Array = jax.Array


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
    *(f"model.{name}" for name in ("cell", "cell_options", "bidirectional", "kernel_init", "gate_bias", "forget_bias")),
    *(f"model.{name}" for name in ("longest_time_scale", "norm", "dense_init", "precision", "remat", "unroll")),
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
    if backend in ("fused", "native") and model.unroll > 1:
        raise UsageError(f"runtime.backend is {backend!r}, but model.unroll is above 1; expected 'scan' or 'auto'.")
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
    cell = build_cell(config).cell
    check_name(model.kernel_init, rnn.KERNELS, "model.kernel_init")
    check_name(model.norm, NORMS, "model.norm")
    check_name(model.dense_init, DENSE_INITS, "model.dense_init")
    options = {
        "kernel_init": model.kernel_init,
        "forget_bias": model.forget_bias,
        "time_scales": _build_time_scales(model, sequence_length),
    }
    shape = {"num_layers": model.num_layers, "bidirectional": model.bidirectional}
    name, hidden_size = model.cell, model.hidden_size
    options = {option: value for option, value in options.items() if takes(cell.init, option)}
    engine = _build_engine(config, cell, sequence_length)

    def init_layers(key: Array, features: int) -> rnn.Layers:
        if own_cell.is_one(name) or model.cell_options:
            widths = (features, *[hidden_size * (1 + shape["bidirectional"])][: shape["num_layers"] - 1])
            for width in widths:
                own_cell.check(name, cell, width, hidden_size, options, engine)
        return rnn.init_stack(key, cell, features, hidden_size, **shape, **options)

    return SequenceClassifier(
        cell,
        init_layers,
        hidden_size,
        num_classes,
        dense_init=model.dense_init,
        norm=model.norm,
        engine=engine,
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
    cell = build_cell(config).cell
    unread = {"model.kernel_size": f"model.name={model.name!r}"}
    fields = {"kernel_init": "kernel_init", "time_scales": "gate_bias", "forget_bias": "forget_bias"}
    unread |= {f"model.{field}": of_cell for option, field in fields.items() if not takes(cell.init, option)}
    if not takes(cell.step, "precision"):
        unread["runtime.eval_precision"] = of_cell
        # A kernel rounds what it multiplies by itself, and in float32 are all products that nobody rounds.
        if model.precision not in ("auto", "float32") and config.runtime.backend != "native":
            unread["model.precision"] = of_cell
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
