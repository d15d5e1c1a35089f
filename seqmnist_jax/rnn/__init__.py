"""The recurrence engine: LSTM, GRU and minGRU layers as pure functions, and a scan for any cell.

A library on its own: it knows no MNIST, no config and no files.

>>> import jax
>>> from seqmnist_jax import rnn
>>> params = rnn.init_gru(jax.random.key(0), features=1, hidden_size=8)
>>> carry, outputs = rnn.gru(params, jax.numpy.ones([2, 5, 1]))
>>> outputs.shape
(2, 5, 8)
"""

from seqmnist_jax.rnn.any_cell import explain_step, scan
from seqmnist_jax.rnn.cell import GRU, GRU_RESET_BEFORE, LSTM, MIN_GRU, Cell, cell
from seqmnist_jax.rnn.cells import gru_step, init_gru, init_lstm, lstm_step, product
from seqmnist_jax.rnn.convert import from_flax, from_keras, from_torch, to_flax, to_keras, to_torch
from seqmnist_jax.rnn.initializers import KERNELS, TIME_SCALES, log_uniform_time_scales
from seqmnist_jax.rnn.layers import BACKENDS, PRECISIONS, Explanation, explain, gru, lstm, min_gru
from seqmnist_jax.rnn.min_gru import init_min_gru, min_gru_step
from seqmnist_jax.rnn.native.cpu import problem as native_problem
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
    "MIN_GRU",
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
    "init_min_gru",
    "init_stack",
    "log_uniform_time_scales",
    "lstm",
    "lstm_step",
    "min_gru",
    "min_gru_step",
    "native_problem",
    "product",
    "remat",
    "scan",
    "stack",
    "to_flax",
    "to_keras",
    "to_torch",
]
