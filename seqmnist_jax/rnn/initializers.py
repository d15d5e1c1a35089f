"""Initialisers of a recurrent layer: kernels gate by gate, and biases as time scales.

An initialiser is a function ``(key, shape, dtype) -> array``, as in ``jax.nn``.
Kernels hold their gates side by side, [rows, gates * hidden]; the functions here
say whether a rule applies to each gate's block or to the joint kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn.checks import choice, whole

Array = jax.Array
Initializer = Callable[..., Array]
KernelPair = tuple[Array, Array]
TimeScales = tuple[str, int] | Initializer


def wide(dtype: Any) -> Any:
    """What numbers are drawn and counted in: half precision has few, and ends at 65,504."""
    return jnp.promote_types(dtype, jnp.float32)


def glorot_uniform(key: Array, features: int, hidden_size: int, gates: int, dtype: Any) -> KernelPair:
    """Glorot's uniform rule over the joint kernel [features + hidden, gates * hidden].

    TF1's cells store both kernels as one matrix, so the limit
    sqrt(6 / (features + hidden + gates * hidden)) holds for both
    (Glorot & Bengio 2010, eq. 16, on that matrix).
    """
    rows, columns = features + hidden_size, gates * hidden_size
    limit = math.sqrt(6.0 / (rows + columns))
    joint = jax.random.uniform(key, (rows, columns), wide(dtype), -limit, limit).astype(dtype)
    return joint[:features], joint[features:]


def orthogonal(key: Array, features: int, hidden_size: int, gates: int, dtype: Any) -> KernelPair:
    """One orthogonal block per gate, in the input kernel and in the recurrent kernel.

    Saxe et al. 2014. For one feature a block is a unit vector.
    """
    init = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, 2 * gates)

    def blocks(some_keys: Array, rows: int) -> Array:
        return jnp.concatenate([init(k, (rows, hidden_size), wide(dtype)) for k in some_keys], axis=1).astype(dtype)

    return blocks(keys[:gates], features), blocks(keys[gates:], hidden_size)


KERNELS: dict[str, Callable[..., KernelPair]] = {
    "glorot_uniform": glorot_uniform,
    "orthogonal": orthogonal,
}


def log_uniform_time_scales(sequence_length: int) -> Initializer:
    """Biases b ~ U(0, log T), T the sequence length in steps.

    As the bias of a gate that keeps the past (the GRU's z, the LSTM's f) it spreads
    the time scales 1 + e^b over which units forget evenly in the logarithm, from 2
    steps to the whole sequence, as state-space models spread their step sizes.
    """
    top = math.log(whole("sequence_length", sequence_length, 2))

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, wide(dtype), 0.0, top).astype(dtype)

    return init


def chrono_time_scales(sequence_length: int) -> Initializer:
    """Biases b = log u, u ~ U(1, T - 1), T the sequence length in steps.

    Chrono initialisation (Tallec & Ollivier 2018, sec. 2): time scales even in the steps, not
    in their logarithm, so that almost every unit is slow.
    """
    top = max(whole("sequence_length", sequence_length, 2) - 1.0, 1.0)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, wide(dtype), 1.0, top)).astype(dtype)

    return init


def uniform_time_scales(sequence_length: int) -> Initializer:
    """Biases whose gates start even in (1/d, 1 - 1/d), d the number of units: b = log(u / (1 - u)).

    Uniform gate initialisation (Gu et al. 2020, eq. 8). It knows no sequence length; half of the
    units forget within 2 steps.
    """
    whole("sequence_length", sequence_length, 2)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        margin = 1.0 / max(shape[-1], 2)
        u = jax.random.uniform(key, shape, wide(dtype), margin, 1.0 - margin)
        return (jnp.log(u) - jnp.log1p(-u)).astype(dtype)

    return init


# Each makes the initialiser of a keeping gate's bias, from the longest time scale in steps.
TIME_SCALES: dict[str, Callable[[int], Initializer]] = {
    "log_uniform": log_uniform_time_scales,
    "chrono": chrono_time_scales,
    "uniform": uniform_time_scales,
}


def keeping_bias(time_scales: TimeScales) -> Initializer:
    """What draws a keeping gate's bias.

    Args:
      time_scales: a name in `TIME_SCALES` and the sequence length, as ``("log_uniform", 784)``; or an initialiser of
        one's own, which is given back.

    Raises:
      ValueError: it is neither, or the length is below 2.
    """
    if callable(time_scales):
        return time_scales
    if not isinstance(time_scales, tuple | list) or len(time_scales) != 2:
        form = "a name and the sequence length, as ('log_uniform', 784), or an initialiser"
        raise ValueError(f"time_scales is {time_scales!r}; expected {form}")
    name, sequence_length = time_scales
    return TIME_SCALES[choice("time_scales", name, tuple(TIME_SCALES))](sequence_length)
