"""The recurrence in time: any pure cell through `lax.scan`, the reference for all backends (`rnn.scan` chooses).

Arrays are [batch, time, features] outside; `_tm` marks the time-major copies inside.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn.cells import narrowed, widened
from seqmnist_jax.rnn.checks import check_rows

Array = jax.Array
Carry = TypeVar("Carry")
Step = Callable[[Any, Carry, Array], tuple[Carry, Any]]


def _running(x: Array, lengths: Array) -> Array:
    """Which sequences have not ended at each step, [batch, time]."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]


def running_tm(x: Array, lengths: Array | None) -> Array | None:
    """The same as [time, batch]; None where all are whole."""
    return None if lengths is None else jnp.swapaxes(_running(x, lengths), 0, 1)


def clamped(lengths: Array, x: Array) -> Array:
    """Lengths as int32 in [0, time]."""
    most = min(jnp.iinfo(lengths.dtype).max, jnp.iinfo(jnp.int32).max)
    return jnp.minimum(jnp.clip(lengths, 0, most).astype(jnp.int32), x.shape[1])


def without_padding(x: Array, lengths: Array | None) -> tuple[Array, Array | None]:
    """x with zeros past each sequence's end, and lengths `clamped`.

    What stands in the padding, NaN included, must reach neither values nor gradients.
    """
    if lengths is None:
        return x, None
    lengths = clamped(lengths, x)
    return where_running(_running(x, lengths), x, jnp.zeros((1, 1, 1), x.dtype)), lengths


def where_running(running: Array | None, new: Any, old: Any) -> Any:
    """`new` where running [batch], or [batch, time], is true (or None), else `old`, for trees of such arrays."""
    if running is None:
        return new

    def pick(n: Array, o: Array) -> Array:
        # `new` has the shape: where a step makes its carry smaller, `lax.scan` must see it.
        old = jnp.broadcast_to(o, n.shape)
        return jnp.where(running.reshape(running.shape + (1,) * (n.ndim - running.ndim)), n, old)

    return jax.tree.map(pick, new, old)


def _stand_ins(lengths: Array) -> Array:
    """For each sequence the one whose first step can be its own: itself, or the longest for an empty one."""
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return jnp.where(lengths > 0, rows, jnp.argmax(lengths).astype(jnp.int32))


def with_frames_of_its_own(x: Array, lengths: Array | None, reverse: bool) -> tuple[Array, Array | None]:
    """x whose padding repeats a frame that its sequence reads, and lengths `clamped`.

    As `without_padding`, for steps that may be singular where x is zero.
    """
    if lengths is None:
        return x, None
    lengths = clamped(lengths, x)
    row = _stand_ins(lengths)
    frames = x[row, lengths[row] - 1 if reverse else jnp.maximum(lengths - 1, 0)]
    return where_running(_running(x, lengths), x, jax.lax.stop_gradient(frames)[:, None]), lengths


def last_frames(x: Array, last: Array, lengths: Array | None, reverse: bool) -> tuple[Array, Array]:
    """x [batch, features] at each sequence's last step to run, and its row of `last`; an empty one has another's."""
    if lengths is None:
        return x[:, 0 if reverse else -1], last
    row = _stand_ins(lengths)
    return x[row, 0 if reverse else jnp.maximum(lengths[row] - 1, 0)], last[row]


def where_some_run(params: Any, lengths: Array | None) -> Any:
    """Parameters that have a gradient only where a sequence has a step: where none has, there is none to repeat."""
    if lengths is None:
        return params
    some = (lengths > 0).any()
    return jax.tree.map(
        lambda leaf: where_running(some, leaf, jax.lax.stop_gradient(leaf)) if hasattr(leaf, "dtype") else leaf, params
    )


def loop(
    step: Any, params: Any, x: Array, carry: Any, lengths: Any, reverse: bool, collect: bool, unroll: int = 1
) -> tuple[Any, Any]:
    """`lax.scan` over x [batch, time, features]; outputs [batch, time, ...] if `collect`, else None.

    Sequences that have ended, or not begun, repeat a step that is theirs (`visited`, and x `with_frames_of_its_own`):
    at an invented point a slope may be infinite, and 0 times that reaches the parameters' gradients.
    """
    visited = None
    if lengths is not None:
        rows = _stand_ins(lengths)
        visited = jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf[rows], carry))
        params = where_some_run(params, lengths)
    wide = widened(params)

    def body(state: tuple[Any, Any], now: tuple[Array, Array | None]) -> tuple[Any, Any]:
        (carry, visited), (x_t, running) = state, now
        start = where_running(running, carry, visited)
        new_carry, y = step(narrowed(wide, params), start, x_t)
        if running is not None:
            check_rows("the step's output", y, x.shape[0])
            visited = jax.lax.stop_gradient(start)
        if collect and any(jnp.ndim(leaf) < 1 for leaf in jax.tree.leaves(y)):
            raise ValueError("the step's output has shape (); with all outputs expected [batch, ...]")
        y = where_running(running, y, jax.tree.map(jnp.zeros_like, y))
        return (where_running(running, new_carry, carry), visited), y if collect else None

    steps = (jnp.swapaxes(x, 0, 1), running_tm(x, lengths))
    (carry, _), outputs_tm = jax.lax.scan(body, (carry, visited), steps, reverse=reverse, unroll=unroll)
    return carry, jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), outputs_tm)


def _as_made(step: Any, params: Any, x: Array, carry: Any) -> Any:
    """The carry, what is weakly typed in it of the dtype that the step makes of it: `loop` has it twice."""
    if not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(carry)):
        return carry
    frame = jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
    made, _ = jax.eval_shape(step, params, carry, frame)
    found: Any = jax.tree.structure(carry)
    if found != jax.tree.structure(made):
        return carry

    def taken(old: Any, new: Any) -> Any:
        takes = jax.typeof(old).weak_type and jnp.result_type(old, new) == new.dtype
        return jnp.asarray(old, new.dtype) if takes else old

    return jax.tree.map(taken, carry, made)


def run(
    step: Any, params: Any, x: Array, carry: Any, lengths: Any, reverse: bool, return_sequences: bool, unroll: int
) -> tuple[Any, Any]:
    """`loop` with all outputs, or with those of each sequence's last step."""
    carry = _as_made(step, params, x, carry)
    if return_sequences:
        return loop(step, params, x, carry, lengths, reverse, True, unroll)

    def remember(params: Any, last: tuple[Any, Any], x_t: Array) -> tuple[tuple[Any, Any], None]:
        return step(params, last[0], x_t), None

    frame = jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
    y_shape = jax.eval_shape(lambda carry, x_t: step(params, carry, x_t)[1], carry, frame)
    if lengths is not None:
        check_rows("the step's output", y_shape, x.shape[0])
    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), y_shape)
    (carry, last), _ = loop(remember, params, x, (carry, nothing), lengths, reverse, False, unroll)
    return carry, last
