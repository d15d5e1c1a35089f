"""Any cell over a whole sequence by a kernel made of its step: divided, hoisted, called and differentiated.

What depends on parameters and x alone is XLA's, for all steps at once, and so are its gradients; the kernel sees
matrices, vectors, inputs and a carry (`Operands`), whatever the cell.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from seqmnist_jax.rnn import derived
from seqmnist_jax.rnn.divide import divide
from seqmnist_jax.rnn.division import Division, Hoisted
from seqmnist_jax.rnn.jaxprs import NotDivisibleError
from seqmnist_jax.rnn.native import cpu, gpu
from seqmnist_jax.rnn.scan import Step, loop
from seqmnist_jax.rnn.stages import Operands, Options, Stages

Array = jax.Array

# A kernel, by the platform that XLA knows; 'derived' is the same in plain JAX. Each has
# - ``problem() -> str | None``, why this process has none, and ``describe()``, ``PRECISIONS``;
# - ``unfit(stages, options) -> str | None``, why it can't run a cell, and ``text(stages, precision)``, its source;
# - ``MULTIPLIES_X``, whether it makes what is linear in x itself (`Stages.front`);
# - ``forward(stages, options, operands, save) -> (carry, outputs, kept)`` and
#   ``backward(stages, options, operands, kept, d_carry, d_outputs, wants_dx) -> Operands``, the gradients, that of x
#   where it multiplies x and it is wanted, else zero.
KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": gpu, "derived": derived}


class Call(NamedTuple):
    """All that is static: the step, the kernel's options, and the platform whose kernel runs."""

    step: Step[Any]
    options: Options
    platform: str


class Given(NamedTuple):
    """The arrays of a call, as `rnn.scan` takes them, checked."""

    params: Any
    x: Array
    carry: Any
    lengths: Array | None


@functools.lru_cache(maxsize=256)
def _divided(step: Step[Any], tree: Any, shapes: tuple[Any, ...], inline: bool) -> Division:
    params, carry, x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    return divide(step, params, carry, x, inline=inline)


def _division(step: Step[Any], params: Any, x: Any, carry: Any, rows: Any, inline: bool) -> Division:
    """A step divided, for so many rows of x; remembered."""
    carry = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), carry)
    leaves, tree = jax.tree.flatten((params, carry, jax.ShapeDtypeStruct((rows, x.shape[-1]), x.dtype)))
    return _divided(step, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), inline)


@functools.lru_cache(maxsize=256)
def _stages(division: Division, front: bool) -> Stages:
    return Stages(division, front=front)


def stages_of(call: Call, params: Any, x: Any, carry: Any, inline: bool = True) -> Stages:
    """The stages of a call's step, for x [batch, time, features] and a carry [batch, ...]; remembered.

    Args:
      call, params, x, carry: the call, and its arrays or their shapes.
      inline: whether products of x of few features may be made in the stages; these have no gradient of x.

    Raises:
      NotDivisibleError: there is no kernel for it.
    """
    division = _division(call.step, params, x, carry, x.shape[0] * x.shape[1], inline)
    return _stages(division, KERNELS[call.platform].MULTIPLIES_X and division.multiplies_x())


def problem(call: Call, params: Any, x: Any, carry: Any) -> str | None:
    """Why the platform's kernel can't run a call, or None; arrays may be shapes."""
    kernel = KERNELS[call.platform]
    if call.options.precision not in kernel.PRECISIONS:
        return (
            f"the kernel is for precision {' and '.join(map(repr, kernel.PRECISIONS))}, not {call.options.precision!r}"
        )
    trouble = kernel.problem()
    if trouble is not None:
        return trouble
    if not all(isinstance(n, int) and n > 0 for leaf in jax.tree.leaves((params, x, carry)) for n in leaf.shape):
        return "a size is zero, or not known yet"
    try:
        stages = stages_of(call, params, x, carry)
    except NotDivisibleError as error:
        return f"no kernel can be made of the step: {error}"
    return kernel.unfit(stages, call.options)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _hoisted(call: Call, stages: Stages, given: Given, params: Any, x: Array) -> Hoisted:
    """What stands outside the loop, in the shapes that a kernel takes it; `given` for its shapes."""
    d, (batch, time, features) = stages.division, given.x.shape
    shape = d.count("x"), d.hidden
    if not stages.front:
        hoisted = d.hoist(params, _rows(x))
        return hoisted._replace(inputs=hoisted.inputs.reshape(batch, time, *shape))
    # What is linear in x is known by its value at zero and by its slope.
    few = _division(call.step, params, x, given.carry, features, inline=False)
    unit = jnp.eye(features, dtype=x.dtype)
    at_zero, slope = jax.jvp(lambda x: few.hoist(params, x), (jnp.zeros_like(unit),), (unit,))
    vectors = jnp.concatenate([at_zero.vectors, at_zero.inputs[0].reshape(shape)])
    return Hoisted(at_zero.weights, vectors, slope.inputs.reshape(features, *shape))


def _operands(stages: Stages, hoisted: Hoisted, given: Given) -> Operands:
    d = stages.division
    leaves, hidden = jax.tree.leaves(given.carry), d.hidden
    return Operands(
        hoisted.weights,
        hoisted.vectors,
        hoisted.inputs,
        given.x if d.count("s") or stages.front else given.x[..., :0],
        jnp.stack([leaves[leaf][:, b * hidden : (b + 1) * hidden] for leaf, b in d.carries]),
        given.lengths,
    )


def _carry(division: Division, blocks: Array, like: Any) -> Any:
    """[carries, batch, hidden] as a carry."""
    leaves, tree = jax.tree.flatten(like)
    parts = [[blocks[i] for i, (leaf, _) in enumerate(division.carries) if leaf == n] for n in range(len(leaves))]
    return jax.tree.unflatten(tree, [jnp.concatenate(p, axis=1) if len(p) > 1 else p[0] for p in parts])


def plain(call: Call, given: Given) -> tuple[Any, Array | None]:
    """The same by `lax.scan`, differentiable as JAX has it."""
    options, (params, x, carry, lengths) = call.options, given
    if options.outputs != "last":
        return loop(call.step, params, x, carry, lengths, options.reverse, options.outputs == "all")
    shape = jax.eval_shape(call.step, params, carry, x[:, 0])[1]

    def remember(params: Any, last: Any, x_t: Array) -> Any:
        return call.step(params, last[0], x_t), None

    nothing = jnp.zeros(shape.shape, shape.dtype)
    return loop(remember, params, x, (carry, nothing), lengths, options.reverse, False)[0]


def _kernel_forward(call: Call, save: bool, inline: bool, given: Given) -> Any:
    stages = stages_of(call, given.params, given.x, given.carry, inline)
    d = stages.division
    operands = _operands(stages, _hoisted(call, stages, given, given.params, given.x), given)
    end, outputs, kept = KERNELS[call.platform].forward(stages, call.options, operands, save)
    outputs = None if outputs is None else outputs.reshape(*outputs.shape[:-2], -1)
    return _carry(d, end, given.carry), outputs, kept


def _kernel_backward(call: Call, inline: bool, given: Given, kept: Any, bars: Any) -> Given:
    stages = stages_of(call, given.params, given.x, given.carry, inline)
    d = stages.division
    hoisted, pull = jax.vjp(functools.partial(_hoisted, call, stages, given), given.params, given.x)
    d_outputs = None if bars[1] is None else bars[1].reshape(*bars[1].shape[:-1], d.outputs, d.hidden)
    operands = _operands(stages, hoisted, given)
    d_carry = _operands(stages, hoisted, given._replace(carry=bars[0])).carry
    bars = KERNELS[call.platform].backward(stages, call.options, operands, kept, d_carry, d_outputs, not inline)
    d_params, dx = pull(Hoisted(bars.weights, bars.vectors, bars.inputs))
    return Given(d_params, bars.x if stages.front else dx, _carry(d, bars.carry, given.carry), None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(function: Any, *arrays: Any) -> Any:
    """``function(*arrays)``, which has no derivative but the one that `recurrence` gives it."""
    return function(*arrays)


@_once.defjvp
def _once_jvp(*_: Any) -> Any:
    raise ValueError("a kernel differentiates once, backwards; backend='scan' does it again and again")


def _forward(call: Call, save: bool, inline: bool, given: Given) -> Any:
    """The kernel where the program is lowered for its platform; elsewhere `plain`, which keeps nothing."""
    kernel = functools.partial(_kernel_forward, call, save, inline)
    _, _, kept = jax.eval_shape(kernel, given)

    def elsewhere(given: Given) -> Any:
        return *plain(call, given), jax.tree.map(lambda k: jnp.zeros(k.shape, k.dtype), kept)

    either = functools.partial(jax.lax.platform_dependent, default=elsewhere, **{call.platform: kernel})
    return _once(either, given)


def kept_bytes(call: Call, given: Any) -> int:
    """Bytes that the kernel keeps for the way back, for arrays or their shapes."""
    _, _, kept = jax.eval_shape(functools.partial(_kernel_forward, call, True, True), Given(*given))
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(kept))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(call: Call, given: Given) -> tuple[Any, Array | None]:
    """The carry after each sequence's last step, and outputs.

    These are [batch, time, ...], the last one's [batch, ...] (zero for an empty sequence), or None.
    """
    end, outputs, _ = _forward(call, False, True, given)
    return end, outputs


def _recurrence_forward(call: Call, given: Any) -> Any:
    # Whether x has a gradient travels as an array's size: JAX keeps the residuals' structure that it traced last.
    wants_dx = jnp.zeros((int(given.x.perturbed),), bool)
    given = jax.tree.map(lambda primal: primal.value, given)
    end, outputs, kept = _forward(call, True, wants_dx.shape[0] == 0, given)
    return (end, outputs), (given, kept, wants_dx)


def _recurrence_backward(call: Call, residuals: Any, bars: Any) -> tuple[Given]:
    given, kept, wants_dx = residuals

    def number(bar: Any) -> Any:
        return jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar

    bars = jax.tree.map(number, bars, is_leaf=lambda bar: isinstance(bar, SymbolicZero))
    kernel = functools.partial(_kernel_backward, call, wants_dx.shape[0] == 0)

    def elsewhere(given: Given, kept: Any, bars: Any) -> Given:
        params, x, carry, lengths = given
        _, pull = jax.vjp(lambda p, x, carry: plain(call, Given(p, x, carry, lengths)), params, x, carry)
        d_params, dx, d_carry = pull(bars)
        return Given(d_params, dx, d_carry, None)

    either = functools.partial(jax.lax.platform_dependent, default=elsewhere, **{call.platform: kernel})
    return (_once(either, given, kept, bars),)


recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)
