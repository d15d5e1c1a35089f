"""The minGRU: a GRU whose gate and candidate read x alone, so that no step multiplies the state.

Feng et al. 2024, "Were RNNs All We Needed?", the plain form (no logarithms, no activation of the candidate):

  z = sigmoid(x W_z + b_z);  n = x W_n + b_n;  h' = (1 - z) n + z h.

z is the gate that keeps, as in this package's GRU; the paper's z is 1 minus ours, so its weights of that gate are ours
with the other sign. Gate order: z, n. Carry: h.

kernel_init goes over the input kernel alone, for there is no other. Where time_scales are given they draw b_z.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]


def step(params: Params, h: Array, x: Array, precision: str = "float32") -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    z, n = jnp.split(rnn.product(x, params["kernel"], precision) + params["bias"], 2, axis=-1)
    z = jax.nn.sigmoid(z)
    h = (1.0 - z) * n + z * h
    return h, h


def init(
    key: Array, features: int, hidden_size: int, *, kernel_init: str = "glorot_uniform", time_scales: Any = None
) -> Params:
    """kernel [features, 2 * hidden], bias [2 * hidden], float32."""
    kernel_key, bias_key = jax.random.split(key)
    if kernel_init == "glorot_uniform":
        kernel = jax.nn.initializers.glorot_uniform()(kernel_key, (features, 2 * hidden_size), jnp.float32)
    else:
        kernel, _ = rnn.KERNELS[kernel_init](kernel_key, features, hidden_size, 2, jnp.float32)
    zeros = jnp.zeros((hidden_size,), jnp.float32)
    keep = zeros if time_scales is None else rnn.keeping_bias(time_scales)(bias_key, (hidden_size,), jnp.float32)
    return {"kernel": kernel, "bias": jnp.concatenate([keep, zeros])}


CELL = rnn.cell(step, init)
