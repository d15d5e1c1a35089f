"""What a GPU kernel needs of this process: a device, the launcher, the compiled kernel, kept by what it depends on."""

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native.compiler import CannotBuildError
from seqmnist_jax.rnn.native.gpu import nvrtc
from seqmnist_jax.rnn.stages import Stages

LAUNCH = "seqmnist_rnn_gpu"
FORWARD, BACKWARD = "recurrence_forward", "recurrence_backward"
LAUNCHER = build.Source("gpu-launcher", (Path(__file__).parent / "launch.cc",))
LEAST_CAPABILITY = 80
# A division is right to two last bits, and without a branch.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--prec-div=false")


class Device(NamedTuple):
    """The GPU: its compute capability, 90 for 9.0, and how many blocks run at once."""

    capability: int
    multiprocessors: int


@functools.cache
def device() -> Device:
    """The first GPU.

    Raises:
      CannotBuildError: there is none, or it is no NVIDIA GPU of capability 8.0 at least.
    """
    try:
        found = jax.devices("cuda")[0]
    except RuntimeError as error:
        raise CannotBuildError("this process has no NVIDIA GPU") from error
    major, _, minor = str(found.compute_capability).partition(".")
    capability = 10 * int(major) + int(minor or 0)
    if capability < LEAST_CAPABILITY:
        raise CannotBuildError(f"the GPU has compute capability {major}.{minor}; the kernel needs 8.0")
    return Device(capability, found.core_count)


@build.once
def _launcher() -> Any:
    """The library that starts kernels, registered with XLA."""
    library = build.library(LAUNCHER).library
    library.seqmnist_gpu_load.restype = ctypes.c_char_p
    library.seqmnist_gpu_load.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    jax.ffi.register_ffi_target(LAUNCH, jax.ffi.pycapsule(library.seqmnist_gpu_launch), platform="CUDA")
    return library


@functools.cache
def problem() -> str | None:
    """Why this process has no GPU kernel, or None; builds the launcher at the first call."""
    try:
        device()
        nvrtc.version()
        _launcher()
    except CannotBuildError as error:
        return str(error)
    except Exception as error:  # Whatever it is, there is another backend.
        return f"the GPU kernel can't be made here: {error}"
    return None


def describe() -> str:
    """What the kernel is, for `explain`; only where there is one."""
    major, minor = divmod(device().capability, 10)
    return f"a CUDA kernel made of the cell's step by NVRTC {nvrtc.version()} for compute capability {major}.{minor}"


@functools.lru_cache(maxsize=256)
def kernel(stages: Stages, shape: Any, name: str, shared: int) -> int:
    """The number under which the launcher has a kernel; compiled at first use.

    Args:
      stages, shape: what it is made of, by the shape's `source`.
      name: `FORWARD` or `BACKWARD`.
      shared: bytes of shared memory that it takes.

    Raises:
      CannotBuildError: the compiler or the driver refuses it.
    """
    text = shape.source(stages)
    options = (f"--gpu-architecture=sm_{device().capability}", *OPTIONS)
    digest = hashlib.sha256("\0".join((text, *options, nvrtc.version())).encode())
    image = build.kept(f"gpu-{digest.hexdigest()[:20]}.cubin", lambda: nvrtc.compile(text, options)[0])
    digest.update(name.encode())
    number = int.from_bytes(digest.digest()[:8], "little", signed=True)
    trouble = _launcher().seqmnist_gpu_load(number, image, name.encode(), shared)
    if trouble:
        raise CannotBuildError(f"the driver refuses a kernel of the recurrence: {trouble.decode()}")
    return number
