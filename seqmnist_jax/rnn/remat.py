"""Memory against time: a layer in segments that are computed again on the way back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn.cells import narrowed, widened
from seqmnist_jax.rnn.checks import as_carry_of_a_step, check_sequences, flag, whole
from seqmnist_jax.rnn.eager import compiled
from seqmnist_jax.rnn.gaps import pressed, spread
from seqmnist_jax.rnn.scan import clamped, where_running

Array = jax.Array


def remat(layer: Callable[..., tuple[Any, Any]], steps: int) -> Callable[..., tuple[Any, Any]]:
    """A layer that remembers its carry every so many steps and computes the rest again on the way back.

    Takes 1.4 to 1.8 times the time; what is saved of a step is then needed for `steps` steps at
    a time only, beside a carry for each segment (Chen et al. 2016, checkpoints over time).

    Args:
      layer: `lstm`, `gru` or another with their arguments; pure.
      steps: in a segment; the square root of the sequence's length saves most.

    Returns:
      A function with the layer's arguments and results, but without `resets`.

    Raises:
      ValueError: steps is below 1.
    """
    steps = whole("steps", steps, 1)

    @functools.wraps(layer)
    def run(
        params: Any,
        x: Any,
        carry: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        reverse: bool = False,
        return_sequences: bool = True,
        zero_output_for_mask: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        if resets is not None:
            raise ValueError("resets are given, but a segment does not know the first carry; expected none under remat")
        x, lengths, mask, _ = check_sequences(x, lengths, mask)
        carry = as_carry_of_a_step(carry)
        flags = flag("reverse", reverse), flag("return_sequences", return_sequences)
        zero = flag("zero_output_for_mask", zero_output_for_mask)
        return compiled(_run, layer, (params, x, carry, lengths, mask, options), (steps, *flags, zero))

    return run


def _run(
    layer: Any,
    params: Any,
    x: Array,
    carry: Any,
    lengths: Any,
    mask: Any,
    options: Any,
    steps: int,
    reverse: bool,
    all_steps: bool,
    zero: bool,
) -> tuple[Any, Any]:
    x, lengths, _ = pressed(x, lengths, mask, None)
    end, outputs = in_segments(layer, params, x, carry, lengths, options, steps, reverse, all_steps)
    return end, spread(outputs, mask if all_steps else None, reverse, zero)


def in_segments(
    layer: Any,
    params: Any,
    x: Array,
    carry: Any,
    lengths: Any,
    options: Any,
    steps: int,
    reverse: bool,
    all_steps: bool,
) -> tuple[Any, Any]:
    """A layer that keeps a carry for each segment of so many steps, and makes the rest again on the way back."""
    call = functools.partial(layer, reverse=reverse, return_sequences=all_steps, **options)
    batch, time, features = x.shape
    # Of a symbolic number of steps there is no number of segments.
    if not isinstance(time, int) or time < 2 * steps:
        return call(params, x, carry, lengths=lengths)
    # Checks all arguments, with x as a whole.
    jax.eval_shape(lambda x: call(params, x, carry), x)
    # The segment that runs first has the rest too, and stands outside the loop: what no carry means, and what an
    # empty sequence's output is, is for the layer to say.
    size = time % steps or steps
    count = (time - size) // steps
    start, others = (time - size, 0) if reverse else (0, size)
    wide = widened(params)

    @jax.checkpoint
    def segment(carry: Any, x: Array, ends: Array | None) -> tuple[Any, Any]:
        return call(narrowed(wide, params), x, carry, lengths=ends)

    def next_segment(state: tuple[Any, Any], now: tuple[Array, Array | None]) -> tuple[tuple[Any, Any], Any]:
        carry, y = segment(state[0], *now)
        if all_steps:
            return (carry, None), y
        return (carry, where_running(None if now[1] is None else now[1] > 0, y, state[1])), None

    def ends(start: Any, size: int) -> Array | None:
        return None if lengths is None else jnp.clip(clamped(lengths, x) - start, 0, size)

    segments = x[:, others : others + count * steps].reshape(batch, count, steps, features).swapaxes(0, 1)
    starts = others + steps * jnp.arange(count, dtype=jnp.int32)
    carry, first = segment(carry, x[:, start : start + size], ends(start, size))
    state = (carry, None if all_steps else first)
    (carry, last), outputs = jax.lax.scan(
        next_segment, state, (segments, jax.vmap(lambda start: ends(start, steps))(starts)), reverse=reverse
    )

    def joined(first: Array, parts: Array) -> Array:
        parts = parts.swapaxes(0, 1).reshape(batch, count * steps, *parts.shape[3:])
        return jnp.concatenate([parts, first] if reverse else [first, parts], axis=1)

    return carry, jax.tree.map(joined, first, outputs) if all_steps else last
