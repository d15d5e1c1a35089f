"""Pure LSTM and GRU cells: parameters, one step, and the parts that a step is made of.

A cell is a function ``step(params, carry, x) -> (carry, y)``.

Gate order: LSTM i, f, g, o; GRU r, z, n. Carry: LSTM (c, h), GRU h, each
[batch, hidden]. Precision says how exact products are, and nothing else; sums and all the rest stay in
float32: 'float32' is full float32, or the arrays' own dtype, on every device; 'tensorfloat32' lets a GPU keep
10 bits of the fraction of what is multiplied, and is float32 elsewhere; 'bfloat16' rounds it to 7 bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import initializers
from seqmnist_jax.rnn.checks import choice, whole

Array = jax.Array
Params = dict[str, Array]
LSTMCarry = tuple[Array, Array]

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
LSTM_GATES = 4
GRU_GATES = 3


def check_sizes(features: int, hidden_size: int) -> None:
    """Refuses a layer without inputs or units."""
    for name, size in (("features", features), ("hidden_size", hidden_size)):
        whole(name, size, 1)


def _kernels(name: str) -> Callable[..., initializers.KernelPair]:
    return initializers.KERNELS[choice("kernel_init", name, tuple(initializers.KERNELS))]


def init_lstm(
    key: Array,
    features: int,
    hidden_size: int,
    *,
    kernel_init: str = "glorot_uniform",
    forget_bias: float = 1.0,
    time_scales: initializers.TimeScales | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters of an LSTM layer.

    Args:
      key: a PRNG key.
      features, hidden_size: sizes of the input and of the state.
      kernel_init: a name in `initializers.KERNELS`.
      forget_bias: the stored bias of the forget gate (Jozefowicz et al. 2015); all
        other biases are zero. TF1 adds the same number at run time instead.
      time_scales: ``("log_uniform", sequence_length)``, or 'chrono' or 'uniform', draws the forget
        gate's bias b from a distribution of time scales (`TIME_SCALES`) in place of `forget_bias`; the
        input gate's bias is then -b, so that what is kept and what enters add up.
      dtype: of all arrays.

    Returns:
      kernel [features, 4 * hidden], recurrent_kernel [hidden, 4 * hidden], bias [4 * hidden].
    """
    check_sizes(features, hidden_size)
    kernel_key, bias_key = jax.random.split(key)
    kernel, recurrent_kernel = _kernels(kernel_init)(kernel_key, features, hidden_size, LSTM_GATES, dtype)
    zeros = jnp.zeros((hidden_size,), dtype)
    if time_scales is None:
        forget = jnp.full((hidden_size,), forget_bias, dtype)
        bias = jnp.concatenate([zeros, forget, zeros, zeros])
    else:
        forget = initializers.keeping_bias(time_scales)(bias_key, (hidden_size,), dtype)
        bias = jnp.concatenate([-forget, forget, zeros, zeros])
    return {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}


@jax.custom_jvp
def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), from e^-|x|: a gate that is nearly open or closed keeps its last bits.

    The direct form is off by half a rounding on one side when e^-x is small beside 1, always the same
    way, which adds up over hundreds of steps.
    """
    e = jnp.exp(-jnp.abs(x))
    small = e / (1.0 + e)
    return jnp.where(x > 0, 1.0 - small, small)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    s = sigmoid(primals[0])
    return s, tangents[0] * s * (1.0 - s)


def by_rows(times: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """The product of a [..., k], as rows [n, k], with b [k, m], as `times` makes it: [..., m].

    For the gradient of b XLA on CPUs multiplies rows as they are. Of several axes it first makes a transposed copy of
    the gradient of the product, and with that its product is slower: 3 to 8 times in all where k and m are small.
    """
    return times(jax.lax.collapse(a, 0, a.ndim - 1), b).reshape(*a.shape[:-1], b.shape[-1])


def product(a: Array, b: Array, precision: str) -> Array:
    """The matrix product a b, as exact as precision says."""
    precision = choice("precision", precision, PRECISIONS)
    if a.ndim > 2 and b.ndim == 2:
        return by_rows(functools.partial(product, precision=precision), a, b)
    if precision == "bfloat16":
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    # XLA's default is TF32 on GPUs that have it, and float32 elsewhere.
    exact = jax.lax.Precision.HIGHEST if precision == "float32" else jax.lax.Precision.DEFAULT
    return jnp.matmul(a, b, precision=exact)


def products_at(precision: str) -> Any:
    """A context: products that say nothing of their precision are in full float32 where that is asked, on GPUs too."""
    return jax.default_matmul_precision("highest" if precision == "float32" else None)


def widened(tree: Any) -> Any:
    """The tree's halves as float32: the gradient of what is narrowed again at each use is summed in float32."""

    def wide(leaf: Any) -> Any:
        is_half = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return jnp.asarray(leaf, jnp.float32) if is_half else leaf

    return jax.tree.map(wide, tree)


def narrowed(wide: Any, like: Any) -> Any:
    """What was `widened` in the dtypes that it had."""
    return jax.tree.map(lambda leaf, old: leaf if leaf is old else leaf.astype(old.dtype), wide, like)


def with_bias(products: Array, bias: Array) -> Array:
    """Products + bias, whose gradient, a sum over all rows, is made in float32 at least."""
    return products + jnp.broadcast_to(widened(bias), products.shape).astype(bias.dtype)


def inputs(params: Params, x: Array, precision: str) -> Array:
    """x W + b, for x [..., features]: the gates' share that needs no carry, [..., gates * hidden]."""
    return with_bias(product(x, params["kernel"], precision), params["bias"])


def lstm_step(params: Params, carry: LSTMCarry, x: Array, precision: str = "float32") -> tuple[LSTMCarry, Array]:
    """One LSTM step: carry (c, h), each [batch, hidden], and x [batch, features].

    i, f, g, o = sigmoid (g: tanh) of x W + h U + b;  c' = f c + i g;  h' = o tanh(c').

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; no peepholes.
    """
    c, h = carry
    gates = inputs(params, x, precision) + product(h, params["recurrent_kernel"], precision)
    i, f, g, o = jnp.split(gates, LSTM_GATES, axis=-1)
    i, f, g, o = sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)
    c = f * c + i * g
    h = o * jnp.tanh(c)
    return (c, h), h


def init_gru(
    key: Array,
    features: int,
    hidden_size: int,
    *,
    kernel_init: str = "glorot_uniform",
    time_scales: initializers.TimeScales | None = None,
    reset_after: bool = True,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters of a GRU layer.

    Args:
      key: a PRNG key.
      features, hidden_size: sizes of the input and of the state.
      kernel_init: a name in `initializers.KERNELS`.
      time_scales: as in `init_lstm`, for the update gate's bias; zero where None.
      reset_after: as in `gru`.
      dtype: of all arrays.

    Returns:
      kernel [features, 3 * hidden], recurrent_kernel [hidden, 3 * hidden],
      bias [3 * hidden] and, where reset_after, recurrent_bias [3 * hidden].
    """
    check_sizes(features, hidden_size)
    kernel_key, bias_key = jax.random.split(key)
    kernel, recurrent_kernel = _kernels(kernel_init)(kernel_key, features, hidden_size, GRU_GATES, dtype)
    zeros = jnp.zeros((hidden_size,), dtype)
    update = zeros if time_scales is None else initializers.keeping_bias(time_scales)(bias_key, (hidden_size,), dtype)
    params = {
        "kernel": kernel,
        "recurrent_kernel": recurrent_kernel,
        "bias": jnp.concatenate([zeros, update, zeros]),
    }
    return params | {"recurrent_bias": jnp.zeros((GRU_GATES * hidden_size,), dtype)} if reset_after else params


def gru_step(params: Params, carry: Array, x: Array, precision: str = "float32") -> tuple[Array, Array]:
    """One GRU step: carry h [batch, hidden] and x [batch, features].

    r, z = sigmoid(x W + b + h U + b_U);  n = tanh(x W + b + r (h U + b_U));  h' = (1 - z) n + z h: the reset gate acts
    after the product with h, as in cuDNN and PyTorch. Where there is no recurrent_bias it acts before it, as in Cho et
    al. 2014: n = tanh(x W + b + (r h) U).
    """
    x_r, x_z, x_n = jnp.split(inputs(params, x, precision), GRU_GATES, axis=-1)
    if "recurrent_bias" in params:
        products = with_bias(product(carry, params["recurrent_kernel"], precision), params["recurrent_bias"])
        h_r, h_z, h_n = jnp.split(products, GRU_GATES, axis=-1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
    else:
        kernel_rz, kernel_n = jnp.split(params["recurrent_kernel"], [2 * carry.shape[-1]], axis=-1)
        h_r, h_z = jnp.split(product(carry, kernel_rz, precision), 2, axis=-1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + product(r * carry, kernel_n, precision))
    h = (1.0 - z) * n + z * carry
    return h, h
