"""The IndRNN: each unit sees its own state alone.

Li et al. 2018, "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN":

  h' = relu(x W + u h + b),  |u| <= bound.

u is a vector. What a unit keeps over T steps grows by u^T, so the paper holds |u| to 2^(1/T) or less by clipping the
stored u after each update. Here it is clipped where it is used, with the gradient of what was used: the stored u may
leave the bounds and comes back by the same gradients. Carry: h.

u starts uniform in (0, bound), W by Glorot's rule, b at zero. The published networks also normalise each layer by
batch, and start u of the last layer, where the last step alone is read, between 1 / bound and bound (Li et al. 2019,
"Deep Independently Recurrent Neural Network (IndRNN)").
"""

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]

# 2^(1/T) for all pixels of an MNIST image.
BOUND = 2.0 ** (1.0 / 784.0)


def step(params: Params, h: Array, x: Array, bound: float = BOUND) -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    u = params["recurrent_kernel"]
    u = u + jax.lax.stop_gradient(jnp.clip(u, -bound, bound) - u)
    h = jax.nn.relu(x @ params["kernel"] + u * h + params["bias"])
    return h, h


def init(key: Array, features: int, hidden_size: int, bound: float = BOUND) -> Params:
    """kernel [features, hidden], recurrent_kernel [hidden], bias [hidden], float32; a bound is above 0."""
    if not bound > 0:
        raise ValueError(f"bound is {bound}; expected a number above 0")
    kernel_key, recurrent_key = jax.random.split(key)
    return {
        "kernel": jax.nn.initializers.glorot_uniform()(kernel_key, (features, hidden_size), jnp.float32),
        "recurrent_kernel": jax.random.uniform(recurrent_key, (hidden_size,), jnp.float32, maxval=bound),
        "bias": jnp.zeros((hidden_size,), jnp.float32),
    }


CELL = rnn.cell(step, init)
