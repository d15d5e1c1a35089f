"""A deep stack of residual blocks around recurrent layers, in stages that shorten the sequence.

A block is made as those of the state-space models (Gu et al. 2022, S4; Smith et al. 2023, S5): layer norm, where they
mostly normalise by batch, the recurrent layer, GELU, dropout, a gated linear unit (Dauphin et al. 2017; S5 has half of
one), dropout, and a skip connection around all of it. Between
stages some steps are put side by side and projected, so that the next stage has fewer. What is known after so many
steps depends on them alone.

Parameters: params['stage_0_input' ...], ['stage_0_block_0' ...]['norm' | 'rnn' | 'gate'], ['norm' | 'head'], ['dense'].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmnist_jax import rnn
from seqmnist_jax.models.head import (
    OF_PRODUCTS,
    Hidden,
    WithRecurrence,
    dot_by_rows,
    drop_units,
    read_out,
    zero_unless,
)
from seqmnist_jax.rnn.scan import without_padding
from seqmnist_jax.rnn.stack import Probability

Array = jax.Array


class Stage(NamedTuple):
    """Blocks on a sequence of one length.

    Attributes:
      channels: features of each block, and units of its recurrent layer.
      blocks: how many there are.
      init_layers: ``(key, features) -> parameters`` of the recurrent layer of a block.
    """

    channels: int
    blocks: int
    init_layers: Callable[[Array, int], rnn.Layers]


class Block(nn.Module):
    """One residual block.

    Attributes:
      cell, engine, data_axis: as in `SequenceClassifier`.
      stage: the one that it stands in.
    """

    cell: rnn.Cell
    stage: Stage
    engine: rnn.Engine
    data_axis: str | None

    @nn.compact
    def __call__(self, x: Array, lengths: Array | None, keep: Probability, only_last: bool) -> Array:
        """Features of every step of x [batch, time, channels], or with `only_last` of each sequence's last."""
        channels = self.stage.channels
        layers = self.param("rnn", self.stage.init_layers, channels)
        y = nn.LayerNorm(name="norm")(x)
        with jax.named_scope("rnn"):
            y = rnn.stack(self.cell, layers, y, lengths=lengths, engine=self.engine, return_sequences=not only_last)
        y = drop_units(self, jax.nn.gelu(y), keep, self.data_axis)
        precision = OF_PRODUCTS[self.engine.precision]
        gate = nn.Dense(2 * channels, precision=precision, dot_general=dot_by_rows, name="gate")
        value, opened = jnp.split(gate(y), 2, axis=-1)
        y = drop_units(self, value * jax.nn.sigmoid(opened), keep, self.data_axis)
        return y + (read_out(x, lengths, "last", False) if only_last else x)


class DeepClassifier(WithRecurrence, nn.Module):
    """Reads a sequence through stages of residual blocks and names its class.

    Attributes:
      cell, num_classes, engine, data_axis: as in `SequenceClassifier`.
      stages: the stages, in order.
      shorten: how many steps of a stage make one of the next.
      reading: what is read of the last stage, a name in `head.READINGS`.
      head_layers: hidden layers between that and the logits.
    """

    cell: rnn.Cell
    stages: tuple[Stage, ...]
    shorten: int
    reading: str
    head_layers: int
    num_classes: int
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
        """Logits, as `SequenceClassifier`'s.

        Of `keep` the first is for x and the second for each block and the head. Steps that don't fill one of the last
        stage, at a sequence's end, play no part; with `every_step` a step has what the steps before it filled.
        """
        of_x, of_units, _ = keep if train and keep is not None else (None, None, None)
        time = x.shape[1]
        x, lengths = without_padding(x, lengths)
        runs = None if lengths is None else jnp.arange(time) < lengths[:, None]
        x = drop_units(self, x, of_x, self.data_axis)
        early = self.reading == "last" and not every_step
        for index, stage in enumerate(self.stages):
            if index:
                lengths = None if lengths is None else lengths // self.shorten
                groups = x.shape[1] // self.shorten
                x = x[:, : groups * self.shorten].reshape(x.shape[0], groups, self.shorten * x.shape[2])
            name, precision = f"stage_{index}", OF_PRODUCTS[self.engine.precision]
            x = nn.Dense(stage.channels, precision=precision, dot_general=dot_by_rows, name=f"{name}_input")(x)
            for place in range(stage.blocks):
                only_last = early and index == len(self.stages) - 1 and place == stage.blocks - 1
                block = Block(self.cell, stage, self.engine, self.data_axis, name=f"{name}_block_{place}")
                x = block(x, lengths, of_units, only_last)
        self.sow("intermediates", "states", x)
        if x.ndim == 3:
            x = read_out(x, lengths, self.reading, every_step)
        elif lengths is not None:
            x = zero_unless(lengths > 0, x)
        if every_step:
            filled = (jnp.arange(time) + 1) // self.shorten ** (len(self.stages) - 1)
            x = zero_unless(runs, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, filled])
        if self.head_layers:
            sizes = self.stages[-1].channels, self.head_layers
            x = Hidden(*sizes, self.engine.precision, self.data_axis, name="head")(x, of_units)
        else:
            x = nn.LayerNorm(name="norm")(x)
        self.sow("intermediates", "features", x)
        return nn.Dense(self.num_classes, precision=jax.lax.Precision.HIGHEST, name="dense")(x)

    def explain_engine(self, params: Any, x: Any, drops_state: bool) -> str:
        """As `SequenceClassifier.explain_engine`, of the first block."""
        layer = params["stage_0_block_0"]["rnn"]["layer_0"]["forward"]
        inside = jax.ShapeDtypeStruct((*x.shape[:2], self.stages[0].channels), x.dtype)
        return rnn.explain_layer(self.cell, layer, inside, self.engine, drops_state)
