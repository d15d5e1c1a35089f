"""The UR-LSTM: an LSTM whose forget gate is refined by another, and whose input gate is what that one leaves.

Gu et al. 2020, "Improving the Gating Mechanism of Recurrent Neural Networks":

  f, r = sigmoid(x W + h U + b);  g = 2 r f + (1 - 2 r) f^2;
  c' = g c + (1 - g) tanh(u);  h' = sigmoid(o) tanh(c'),

with u and o made as f and r are. r moves the gate between f^2 (r = 0) and 1 - (1 - f)^2 (r = 1), so that it gets near
0 and 1 where f alone learns no more. Gate order: f, r, u, o. Carry: (c, h).

Forget gates start even in (1/d, 1 - 1/d), d the number of units (the "uniform" of `rnn.TIME_SCALES`), refining gates
against them: their bias is minus the forget gate's. Two parameters here; in others' code one for both.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]
Carry = tuple[Array, Array]


def refined(forget: Array, refine: Array) -> Array:
    """The gate g, from f and r before their sigmoid."""
    f, r = jax.nn.sigmoid(forget), jax.nn.sigmoid(refine)
    return 2 * r * f + (1 - 2 * r) * f**2


def step(params: Params, carry: Carry, x: Array) -> tuple[Carry, Array]:
    """One step: c and h [batch, hidden], and x [batch, features]."""
    c, h = carry
    f, r, u, o = jnp.split(x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"], 4, axis=-1)
    g = refined(f, r)
    c = g * c + (1 - g) * jnp.tanh(u)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def init(
    key: Array, features: int, hidden_size: int, *, kernel_init: str = "glorot_uniform", time_scales: Any = None
) -> Params:
    """kernel [features, 4 * hidden], recurrent_kernel [hidden, 4 * hidden], bias [4 * hidden], float32.

    Args:
      key, features, hidden_size, kernel_init: as in `rnn.init_lstm`.
      time_scales: draws the forget gates' biases in place of the uniform ones.
    """
    draw = rnn.keeping_bias(time_scales or ("uniform", 2))
    kernel_key, bias_key = jax.random.split(key)
    kernel, recurrent_kernel = rnn.KERNELS[kernel_init](kernel_key, features, hidden_size, 4, jnp.float32)
    forget, zeros = draw(bias_key, (hidden_size,), jnp.float32), jnp.zeros((2 * hidden_size,), jnp.float32)
    return {
        "kernel": kernel,
        "recurrent_kernel": recurrent_kernel,
        "bias": jnp.concatenate([forget, -forget, zeros]),
    }


CELL = rnn.cell(step, init, lambda zero: (zero, zero))
