"""Any cell over a whole sequence by a kernel made of its step: what is divided, hoisted, called and differentiated."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from seqmnist_jax.rnn.divide import Division, Hoisted, divide
from seqmnist_jax.rnn.native.gpu import calls
from seqmnist_jax.rnn.native.gpu.source import Shape
from seqmnist_jax.rnn.scan import Step, loop
from seqmnist_jax.rnn.stages import Stages

Array = jax.Array


class Options(NamedTuple):
    """All that is static about a call; outputs 'none', 'all' or 'last'."""

    step: Step[Any]
    reverse: bool
    outputs: str


class Given(NamedTuple):
    """The arrays of a call, as `rnn.scan` takes them, checked."""

    params: Any
    x: Array
    carry: Any
    lengths: Array | None


@functools.lru_cache(maxsize=256)
def _stages(step: Step[Any], tree: Any, shapes: tuple[Any, ...], inline: bool) -> Stages:
    params, carry, x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    return Stages(divide(step, params, carry, x, inline=inline))


def stages_of(step: Step[Any], params: Any, x: Any, carry: Any, inline: bool) -> Stages:
    """The stages of a step, for x [batch, time, features] and carry [batch, ...]; remembered."""
    batch, time, features = x.shape
    leaves, tree = jax.tree.flatten(
        (
            params,
            jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch * time, *a.shape[1:]), a.dtype), carry),
            jax.ShapeDtypeStruct((batch * time, features), x.dtype),
        )
    )
    return _stages(step, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), inline)


def _shape(options: Options, stages: Stages, given: Given, save: bool) -> Shape:
    masked = given.lengths is not None or given.x.shape[0] % 8 != 0
    return Shape(stages.division.hidden, 8, options.outputs, save, masked, options.reverse)


def _padded(array: Array, units: int, axes: tuple[int, ...]) -> Array:
    extra = [(0, units - n) if axis in axes else (0, 0) for axis, n in enumerate(array.shape)]
    return jnp.pad(array, extra) if any(n for _, n in extra) else array


def _blocks(division: Division, carry: Any) -> Array:
    """A carry's leaves as [carries, batch, hidden]."""
    leaves = jax.tree.leaves(carry)
    hidden = division.hidden
    return jnp.stack([leaves[leaf][:, b * hidden : (b + 1) * hidden] for leaf, b in division.carries])


def _carry(division: Division, blocks: Array, like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    parts = [[blocks[i] for i, (leaf, _) in enumerate(division.carries) if leaf == n] for n in range(len(leaves))]
    return jax.tree.unflatten(tree, [jnp.concatenate(p, axis=1) if len(p) > 1 else p[0] for p in parts])


def _operands(division: Division, hoisted: Hoisted, given: Given, units: int) -> tuple[Array, ...]:
    """Weights, vectors, inputs, x: padded to whole tiles."""
    batch, time, _ = given.x.shape
    inputs = hoisted.inputs.reshape(batch, time, division.count("x"), division.hidden)
    x = given.x if division.count("s") else jnp.zeros((0, time, 0), given.x.dtype)
    return (
        _padded(hoisted.weights, units, (1, 2)),
        _padded(hoisted.vectors, units, (1,)),
        _padded(inputs, units, (3,)),
        x,
    )


def _lengths(given: Given) -> Array:
    batch, time, _ = given.x.shape
    return jnp.full((batch,), time, jnp.int32) if given.lengths is None else given.lengths


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _forward(options: Options, given: Given, save: bool, inline: bool) -> tuple[Any, Array | None, calls.Kept]:
    stages = stages_of(options.step, given.params, given.x, given.carry, inline)
    d, shape = stages.division, _shape(options, stages, given, save)
    hoisted = d.hoist(given.params, _rows(given.x))
    carry = _padded(_blocks(d, given.carry), shape.units, (2,))
    outputs, kept = calls.forward(
        stages, shape, *_operands(d, hoisted, given, shape.units), carry, _lengths(given)
    )
    end = _carry(d, kept.carry[..., : d.hidden], given.carry)
    if options.outputs == "none":
        return end, None, kept
    outputs = outputs[..., : d.hidden]
    return end, outputs.reshape(*outputs.shape[:-2], -1), kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(options: Options, given: Given) -> tuple[Any, Array | None]:
    """(carry, outputs): the carry after each sequence's last step; outputs [batch, time, ...], the last one's
    [batch, ...] (zero for an empty sequence), or None."""
    end, outputs, _ = _forward(options, given, save=False, inline=True)
    return end, outputs


def _recurrence_forward(options: Options, given: Any) -> Any:
    # Whether x has a gradient travels as an array's size: JAX keeps the residuals' structure that it traced last.
    wants_dx = jnp.zeros((int(given.x.perturbed),), bool)
    given = jax.tree.map(lambda primal: primal.value, given)
    end, outputs, kept = _forward(options, given, save=True, inline=wants_dx.shape[0] == 0)
    return (end, outputs), (given, kept, wants_dx)


def _recurrence_backward(options: Options, residuals: Any, bars: Any) -> tuple[Given]:
    given, kept, wants_dx = residuals
    stages = stages_of(options.step, given.params, given.x, given.carry, wants_dx.shape[0] == 0)
    d, shape = stages.division, _shape(options, stages, given, save=True)
    bars = jax.tree.map(
        lambda bar: jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar,
        bars,
        is_leaf=lambda bar: isinstance(bar, SymbolicZero),
    )
    hoisted, pull = jax.vjp(lambda params, x: d.hoist(params, _rows(x)), given.params, given.x)
    if bars[1] is None:
        d_outputs = jnp.zeros((0,), jnp.float32)
    else:
        d_outputs = _padded(bars[1].reshape(*bars[1].shape[:-1], d.outputs, d.hidden), shape.units, (bars[1].ndim,))
    d_weights, d_vectors, d_inputs, d_start = calls.backward(
        stages,
        shape,
        *_operands(d, hoisted, given, shape.units),
        _lengths(given),
        kept,
        _padded(_blocks(d, bars[0]), shape.units, (2,)),
        d_outputs,
    )
    hidden = d.hidden
    d_params, dx = pull(
        Hoisted(
            d_weights[:, :hidden, :hidden],
            d_vectors[:, :hidden],
            d_inputs[..., :hidden].reshape(hoisted.inputs.shape),
        )
    )
    return (Given(d_params, dx, _carry(d, d_start[..., :hidden], given.carry), None),)


recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)
