"""CUDA source to machine code by NVRTC, which comes with `jax[cuda]` and needs neither a toolkit nor a GPU."""

import ctypes
import functools
import importlib.util
from pathlib import Path

from seqmnist_jax.rnn.native.compiler import CannotBuildError

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def _candidates() -> list[str]:
    """NVRTC of NVIDIA's wheels, then the system's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.1[0-9]"), reverse=True)]
    return [*map(str, found), *NAMES]


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CannotBuildError("there is no NVRTC (the package nvidia-cuda-nvrtc, which jax[cuda] brings)")


@functools.cache
def version() -> str:
    """NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """A cubin, and what the compiler had to say.

    Raises:
      CannotBuildError: there is no NVRTC, or the source has an error.
    """
    library, program = _library(), ctypes.c_void_p()

    def text(size: str, content: str) -> bytes:
        length = ctypes.c_size_t()
        if getattr(library, size)(program, ctypes.byref(length)):
            raise CannotBuildError(f"NVRTC's {size} failed")
        buffer = ctypes.create_string_buffer(max(length.value, 1))
        if getattr(library, content)(program, buffer):
            raise CannotBuildError(f"NVRTC's {content} failed")
        return buffer.raw[: length.value]

    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"recurrence.cu", 0, None, None):
        raise CannotBuildError("NVRTC can't begin a program")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), given)
        log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(errors="replace").strip("\0\n")
        if failed:
            line = next((line for line in log.splitlines() if "error" in line), log[:300])
            raise CannotBuildError(f"NVRTC refuses the kernel: {line}")
        return text("nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
