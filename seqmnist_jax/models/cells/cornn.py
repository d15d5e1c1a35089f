"""coRNN: coupled oscillators, which the input drives and friction brakes.

Rusch and Mishra 2021, "Coupled Oscillatory Recurrent Neural Network (coRNN)":

  z' = z + dt (tanh(y U + z Z + x W + b) - gamma y - epsilon z);  y' = y + dt z'.

y are the places of the oscillators and z their velocities. Carry: (y, z). dt, gamma (the springs) and epsilon (the
friction) are by default those of the published recipe for permuted MNIST, as its code has them.

Parameters start uniform within 1 / sqrt(features + 2 hidden), as the authors' one linear layer of (x, z, y) does.
"""

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]
Carry = tuple[Array, Array]


def step(
    params: Params, carry: Carry, x: Array, dt: float = 0.076, gamma: float = 0.4, epsilon: float = 8.0
) -> tuple[Carry, Array]:
    """One step: y and z [batch, hidden], and x [batch, features]."""
    y, z = carry
    coupled = y @ params["recurrent_kernel"] + z @ params["velocity_kernel"]
    force = jnp.tanh(coupled + x @ params["kernel"] + params["bias"])
    z = z + dt * (force - gamma * y - epsilon * z)
    y = y + dt * z
    return (y, z), y


def init(key: Array, features: int, hidden_size: int) -> Params:
    """kernel [features, hidden], recurrent_kernel and velocity_kernel [hidden, hidden], bias [hidden], float32."""
    limit = (features + 2 * hidden_size) ** -0.5
    shapes = {
        "kernel": (features, hidden_size),
        "recurrent_kernel": (hidden_size, hidden_size),
        "velocity_kernel": (hidden_size, hidden_size),
        "bias": (hidden_size,),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(part, shape, jnp.float32, -limit, limit)
        for part, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


CELL = rnn.cell(step, init, lambda zero: (zero, zero))
