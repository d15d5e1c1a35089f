"""Elman's network, the plain one: a tanh layer that reads its own output.

Elman 1990, "Finding Structure in Time", Cognitive Science 14, with tanh, as is usual since:

  h' = tanh(x W + h U + b).

Carry: h. U starts orthogonal (Saxe et al. 2014), W by Glorot's rule, b at zero.
"""

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]


def step(params: Params, h: Array, x: Array) -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    h = jnp.tanh(x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"])
    return h, h


def init(key: Array, features: int, hidden_size: int) -> Params:
    """kernel [features, hidden], recurrent_kernel [hidden, hidden], bias [hidden], float32."""
    kernel_key, recurrent_key = jax.random.split(key)
    return {
        "kernel": jax.nn.initializers.glorot_uniform()(kernel_key, (features, hidden_size), jnp.float32),
        "recurrent_kernel": jax.nn.initializers.orthogonal()(recurrent_key, (hidden_size, hidden_size), jnp.float32),
        "bias": jnp.zeros((hidden_size,), jnp.float32),
    }


CELL = rnn.cell(step, init)
