"""expRNN: Elman's network with a recurrent matrix that stays orthogonal, the exponential of a skew-symmetric one.

Lezcano-Casado and Martínez-Rubio 2019, "Cheap Orthogonal Constraints in Neural Networks":

  h' = modrelu(x W + h exp(A)),  A = S - S^T;  modrelu(v) = sign(v) relu(|v| + b),

S with numbers above its diagonal alone; they are the parameters. exp(A) is made of parameters alone, so a kernel, and
'fused', make it once for a whole sequence; `lax.scan` ('scan') once a step. Carry: h.

A starts in blocks of two rows and columns, each exp(A)'s rotation by tan(v / 2), v uniform in (0, pi / 2) ("Cayley" in
the authors' code); W by He's normal rule, b uniform within 0.01. The paper gives A a tenth of the others' rate.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax import rnn

# Of a matrix before its exponential: enough for a norm of 4,096.
MOST_HALVINGS = 12

Array = jax.Array
Params = dict[str, Array]


def orthogonal(skew: Array, hidden_size: int) -> Array:
    """exp(A) [hidden, hidden], from the numbers above A's diagonal, row by row."""
    upper = jnp.zeros((hidden_size, hidden_size), skew.dtype).at[np.triu_indices(hidden_size, 1)].set(skew)
    return _exp(upper - upper.T)


def _exp(a: Array) -> Array:
    """exp(a) of a skew-symmetric matrix: Taylor's polynomial of degree 16 of a / 2^n, squared n times.

    The norm of a / 2^n is at most 1, so the remainder is below 3e-15. Summed in four parts, as Paterson and Stockmeyer
    1973 do, the polynomial takes six products.

    Products alone: `jax.scipy.linalg.expm` solves a system for each of several replicas, and on two cores two such
    batches can wait for each other without end (jaxlib 0.10.2).
    """
    times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    square = times(a, a)
    # Of a normal matrix the 2-norm of the square is the 2-norm's square, and no more than any other norm.
    length = jnp.sqrt(jnp.abs(jax.lax.stop_gradient(square)).sum(1).max())
    halvings = jnp.clip(jnp.ceil(jnp.log2(length)), 0, MOST_HALVINGS)
    # A power of two to the last bit, else b2 would not be b b.
    scale = 1 / jnp.left_shift(1, halvings.astype(jnp.int32)).astype(a.dtype)
    b, b2 = a * scale, square * (scale * scale)
    powers = jnp.eye(len(a), dtype=a.dtype), b, b2, times(b2, b)
    b4 = times(b2, b2)
    root = b4 * (1 / math.factorial(16))
    for first in (12, 8, 4, 0):
        part = sum(power * (1 / math.factorial(first + k)) for k, power in enumerate(powers))
        root = part + (root if first == 12 else times(b4, root))
    return jax.lax.fori_loop(0, MOST_HALVINGS, lambda n, root: jnp.where(n < halvings, times(root, root), root), root)


def step(params: Params, h: Array, x: Array) -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    v = x @ params["kernel"] + h @ orthogonal(params["skew"], h.shape[-1])
    h = jnp.sign(v) * jax.nn.relu(jnp.abs(v) + params["bias"])
    return h, h


def init(key: Array, features: int, hidden_size: int) -> Params:
    """kernel [features, hidden], skew [hidden * (hidden - 1) / 2], bias [hidden], float32.

    Raises:
      ValueError: there are fewer than two units, which have no rotation.
    """
    if hidden_size < 2:
        raise ValueError(f"hidden_size is {hidden_size}; expected at least 2 units, since one can't be rotated")
    kernel_key, skew_key, bias_key = jax.random.split(key, 3)
    rows, columns = np.triu_indices(hidden_size, 1)
    angles = -jnp.tan(jax.random.uniform(skew_key, (hidden_size,), jnp.float32, 0.0, jnp.pi / 2) / 2)
    return {
        "kernel": jax.nn.initializers.he_normal()(kernel_key, (features, hidden_size), jnp.float32),
        "skew": jnp.where((columns == rows + 1) & (rows % 2 == 0), angles[rows], 0.0),
        "bias": jax.random.uniform(bias_key, (hidden_size,), jnp.float32, -0.01, 0.01),
    }


CELL = rnn.cell(step, init)
