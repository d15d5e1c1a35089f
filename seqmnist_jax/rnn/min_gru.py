"""A minGRU: a GRU whose gate and candidate read x alone, so that no step multiplies the state.

Feng et al. 2024, "Were RNNs All We Needed?", the plain form (no logarithms, no activation of the
candidate):

  z = sigmoid(x W_z + b_z);  n = x W_n + b_n;  h' = (1 - z) n + z h.

z is the gate that KEEPS, as in this package's GRU; the paper's z is 1 minus ours, so its weights of
that gate are ours with the other sign. Gate order: z, n. Carry: h [batch, hidden].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells, checks, initializers

Array = jax.Array
Params = cells.Params

GATES = 2

# The rules of `initializers.KERNELS` where there is no recurrent kernel: Glorot's limit is then that of
# the input kernel alone.
KERNELS: dict[str, Callable[[Array, int, int, Any], Array]] = {
    "glorot_uniform": lambda key, features, hidden_size, dtype: jax.nn.initializers.glorot_uniform()(
        key, (features, GATES * hidden_size), initializers.wide(dtype)
    ).astype(dtype),
    "orthogonal": lambda key, features, hidden_size, dtype: initializers.orthogonal(
        key, features, hidden_size, GATES, dtype
    )[0],
}


def init_min_gru(
    key: Array,
    features: int,
    hidden_size: int,
    *,
    kernel_init: str = "glorot_uniform",
    time_scales: initializers.TimeScales | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters of a minGRU layer.

    Args:
      key: a PRNG key.
      features, hidden_size: sizes of the input and of the state.
      kernel_init: 'glorot_uniform' (over [features, 2 * hidden]) or 'orthogonal' (a block per gate).
      time_scales: as in `init_lstm`, for the bias of the gate that keeps; zero where None.
      dtype: of all arrays.

    Returns:
      kernel [features, 2 * hidden], bias [2 * hidden].

    Raises:
      ValueError: a size is below 1, or kernel_init is unknown.
    """
    cells.check_sizes(features, hidden_size)
    checks.choice("kernel_init", kernel_init, tuple(KERNELS))
    kernel_key, bias_key = jax.random.split(key)
    zeros = jnp.zeros((hidden_size,), dtype)
    keep = zeros if time_scales is None else initializers.keeping_bias(time_scales)(bias_key, (hidden_size,), dtype)
    return {
        "kernel": KERNELS[kernel_init](kernel_key, features, hidden_size, dtype),
        "bias": jnp.concatenate([keep, zeros]),
    }


def min_gru_recurrence(params: Params, carry: Array, from_x: Array, precision: str = "float32") -> tuple[Array, Array]:
    """One step, given its product with the input, [batch, 2 * hidden]."""
    del params, precision
    z, n = jnp.split(from_x, GATES, axis=-1)
    z = cells.sigmoid(z)
    h = (1.0 - z) * n + z * carry
    return h, h


def min_gru_step(params: Params, carry: Array, x: Array, precision: str = "float32") -> tuple[Array, Array]:
    """One minGRU step: carry h [batch, hidden] and x [batch, features]."""
    return min_gru_recurrence(params, carry, cells.inputs(params, x, precision))
