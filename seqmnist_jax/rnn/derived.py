"""The recurrence of any divided step in plain JAX, with the backward that its division gives, for every platform.

The same interface as the kernels have (see `recurrence`). Automatic differentiation of a scan multiplies the weights'
gradients up in every step. Here the loop backwards makes only the products' cotangents and what they mean for the step
before; the weights' gradients are one product for every block of steps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.jaxprs import apply, flattened, read
from seqmnist_jax.rnn.scan import running_tm, where_running
from seqmnist_jax.rnn.stages import Kept, Operands, Options, Stages

Array = jax.Array

MULTIPLIES_X = False
KEEPS_SOURCES = False
BACK_AS_FORTH = False
# Steps that share one product for the weights' gradients: few, so that it finds its operands in the caches; but not so
# few that the product is no better than one in every step.
MOST_BLOCK_STEPS = 28


def problem() -> None:
    """Plain JAX is everywhere."""


def unfit(stages: Stages, options: Options) -> None:
    """It runs all that can be divided."""


class _Values:
    """A jaxpr of arrays, evaluated as far as its arguments are known yet."""

    def __init__(self, closed: Any):
        self._jaxpr = closed.jaxpr
        self._known: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self._waiting = list(closed.jaxpr.eqns)

    def give(self, first: int, arrays: Sequence[Array]) -> None:
        """Makes the arguments from number `first` on known."""
        self._known.update(zip(self._jaxpr.invars[first : first + len(arrays)], arrays, strict=True))
        left = []
        for e in self._waiting:
            if all(isinstance(v, jex.Literal) or v in self._known for v in e.invars):
                made = apply(e, [read(self._known, v) for v in e.invars])
                self._known.update(zip(e.outvars, made, strict=True))
            else:
                left.append(e)
        self._waiting = left

    def argument(self, i: int) -> Array:
        """An argument that is known."""
        return self._known[self._jaxpr.invars[i]]

    def result(self, i: int) -> Array:
        """A result that is known."""
        return read(self._known, self._jaxpr.outvars[i])


class _Program:
    """The scalar function for [batch, hidden], forward and backward, and the places of its arguments."""

    def __init__(self, stages: Stages, batch: int):
        self.division = d = stages.division
        shape = jax.ShapeDtypeStruct((batch, d.hidden), d.dtype)
        self.count = n = len(d.raws)
        self.made = made = len(d.scalars([jnp.zeros((), d.dtype)] * n)[1])
        kinds = [raw.kind for raw in d.raws]
        self.places = {kind: kinds.index(kind) if kind in kinds else 0 for kind in "cmxsp"}

        def forward(*raws: Array) -> list[Array]:
            results, kept = d.scalars(raws)
            return [*results, *kept]

        def backward(*given: Array) -> list[Array]:
            raws, kept, bars = given[:n], given[n : n + made], given[n + made :]
            values, pull = jax.vjp(lambda *r: tuple(d.scalars(r, kept)[0]), *raws)
            return [*pull(tuple(bars)), *values[: len(d.sources)]]

        def trace(function: Any, count: int) -> Any:
            return flattened(jax.vmap(jax.vmap(function)), [shape] * count, custom=True)

        self.forward = trace(forward, n)
        self.backward = trace(backward, n + made + len(d.sources) + len(d.carries) + d.outputs)

    def outside(self, operands: Operands, now: tuple[Array, Array], batch: int) -> list[tuple[int, list[Array]]]:
        """The arguments that are no part of the recurrence: 'x', 's' and 'p'."""
        inputs, x = now
        shape = (batch, self.division.hidden)
        return [
            (self.places["x"], list(inputs)),
            (self.places["s"], [jnp.broadcast_to(x[:, f : f + 1], shape) for f in range(self.division.count("s"))]),
            (self.places["p"], [jnp.broadcast_to(vector, shape) for vector in operands.vectors]),
        ]


def _outside_tm(operands: Operands) -> tuple[Array, Array]:
    """Inputs [time, number, batch, hidden] and x [time, batch, features]."""
    return jnp.transpose(operands.inputs, (1, 2, 0, 3)), jnp.swapaxes(operands.x, 0, 1)


class _Matrix(NamedTuple):
    """All products of one source side by side: one product of [hidden, count * hidden]."""

    products: list[int]
    weights: Array

    @classmethod
    def of(cls, stages: Stages, weights: Array) -> "list[_Matrix]":
        """That of each source."""
        products = stages.division.products
        own = [[q for q, p in enumerate(products) if p.source == k] for k in range(len(stages.division.sources))]
        return [cls(qs, jnp.concatenate([weights[q] for q in qs], axis=1)) for qs in own]


def forward(stages: Stages, options: Options, operands: Operands, save: bool) -> tuple[Array, Array | None, Kept]:
    """Runs the recurrence.

    Returns:
      (carry, outputs, kept): outputs [batch, time, number, hidden], the last step's [batch, number, hidden], or None.
    """
    d, batch = stages.division, operands.x.shape[0]
    program, matrices = _Program(stages, batch), _Matrix.of(stages, operands.weights)
    n_sources, n_carries = len(d.sources), len(d.carries)
    first_output, first_made = n_sources + n_carries, n_sources + n_carries + d.outputs

    def step(loop: tuple[Array, Array | None], now: Any) -> Any:
        (before, last), (outside, running) = loop, now
        values = _Values(program.forward)
        for place, arrays in (*program.outside(operands, outside, batch), (program.places["c"], list(before))):
            values.give(place, arrays)
        for round in range(1, d.rounds + 1):
            made: dict[int, Array] = {}
            for k in [k for k, (r, _) in enumerate(d.sources) if r == round]:
                products, weights = matrices[k]
                joined = cells.product(values.result(k), weights, options.precision)
                for q, part in zip(products, jnp.split(joined, len(products), axis=1), strict=True):
                    result = d.products[q].result
                    made[result] = made[result] + part if result in made else part
            for i, value in made.items():
                values.give(program.places["m"] + i, [value])
        after = jnp.stack([where_running(running, values.result(n_sources + i), before[i]) for i in range(n_carries)])
        outputs = [values.result(first_output + i) for i in range(d.outputs)]
        y = None if options.outputs == "none" else jnp.stack(outputs, axis=1)
        if y is not None and running is not None:
            y = jnp.where(running[:, None, None], y, jnp.zeros_like(y) if last is None else last)

        def kept(kind: str, i: int) -> Array:
            if kind == "c":
                return before[i]
            return values.result(first_made + i) if kind == "t" else values.argument(program.places["m"] + i)

        saved = tuple(kept(kind, i) for kind, i in stages.kept) if save else ()
        return (after, y if options.outputs == "last" else None), (y if options.outputs == "all" else None, saved)

    nothing = jnp.zeros((batch, d.outputs, d.hidden), operands.x.dtype) if options.outputs == "last" else None
    steps = (_outside_tm(operands), running_tm(operands.x, operands.lengths))
    (end, last), (outputs_tm, values) = jax.lax.scan(step, (operands.carry, nothing), steps, reverse=options.reverse)
    outputs = last if outputs_tm is None else jnp.swapaxes(outputs_tm, 0, 1)
    return end, outputs, Kept(end, values)


def backward(
    stages: Stages,
    options: Options,
    operands: Operands,
    kept: Kept,
    d_carry: Array,
    d_outputs: Array | None,
    wants_dx: bool,
) -> Operands:
    """Gradients of all but x.

    Args:
      stages, options, operands: as in `forward`.
      kept: what it gave.
      d_carry, d_outputs: the cotangents of its carry and of its outputs, None where these have none.
    """
    d, (batch, time, _) = stages.division, operands.x.shape
    program, matrices = _Program(stages, batch), _Matrix.of(stages, operands.weights)
    representatives = [stages.sum_of.index(i) for i in range(len(stages.sums))]
    n_carries, n_sources = len(d.carries), len(d.sources)
    first_source = program.count + program.made

    def step(loop: tuple[Array, Array, Array], now: Any) -> Any:
        bars, after, sums = loop
        outside, running, d_output, values_kept = now
        values = _Values(program.backward)
        for place, arrays in program.outside(operands, outside, batch):
            values.give(place, arrays)
        before = after
        for (kind, i), value in zip(stages.kept, values_kept, strict=True):
            values.give(program.count + i if kind == "t" else program.places[kind] + i, [value])
            if kind == "c":
                before = before.at[i].set(value)
        for i, carry in stages.after.items():
            values.give(program.count + i, [after[carry]])
        values.give(first_source + n_sources, list(bars))
        d_y = [jnp.zeros_like(bars[0])] * d.outputs if d_output is None else list(jnp.swapaxes(d_output, 0, 1))
        values.give(first_source + n_sources + n_carries, d_y)
        made: dict[int, Array] = {}
        for round in range(d.rounds, 0, -1):
            for i, (r, _) in enumerate(d.results):
                if r == round:
                    bar = values.result(program.places["m"] + i)
                    made[i] = where_running(running, bar, jnp.zeros_like(bar))
            for k, (r, _) in enumerate(d.sources):
                if r == round:
                    products, matrix = matrices[k]
                    joined = jnp.concatenate([made[d.products[q].result] for q in products], axis=1)
                    values.give(first_source + k, [cells.product(joined, matrix.T, options.precision)])
        new = [values.result(program.places["c"] + i) for i in range(n_carries)]
        bars = jnp.stack([where_running(running, n, o) for n, o in zip(new, bars, strict=True)])
        zero = jnp.zeros_like(bars[0])
        vectors = [values.result(program.places["p"] + i) for i in representatives]
        vectors = [where_running(running, v, zero).sum(0, dtype=sums.dtype) for v in vectors]
        share = jnp.stack(vectors) if vectors else jnp.zeros_like(sums)
        inputs = [where_running(running, values.result(program.places["x"] + i), zero) for i in range(d.count("x"))]
        d_inputs = jnp.stack(inputs) if inputs else jnp.zeros((0, *zero.shape), zero.dtype)
        sources = tuple(where_running(running, values.result(program.count + i), zero) for i in range(n_sources))
        return (bars, before, sums + share), (d_inputs, sources, tuple(made[i] for i in range(len(made))))

    def rows(array_tm: Array) -> Array:
        return array_tm.reshape(array_tm.shape[0] * array_tm.shape[1], array_tm.shape[2])

    def block(loop: Any, now: Any) -> Any:
        inner, weights = loop
        inner, (d_inputs, sources, made) = jax.lax.scan(step, inner, now, reverse=not options.reverse)
        for k, (products, _) in enumerate(matrices):
            joined = jnp.concatenate([rows(made[d.products[q].result]) for q in products], axis=1)
            share = cells.product(rows(sources[k]).T, joined, options.precision)
            share = jnp.swapaxes(share.reshape(d.hidden, len(products), d.hidden), 0, 1)
            weights = weights.at[jnp.asarray(products)].add(share.astype(weights.dtype))
        return (inner, weights), d_inputs

    steps: Any = (_outside_tm(operands), running_tm(operands.x, operands.lengths), None, kept.values)
    if options.outputs == "all" and d_outputs is not None:
        steps = (*steps[:2], jnp.swapaxes(d_outputs, 0, 1), kept.values)
    elif d_outputs is not None:
        # The last output is that of the last step that runs.
        lengths = operands.ends()
        at = jnp.zeros_like(lengths) if options.reverse else lengths - 1
        is_last = jnp.arange(time)[:, None] == at[None, :]
        steps = (*steps[:2], jnp.where(is_last[..., None, None], d_outputs[None], 0.0), kept.values)
    # A symbolic number of steps has no blocks but one.
    size = min(max(time, 1), MOST_BLOCK_STEPS) if isinstance(time, int) else time
    count = time // size
    # Steps that fill no block are the last of the way back, and a block of their own.
    first = 0 if options.reverse else time - count * size

    def block_at(loop: Any, start: Any, size: Any = size) -> Any:
        return block(loop, jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), steps))

    # What is narrow is summed in float32.
    nothing = cells.widened((jnp.zeros((len(stages.sums), d.hidden), d.dtype), jnp.zeros_like(operands.weights)))
    loop = (d_carry, kept.carry, nothing[0]), nothing[1]
    starts = first + size * jnp.arange(count, dtype=jnp.int32)
    loop, d_inputs = jax.lax.scan(block_at, loop, starts, reverse=not options.reverse)
    d_inputs = d_inputs.reshape(count * size, *d_inputs.shape[2:])
    if count * size != time:
        loop, rest = block_at(loop, count * size if options.reverse else 0, time - count * size)
        d_inputs = jnp.concatenate([d_inputs, rest] if options.reverse else [rest, d_inputs])
    ((start, _, sums), weights), d_inputs = loop, jnp.transpose(d_inputs, (2, 0, 1, 3))
    weights, sums = weights.astype(d.dtype), sums.astype(d.dtype)
    return stages.gradients(operands, weights, sums, d_inputs, start)
