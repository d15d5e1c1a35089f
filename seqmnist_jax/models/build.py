"""From config.model to the model that it names; the table of models."""

import functools
import re
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
from seqmnist_jax.models.deep import DeepClassifier, Stage
from seqmnist_jax.models.head import MLP, READINGS
from seqmnist_jax.models.tcn import TCN
from seqmnist_jax.rnn.cell import takes

Array = jax.Array


def model_title(flat: Mapping[str, Any]) -> str:
    """A model's name for people, 'GRU 2 x 128, bfloat16', from the flat fields of its config."""
    name, layers, size = flat.get("model.name", "rnn"), flat["model.num_layers"], flat["model.hidden_size"]
    if name == "tcn":
        return f"TCN, {layers} levels of {size}"
    if name == "mlp":
        return f"MLP {layers} x {size}"
    if name == "linear":
        return "Linear classifier"
    precision = flat.get("model.precision", "float32")
    exact = "" if precision in ("auto", "float32") else f", {precision}"
    if name == "deep":
        stages = flat.get("model.stages") or f"{size}x{layers}"
        return f"{cell_title(flat['model.cell'])} in a deep stack, {stages}{exact}"
    memory = f", memory of {flat['model.memory']}" if flat.get("model.memory") else ""
    hidden = f", MLP {flat['model.head_layers']} x {size} behind it" if flat.get("model.head_layers") else ""
    both = " both ways" if flat["model.bidirectional"] else ""
    shape = str(size) if layers == 1 else f"{layers} x {size}"
    return f"{cell_title(flat['model.cell'])} {shape}{both}{memory}{hidden}{exact}"


# The fields that only some models read.
OF_CELLS = (
    *(f"model.{name}" for name in ("cell", "cell_options", "bidirectional", "kernel_init", "gate_bias", "forget_bias")),
    *(f"model.{name}" for name in ("longest_time_scale", "precision", "remat", "unroll", "reading", "head_layers")),
    "optimizer.recurrent_rate",
    "runtime.backend",
    "runtime.eval_precision",
)
OF_MODELS: dict[str, tuple[str, ...]] = {
    "rnn": (*OF_CELLS, "model.num_layers", "model.hidden_size", "model.norm", "model.dense_init", "model.memory"),
    "deep": (*OF_CELLS, "model.num_layers", "model.hidden_size", "model.stages", "model.shorten"),
    "tcn": ("model.num_layers", "model.hidden_size", "model.kernel_size"),
    "mlp": ("model.num_layers", "model.hidden_size"),
    "linear": (),
}
# Of a stage, and of its blocks.
MOST_CHANNELS = 10**6
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
    if longest < 2 and model.gate_bias != "uniform":  # which knows no time
        where = "model.longest_time_scale" if model.longest_time_scale else "the sequence length (of a stage)"
        raise UsageError(
            f"model.gate_bias is {model.gate_bias!r}, but {where} is {longest}; expected at least 2 steps."
        )
    return rnn.keeping_bias((model.gate_bias, max(longest, 2)))


def _build_init_layers(
    config: ml_collections.ConfigDict, cell: rnn.Cell, engine: rnn.Engine, sequence_length: int, hidden_size: int
) -> Callable[..., rnn.Layers]:
    """``(key, features, num_layers) -> parameters`` of recurrent layers for sequences of this length."""
    model = config.model
    check_name(model.kernel_init, rnn.KERNELS, "model.kernel_init")
    options = {
        "kernel_init": model.kernel_init,
        "forget_bias": model.forget_bias,
        "time_scales": _build_time_scales(model, sequence_length),
        "sequence_length": sequence_length,
    }
    options = {option: value for option, value in options.items() if takes(cell.init, option)}
    name, bidirectional, drops_state = model.cell, model.bidirectional, model.dropout.state_keep < 1.0
    is_checked = own_cell.is_one(name) or bool(model.cell_options) or engine.backend == "native" or drops_state

    def init_layers(key: Array, features: int, num_layers: int = 1) -> rnn.Layers:
        if is_checked:
            for width in (features, *[hidden_size * (1 + bidirectional)][: num_layers - 1]):
                own_cell.check(name, cell, width, hidden_size, options, engine, drops_state)
        shape = {"num_layers": num_layers, "bidirectional": bidirectional}
        try:
            return rnn.init_stack(key, cell, features, hidden_size, **shape, **options)
        except ValueError as e:
            raise UsageError(f"model.cell is {name!r}, but its {e}.") from e

    return init_layers


def _build_rnn(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> SequenceClassifier:
    model = config.model
    check_name(model.norm, NORMS, "model.norm")
    check_name(model.dense_init, DENSE_INITS, "model.dense_init")
    check_name(model.reading, READINGS, "model.reading")
    cell = build_cell(config).cell
    engine = _build_engine(config, cell, sequence_length)
    init_layers = _build_init_layers(config, cell, engine, sequence_length, model.hidden_size)
    return SequenceClassifier(
        cell,
        functools.partial(init_layers, num_layers=model.num_layers),
        model.hidden_size,
        num_classes,
        dense_init=model.dense_init,
        norm=model.norm,
        engine=engine,
        reading=model.reading,
        head_layers=model.head_layers,
        memory=model.memory,
    )


def _build_sizes(model: ml_collections.ConfigDict) -> list[tuple[int, int]]:
    """Channels and blocks of each stage of model.stages."""
    if not model.stages:
        return [(model.hidden_size, model.num_layers)]
    found = [re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part) for part in model.stages.split(",")]
    sizes = [(int(one[1]), int(one[2])) for one in found if one]
    if len(sizes) < len(found) or not all(0 < number <= MOST_CHANNELS for size in sizes for number in size):
        raise UsageError(
            f"model.stages is {model.stages!r}; expected channels x blocks of each stage, as '32x1, 64x2, 128x1'."
        )
    return sizes


def _build_deep(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> DeepClassifier:
    model, sizes = config.model, _build_sizes(config.model)
    check_name(model.reading, READINGS, "model.reading")
    if model.bidirectional:
        raise UsageError("model.bidirectional is True, but a deep stack reads forwards alone; expected False.")
    _check_no_dropout(model, "a deep stack", ("state_keep",))
    if sequence_length % model.shorten ** (len(sizes) - 1):
        raise UsageError(
            f"model.shorten is {model.shorten} and model.stages names {len(sizes)}, but the sequence length of this "
            f"view is {sequence_length}; expected a multiple of {model.shorten ** (len(sizes) - 1)}."
        )
    cell = build_cell(config).cell
    engine = _build_engine(config, cell, sequence_length)
    stages = []
    for index, (channels, blocks) in enumerate(sizes):
        length = sequence_length // model.shorten**index
        stages.append(Stage(channels, blocks, _build_init_layers(config, cell, engine, length, channels)))
    return DeepClassifier(
        cell,
        tuple(stages),
        shorten=model.shorten,
        reading=model.reading,
        head_layers=model.head_layers,
        num_classes=num_classes,
        engine=engine,
    )


def _build_mlp(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> MLP:
    del sequence_length
    model = config.model
    places = ("state_keep",) if model.name == "mlp" else ("state_keep", "output_keep")
    _check_no_dropout(model, f"model.name={model.name!r}", places)
    return MLP(model.hidden_size, model.num_layers if model.name == "mlp" else 0, num_classes)


def _check_no_dropout(model: ml_collections.ConfigDict, what: str, places: tuple[str, ...]) -> None:
    for name in places:
        if model.dropout[name] < 1.0:
            raise UsageError(
                f"model.dropout.{name} is {model.dropout[name]}, but {what} has no such place; expected 1."
            )


def _build_tcn(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> TCN:
    del sequence_length
    model = config.model
    _check_no_dropout(model, "a TCN", ("input_keep", "state_keep"))
    return TCN(
        channels=model.hidden_size, levels=model.num_layers, kernel_size=model.kernel_size, num_classes=num_classes
    )


def build_unread(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The fields of config.model, and the backend, that this model does not read, and by which field that is so."""
    model = config.model
    read = OF_MODELS[model.name]
    others = {field for fields in OF_MODELS.values() for field in fields} - set(read)
    unread = dict.fromkeys(sorted(others), f"model.name={model.name!r}")
    if "model.cell" not in read:
        return unread
    of_cell, of_bias = f"model.cell={model.cell!r}", f"model.gate_bias={model.gate_bias!r}"
    if model.name == "deep" and len(_build_sizes(model)) == 1:
        unread["model.shorten"] = f"model.stages={model.stages!r}"
    if model.name == "deep" and model.stages:
        unread |= dict.fromkeys(("model.num_layers", "model.hidden_size"), f"model.stages={model.stages!r}")
    choice = build_cell(config)
    cell = choice.cell
    unread |= {} if choice.recurrent else {"optimizer.recurrent_rate": of_cell}
    fields = {"kernel_init": "kernel_init", "time_scales": "gate_bias", "forget_bias": "forget_bias"}
    unread |= {f"model.{field}": of_cell for option, field in fields.items() if not takes(cell.init, option)}
    if not takes(cell.step, "precision"):
        unread["runtime.eval_precision"] = of_cell
        # A kernel rounds what it multiplies by itself, and in float32 are all products that nobody rounds.
        if model.precision not in ("auto", "float32") and config.runtime.backend != "native":
            unread["model.precision"] = f"{of_cell} and runtime.backend={config.runtime.backend!r}"
    unread |= {} if model.gate_bias == "constant" else {"model.forget_bias": of_bias}
    return unread if model.gate_bias in ("log_uniform", "chrono") else unread | {"model.longest_time_scale": of_bias}


MODELS: dict[str, Callable[[ml_collections.ConfigDict, int, int], nn.Module]] = {
    "rnn": _build_rnn,
    "deep": _build_deep,
    "tcn": _build_tcn,
    "mlp": _build_mlp,
    "linear": _build_mlp,
}


def build_model(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> nn.Module:
    """The model that config.model names, for sequences of this length.

    Raises:
      UsageError: an unknown name or an impossible size.
    """
    build = choose(MODELS, config.model.name, "model.name")
    return build(config, sequence_length, num_classes)
