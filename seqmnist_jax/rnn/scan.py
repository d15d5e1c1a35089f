"""The recurrence in time: any pure cell through `lax.scan`, the reference for all backends.

Arrays are [batch, time, features] outside; `_tm` marks the time-major copies inside.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Carry = TypeVar("Carry")
Step = Callable[[Any, Carry, Array], tuple[Carry, Any]]


def is_known(array: Any) -> bool:
    """Whether the array's numbers can be looked at now, which under `jit` or `grad` they can't."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def is_real(dtype: Any) -> bool:
    """Whether the dtype is one of real numbers, floating or whole."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_x(x: Any) -> None:
    """Checks the shape and dtype of x, which may be a `jax.ShapeDtypeStruct`."""
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; expected [batch, time, features]")
    if x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}; expected at least one time step")
    if not is_real(x.dtype):
        raise ValueError(f"x has dtype {x.dtype}; expected real numbers")


def running_tm(x: Array, lengths: Array | None) -> Array | None:
    """Which sequences have not ended at each step, [time, batch]; None where all are whole."""
    return None if lengths is None else jnp.arange(x.shape[1])[:, None] < lengths[None, :]


def check_inputs(x: Array, lengths: Array | None) -> tuple[Array, Array | None]:
    """Checks x and lengths; gives x with zeros past each sequence's end, and lengths as int32 in [0, time].

    What stands in the padding, NaN included, must reach neither values nor gradients.
    """
    check_x(x)
    if lengths is None:
        return x, None
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape}; expected [batch] = {x.shape[:1]}, as x {x.shape}")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths has dtype {lengths.dtype}; expected integers")
    if is_known(lengths) and len(lengths):
        # NumPy's, because under `jit` JAX's would be traced even here.
        values = np.asarray(lengths)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > x.shape[1]:
            raise ValueError(f"lengths has values from {low} to {high}; expected 0 to {x.shape[1]}, as x {x.shape}")
    # In their own dtype what is too long for int32 can be cut, but the time axis may be too long for it.
    if jnp.iinfo(lengths.dtype).max > x.shape[1]:
        lengths = jnp.minimum(lengths, x.shape[1])
    lengths = jnp.maximum(lengths.astype(jnp.int32), 0)
    running = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    return jnp.where(running[:, :, None], x, jnp.zeros((), x.dtype)), lengths


def where_running(running: Array | None, new: Any, old: Any) -> Any:
    """`new` where running [batch] is true (or None), else `old`, for trees of [batch, ...]."""
    if running is None:
        return new

    def pick(n: Array, o: Array) -> Array:
        return jnp.where(running.reshape(running.shape + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(pick, new, old)


def loop(
    step: Step[Carry],
    params: Any,
    x: Array,
    carry: Carry,
    lengths: Array | None,
    reverse: bool,
    collect: bool,
    unroll: int = 1,
) -> tuple[Carry, Any]:
    """`lax.scan` over x [batch, time, features]; outputs [batch, time, ...] if `collect`, else None."""
    x_tm = jnp.swapaxes(x, 0, 1)

    def body(carry: Carry, now: tuple[Array, Array | None]) -> tuple[Carry, Any]:
        x_t, running = now
        new_carry, y = step(params, carry, x_t)
        new_carry = where_running(running, new_carry, carry)
        y = where_running(running, y, jax.tree.map(jnp.zeros_like, y))
        return new_carry, y if collect else None

    carry, outputs_tm = jax.lax.scan(body, carry, (x_tm, running_tm(x, lengths)), reverse=reverse, unroll=unroll)
    return carry, jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), outputs_tm)


def scan(
    step: Step[Carry],
    params: Any,
    x: Array,
    carry: Carry,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    unroll: int = 1,
) -> tuple[Carry, Array]:
    """Runs a pure cell over time.

    Args:
      step: ``step(params, carry, x_t) -> (carry, y_t)``; x_t is [batch, features].
      params: the cell's parameters, any pytree.
      x: [batch, time, features].
      carry: the state before the first step, a pytree of [batch, ...].
      lengths: integers [batch]; sequence b ends after lengths[b] steps. Past its end
        its carry is left as it was, its outputs are zero, and what x holds there plays no
        part. 0 is an empty sequence. Where values are not known (under `jit`), those beyond
        the time axis mean the whole sequence and negative ones an empty one.
      reverse: run from each sequence's last step to its first. The output of
        step t stands at index t either way.
      return_sequences: whether to keep the outputs of all steps.
      unroll: how many steps are laid out in one pass of the loop: 1 is a loop (TF1's
        dynamic_rnn), the number of steps none at all (static_rnn).

    Returns:
      (carry, outputs): the carry after each sequence's last step, and [batch, time, ...],
      or the last step's [batch, ...] (zero for an empty sequence).

    Raises:
      ValueError: x or lengths has the wrong shape or dtype, lengths are known and outside
        [0, time], or unroll is below 1.
    """
    x, lengths = check_inputs(x, lengths)
    if unroll < 1:
        raise ValueError(f"unroll is {unroll}; expected at least 1")
    if return_sequences:
        return loop(step, params, x, carry, lengths, reverse, True, unroll)

    def remember(params: Any, last: tuple[Carry, Any], x_t: Array) -> tuple[tuple[Carry, Any], None]:
        return step(params, last[0], x_t), None

    y_shape = jax.eval_shape(step, params, carry, x[:, 0])[1]
    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), y_shape)
    (carry, last), _ = loop(remember, params, x, (carry, nothing), lengths, reverse, False, unroll)
    return carry, last
