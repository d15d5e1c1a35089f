"""The minLSTM: an LSTM whose gates read x alone.

Feng et al. 2024, "Were RNNs All We Needed?", with gates that add up to 1:

  f, i = sigmoid(x W + b);  h' = (f h + i n) / (f + i),  n = x W_n + b_n.

The plain form, without logarithms and without an activation of n, as the minGRU's. A gate is closed no further than
sigmoid(-40). Gate order: f, i, n. Carry: h.

kernel_init is the input kernel of a GRU (Glorot's limit counts its recurrent kernel too). Where time_scales are given
they draw b_f, and b_i is -b_f: the share f / (f + i) that is kept is then sigmoid(b_f) before x plays a part.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]

CLOSED = -40.0


def step(params: Params, h: Array, x: Array) -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    f, i, n = jnp.split(x @ params["kernel"] + params["bias"], 3, axis=-1)
    # Of two gates that are closed further the square of f + i, of which gradients are made, is no float any more.
    f, i = jax.nn.sigmoid(jnp.maximum(f, CLOSED)), jax.nn.sigmoid(jnp.maximum(i, CLOSED))
    h = (f * h + i * n) / (f + i)
    return h, h


def init(
    key: Array, features: int, hidden_size: int, *, kernel_init: str = "glorot_uniform", time_scales: Any = None
) -> Params:
    """kernel [features, 3 * hidden], bias [3 * hidden], float32."""
    kernel_key, bias_key = jax.random.split(key)
    kernel, _ = rnn.KERNELS[kernel_init](kernel_key, features, hidden_size, 3, jnp.float32)
    zeros = jnp.zeros((hidden_size,), jnp.float32)
    forget = zeros if time_scales is None else rnn.keeping_bias(time_scales)(bias_key, (hidden_size,), jnp.float32)
    return {"kernel": kernel, "bias": jnp.concatenate([forget, -forget, zeros])}


CELL = rnn.cell(step, init)
