"""Pure LSTM and GRU cells: parameters, one step, and the part of it that need not wait.

A cell is a function ``step(params, carry, x) -> (carry, y)``. For both cells the
product with the input needs no carry, so it is split off: ``*_inputs`` makes
it for any number of steps at once, ``*_recurrence`` does the rest of one step, and
``*_step`` is one after the other.

Gate order: LSTM i, f, g, o; GRU r, z, n. Carry: LSTM (c, h), GRU h, each
[batch, hidden].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import initializers

Array = jax.Array
Params = dict[str, Array]
LSTMCarry = tuple[Array, Array]

LSTM_GATES = 4
GRU_GATES = 3


def _check_sizes(features: int, hidden_size: int) -> None:
    for name, size in (("features", features), ("hidden_size", hidden_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")


def _kernels(name: str) -> Callable[..., initializers.KernelPair]:
    if name not in initializers.KERNELS:
        raise ValueError(f"kernel_init is {name!r}; expected one of {sorted(initializers.KERNELS)}")
    return initializers.KERNELS[name]


def init_lstm(
    key: Array,
    features: int,
    hidden_size: int,
    *,
    kernel_init: str = "glorot_uniform",
    forget_bias: float = 1.0,
    time_scales: initializers.Initializer | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters of an LSTM layer.

    Args:
      key: a PRNG key.
      features, hidden_size: sizes of the input and of the state.
      kernel_init: a name in `initializers.KERNELS`.
      forget_bias: the stored bias of the forget gate (Jozefowicz et al. 2015); all
        other biases are zero. TF1 adds the same number at run time instead.
      time_scales: draws the forget gate's bias b from a distribution of time scales
        (see `initializers.log_uniform_time_scales`) in place of `forget_bias`; the
        input gate's bias is then -b, so that what is kept and what enters add up.
      dtype: of all arrays.

    Returns:
      kernel [features, 4 * hidden], recurrent_kernel [hidden, 4 * hidden], bias [4 * hidden].
    """
    _check_sizes(features, hidden_size)
    kernel_key, bias_key = jax.random.split(key)
    kernel, recurrent_kernel = _kernels(kernel_init)(kernel_key, features, hidden_size, LSTM_GATES, dtype)
    zeros = jnp.zeros((hidden_size,), dtype)
    if time_scales is None:
        forget = jnp.full((hidden_size,), forget_bias, dtype)
        bias = jnp.concatenate([zeros, forget, zeros, zeros])
    else:
        forget = time_scales(bias_key, (hidden_size,), dtype)
        bias = jnp.concatenate([-forget, forget, zeros, zeros])
    return {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}


def lstm_inputs(params: Params, x: Array) -> Array:
    """x W + b, for x [..., features]: the gates' share that needs no carry, [..., 4 * hidden]."""
    return x @ params["kernel"] + params["bias"]


def lstm_recurrence(params: Params, carry: LSTMCarry, inputs: Array) -> tuple[LSTMCarry, Array]:
    """The rest of an LSTM step, from `lstm_inputs` of that step.

    i, f, o = sigmoid, g = tanh of x W + h U + b;  c' = f c + i g;  h' = o tanh(c')
    (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; no peepholes).
    """
    c, h = carry
    i, f, g, o = jnp.split(inputs + h @ params["recurrent_kernel"], LSTM_GATES, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def lstm_step(params: Params, carry: LSTMCarry, x: Array) -> tuple[LSTMCarry, Array]:
    """One LSTM step: carry (c, h), each [batch, hidden], and x [batch, features]."""
    return lstm_recurrence(params, carry, lstm_inputs(params, x))


def init_gru(
    key: Array,
    features: int,
    hidden_size: int,
    *,
    kernel_init: str = "glorot_uniform",
    time_scales: initializers.Initializer | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters of a reset-after GRU layer.

    Args:
      key: a PRNG key.
      features, hidden_size: sizes of the input and of the state.
      kernel_init: a name in `initializers.KERNELS`.
      time_scales: draws the update gate's bias from a distribution of time scales
        (see `initializers.log_uniform_time_scales`); zero where None.
      dtype: of all arrays.

    Returns:
      kernel [features, 3 * hidden], recurrent_kernel [hidden, 3 * hidden],
      bias [3 * hidden] and recurrent_bias [3 * hidden].
    """
    _check_sizes(features, hidden_size)
    kernel_key, bias_key = jax.random.split(key)
    kernel, recurrent_kernel = _kernels(kernel_init)(kernel_key, features, hidden_size, GRU_GATES, dtype)
    zeros = jnp.zeros((hidden_size,), dtype)
    update = zeros if time_scales is None else time_scales(bias_key, (hidden_size,), dtype)
    return {
        "kernel": kernel,
        "recurrent_kernel": recurrent_kernel,
        "bias": jnp.concatenate([zeros, update, zeros]),
        "recurrent_bias": jnp.zeros((GRU_GATES * hidden_size,), dtype),
    }


def gru_inputs(params: Params, x: Array) -> Array:
    """x W + b, for x [..., features]: the gates' share that needs no carry, [..., 3 * hidden]."""
    return x @ params["kernel"] + params["bias"]


def gru_recurrence(params: Params, carry: Array, inputs: Array) -> tuple[Array, Array]:
    """The rest of a GRU step, from `gru_inputs` of that step.

    r, z = sigmoid(x W + h U + b + b_U);  n = tanh(x W + b + r (h U + b_U));
    h' = (1 - z) n + z h: the reset gate acts after the product with h, as in cuDNN
    and PyTorch (a later variant of the cell of Cho et al. 2014, whose reset acts before it).
    """
    h = carry
    x_r, x_z, x_n = jnp.split(inputs, GRU_GATES, axis=-1)
    h_r, h_z, h_n = jnp.split(h @ params["recurrent_kernel"] + params["recurrent_bias"], GRU_GATES, axis=-1)
    r = jax.nn.sigmoid(x_r + h_r)
    z = jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    h = (1.0 - z) * n + z * h
    return h, h


def gru_step(params: Params, carry: Array, x: Array) -> tuple[Array, Array]:
    """One GRU step: carry h [batch, hidden] and x [batch, features]."""
    return gru_recurrence(params, carry, gru_inputs(params, x))
