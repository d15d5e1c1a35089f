"""The sequence classifiers that configs can name, as Flax modules.

The recurrent one is layers -> norm -> dense, its parameters params['rnn']['layer_0']['forward' |
'backward'][...], ['norm'], ['dense']. Every model is called as `SequenceClassifier` is, and sows, in the
collection 'intermediates', what its dense layer sees as 'features'; the recurrent one what its layers
hand on as 'states'.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.devices.mesh import own_share, shards
from seqmnist_jax.errors import UsageError, choose
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
NORMS = ("none", "frozen", "batch")
GATE_BIASES = ("constant", *rnn.TIME_SCALES)

# name: (kernel initialiser, bias initialiser) of the dense layer
DENSE_INITS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "glorot_uniform": (nn.initializers.glorot_uniform(), nn.initializers.zeros),
    "orthogonal": (nn.initializers.orthogonal(), nn.initializers.zeros),
    # Standard normal kernel and bias, as the tutorial's first model draws them.
    "random_normal": (nn.initializers.normal(1.0), nn.initializers.normal(1.0)),
}

# TF1's defaults for a batch-norm layer, which the tutorial keeps.
NORM_EPSILON = 1e-3
NORM_MOMENTUM = 0.99


class SequenceClassifier(nn.Module):
    """Reads a sequence and names its class from the recurrent layers' last output, or from each.

    Attributes:
      cell: the recurrence engine's cell.
      init_layers: ``(key, features) -> parameters`` of the recurrent layers, as `rnn.init_stack`.
      hidden_size: units of a layer in one direction.
      num_classes: the number of logits.
      dense_init: a name in `DENSE_INITS`.
      norm: between layers and dense: 'none'; 'batch', batch normalisation (Ioffe &
        Szegedy 2015); 'frozen', the same with its moving mean and variance left at 0
        and 1, in training too: an affine layer, and what the 2018 tutorial really ran.
      engine: how the recurrent layers run.
      data_axis: None, or in training the axis of a ``shard_map`` over which batches are divided:
        statistics are then those of the whole batch, and masks are parts of its masks.
    """

    cell: rnn.Cell
    init_layers: Callable[[Array, int], rnn.Layers]
    hidden_size: int
    num_classes: int
    dense_init: str
    norm: str
    engine: rnn.Engine = rnn.Engine()
    data_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        lengths: Array | None = None,
        keep: rnn.Keep | None = None,
        every_step: bool = False,
    ) -> Array:
        """Logits [batch, num_classes] of sequences, or [batch, time, num_classes].

        Args:
          x: [batch, time, features].
          train: whether the norm layer uses and gathers the batch's statistics, and units are dropped.
          lengths: integers [batch], as in `rnn.scan`; None for whole sequences.
          keep: in training, the probabilities to keep a unit at each place of variational
            dropout; None at a place, or in all, for no dropout. Needs the rng 'dropout'.
          every_step: whether to read the output of each step, not the last alone. Only layers
            that read forwards have seen, at a step, what came before it and no more.
        """
        layers = self.param("rnn", self.init_layers, x.shape[-1])
        masks = (
            self._masks(layers, x, keep) if train and keep is not None and any(p is not None for p in keep) else None
        )
        with jax.named_scope("rnn"):
            read = rnn.stack(
                self.cell, layers, x, lengths=lengths, masks=masks, engine=self.engine, return_sequences=every_step
            )
        self.sow("intermediates", "states", read)
        if self.norm != "none":
            read = nn.BatchNorm(
                use_running_average=self.norm == "frozen" or not train,
                momentum=NORM_MOMENTUM,
                epsilon=NORM_EPSILON,
                axis_name=self.data_axis,
                name="norm",
            )(read)
        self.sow("intermediates", "features", read)
        kernel_init, bias_init = DENSE_INITS[self.dense_init]
        return nn.Dense(self.num_classes, kernel_init=kernel_init, bias_init=bias_init, name="dense")(read)

    def _masks(self, layers: rnn.Layers, x: Array, keep: rnn.Keep) -> dict[str, dict[str, rnn.Masks]]:
        """Fresh masks for every layer and direction."""
        whole = x.shape[0] * shards(self.data_axis)

        def draw(features: int) -> rnn.Masks:
            masks = rnn.draw_masks(self.make_rng("dropout"), keep, whole, features, self.hidden_size, x.dtype)
            return jax.tree.map(lambda mask: own_share(mask, self.data_axis), masks)

        return {
            name: {direction: draw(params["kernel"].shape[0]) for direction, params in directions.items()}
            for name, directions in layers.items()
        }


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


def explain_engine(model: nn.Module, params: Any, x: Any, drops_state: bool) -> str:
    """Which backend of the recurrence the model's layers take, and why.

    Args:
      model: the model.
      params: its parameters, or their shapes.
      x: a batch [batch, time, features], or its shape.
      drops_state: whether training drops units of the state.
    """
    if not isinstance(model, SequenceClassifier):
        return "none: the model has no recurrence"
    if model.engine.unroll > 1 or drops_state:
        return "scan: dropout of the state or unrolling works on single steps"
    if "scan" not in model.cell.backends:
        return "the cell's own layer"
    layer = params["rnn"]["layer_0"]["forward"]
    reset_after = "recurrent_bias" in layer
    return str(rnn.explain(layer, x, backend=model.engine.backend, reset_after=reset_after))


def portable(model: nn.Module) -> nn.Module:
    """The same model in XLA's own operations alone, so that its program runs wherever XLA does."""
    if not isinstance(model, SequenceClassifier) or "scan" not in model.cell.backends:
        return model
    # Forwards, neither `remat` nor `unroll` changes a value.
    return model.clone(engine=rnn.Engine("scan", model.engine.precision))


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
