"""The GPU kernel's two calls: compiled at first use, kept by content, started through `jax.ffi`."""

import ctypes
import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.native.gpu import nvrtc
from seqmnist_jax.rnn.native.gpu.source import Shape, groups, piece_words, shared_bytes, source
from seqmnist_jax.rnn.stages import Stages

Array = jax.Array

LAUNCH = "seqmnist_rnn_gpu"


class Kept(NamedTuple):
    """What the way back needs of the forward pass.

    Attributes:
      carry: after the last step, [carries, batch, units].
      pieces: in the order of the threads.
      sources: of each group of products, [batch, time, sources * units] in bfloat16, units in the threads' order.
    """

    carry: Array
    pieces: Array
    sources: tuple[Array, ...]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


@functools.cache
def _load(stages: Stages, shape: Shape, architecture: str, name: str, shared: int) -> int:
    text = source(stages, shape)
    options = (f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space")
    number = _number("\0".join((text, *options, nvrtc.version(), name)))
    image, _ = nvrtc.compile(text, options)
    problem = _launcher().seqmnist_gpu_load(number, image, name.encode(), shared)
    if problem:
        raise RuntimeError(problem.decode())
    return number


@functools.cache
def _launcher() -> Any:
    library = ctypes.CDLL(__import__("os").environ["LAUNCH_SO"])
    library.seqmnist_gpu_load.restype = ctypes.c_char_p
    library.seqmnist_gpu_load.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    jax.ffi.register_ffi_target(LAUNCH, jax.ffi.pycapsule(library.seqmnist_gpu_launch), platform="CUDA")
    return library


def _call(
    stages: Stages, shape: Shape, name: str, results: Any, arguments: tuple[Array, ...], batch: int, time: int
) -> Any:
    device = jax.devices("cuda")[0]
    architecture = f"sm_{str(device.compute_capability).replace('.', '')}"
    few = 4 * device.core_count
    direction = 0 if name == "recurrence_forward" else 1
    shapes = [shape._replace(sequences=n) for n in (8, 4)]
    shared = [shared_bytes(stages, s)[direction] for s in shapes]
    numbers = [_load(stages, s, architecture, name, m) for s, m in zip(shapes, shared, strict=True)]
    call = jax.ffi.ffi_call(LAUNCH, results, vmap_method="broadcast_all")
    integers = {
        "kernel": numbers[0],
        "few_kernel": numbers[1],
        "few": few,
        "tiles": -(-batch // 8),
        "threads": shape.threads,
        "shared": shared[0],
        "few_shared": shared[1],
        "batch": batch,
        "time": time,
    }
    return call(*arguments, **{name: np.int64(value) for name, value in integers.items()})


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def forward(
    stages: Stages, shape: Shape, weights: Array, vectors: Array, inputs: Array, x: Array, carry: Array, lengths: Array
) -> tuple[Array, Kept]:
    """Outputs, and what is kept (of which only the carry is filled where nothing is saved)."""
    d, units = stages.division, shape.units
    _, batch, _ = carry.shape
    time = x.shape[1]
    rows = 2 * -(-batch // 8)
    outputs = {"none": (0,), "all": (batch, time, d.outputs, units), "last": (batch, d.outputs, units)}[shape.outputs]
    words = piece_words(stages, shape._replace(sequences=4)) * shape.threads if shape.save else 0
    kept = jax.ShapeDtypeStruct((rows, time, words), jnp.uint32)
    joined = groups(stages)
    sources = [
        jax.ShapeDtypeStruct((batch if shape.save else 0, time, len(s) * units), jnp.bfloat16) for s, _ in joined
    ]
    end, outputs, pieces, *sources = _call(
        stages,
        shape,
        "recurrence_forward",
        (_floats(*carry.shape), _floats(*outputs), kept, *sources),
        (weights, vectors, inputs, x, carry, lengths),
        batch,
        time,
    )
    return outputs, Kept(end, pieces, tuple(sources))


def backward(
    stages: Stages,
    shape: Shape,
    weights: Array,
    vectors: Array,
    inputs: Array,
    x: Array,
    lengths: Array,
    kept: Kept,
    d_carry: Array,
    d_outputs: Array,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of weights, vectors, inputs and the first carry."""
    d, units = stages.division, shape.units
    _, batch, _ = d_carry.shape
    time = x.shape[1]
    joined = groups(stages)
    d_start, d_inputs, sums, *d_results = _call(
        stages,
        shape,
        "recurrence_backward",
        (
            _floats(*d_carry.shape),
            _floats(batch, time, d.count("x"), units),
            _floats(2 * -(-batch // 8), max(len(stages.sums), 1), units),
            *(jax.ShapeDtypeStruct((batch, time, len(r) * units), jnp.bfloat16) for _, r in joined),
        ),
        (weights, vectors, inputs, x, kept.carry, lengths, kept.pieces, d_carry, d_outputs),
        batch,
        time,
    )
    blocks: dict[tuple[int, int], Array] = {}
    for (sources, results), source_rows, result_rows in zip(joined, kept.sources, d_results, strict=True):
        product = jax.lax.dot_general(
            source_rows.reshape(batch * time, -1),
            result_rows.reshape(batch * time, -1),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        product = _in_order(_in_order(product, 0), 1)
        for i, s in enumerate(sources):
            for j, r in enumerate(results):
                blocks[s, r] = product[i * units : (i + 1) * units, j * units : (j + 1) * units]
    d_weights = [blocks[p.source, p.result] for p in d.products]
    total = sums.sum(0)
    d_vectors = [jnp.zeros(units) if place is None else total[place] for place in stages.sum_of]
    return (
        jnp.stack(d_weights) if d_weights else jnp.zeros((0, units, units)),
        jnp.stack(d_vectors) if d_vectors else jnp.zeros((0, units)),
        d_inputs,
        d_start,
    )


def _in_order(array: Array, axis: int) -> Array:
    """An axis of units from the threads' order, g and g + 8 side by side in each 16, to their own."""
    shape = array.shape
    array = array.reshape(*shape[:axis], -1, 8, 2, *shape[axis + 1 :])
    return jnp.swapaxes(array, axis + 1, axis + 2).reshape(shape)
