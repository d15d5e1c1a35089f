"""A minGRU: a GRU whose gate and candidate read x alone, so that all steps can be taken at once.

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

from seqmnist_jax.rnn import cells, checks, initializers, layers
from seqmnist_jax.rnn.eager import compiled
from seqmnist_jax.rnn.gaps import pressed, spread
from seqmnist_jax.rnn.scan import running_tm, without_padding

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


def _gates(params: Params, x: Array, precision: str) -> tuple[Array, Array]:
    """z and n, for x [..., features]."""
    z, n = jnp.split(cells.inputs(params, x, precision), GATES, axis=-1)
    return cells.sigmoid(z), n


def min_gru_step(params: Params, carry: Array, x: Array, precision: str = "float32") -> tuple[Array, Array]:
    """One minGRU step: carry h [batch, hidden] and x [batch, features]."""
    z, n = _gates(params, x, precision)
    h = (1.0 - z) * n + z * carry
    return h, h


def _compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """The step h' = a h + b that two such steps make, each given as (a, b)."""
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


def _run(
    _: Any,
    params: Params,
    x: Array,
    carry: Array,
    lengths: Array | None,
    mask: Array | None,
    resets: Any,
    reverse: bool,
    return_sequences: bool,
    zero: bool,
    precision: str,
) -> tuple[Array, Array]:
    if x.shape[1] == 0:
        return carry, jnp.zeros((x.shape[0], 0, carry.shape[1]), carry.dtype) if return_sequences else carry
    x, lengths, anew = pressed(x, lengths, mask, resets and resets[0])
    x, lengths = without_padding(x, lengths)
    z, n = _gates(params, jnp.swapaxes(x, 0, 1), precision)
    a, b = z, (1.0 - z) * n
    if resets is not None:
        anew_tm, start = anew.T[:, :, None], resets[1]
        b = b if start is None else jnp.where(anew_tm, b + a * start, b)
        a = jnp.where(anew_tm, 0.0, a)
    running = running_tm(x, lengths)
    if running is not None:
        # A sequence that has ended keeps its state and adds nothing to it.
        running = running[:, :, None]
        a, b = jnp.where(running, a, 1.0), jnp.where(running, b, 0.0)
    first, last = (-1, 0) if reverse else (0, -1)
    b = b.at[first].add(a[first] * carry)
    _, h = jax.lax.associative_scan(_compose, (a, b), reverse=reverse)
    end = h[last]
    if not return_sequences:
        return end, end
    outputs = jnp.swapaxes(h if running is None else jnp.where(running, h, 0.0), 0, 1)
    return end, spread(outputs, mask, reverse, zero)


def min_gru(
    params: Params,
    x: Array,
    carry: Array | None = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    zero_output_for_mask: bool = False,
    precision: str = "float32",
    backend: str = "auto",
) -> tuple[Array, Array]:
    """A minGRU layer over a whole sequence, parallel in time.

    A step is h' = a h + b, with a = z and b = (1 - z) n known for all steps beforehand, and two such
    steps make one of the same kind. So `jax.lax.associative_scan` takes T steps in about 2 log2 T rounds
    (Blelloch 1990). `min_gru_step` is the serial form.

    Args:
      params: as `init_min_gru` makes them.
      x: [batch, time, features].
      carry: h [batch, hidden]; zeros where None.
      lengths, mask, resets, reverse, return_sequences, zero_output_for_mask, precision: as in `lstm`.
      backend: 'auto'; there is one implementation.

    Returns:
      (h, outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: as in `lstm`.
    """
    checks.choice("backend", backend, ("auto",))
    precision = checks.choice("precision", precision, layers.PRECISIONS)
    reverse, return_sequences = checks.flag("reverse", reverse), checks.flag("return_sequences", return_sequences)
    zero = checks.flag("zero_output_for_mask", zero_output_for_mask)
    mask, resets = checks.check_marks(x, lengths, mask, resets)
    x, lengths = checks.check_inputs(x, lengths, mask)
    is_given = carry is not None
    params, hidden = checks.check_params(params, ("kernel", "bias"), GATES, x)
    dtype = checks.common_dtype(params, x)
    carry = checks.check_carry(carry, 1, (x.shape[0], hidden), dtype)
    dtype = jnp.result_type(dtype, carry)
    layers.check_dtypes(precision, backend, dtype)
    params, x, carry = jax.tree.map(lambda array: jnp.asarray(array, dtype), (params, x, carry))
    anew = None if resets is None else (resets, carry if is_given else None)
    arguments = params, x, carry, lengths, mask, anew
    return compiled(_run, min_gru_step, arguments, (reverse, return_sequences, zero, precision))
