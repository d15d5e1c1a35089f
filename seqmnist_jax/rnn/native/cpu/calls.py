"""The CPU kernel's two calls: built at first use, kept by content, called through `jax.ffi`."""

import ctypes
import functools
import hashlib
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native.compiler import CannotBuildError, Source
from seqmnist_jax.rnn.native.cpu.source import FOLDER, source
from seqmnist_jax.rnn.stages import OUTPUTS, Kept, Operands, Options, Stages, floats

Array = jax.Array

# XLA's name of each call: the function in the library.
CALLS = {"seqmnist_rnn_forward": "seqmnist_forward", "seqmnist_rnn_backward": "seqmnist_backward"}
FORWARD, BACKWARD = CALLS
LAUNCHER = Source("recurrence", (FOLDER / "launch.cc", FOLDER / "call.h"))
MULTIPLIES_X = True
KEEPS_SOURCES = False
BACK_AS_FORTH = False
# Units are padded to this in what is kept.
PADDING = 16


@build.once
def _launcher() -> build.Kernel:
    made = build.library(LAUNCHER)
    made.library.seqmnist_add.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    for name, symbol in CALLS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(made.library, symbol)), platform="cpu")
    return made


@build.once
def _number(text: str) -> int:
    """The number by which a built kernel is known, the same in every process."""
    with tempfile.TemporaryDirectory(prefix="seqmnist_jax-") as scratch:
        file = Path(scratch) / "cell.cc"
        file.write_text(text)
        cell = build.library(Source("cell", (file,))).library
    cell.seqmnist_kernel.restype = ctypes.c_void_p
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    _launcher().library.seqmnist_add(number, cell.seqmnist_kernel())
    return number


@functools.lru_cache(maxsize=256)
def text(stages: Stages, precision: str) -> str:
    """The source that is generated for a cell."""
    return source(stages, precision)


# What went wrong with the compiler, not with a step.
_unbuilt: set[str] = set()


def _trouble(make: Callable[[], Any]) -> str | None:
    try:
        make()
        return None
    except CannotBuildError as error:
        why = str(error)
    except Exception as error:  # Whatever it is, there is another backend.
        why = f"the kernel can't be built here: {error}"
    _unbuilt.add(why)
    return why


@build.once
def problem() -> str | None:
    """Why this machine has no kernel for any cell, or None; builds what all cells share at the first call."""
    return _trouble(_launcher)


@build.once
def _trouble_of(text: str) -> str | None:
    return _trouble(lambda: _number(text))


def unfit(stages: Stages, options: Options) -> str | None:
    """Why the kernel can't run a cell, or None where it is ready; builds it at the first call.

    Raises:
      NotDivisibleError: no kernel can be made of the cell's step.
    """
    return _trouble_of(text(stages, options.precision))


def describe() -> str:
    """What the kernel is, for `explain`; only where there is one."""
    return f"a C++ kernel made of the step, {_launcher().origin} for {platform.machine()}"


_not_said = ["that there is no kernel"]


def warn_once(why: str) -> None:
    """Says, once in a process (also where warnings are errors), that a kernel could not be built and why."""
    if why not in _unbuilt or not _not_said:
        return
    _not_said.clear()
    warnings.warn(
        f"seqmnist_jax.rnn has no native kernel for this cell and takes the slower 'fused' backend: {why}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _call(name: str, stages: Stages, options: Options, results: Any, arguments: tuple[Array, ...]) -> Any:
    # 'expand_dims': axes that vmap adds arrive in front, of size 1 where an array has none. To the kernel they are
    # replicas.
    call = jax.ffi.ffi_call(name, results, vmap_method="expand_dims")
    return call(
        *arguments,
        kernel=np.int64(_number(text(stages, options.precision))),
        outputs=np.int64(OUTPUTS.index(options.outputs)),
        reverse=options.reverse,
    )


def _output_shape(stages: Stages, options: Options, operands: Operands) -> tuple[int, ...]:
    d, (batch, time, _) = stages.division, operands.x.shape
    shapes = {"all": (batch, time), "last": (batch,), "none": (0,)}
    return (*shapes[options.outputs], d.outputs, d.hidden)


def _arguments(operands: Operands, carry: Array) -> tuple[Array, ...]:
    return *operands[:4], carry, operands.ends()


def forward(stages: Stages, options: Options, operands: Operands, save: bool) -> tuple[Array, Array | None, Kept]:
    """The carry after the last step, the outputs, and what is kept: see `derived.forward`.

    Raises:
      CannotBuildError: this machine can't build the kernel.
    """
    d, (batch, time, _) = stages.division, operands.x.shape
    units = -(-d.hidden // PADDING) * PADDING
    end, outputs, values = _call(
        FORWARD,
        stages,
        options,
        (
            floats(len(d.carries), batch, d.hidden),
            floats(*_output_shape(stages, options, operands)),
            floats(time if save else 0, batch, units, len(stages.kept)),
        ),
        _arguments(operands, operands.carry),
    )
    return end, None if options.outputs == "none" else outputs, Kept(end, values)


def backward(
    stages: Stages,
    options: Options,
    operands: Operands,
    kept: Kept,
    d_carry: Array,
    d_outputs: Array | None,
    wants_dx: bool,
) -> Operands:
    """Gradients; of x where x is multiplied inside and its gradient is wanted: see `derived.backward`."""
    d, (batch, time, features) = stages.division, operands.x.shape
    if d_outputs is None:
        d_outputs = jnp.zeros(_output_shape(stages, options, operands), jnp.float32)
    d_start, d_inputs, weights, sums, dx = _call(
        BACKWARD,
        stages,
        options,
        (
            floats(len(d.carries), batch, d.hidden),
            floats(*operands.inputs.shape),
            floats(len(d.products), d.hidden, d.hidden),
            floats(len(stages.sums), d.hidden),
            floats(batch if stages.front and wants_dx else 0, time, features),
        ),
        (*_arguments(operands, kept.carry), kept.values, d_carry, d_outputs),
    )
    return stages.gradients(operands, weights, sums, d_inputs, d_start, dx if dx.size else None)
