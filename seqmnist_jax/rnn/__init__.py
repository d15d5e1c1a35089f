"""The recurrence engine: LSTM and GRU layers as pure functions, and a scan for any cell.

A library on its own: it knows no MNIST, no config and no files, and needs JAX alone. Sequences are
[batch, time, features]; a layer gives its last state and its outputs.

A layer over whole sequences, and its parameters:
  lstm, gru                     a layer; init_lstm, init_gru draw its parameters
  stack, init_stack             several Layers, one or both directions; Engine, how they run
  draw_masks                    dropout for a stack: Masks, of probabilities Keep
  log_uniform_time_scales       an initialiser; keeping_bias, what `time_scales` means; TIME_SCALES, KERNELS, names

A cell of your own:
  scan                          any step over whole sequences; product, its matrix product at a precision
  cell                          step and initialiser as a Cell, as LSTM, GRU and GRU_RESET_BEFORE are
  lstm_step, gru_step           one step of the layers here

How it runs:
  explain                       an Explanation: which of BACKENDS would run a layer, and why; explain_step and
                                explain_layer, in words, of a step and of a stack's layer
  native_problem                why no kernel can be made for this process's device, or None
  remat                         gradient checkpointing; PRECISIONS, how exact products are

Weights of other libraries:
  from_torch, from_keras, from_flax    and back: to_torch, to_keras, to_flax

>>> import jax
>>> from seqmnist_jax import rnn
>>> params = rnn.init_gru(jax.random.key(0), features=1, hidden_size=8)
>>> carry, outputs = rnn.gru(params, jax.numpy.ones([2, 5, 1]))
>>> outputs.shape
(2, 5, 8)
"""

from seqmnist_jax.rnn.any_cell import explain_step, scan
from seqmnist_jax.rnn.cell import GRU, GRU_RESET_BEFORE, LSTM, Cell, cell
from seqmnist_jax.rnn.cells import PRECISIONS, gru_step, init_gru, init_lstm, lstm_step, product
from seqmnist_jax.rnn.convert import from_flax, from_keras, from_torch, to_flax, to_keras, to_torch
from seqmnist_jax.rnn.initializers import KERNELS, TIME_SCALES, keeping_bias, log_uniform_time_scales
from seqmnist_jax.rnn.layers import Explanation, explain, gru, lstm
from seqmnist_jax.rnn.recurrence import BACKENDS, native_problem
from seqmnist_jax.rnn.remat import remat
from seqmnist_jax.rnn.stack import (
    Engine,
    Keep,
    Layers,
    Masks,
    draw_masks,
    explain_layer,
    init_stack,
    stack,
)

__all__ = [
    "BACKENDS",
    "GRU",
    "GRU_RESET_BEFORE",
    "KERNELS",
    "LSTM",
    "PRECISIONS",
    "TIME_SCALES",
    "Cell",
    "Engine",
    "Explanation",
    "Keep",
    "Layers",
    "Masks",
    "cell",
    "draw_masks",
    "explain",
    "explain_layer",
    "explain_step",
    "from_flax",
    "from_keras",
    "from_torch",
    "gru",
    "gru_step",
    "init_gru",
    "init_lstm",
    "init_stack",
    "keeping_bias",
    "log_uniform_time_scales",
    "lstm",
    "lstm_step",
    "native_problem",
    "product",
    "remat",
    "scan",
    "stack",
    "to_flax",
    "to_keras",
    "to_torch",
]
