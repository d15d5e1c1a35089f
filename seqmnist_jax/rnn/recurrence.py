"""Any cell over a whole sequence by a kernel made of its step: divided, hoisted, called and differentiated.

What depends on parameters and x alone is XLA's, for all steps at once, and so are its gradients; the kernel sees
matrices, vectors, inputs and a carry (`Operands`), whatever the cell.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from seqmnist_jax.rnn import derived
from seqmnist_jax.rnn.cells import products_at
from seqmnist_jax.rnn.divide import divide
from seqmnist_jax.rnn.division import Division, Hoisted
from seqmnist_jax.rnn.jaxprs import NotDivisibleError, without_mesh
from seqmnist_jax.rnn.native import gpu
from seqmnist_jax.rnn.native.cpu import calls as cpu
from seqmnist_jax.rnn.readout import Inner, taken_out
from seqmnist_jax.rnn.remat import in_segments
from seqmnist_jax.rnn.scan import Step, loop
from seqmnist_jax.rnn.scan import run as by_scan
from seqmnist_jax.rnn.stages import Operands, Options, Stages

Array = jax.Array

# A kernel, by the platform that XLA knows; 'derived' is the same in plain JAX. Each has
# - ``problem() -> str | None``, why this process has none, and ``describe()`` where it has;
# - ``unfit(stages, options) -> str | None``, why it can't run a cell, and ``text(stages, precision)``, its source;
# - ``MULTIPLIES_X``, whether it makes what is linear in x itself (`Stages.front`), and without products of the state
#   all that is element-wise in x;
# - ``KEEPS_SOURCES``, whether the forward pass keeps what products multiply; else it is made again on the way back;
# - ``BACK_AS_FORTH``, whether only as many replicas can go the way back together as went forward together;
# - ``forward(stages, options, operands, save) -> (carry, outputs, kept)`` and
#   ``backward(stages, options, operands, kept, d_carry, d_outputs, wants_dx) -> Operands``, the gradients, that of x
#   where it multiplies x and it is wanted, else zero.
KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": gpu, "derived": derived}
# The name there for each of JAX's platforms.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
BACKENDS = ("auto", "scan", "fused", "native")

# Of no sequences, steps or units there is nothing to make faster: `lax.scan` makes nothing of it, by whatever name.
NOTHING = "a size is zero"
NO_PLATFORM = "the kernels are for CPUs and GPUs"
# What is kept for the way back may take this many bytes.
MOST_KEPT_BYTES = 2 << 30


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
def _stages(
    step: Step[Any], platform: str, precision: str, tree: Any, shapes: tuple[Any, ...], inline: bool, of_float: Any
) -> Stages:
    del of_float  # what a Python float becomes, by which the step may be another
    params, carry, x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    multiplies = KERNELS[platform].MULTIPLIES_X
    division = divide(step, params, carry, x, inline=inline, deep=multiplies, precision=precision)
    front = multiplies and division.multiplies_x()
    return Stages(division, with_sources=not KERNELS[platform].KEEPS_SOURCES, front=front)


def stages_of(call: Call, params: Any, x: Any, carry: Any, inline: bool = True) -> Stages:
    """The stages of a call's step, for x [batch, time, features] and a carry [batch, ...]; remembered.

    Args:
      call, params, x, carry: the call, and its arrays or their shapes.
      inline: whether products of x of few features may be made in the stages; these have no gradient of x.

    Raises:
      NotDivisibleError: there is no kernel for it.
    """
    frame = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), x.dtype)
    leaves, tree = jax.tree.flatten((params, carry, frame))
    leaf_shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    of_float, precision = jnp.result_type(float), call.options.precision
    return _stages(call.step, call.platform, precision, tree, leaf_shapes, inline, of_float)


def shapes(tree: Any) -> Any:
    """The shapes and dtypes of what can be made arrays of."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def native_problem() -> str | None:
    """Why no kernel can be made for this process's device, or None."""
    platform = PLATFORMS.get(jax.default_backend())
    return NO_PLATFORM if platform is None else KERNELS[platform].problem()


def problem(call: Call, given: Given) -> str | None:
    """Why the platform's kernel can't run a call, or None; arrays may be shapes."""
    if call.platform not in KERNELS:
        return NO_PLATFORM
    kernel = KERNELS[call.platform]
    trouble: str | None = kernel.problem()
    if trouble is not None:
        return trouble
    try:
        params, x, carry = shapes((given.params, given.x, given.carry))
        sizes = [n for leaf in jax.tree.leaves((params, x, carry)) for n in leaf.shape]
        if any(isinstance(n, int) and n < 1 for n in sizes):
            return NOTHING
        if call.platform == "cuda" and not all(isinstance(n, int) for n in sizes):
            return "a size is not known yet"
        stages = stages_of(call, params, x, carry)
        if call.platform != "derived" and stages.division.dtype != jnp.float32:
            return f"the kernel computes in float32, and these arrays are {stages.division.dtype}"
        found: str | None = kernel.unfit(stages, call.options)
        return found
    except NotDivisibleError as error:
        return f"no kernel can be made of the step: {error}"
    except Exception as error:  # Whatever the step does not like, `lax.scan` will tell better.
        return f"no kernel can be made of the step: {type(error).__name__}: {error}"


def without_readout(call: Call, given: Given) -> Call:
    """The call of the step's part in the loop; products that the output alone needs then stand behind it.

    On CPUs only where the last output alone is wanted: for the outputs of all steps their kernels multiply faster than
    XLA does.
    """
    if call.platform != "cuda" and (call.platform != "cpu" or call.options.outputs == "all"):
        return call
    try:
        params, x, carry = shapes((given.params, given.x, given.carry))
        is_ragged = given.lengths is not None
        return call._replace(step=taken_out(call.step, call.options.precision, params, carry, x, is_ragged))
    except Exception:  # Whatever it is, `problem` tells it.
        return call


def _in_axes(step: Step[Any], given: Given, precision: str) -> Step[Any]:
    """The step as it is in the named axes around, if there are: its rules are traced where others are, or none."""
    if not jex.unsafe_get_axis_names_DO_NOT_USE():
        return step
    params, x, carry = shapes((given.params, given.x, given.carry))
    try:
        frame = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), x.dtype)
        with products_at(precision), without_mesh():
            closed, out = jax.make_jaxpr(step, return_shape=True)(params, carry, frame)
    except Exception:  # Whatever the step does not like, `problem` tells it.
        return step
    traced, tree = jex.jaxpr_as_fun(closed), jax.tree.structure(out)
    return lambda *given: jax.tree.unflatten(tree, traced(*jax.tree.leaves(given)))


def choose(step: Step[Any], options: Options, given: Given, backend: str, platform: str) -> tuple[str, Call, str]:
    """What runs on one of JAX's platforms: 'scan', 'fused' or 'native', the call for it, and why.

    'auto' is 'native' where that can be, else 'fused', else 'scan'. Arrays may be shapes.

    Raises:
      ValueError: the backend was named, and can't.
    """
    scanned = Call(step, options, PLATFORMS.get(platform, ""))
    why = "named by the caller"
    if backend == "scan":
        return backend, scanned, why
    native = scanned._replace(step=_in_axes(step, given, options.precision))
    if backend != "fused":
        inner = without_readout(native, given)
        trouble = problem(inner, given)
        if trouble is None:
            after = "" if inner == native else "; products that only the output needs stand behind the loop"
            return "native", inner, KERNELS[native.platform].describe() + after
        if backend == "native" and trouble != NOTHING:
            raise ValueError(f"backend is 'native', but {trouble}; expected 'auto' or 'scan'")
        why = trouble
    fused = native._replace(platform="derived")
    trouble = problem(fused, given)
    if trouble is None:
        if backend == "auto" and platform == "cpu":
            cpu.warn_once(why)
        return "fused", fused, why
    if backend == "fused" and trouble != NOTHING:
        raise ValueError(f"backend is 'fused', but {trouble}; expected 'auto' or 'scan'")
    return "scan", scanned, trouble


def _hoisted(stages: Stages, params: Any, x: Array) -> Hoisted:
    """What stands outside the loop, in the shapes that a kernel takes it."""
    d = stages.division
    return d.hoist_linear(params) if stages.front else d.hoist(params, x)


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


def plain(call: Call, given: Given, unroll: int = 1) -> tuple[Any, Array | None]:
    """The same by `lax.scan`, differentiable as JAX has it."""
    options, (params, x, carry, lengths) = call.options, given
    if options.outputs == "none":
        return loop(call.step, params, x, carry, lengths, options.reverse, False)
    return by_scan(call.step, params, x, carry, lengths, options.reverse, options.outputs == "all", unroll)


def _kernel_forward(call: Call, save: bool, inline: bool, given: Given) -> Any:
    stages = stages_of(call, given.params, given.x, given.carry, inline)
    d = stages.division
    operands = _operands(stages, _hoisted(stages, given.params, given.x), given)
    end, outputs, kept = KERNELS[call.platform].forward(stages, call.options, operands, save)
    outputs = None if outputs is None else outputs.reshape(*outputs.shape[:-2], d.outputs * d.hidden)
    return _carry(d, end, given.carry), outputs, kept


def _kernel_backward(call: Call, inline: bool, given: Given, kept: Any, bars: Any) -> Given:
    stages = stages_of(call, given.params, given.x, given.carry, inline)
    d = stages.division
    hoisted, pull = jax.vjp(functools.partial(_hoisted, stages), given.params, given.x)
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


def _either(call: Call, kernel: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel where the program is lowered for its platform, else the other."""
    if call.platform == "derived":
        return kernel
    return functools.partial(jax.lax.platform_dependent, default=elsewhere, **{call.platform: kernel})


def _kept(call: Call, given: Any) -> Any:
    """The shapes of what the kernel keeps for the way back."""
    return jax.eval_shape(functools.partial(_kernel_forward, call, True, True), Given(*given))[2]


def _size(kept: Any) -> Any:
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(kept))


def _is_too_much(kept: Any, x: Any, replicas: int = 1) -> bool:
    """Whether so many replicas of what is kept are; where that can't be known, or is one step's, they are not."""
    size = _size(kept) * replicas
    return isinstance(size, int) and size > MOST_KEPT_BYTES and x.shape[1] > 1


def kept_bytes(call: Call, given: Any) -> Any:
    """Bytes that `run` keeps for the way back, of arrays or their shapes; an expression where a size is symbolic."""
    kept = _kept(call, given)
    if not _is_too_much(kept, given[1]):
        return _size(kept)
    time, steps = given[1].shape[1], _segment(given[1])
    return _size(kept) * steps // time + _size(given[2]) * (time // steps)


def _segment(x: Any) -> int:
    """Steps of a segment: where the carries that are kept are as many as the steps between them."""
    return math.isqrt(x.shape[1])


def _in_segments(call: Call, given: Given) -> tuple[Any, Array | None]:
    """`recurrence`, of which a carry for each segment is kept, and the rest made again on the way back."""

    def layer(params: Any, x: Array, carry: Any, lengths: Any = None, **_: bool) -> tuple[Any, Any]:
        return recurrence(call, Given(params, x, carry, lengths))

    options = call.options
    return in_segments(layer, *given, {}, _segment(given.x), options.reverse, options.outputs == "all")


def run(call: Call, given: Given) -> tuple[Any, Array | None]:
    """`recurrence`; in segments, which take longer, where it would keep more than `MOST_KEPT_BYTES`."""
    end, outputs = (_in_segments if _is_too_much(_kept(call, given), given.x) else recurrence)(call, given)
    if isinstance(call.step, Inner):
        outputs = call.step.outputs(*given, outputs, call.options.reverse)
    return end, outputs


def _for_replicas(call: Call, function: Callable[..., Any], replicas: int = 1) -> Callable[..., Any]:
    """``function(replicas, given, ...)``: told how many `vmap` makes of it, which comes after all shapes are fixed.

    Those of cotangents alone, as of `jax.jacrev`, share one forward pass; a kernel may need them one after the other.
    Where others differ in anything that was given, even in what the loop does not read, they go both ways together.
    """
    one = custom_vmap(functools.partial(function, replicas))
    back_as_forth = KERNELS[call.platform].BACK_AS_FORTH

    @one.def_vmap
    def _(size: int, is_mapped: Any, *arrays: Any) -> tuple[Any, Any]:
        is_given, *others = is_mapped
        alone = back_as_forth and not any(jax.tree.leaves(is_given))
        if back_as_forth and not alone:  # Every launch reads a carry.
            given = arrays[0]
            each = jax.tree.map(
                lambda mapped, leaf: leaf if mapped else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))),
                is_given.carry,
                given.carry,
            )
            is_given = is_given._replace(carry=jax.tree.map(lambda _: True, is_given.carry))
            arrays = (given._replace(carry=each), *arrays[1:])
        is_mapped = (is_given, *others)
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, is_mapped)

        def several(count: int, *arrays: Any) -> Any:
            return jax.vmap(functools.partial(function, count), axes, axis_size=size)(*arrays)

        def number(i: Array) -> Any:
            return one(*jax.tree.map(lambda mapped, a: jnp.asarray(a)[i] if mapped else a, is_mapped, arrays))

        if alone:
            results = jax.lax.map(number, jnp.arange(size))
        else:
            results = _for_replicas(call, several, replicas * size)(*arrays)
        return results, jax.tree.map(lambda _: True, results)

    return one


def _forward(call: Call, save: bool, inline: bool, given: Given) -> Any:
    """The kernel where the program is lowered for its platform; elsewhere `plain`, which keeps nothing."""
    kernel = functools.partial(_kernel_forward, call, save, inline)
    kept = jax.eval_shape(kernel, given)[2]

    def nothing() -> Any:
        return jax.tree.map(lambda k: jnp.zeros(k.shape, k.dtype), kept)

    def function(replicas: int, given: Given) -> Any:
        if save and _is_too_much(kept, given.x, replicas):  # Then nobody reads it.
            end, outputs, _ = _forward(call, False, inline, given)
            return end, outputs, nothing()
        return _either(call, kernel, lambda given: (*plain(call, given), nothing()))(given)

    return _once(_for_replicas(call, function), given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(call: Call, given: Given) -> tuple[Any, Array | None]:
    """The carry after each sequence's last step, and outputs.

    These are [batch, time, ...], the last one's [batch, ...] (zero for an empty sequence), or None.
    """
    end, outputs, _ = _forward(call, False, True, given)
    return end, outputs


def _recurrence_forward(call: Call, given: Any) -> Any:
    # Whether x has a gradient must travel as an array's size. The tree's structure won't do: JAX keeps the last one
    # traced, and within one jitted function both kinds can be.
    wants_dx = jnp.zeros((int(given.x.perturbed),), bool)
    given = jax.tree.map(lambda primal: primal.value, given)
    end, outputs, kept = _forward(call, True, wants_dx.shape[0] == 0, given)
    return (end, outputs), (given, kept, wants_dx)


def _recurrence_backward(call: Call, residuals: Any, bars: Any) -> tuple[Given]:
    given, kept, wants_dx = residuals
    inline = wants_dx.shape[0] == 0

    def number(bar: Any) -> Any:
        return jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar

    def pulled(function: Any, given: Given, bars: Any) -> Given:
        params, x, carry, lengths = given
        _, pull = jax.vjp(lambda p, x, carry: function(call, Given(p, x, carry, lengths)), params, x, carry)
        d_params, dx, d_carry = pull(bars)
        return Given(d_params, dx, d_carry, None)

    def function(replicas: int, given: Given, kept: Any, bars: Any) -> Given:
        if _is_too_much(kept, given.x, replicas):
            return pulled(_in_segments, given, bars)
        kernel = functools.partial(_kernel_backward, call, inline)
        return _either(call, kernel, lambda given, kept, bars: pulled(plain, given, bars))(given, kept, bars)

    bars = jax.tree.map(number, bars, is_leaf=lambda bar: isinstance(bar, SymbolicZero))
    return (_once(_for_replicas(call, function), given, kept, bars),)


recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)
