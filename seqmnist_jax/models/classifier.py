"""The recurrent sequence classifier, as a Flax module: layers -> norm -> hidden layers, if any -> dense.

Its parameters are params['rnn']['layer_0']['forward' | 'backward'][...], ['norm'], ['head'], ['dense']. Every model
is called as `SequenceClassifier` is, and sows, in the collection 'intermediates', what its dense layer sees
as 'features'; this one also what its layers hand on as 'states'.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from seqmnist_jax import rnn
from seqmnist_jax.devices.mesh import own_share, shards
from seqmnist_jax.models.head import Hidden, WithRecurrence, read_out
from seqmnist_jax.models.legendre import with_memory
from seqmnist_jax.rnn.scan import clamped, without_padding

Array = jax.Array

NORMS = ("none", "frozen", "batch")
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


class SequenceClassifier(WithRecurrence, nn.Module):
    """Reads a sequence and names its class from the recurrent layers' last output, or their mean, or from each.

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
      reading: what is read of the layers' outputs, a name in `head.READINGS`.
      memory: coefficients of the Legendre memory that the layers read beside each value; 0 for none.
      head_layers: hidden layers, as wide as a recurrent one, before the dense layer.
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
    reading: str = "last"
    head_layers: int = 0
    memory: int = 0
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
        if self.memory:
            x, lengths = without_padding(x, lengths)
            x = with_memory(x, self.memory)
        layers = self.param("rnn", self.init_layers, x.shape[-1])
        masks = (
            self._masks(layers, x, keep) if train and keep is not None and any(p is not None for p in keep) else None
        )
        every = every_step or self.reading == "mean"
        with jax.named_scope("rnn"):
            read = rnn.stack(
                self.cell, layers, x, lengths=lengths, masks=masks, engine=self.engine, return_sequences=every
            )
        self.sow("intermediates", "states", read)
        if self.reading == "mean":
            read = read_out(read, None if lengths is None else clamped(lengths, x), self.reading, every_step)
        if self.norm != "none":
            read = nn.BatchNorm(
                use_running_average=self.norm == "frozen" or not train,
                momentum=NORM_MOMENTUM,
                epsilon=NORM_EPSILON,
                axis_name=self.data_axis,
                name="norm",
            )(read)
        if self.head_layers:
            hidden = Hidden(self.hidden_size, self.head_layers, self.engine.precision, self.data_axis, name="head")
            read = hidden(read, keep[1] if train and keep is not None else None)
        self.sow("intermediates", "features", read)
        kernel_init, bias_init = DENSE_INITS[self.dense_init]
        dense = nn.Dense(
            self.num_classes,
            kernel_init=kernel_init,
            bias_init=bias_init,
            precision=jax.lax.Precision.HIGHEST,
            name="dense",
        )
        return dense(read)

    def _masks(self, layers: rnn.Layers, x: Array, keep: rnn.Keep) -> dict[str, dict[str, rnn.Masks]]:
        """Fresh masks for every layer and direction."""
        whole = x.shape[0] * shards(self.data_axis)

        def draw(features: int) -> rnn.Masks:
            masks = rnn.draw_masks(self.make_rng("dropout"), keep, whole, features, self.hidden_size, x.dtype)
            return jax.tree.map(lambda mask: own_share(mask, self.data_axis), masks)

        def width(name: str, directions: dict[str, Any]) -> int:
            return x.shape[-1] if name == "layer_0" else self.hidden_size * len(directions)

        return {
            name: {direction: draw(width(name, directions)) for direction in directions}
            for name, directions in layers.items()
        }

    def explain_engine(self, params: Any, x: Any, drops_state: bool) -> str:
        """Which backend of the recurrence the layers take, and why.

        Args:
          params: the model's parameters, or their shapes.
          x: a batch [batch, time, features], or its shape.
          drops_state: whether training drops units of the state.
        """
        read = jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * (1 + self.memory)), x.dtype)
        return rnn.explain_layer(self.cell, params["rnn"]["layer_0"]["forward"], read, self.engine, drops_state)
