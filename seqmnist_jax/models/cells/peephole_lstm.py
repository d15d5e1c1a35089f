"""The LSTM with peepholes: its gates see the memory c, not its output alone.

Gers et al. 2002, "Learning Precise Timing with LSTM Recurrent Networks":

  i = sigmoid(x W_i + h U_i + b_i + p_i c);  f = sigmoid(x W_f + h U_f + b_f + p_f c);
  c' = f c + i tanh(x W_g + h U_g + b_g);
  o = sigmoid(x W_o + h U_o + b_o + p_o c');  h' = o tanh(c').

p_i, p_f and p_o are vectors: each unit sees its own c; the output gate sees the new one. As in `rnn.lstm` candidate
and output are tanh. Gate order: i, f, g, o. Carry: (c, h). The peepholes start at zero, all else as `rnn.init_lstm`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]
Carry = tuple[Array, Array]


def step(params: Params, carry: Carry, x: Array) -> tuple[Carry, Array]:
    """One step: c and h [batch, hidden], and x [batch, features]."""
    c, h = carry
    i, f, g, o = jnp.split(x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"], 4, axis=-1)
    p_i, p_f, p_o = jnp.split(params["peepholes"], 3)
    i, f = jax.nn.sigmoid(i + p_i * c), jax.nn.sigmoid(f + p_f * c)
    c = f * c + i * jnp.tanh(g)
    h = jax.nn.sigmoid(o + p_o * c) * jnp.tanh(c)
    return (c, h), h


def init(
    key: Array,
    features: int,
    hidden_size: int,
    *,
    kernel_init: str = "glorot_uniform",
    forget_bias: float = 1.0,
    time_scales: Any = None,
) -> Params:
    """The parameters of `rnn.init_lstm`, and peepholes [3 * hidden]: p_i, p_f, p_o."""
    options = {"kernel_init": kernel_init, "forget_bias": forget_bias, "time_scales": time_scales}
    params = rnn.init_lstm(key, features, hidden_size, **options)
    return params | {"peepholes": jnp.zeros((3 * hidden_size,), jnp.float32)}


CELL = rnn.cell(step, init, lambda zero: (zero, zero))
