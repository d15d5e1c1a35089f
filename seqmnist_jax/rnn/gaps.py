"""Masks and resets, for every layer and backend: what the engine runs has neither.

A masked step is as if it were not there. So the steps that run are moved together, a sequence of fewer steps
(`pressed`), and outputs back to where they belong (`spread`). A reset is a column beside x, which the step reads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn.scan import Step, where_running

Array = jax.Array
# Where the state starts anew, and from which carry; zero where None.
Resets = tuple[Array, Any] | None


def pressed(x: Array, lengths: Any, mask: Array | None, resets: Any) -> tuple[Array, Any, Any]:
    """x, lengths and resets, a tree of [batch, time], of the steps that run alone, which begin at step 0."""
    if mask is None:
        return x, lengths, resets
    batch, time, _ = x.shape
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    steps = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None, :], mask.shape)
    order = jnp.zeros_like(steps).at[rows, jnp.where(mask, count - 1, time)].set(steps, mode="drop")
    return x[rows, order], count[:, -1], None if resets is None else resets[rows, order]


def spread(outputs: Any, mask: Array | None, reverse: bool, zero: bool) -> Any:
    """Outputs [batch, time, ...] of steps that were `pressed`, each at its own step.

    A masked step has the output of the step that ran before it, or zero where there was none or where `zero` is true.
    """
    if mask is None:
        return outputs
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    # In reverse the step before is the next in time; where that is none, outputs past the end are zero anyway.
    place = count - mask.astype(jnp.int32) if reverse else count - 1
    rows = jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None]
    found = jax.tree.map(lambda y: y[rows, jnp.maximum(place, 0)], outputs)
    return where_running(mask if zero else place >= 0, found, jax.tree.map(jnp.zeros_like, found))


@dataclasses.dataclass(frozen=True)
class _Resetting:
    """A step whose state starts anew where the last column of x is not zero; equal to that of an equal step."""

    step: Step[Any]

    def __call__(self, given: Any, carry: Any, x_t: Array) -> tuple[Any, Any]:
        params, start = given
        start = jax.tree.map(jnp.zeros_like, carry) if start is None else start
        return self.step(params, where_running(x_t[:, -1] != 0, start, carry), x_t[:, :-1])


def with_resets(step: Step[Any], params: Any, x: Array, resets: Resets) -> tuple[Step[Any], Any, Array]:
    """A step, its parameters and its x, such that the state starts anew at resets."""
    if resets is None:
        return step, params, x
    at, start = resets
    return _Resetting(step), (params, start), jnp.concatenate([x, at[:, :, None].astype(x.dtype)], axis=2)
