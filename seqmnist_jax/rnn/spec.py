"""What a backend of the recurrence is asked, and what its forward pass leaves for the way back."""

from typing import Any, NamedTuple

import jax

from seqmnist_jax.rnn import cells

Array = jax.Array


class Layer(NamedTuple):
    """All that is static about a call of a layer.

    Attributes:
      cell: 'lstm', 'gru' or 'gru_reset_before'.
      reverse: from the last step to the first.
      return_sequences: whether the outputs of all steps are wanted.
      precision: as in `cells`.
      save_gates: whether the forward pass saves the gates; else the way back makes them anew.
    """

    cell: str
    reverse: bool
    return_sequences: bool
    precision: str
    save_gates: bool = True


class Inputs(NamedTuple):
    """The arrays of a call, as `lstm` takes them, checked."""

    params: cells.Params
    x: Array
    carry: Any
    lengths: Array | None


class Saved(NamedTuple):
    """What the way back needs of the forward pass; the same arrays in every backend.

    Attributes:
      outputs: h after each step, zero past a sequence's end, [batch, time, hidden].
      gates: [time, batch, 4 * hidden], or [0, batch, 4 * hidden] where they are not saved. In
        which order they stand is the backend's own business.
      memories: an LSTM's c after each step, [time, batch, hidden]; [0, batch, hidden] for a GRU.
    """

    outputs: Array
    gates: Array
    memories: Array
