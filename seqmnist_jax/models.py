"""The sequence classifier: recurrent layer -> norm -> dense, as one Flax module.

Parameters: params['rnn']['layer_0']['forward'][...], ['norm'], ['dense'].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections

from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError, choose

Array = jax.Array


class Cell(NamedTuple):
    """A recurrent layer that configs can name.

    Attributes:
      layer: the recurrence over a sequence, with the arguments of `rnn.lstm`.
      init: ``(key, features, hidden_size, *, kernel_init, forget_bias, time_scales)`` makes its parameters.
      joint_kernels: whether its input and recurrent kernel count as one tensor where
        tensors are clipped one by one.
    """

    layer: Callable[..., Any]
    init: Callable[..., Any]
    joint_kernels: bool


def _init_gru(key: Array, features: int, hidden_size: int, *, forget_bias: float, **options: Any) -> dict[str, Array]:
    del forget_bias  # a GRU has no such gate
    return rnn.init_gru(key, features, hidden_size, **options)


CELLS = {
    "lstm": Cell(rnn.lstm, rnn.init_lstm, joint_kernels=True),
    "gru": Cell(rnn.gru, _init_gru, joint_kernels=False),
}
NORMS = ("none", "frozen", "batch")
GATE_BIASES = ("constant", "log_uniform")

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
    """Reads a sequence and names its class from the recurrent layer's last output.

    Attributes:
      layer: the recurrence, `rnn.lstm` or `rnn.gru`.
      init_layer: ``(key, features) -> parameters`` of that layer.
      num_classes: the number of logits.
      dense_init: a name in `DENSE_INITS`.
      norm: between layer and dense: 'none'; 'batch', batch normalisation (Ioffe &
        Szegedy 2015); 'frozen', the same with its moving mean and variance left at 0
        and 1, in training too: an affine layer, and what the 2018 tutorial really ran.
    """

    layer: Callable[..., Any]
    init_layer: Callable[[Array, int], dict[str, Array]]
    num_classes: int
    dense_init: str
    norm: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, lengths: Array | None = None) -> Array:
        """x [batch, time, features] (and lengths [batch]) to logits [batch, num_classes]."""
        features = x.shape[-1]
        params = self.param("rnn", lambda key: {"layer_0": {"forward": self.init_layer(key, features)}})
        _, last = self.layer(params["layer_0"]["forward"], x, lengths=lengths, return_sequences=False)
        if self.norm != "none":
            last = nn.BatchNorm(
                use_running_average=self.norm == "frozen" or not train,
                momentum=NORM_MOMENTUM,
                epsilon=NORM_EPSILON,
                name="norm",
            )(last)
        kernel_init, bias_init = DENSE_INITS[self.dense_init]
        return nn.Dense(self.num_classes, kernel_init=kernel_init, bias_init=bias_init, name="dense")(last)


def build_model(config: ml_collections.ConfigDict, sequence_length: int, num_classes: int) -> SequenceClassifier:
    """The model that config.model names, for sequences of this length.

    Raises:
      UsageError: an unknown name or an impossible size.
    """
    model = config.model
    cell = choose(CELLS, model.cell, "model.cell")
    choose(rnn.KERNELS, model.kernel_init, "model.kernel_init")
    choose(dict.fromkeys(GATE_BIASES), model.gate_bias, "model.gate_bias")
    choose(dict.fromkeys(NORMS), model.norm, "model.norm")
    choose(DENSE_INITS, model.dense_init, "model.dense_init")
    if model.hidden_size < 1:
        raise UsageError(f"model.hidden_size is {model.hidden_size}; expected at least 1.")
    hidden_size, kernel_init, forget_bias = model.hidden_size, model.kernel_init, model.forget_bias
    if not math.isfinite(forget_bias):
        raise UsageError(f"model.forget_bias is {forget_bias}; expected a finite number.")
    if model.gate_bias == "log_uniform" and sequence_length < 2:
        raise UsageError("model.gate_bias is 'log_uniform', but the sequences of this view have a single step.")
    time_scales = rnn.log_uniform_time_scales(sequence_length) if model.gate_bias == "log_uniform" else None

    def init_layer(key: Array, features: int) -> dict[str, Array]:
        return cell.init(
            key, features, hidden_size, kernel_init=kernel_init, forget_bias=forget_bias, time_scales=time_scales
        )

    return SequenceClassifier(cell.layer, init_layer, num_classes, dense_init=model.dense_init, norm=model.norm)
