"""expRNN: Elman's network with a recurrent matrix that stays orthogonal, the exponential of a skew-symmetric one.

Lezcano-Casado and Martínez-Rubio 2019, "Cheap Orthogonal Constraints in Neural Networks":

  h' = modrelu(x W + h exp(A)),  A = S - S^T;  modrelu(v) = sign(v) relu(|v| + b),

S with numbers above its diagonal alone; they are the parameters. exp(A) is made of parameters alone, so a kernel, and
'fused', make it once for a whole sequence; `lax.scan` ('scan') once a step. Carry: h.

A starts in blocks of two rows and columns, each exp(A)'s rotation by tan(v / 2), v uniform in (0, pi / 2) ("Cayley" in
the authors' code); W by He's normal rule, b uniform within 0.01. The paper gives A a tenth of the others' rate.
"""

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]


def orthogonal(skew: Array, hidden_size: int) -> Array:
    """exp(A) [hidden, hidden], from the numbers above A's diagonal, row by row."""
    upper = jnp.zeros((hidden_size, hidden_size), skew.dtype).at[np.triu_indices(hidden_size, 1)].set(skew)
    return jax.scipy.linalg.expm(upper - upper.T)


def step(params: Params, h: Array, x: Array) -> tuple[Array, Array]:
    """One step: h [batch, hidden] and x [batch, features]."""
    v = x @ params["kernel"] + h @ orthogonal(params["skew"], h.shape[-1])
    h = jnp.sign(v) * jax.nn.relu(jnp.abs(v) + params["bias"])
    return h, h


def init(key: Array, features: int, hidden_size: int) -> Params:
    """kernel [features, hidden], skew [hidden * (hidden - 1) / 2], bias [hidden], float32."""
    kernel_key, skew_key, bias_key = jax.random.split(key, 3)
    rows, columns = np.triu_indices(hidden_size, 1)
    angles = -jnp.tan(jax.random.uniform(skew_key, (hidden_size,), jnp.float32, 0.0, jnp.pi / 2) / 2)
    return {
        "kernel": jax.nn.initializers.he_normal()(kernel_key, (features, hidden_size), jnp.float32),
        "skew": jnp.where((columns == rows + 1) & (rows % 2 == 0), angles[rows], 0.0),
        "bias": jax.random.uniform(bias_key, (hidden_size,), jnp.float32, -0.01, 0.01),
    }


CELL = rnn.cell(step, init)
