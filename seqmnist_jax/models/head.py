"""What stands between a network's features and its logits; and the network that is nothing else, an MLP."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmnist_jax import rnn
from seqmnist_jax.devices.mesh import own_share, shards
from seqmnist_jax.rnn.cells import by_rows
from seqmnist_jax.rnn.scan import without_padding
from seqmnist_jax.rnn.stack import Probability

Array = jax.Array

READINGS = ("last", "mean")
# How exact the products of dense layers are, by the name of a precision: XLA's default is TF32 on GPUs.
OF_PRODUCTS = {
    "float32": jax.lax.Precision.HIGHEST,
    "tensorfloat32": jax.lax.Precision.DEFAULT,
    "bfloat16": jax.lax.Precision.DEFAULT,
}


def dot_by_rows(x: Array, kernel: Array, dimension_numbers: Any, precision: jax.lax.Precision) -> Array:
    """The product of a dense layer with every step of x [batch, time, features], in place of `jax.lax.dot_general`."""
    del dimension_numbers
    return by_rows(functools.partial(jnp.matmul, precision=precision), x, kernel)


def drop_units(module: nn.Module, x: Array, keep: Probability, data_axis: str | None) -> Array:
    """X [batch, ..., features] with units dropped, of a sequence the same ones at all of its steps.

    Args:
      module: whose rng 'dropout' draws them.
      x: what they are dropped of.
      keep: the probability to keep one; None for no dropout.
      data_axis: as in `SequenceClassifier`.
    """
    if keep is None:
        return x
    whole = x.shape[0] * shards(data_axis), x.shape[-1]
    mask = own_share(jax.random.bernoulli(module.make_rng("dropout"), keep, whole), data_axis)
    return jnp.where(mask.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]), x / keep, 0.0)


def zero_unless(where: Array | None, x: Array) -> Array:
    """X [..., features] where `where` [...] holds (or is None), and zeros elsewhere."""
    return x if where is None else jnp.where(where[..., None], x, 0.0)


def read_out(y: Array, lengths: Array | None, reading: str, every_step: bool) -> Array:
    """What is read of the outputs of all steps.

    Args:
      y: [batch, time, features].
      lengths: int32 [batch] in [0, time]; None for whole sequences.
      reading: 'last', each sequence's last output, or 'mean', of all of its outputs. Of an empty sequence: zeros.
      every_step: what would be read if the sequence ended at each step, [batch, time, features]; past its end zeros.
    """
    steps = jnp.arange(y.shape[1])
    running = None if lengths is None else steps < lengths[:, None]
    y = zero_unless(running, y)
    if every_step:
        return y if reading == "last" else zero_unless(running, jnp.cumsum(y, axis=1) / (steps + 1.0)[:, None])
    if reading == "mean":
        count = float(y.shape[1]) if lengths is None else jnp.maximum(lengths, 1).astype(y.dtype)[:, None]
        return y.sum(1) / count
    if lengths is None:
        return y[:, -1]
    return jnp.take_along_axis(y, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


class Hidden(nn.Module):
    """Hidden layers on features: layer norm, GELU, dropout, and a dense layer before the next.

    Attributes:
      width: of each dense layer.
      layers: how many there are.
      precision: of their products, a name in `OF_PRODUCTS`.
      data_axis: as in `SequenceClassifier`.
    """

    width: int
    layers: int
    precision: str = "float32"
    data_axis: str | None = None

    @nn.compact
    def __call__(self, x: Array, keep: Probability) -> Array:
        """Features [..., width] of x [..., features]; `keep` as in `drop_units`."""
        for index in range(self.layers + 1):
            x = jax.nn.gelu(nn.LayerNorm(name=f"norm_{index}")(x))
            x = drop_units(self, x, keep, self.data_axis)
            if index < self.layers:
                precision = OF_PRODUCTS[self.precision]
                x = nn.Dense(self.width, precision=precision, name=f"dense_{index}")(x)
        return x


class WithRecurrence:
    """What a model answers whose `cell` its `engine` runs."""

    cell: rnn.Cell
    engine: rnn.Engine
    clone: Any

    @property
    def precision(self) -> str:
        """How exact the products of its recurrent layers are."""
        return self.engine.precision

    def at(self, precision: str) -> nn.Module:
        """The same model at another precision."""
        # 'native' is asked of training; a GPU has no kernel for full float32, in which evaluation may be.
        backend = "auto" if self.engine.backend == "native" else self.engine.backend
        return self.clone(engine=self.engine._replace(backend=backend, precision=precision))

    def portable(self) -> nn.Module:
        """The same model in XLA's own operations alone, so that its program runs wherever XLA does."""
        if "scan" not in self.cell.backends:
            return self.clone()
        # Forwards, neither `remat` nor `unroll` changes a value.
        return self.clone(engine=rnn.Engine("scan", self.engine.precision))


class WithoutRecurrence(nn.Module):
    """What a model without recurrent layers answers where something is asked of these."""

    def explain_engine(self, params: Any, x: Any, drops_state: bool) -> str:
        """As `SequenceClassifier.explain_engine`."""
        return "none: the model has no recurrence"

    @property
    def precision(self) -> str:
        """How exact its products are."""
        return "float32"

    def at(self, precision: str) -> nn.Module:
        """As `WithRecurrence.at`; the model knows full float32 alone."""
        return self

    def portable(self) -> nn.Module:
        """As `WithRecurrence.portable`; the model is."""
        return self


class MLP(WithoutRecurrence):
    """Reads all values of a sequence at once and names its class: it knows no order, and no step from another.

    Attributes:
      hidden_size, num_layers: width and number of hidden layers, each layer norm, GELU and dropout behind a dense
        layer; none makes it a linear classifier.
      num_classes: the number of logits.
      data_axis: as in `SequenceClassifier`.
    """

    hidden_size: int
    num_layers: int
    num_classes: int
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
        """Logits, as `SequenceClassifier`'s; what lies past a sequence's end, or a step with `every_step`, is zero.

        Of `keep` the first is for the values of x and the second for hidden units.
        """
        x, _ = without_padding(x, lengths)
        of_x, of_units, _ = keep if train and keep is not None else (None, None, None)
        flat = drop_units(self, x.reshape(x.shape[0], math.prod(x.shape[1:])), of_x, self.data_axis)
        first = nn.Dense(
            self.hidden_size if self.num_layers else self.num_classes,
            precision=jax.lax.Precision.HIGHEST,
            name="input" if self.num_layers else "dense",
        )
        y = first(flat)
        if every_step:
            kernel, bias = (first.variables["params"][name] for name in ("kernel", "bias"))
            kernel = kernel.reshape(*x.shape[1:], -1)
            y = jnp.cumsum(jnp.einsum("btf,tfh->bth", x, kernel, precision=jax.lax.Precision.HIGHEST), axis=1) + bias
        if not self.num_layers:
            self.sow("intermediates", "features", flat)
            return y
        y = Hidden(self.hidden_size, self.num_layers - 1, data_axis=self.data_axis, name="hidden")(y, of_units)
        self.sow("intermediates", "features", y)
        return nn.Dense(self.num_classes, precision=jax.lax.Precision.HIGHEST, name="dense")(y)
