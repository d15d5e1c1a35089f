"""LEM, long expressive memory: two states with gates for their step sizes, the second sees the first's new value.

Rusch et al. 2022, "Long Expressive Memory for Sequence Modeling":

  a = dt sigmoid(x W_a + y U_a + b_a);  b = dt sigmoid(x W_b + y U_b + b_b);
  z' = (1 - a) z + a tanh(x W_z + y U_z + b_z);
  y' = (1 - b) y + b tanh(x W_y + z' Z + b_y).

Order of the blocks: a, b, z, y. Carry: (y, z). dt, the longest step, is by default that of the published recipe for
permuted MNIST. Parameters start uniform within 1 / sqrt(hidden), as in the authors' code, which has two biases where
this has one.
"""

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]
Carry = tuple[Array, Array]

DT = 0.31


def step(params: Params, carry: Carry, x: Array, dt: float = DT) -> tuple[Carry, Array]:
    """One step: y and z [batch, hidden], and x [batch, features]."""
    y, z = carry
    given = x @ params["kernel"] + params["bias"]
    of_y = 3 * y.shape[-1]
    a, b, candidate = jnp.split(given[:, :of_y] + y @ params["recurrent_kernel"], 3, axis=-1)
    a, b = dt * jax.nn.sigmoid(a), dt * jax.nn.sigmoid(b)
    z = (1 - a) * z + a * jnp.tanh(candidate)
    y = (1 - b) * y + b * jnp.tanh(given[:, of_y:] + z @ params["memory_kernel"])
    return (y, z), y


def init(key: Array, features: int, hidden_size: int) -> Params:
    """kernel [features, 4 * hidden], recurrent_kernel [hidden, 3 * hidden], memory_kernel [hidden, hidden], bias."""
    limit = hidden_size**-0.5
    shapes = {
        "kernel": (features, 4 * hidden_size),
        "recurrent_kernel": (hidden_size, 3 * hidden_size),
        "memory_kernel": (hidden_size, hidden_size),
        "bias": (4 * hidden_size,),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(part, shape, jnp.float32, -limit, limit)
        for part, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


CELL = rnn.cell(step, init, lambda zero: (zero, zero))
