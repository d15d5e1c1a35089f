"""A step in two: what its next carry waits for, and products that only the output waits for.

A linear recurrence's output is a product of its new state, y = s C, which no later step reads. In the loop it would be
one small product a step; after the loop it is one large one for all steps, or, where the last output alone is wanted,
for one step. So the loop runs `Inner`, whose output is what those products read, and `Inner.outputs` makes y of it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from seqmnist_jax.rnn.divide import laid_flat
from seqmnist_jax.rnn.jaxprs import follow, is_plain, keeps_places, known, needed, pulls_linearly, read
from seqmnist_jax.rnn.scan import Step, last_frames, where_running, with_frames_of_its_own, without_padding

Array = jax.Array


class _Cut(NamedTuple):
    """A step's equations, divided.

    Attributes:
      closed: the step's jaxpr.
      inside, outside: equations of the loop, and those of the output; both have what depends on parameters and x.
      between: the values of the state that those outside read.
      by_rows: whether those outside make of each sequence's values its own output.
    """

    closed: Any
    inside: list[Any]
    outside: list[Any]
    between: list[Any]
    by_rows: bool


@functools.lru_cache(maxsize=256)
def _cut(step: Any, precision: str, tree: Any, shapes: tuple[Any, ...], of_float: Any) -> _Cut | None:
    del of_float  # what a Python float becomes, by which the step may be another
    params, carry, x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    closed = laid_flat(step, params, carry, x, precision)
    jaxpr, n_params, n_carry = closed.jaxpr, len(jax.tree.leaves(params)), len(jax.tree.leaves(carry))
    carries, new, ys = jaxpr.invars[n_params:-1], jaxpr.outvars[:n_carry], jaxpr.outvars[n_carry:]
    if len(ys) != 1 or not carries:
        return None
    of_state, of_carry, late = set(carries), needed(jaxpr.eqns, new), set[Any]()
    inside = {v for e in of_carry for v in e.outvars}
    for e in needed(jaxpr.eqns, ys):
        operands = {v for v in e.invars if not isinstance(v, jex.Literal)}
        if operands & of_state:
            of_state.update(e.outvars)
            if not inside.intersection(e.outvars) and (e.primitive.name == "dot_general" or operands & late):
                late.update(e.outvars)
    if not late:
        return None
    read_late = [
        v for e in jaxpr.eqns if late.intersection(e.outvars) for v in e.invars if not isinstance(v, jex.Literal)
    ]
    between = [v for v in dict.fromkeys(read_late) if v in of_state and v not in late]
    hidden, rows = min(v.aval.shape[-1] for v in carries), x.shape[0]
    if any(v.aval.dtype != x.dtype or v.aval.shape[:-1] != (rows,) or v.aval.shape[1] % hidden for v in between):
        return None
    outside = needed(jaxpr.eqns, ys, between)
    if not all(map(pulls_linearly, outside)):  # what both parts have, or all steps, would be given a part or a sum
        return None
    inner = needed(jaxpr.eqns, [*new, *between])
    return _Cut(closed, inner, outside, between, _is_by_rows(outside, {jaxpr.invars[-1], *between}))


def _is_by_rows(equations: list[Any], of_sequences: set[Any]) -> bool:
    """Whether no equation puts together what is of several sequences, as far as is known."""
    for e in equations:
        name, operands = e.primitive.name, [v for v in e.invars if not isinstance(v, jex.Literal)]
        if of_sequences.intersection(operands):
            of_sequences.update(e.outvars)
            keeps = keeps_places(e) or (name == "concatenate" and e.params["dimension"] > 0)
            keeps |= name == "dot_general" and is_plain(e) and e.invars[1] not in of_sequences
            keeps |= name == "slice" and e.outvars[0].aval.shape[0] == e.invars[0].aval.shape[0]
            if not keeps:
                return False
    return True


def _cut_for(step: Any, precision: str, params: Any, carry: Any, x: Any) -> _Cut | None:
    leaves, tree = jax.tree.flatten((params, carry, x))
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _cut(step, precision, tree, shapes, jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Inner:
    """The loop's part of a step, itself a step; its output is what `outputs` reads."""

    step: Step[Any]
    precision: str

    def __call__(self, params: Any, carry: Any, x: Array) -> tuple[Any, Array]:
        """The new carry, and the values of the state that the rest reads, side by side."""
        cut = _cut_for(self.step, self.precision, params, carry, x)
        assert cut is not None
        leaves, tree = jax.tree.flatten(carry)
        values = known(cut.closed, [*jax.tree.leaves(params), *leaves, x])
        follow(cut.inside, values)
        new = [read(values, v) for v in cut.closed.jaxpr.outvars[: len(leaves)]]
        return jax.tree.unflatten(tree, new), jnp.concatenate([values[v] for v in cut.between], axis=1)

    def outputs(self, params: Any, x: Array, carry: Any, lengths: Any, between: Any, reverse: bool) -> Array:
        """The step's outputs.

        Args:
          params, x, carry, lengths: as the engine's; x with frames of its own past each sequence's end.
          between: the loop's outputs, [batch, time, ...], or the last one's [batch, ...].
          reverse: whether the loop ran from the last step to the first.
        """
        frame = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), x.dtype)
        cut = _cut_for(self.step, self.precision, params, carry, frame)
        assert cut is not None
        sizes = [v.aval.shape[1] for v in cut.between]

        def of_step(x: Array, between: Array) -> Array:
            values = known(cut.closed, [*jax.tree.leaves((params, carry)), x])
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            parts = [between[:, start : start + size] for start, size in zip(starts, sizes, strict=True)]
            values |= dict(zip(cut.between, parts, strict=True))
            follow(cut.outside, values)
            y: Array = values[cut.closed.jaxpr.outvars[-1]]
            return y

        if between.ndim == 2:
            x, between = last_frames(x, between, lengths, reverse)
            y = of_step(x, between)
            return where_running(None if lengths is None else lengths > 0, y, jnp.zeros_like(y))
        # Past a sequence's end stands what it has been through, as in x: elsewhere a slope may be infinite.
        between, _ = with_frames_of_its_own(between, lengths, reverse)
        return without_padding(jax.vmap(of_step, in_axes=1, out_axes=1)(x, between), lengths)[0]


def taken_out(step: Step[Any], precision: str, params: Any, carry: Any, x: Any, is_ragged: bool = False) -> Step[Any]:
    """`Inner` of a step that has such products, else the step.

    Args:
      step, precision: as in the engine's calls.
      params, carry, x: arrays or their shapes; x [batch, time, features].
      is_ragged: whether sequences end at steps of their own. Behind the loop stand then outputs of different steps side
        by side, so that a step whose output puts sequences together stays as it is.

    Raises:
      whatever the step does not like.
    """
    frame = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), x.dtype)
    cut = _cut_for(step, precision, params, carry, frame)
    return step if cut is None or (is_ragged and not cut.by_rows) else Inner(step, precision)
