"""The UR-GRU: a GRU whose update gate is refined by another.

Gu et al. 2020, "Improving the Gating Mechanism of Recurrent Neural Networks", whose refined gate (see `ur_lstm`) stands
here in the place of the gate that keeps:

  f, r, s = sigmoid(x W + b + h U + b_U);  g = 2 r f + (1 - 2 r) f^2;
  n = tanh(x W_n + b_n + s (h U_n + b_Un));  h' = g h + (1 - g) n.

The reset s acts after the product with h, as in this package's GRU (in the authors' code before it, or there is none).
Gate order: f, r, s, n. Carry: h. Biases start as the UR-LSTM's.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn
from seqmnist_jax.models.cells import ur_lstm

Array = jax.Array
Params = dict[str, Array]


def step(params: Params, h: Array, x: Array) -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    x_f, x_r, x_s, x_n = jnp.split(x @ params["kernel"] + params["bias"], 4, axis=-1)
    h_f, h_r, h_s, h_n = jnp.split(h @ params["recurrent_kernel"] + params["recurrent_bias"], 4, axis=-1)
    g = ur_lstm.refined(x_f + h_f, x_r + h_r)
    n = jnp.tanh(x_n + jax.nn.sigmoid(x_s + h_s) * h_n)
    h = g * h + (1 - g) * n
    return h, h


def init(
    key: Array, features: int, hidden_size: int, *, kernel_init: str = "glorot_uniform", time_scales: Any = None
) -> Params:
    """The UR-LSTM's, and recurrent_bias [4 * hidden]: zero."""
    params = ur_lstm.init(key, features, hidden_size, kernel_init=kernel_init, time_scales=time_scales)
    return params | {"recurrent_bias": jnp.zeros((4 * hidden_size,), jnp.float32)}


CELL = rnn.cell(step, init)
