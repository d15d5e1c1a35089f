"""The recurrence in time: any pure cell through `lax.scan`, and the LSTM and the GRU on top.

Arrays are [batch, time, features] outside; `_tm` marks the time-major copies inside.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells

Array = jax.Array
Carry = TypeVar("Carry")
Step = Callable[[Any, Carry, Array], tuple[Carry, Any]]


def _check_inputs(x: Array, lengths: Array | None) -> Array:
    """Checks x and lengths; gives x with zeros past each sequence's end.

    What stands in the padding, NaN included, must reach neither values nor gradients.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; expected [batch, time, features]")
    if x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}; expected at least one time step")
    if lengths is None:
        return x
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape}; expected [batch] = {x.shape[:1]}, as x {x.shape}")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths has dtype {lengths.dtype}; expected integers")
    running = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    return jnp.where(running[:, :, None], x, jnp.zeros((), x.dtype))


def _where_running(running: Array, new: Any, old: Any) -> Any:
    """`new` where running [batch] is true, else `old`, for trees of [batch, ...]."""

    def pick(n: Array, o: Array) -> Array:
        return jnp.where(running.reshape(running.shape + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(pick, new, old)


def _loop(
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
    running_tm = None if lengths is None else jnp.arange(x.shape[1])[:, None] < lengths[None, :]

    def body(carry: Carry, now: tuple[Array, Array | None]) -> tuple[Carry, Any]:
        x_t, running = now
        new_carry, y = step(params, carry, x_t)
        if running is not None:
            new_carry = _where_running(running, new_carry, carry)
            y = _where_running(running, y, jax.tree.map(jnp.zeros_like, y))
        return new_carry, y if collect else None

    carry, outputs_tm = jax.lax.scan(body, carry, (x_tm, running_tm), reverse=reverse, unroll=unroll)
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
        part. Values beyond the time axis mean the whole sequence, values below 1 an
        empty one.
      reverse: run from each sequence's last step to its first. The output of
        step t stands at index t either way.
      return_sequences: whether to keep the outputs of all steps.
      unroll: how many steps are laid out in one pass of the loop: 1 is a loop (TF1's
        dynamic_rnn), the number of steps none at all (static_rnn).

    Returns:
      (carry, outputs): the carry after each sequence's last step, and [batch, time, ...],
      or the last step's [batch, ...] (zero for an empty sequence).

    Raises:
      ValueError: x or lengths has the wrong shape or dtype, or unroll is below 1.
    """
    x = _check_inputs(x, lengths)
    if unroll < 1:
        raise ValueError(f"unroll is {unroll}; expected at least 1")
    if return_sequences:
        return _loop(step, params, x, carry, lengths, reverse, True, unroll)

    def remember(params: Any, loop: tuple[Carry, Any], x_t: Array) -> tuple[tuple[Carry, Any], None]:
        return step(params, loop[0], x_t), None

    y_shape = jax.eval_shape(step, params, carry, x[:, 0])[1]
    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), y_shape)
    (carry, last), _ = _loop(remember, params, x, (carry, nothing), lengths, reverse, False, unroll)
    return carry, last


def _check_layer(params: cells.Params, x: Array, carry: Any, parts: int, gates: int) -> Any:
    """Checks that params, x and carry fit together; gives the carry, zeros where it is None.

    `parts` is the number of arrays in the carry: one stands alone, more are a tuple.
    """
    names = ["recurrent_kernel", "kernel", "bias"] + (["recurrent_bias"] if gates == cells.GRU_GATES else [])
    if set(params) != set(names):
        raise ValueError(f"params has {sorted(params)}; expected {sorted(names)}")
    if params["recurrent_kernel"].ndim != 2:
        raise ValueError(
            f"params['recurrent_kernel'] has shape {params['recurrent_kernel'].shape}; "
            f"expected [hidden, {gates} * hidden]"
        )
    hidden = params["recurrent_kernel"].shape[0]
    expected = {
        "recurrent_kernel": (hidden, gates * hidden),
        "kernel": (x.shape[-1], gates * hidden),
        "bias": (gates * hidden,),
        "recurrent_bias": (gates * hidden,),
    }
    for name in names:
        if params[name].shape != expected[name]:
            raise ValueError(
                f"params[{name!r}] has shape {params[name].shape}; expected {expected[name]} "
                f"for x {x.shape} and {hidden} hidden units"
            )
    dtype = jnp.result_type(x, *params.values())
    shape = (x.shape[0], hidden)
    blank = (jnp.zeros(shape, dtype),) * parts if parts > 1 else jnp.zeros(shape, dtype)
    if carry is None:
        return blank
    found: Any = jax.tree.structure(carry)
    if found != jax.tree.structure(blank):
        form = "a tuple (c, h)" if parts > 1 else "one array h"
        raise ValueError(f"carry is {found}; expected {form} of [batch, hidden]")
    for part in jax.tree.leaves(carry):
        if part.shape != shape:
            raise ValueError(f"carry has shape {part.shape}; expected [batch, hidden] = {shape}")
        if jnp.result_type(part, dtype) != part.dtype:
            raise ValueError(f"carry has dtype {part.dtype}; x and params would make it {dtype} in the first step")
    return carry


def lstm(
    params: cells.Params,
    x: Array,
    carry: cells.LSTMCarry | None = None,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
) -> tuple[cells.LSTMCarry, Array]:
    """An LSTM layer over a whole sequence.

    The input's product is made for all steps at once, before the loop.

    Args:
      params: as `init_lstm` makes them.
      x: [batch, time, features].
      carry: (c, h), each [batch, hidden]; zeros where None.
      lengths, reverse, return_sequences: as in `scan`; with ``return_sequences=False``
        an empty sequence's output is its initial h.

    Returns:
      ((c, h), outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: an argument's shape or dtype does not fit the others.
    """
    x = _check_inputs(x, lengths)
    carry = _check_layer(params, x, carry, 2, cells.LSTM_GATES)
    inputs = cells.lstm_inputs(params, x)
    (c, h), outputs = _loop(cells.lstm_recurrence, params, inputs, carry, lengths, reverse, return_sequences)
    return (c, h), outputs if return_sequences else h


def gru(
    params: cells.Params,
    x: Array,
    carry: Array | None = None,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
) -> tuple[Array, Array]:
    """A reset-after GRU layer over a whole sequence.

    The input's product is made for all steps at once, before the loop.

    Args:
      params: as `init_gru` makes them.
      x: [batch, time, features].
      carry: h [batch, hidden]; zeros where None.
      lengths, reverse, return_sequences: as in `scan`; with ``return_sequences=False``
        an empty sequence's output is its initial h.

    Returns:
      (h, outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: an argument's shape or dtype does not fit the others.
    """
    x = _check_inputs(x, lengths)
    carry = _check_layer(params, x, carry, 1, cells.GRU_GATES)
    inputs = cells.gru_inputs(params, x)
    h, outputs = _loop(cells.gru_recurrence, params, inputs, carry, lengths, reverse, return_sequences)
    return h, outputs if return_sequences else h
