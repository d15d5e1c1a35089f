"""The GPU kernel's two calls, in the form that every kernel has (see `recurrence`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.native.compiler import CannotBuildError
from seqmnist_jax.rnn.native.gpu import independent, load
from seqmnist_jax.rnn.native.gpu.source import Shape, blocks, groups, misfit, piece_words, shared_bytes
from seqmnist_jax.rnn.scan import without_padding
from seqmnist_jax.rnn.stages import Kept, Operands, Options, Stages, floats

Array = jax.Array

# What a product of 16-bit numbers, summed in float32, is exact enough for.
OF_PRODUCTS = ("tensorfloat32", "bfloat16")
MULTIPLIES_X = False
KEEPS_SOURCES = True
# What is kept of products stands in the order of blocks, whose size depends on how many sequences all replicas have.
BACK_AS_FORTH = True


# The way back in float16 is launched so often. The place of its scales in the arguments, and in the results.
LAUNCHES = 3
SCALES = {9: 3}


def _call(stages: Stages, shape: Shape, name: str, results: Any, arguments: tuple[Array, ...]) -> Any:
    batch, time, _ = arguments[3].shape
    few = shape._replace(sequences=4)
    direction = 0 if name == load.FORWARD else 1
    shared, few_shared = (shared_bytes(stages, s)[direction] for s in (shape, few))
    integers = {
        "kernel": load.kernel(stages, shape, name, shared),
        "few_kernel": load.kernel(stages, few, name, few_shared),
        # So many sequences, 4 to a block or cluster, run at once. Clusters leave a quarter of the device idle at worst:
        # a part of it that has no whole cluster left takes none.
        "few": 4 * (load.device().multiprocessors * (3 if shape.blocks > 1 else 4) // (4 * shape.blocks)),
        "tiles": -(-batch // 8),
        "blocks": shape.blocks,
        "threads": shape.threads,
        "shared": shared,
        "few_shared": few_shared,
        "batch": batch,
        "time": time,
        "launches": LAUNCHES if direction and shape.half else 1,
    }
    aliases = SCALES if direction else None
    call = jax.ffi.ffi_call(load.LAUNCH, results, vmap_method="broadcast_all", input_output_aliases=aliases)
    return call(*arguments, **{name: np.int64(value) for name, value in integers.items()})


def _shape(stages: Stages, options: Options, operands: Operands, save: bool) -> Shape:
    masked = operands.lengths is not None or operands.carry.shape[1] % 8 != 0
    half = options.precision == "tensorfloat32"
    return Shape(stages.division.hidden, blocks(stages), 8, options.outputs, save, masked, options.reverse, half)


def _dtype(shape: Shape) -> Any:
    return jnp.float16 if shape.half else jnp.bfloat16


def _scales(shape: Shape, operands: Operands, d_carry: Array, d_outputs: Array | None) -> Array:
    """A power of two for the cotangents, and three zeros, in place of which the kernel tells of those that outgrow it.

    Their largest is then about 4, or 1 / 16 where each step adds its own: what float16 rounds to a subnormal is too
    small to be seen in a sum, and what grows has room until 65,504.
    """
    if not shape.half:
        return jnp.asarray([1.0, 0.0, 0.0, 0.0], jnp.float32)
    target = -4 if shape.outputs == "all" else 2
    if operands.lengths is not None and d_outputs is not None:
        # Nobody reads those of steps that don't run, so they may be anything.
        steps = jnp.arange(operands.x.shape[1] if shape.outputs == "all" else 1)
        runs = (steps < operands.ends()[:, None]).reshape(*d_outputs.shape[:-2], 1, 1)
        d_outputs = jnp.where(runs, d_outputs, 0)
    bars = [d_carry] if d_outputs is None else [d_carry, d_outputs]
    largest = jnp.stack([jnp.abs(bar).max(initial=0.0) for bar in bars]).max()
    # Of subnormal numbers, and of those near the largest, neither the scale nor its inverse may become infinite.
    exponent = jnp.clip(target - jnp.frexp(largest)[1], -120, 120)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), jnp.ldexp(jnp.float32(1), exponent), 1.0)
    return jnp.zeros(4, jnp.float32).at[0].set(scale)


def _padded(array: Array, units: int, *axes: int) -> Array:
    """Axes of hidden units in whole tiles."""
    extra = [(0, units - n if axis in axes else 0) for axis, n in enumerate(array.shape)]
    return jnp.pad(array, extra) if any(n for _, n in extra) else array


def _arguments(operands: Operands, carry: Array, units: int) -> tuple[Array, ...]:
    """The first arrays of either kernel."""
    weights, vectors, inputs, x, *_ = operands
    padded = _padded(weights, units, 1, 2), _padded(vectors, units, 1), _padded(inputs, units, 3)
    return *padded, x, carry, operands.ends()


def unfit(stages: Stages, options: Options) -> str | None:
    """Why there is no kernel for these stages, or None; compiles it."""
    d = stages.division
    shape: Any = independent.Shape(d.hidden, options.outputs, True, True, options.reverse)
    shared = 0
    if d.products:
        if options.precision not in OF_PRODUCTS:
            return f"the kernel is for precision {' and '.join(map(repr, OF_PRODUCTS))}, not {options.precision!r}"
        trouble = misfit(stages, load.device().capability)
        if trouble is not None:
            return trouble
        half = options.precision == "tensorfloat32"
        shape = Shape(d.hidden, blocks(stages), 4, options.outputs, True, True, options.reverse, half)
        shared = shared_bytes(stages, shape)[1]
    try:
        load.kernel(stages, shape, load.BACKWARD, shared)
    except CannotBuildError as error:
        return str(error)
    return None


def text(stages: Stages, precision: str) -> str:
    """The source that is generated for a cell, for whole sequences in training."""
    d, half = stages.division, precision == "tensorfloat32"
    if not d.products:
        return independent.text(stages)
    return Shape(d.hidden, blocks(stages), 8, "all", True, False, False, half).source(stages)


def forward(stages: Stages, options: Options, operands: Operands, save: bool) -> tuple[Array, Array | None, Any]:
    """The carry after the last step, the outputs, and what is kept."""
    if not stages.division.products:
        return independent.forward(stages, options, operands, save)
    d, shape = stages.division, _shape(stages, options, operands, save)
    units, (batch, time, _) = shape.units, operands.x.shape
    sizes = {"none": (0,), "all": (batch, time, d.outputs, units), "last": (batch, d.outputs, units)}
    words = piece_words(stages, shape._replace(sequences=4)) * shape.threads * shape.blocks if save else 0
    saved = [(batch if save else 0, time, len(sources) * units) for sources, _ in groups(stages)]
    end, outputs, pieces, *sources = _call(
        stages,
        shape,
        load.FORWARD,
        (
            floats(len(d.carries), batch, units),
            floats(*sizes[options.outputs]),
            jax.ShapeDtypeStruct((_rows(batch), time, words), jnp.uint32),
            *(jax.ShapeDtypeStruct(size, _dtype(shape)) for size in saved),
        ),
        _arguments(operands, _padded(operands.carry, units, 2), units),
    )
    hidden = d.hidden
    return (
        end[..., :hidden],
        None if options.outputs == "none" else outputs[..., :hidden],
        # Pieces in the order of the threads; of each group the sources [batch, time, sources * units] in 16 bits,
        # units in one block's order of threads, in a cluster in their own.
        Kept(end, (pieces, tuple(sources))),
    )


def backward(
    stages: Stages,
    options: Options,
    operands: Operands,
    kept: Any,
    d_carry: Array,
    d_outputs: Array | None,
    wants_dx: bool,
) -> Operands:
    """Gradients of all but x."""
    if not stages.division.products:
        return independent.backward(stages, options, operands, kept, d_carry, d_outputs)
    d, shape = stages.division, _shape(stages, options, operands, True)
    units, (batch, time, _) = shape.units, operands.x.shape
    joined, (pieces, kept_sources) = groups(stages), kept.values
    d_start, d_inputs, sums, scales, *d_results = _call(
        stages,
        shape,
        load.BACKWARD,
        (
            floats(len(d.carries), batch, units),
            floats(batch, time, d.count("x"), units),
            floats(_rows(batch), len(stages.sums), units),
            floats(4),
            *(jax.ShapeDtypeStruct((batch, time, len(results) * units), _dtype(shape)) for _, results in joined),
        ),
        (
            *_arguments(operands, kept.carry, units),
            pieces,
            _padded(d_carry, units, 2),
            _floats_of(d_outputs, units),
            _scales(shape, operands, d_carry, d_outputs),
            *kept_sources,
        ),
    )
    scale = jnp.where(scales[1] > 0, scales[3], scales[0])
    in_order = _in_order if shape.blocks == 1 else lambda array, axis: array
    of_pairs: dict[tuple[int, int], Array] = {}
    for (sources, results), of_sources, of_results in zip(joined, kept_sources, d_results, strict=True):
        rows = batch * time
        of_sources, _ = without_padding(of_sources, operands.lengths)  # NaN there would reach the weights, times 0
        product = jax.lax.dot_general(
            of_sources.reshape(rows, of_sources.shape[-1]),
            of_results.reshape(rows, of_results.shape[-1]),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        product = in_order(in_order(product / scale, 0), 1).reshape(len(sources), units, len(results), units)
        of_pairs |= {(s, r): product[i, :, j] for i, s in enumerate(sources) for j, r in enumerate(results)}
    total, hidden = sums.sum(0), d.hidden
    weights = [of_pairs[p.source, p.result][:hidden, :hidden] for p in d.products]
    return stages.gradients(
        operands,
        jnp.stack(weights),
        total[:, :hidden],
        d_inputs[..., :hidden],
        d_start[..., :hidden],
    )


def _floats_of(d_outputs: Array | None, units: int) -> Array:
    return jnp.zeros((0,), jnp.float32) if d_outputs is None else _padded(d_outputs, units, d_outputs.ndim - 1)


def _rows(batch: int) -> int:
    """Blocks of 4 sequences, in pairs."""
    return 2 * -(-batch // 8)


def _in_order(array: Array, axis: int) -> Array:
    """An axis of units from the threads' order, g and g + 8 side by side in each 16, to their own."""
    shape = array.shape
    array = array.reshape(*shape[:axis], -1, 8, 2, *shape[axis + 1 :])
    return jnp.swapaxes(array, axis + 1, axis + 2).reshape(shape)
