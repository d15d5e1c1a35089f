"""Builds the kernel with the machine's own compiler, once for each user, and registers it with XLA.

The library lies in a cache folder under a name made of everything that it depends on:
sources, flags, compiler, CPU and jaxlib. Processes that start together wait for the first
one's build. Whatever goes wrong ends in a sentence (`problem`), never in a crash.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import platformdirs

FORWARD, BACKWARD = "seqmnist_rnn_forward", "seqmnist_rnn_backward"
# XLA's name of each call: the function in the library.
SYMBOLS = {FORWARD: "seqmnist_forward", BACKWARD: "seqmnist_backward"}

SOURCE = Path(__file__).parent / "recurrence.cc"
HEADER = Path(__file__).parent / "products.h"
FLAGS = ("-std=gnu++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_SECONDS = 300


class CannotBuildError(Exception):
    """There is no kernel on this machine; the message says why."""


def _compiler() -> list[str]:
    """The command that compiles C++: CXX where it is set, else the first one found."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return [found]
    raise CannotBuildError("there is no C++ compiler (c++, g++ or clang++, or what CXX names)")


def _flags() -> list[str]:
    """Flags for this machine's processor and system."""
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        return [*FLAGS, "-march=native"]
    # Apple's clang and GCC name an ARM processor this way.
    return [*FLAGS, "-mcpu=native"]


def _cpu() -> str:
    """What names this processor and its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.processor()


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuildError(f"the compiler {shlex.join(compiler)} does not run ({error})") from error


def _key(compiler: list[str], flags: list[str]) -> str:
    parts = [SOURCE.read_text(), HEADER.read_text(), *compiler, _version(compiler), *flags, _cpu(), jaxlib.__version__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _folder() -> Path:
    """Where built kernels live: beside the package's other caches, or for this process alone."""
    named = os.environ.get("SEQMNIST_CACHE_DIR")
    folder = (Path(named) if named else platformdirs.user_cache_path("seqmnist_jax")) / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="seqmnist_jax-"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that dies with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], flags: list[str], target: Path) -> None:
    """Compiles into a name of its own, then puts it in its place."""
    partial = target.with_suffix(f".{os.getpid()}.partial")
    print(
        f"Building the recurrence kernel with {shlex.join(compiler)}, once on this machine: about ten seconds.",
        file=sys.stderr,
        flush=True,
    )
    command = [*compiler, *flags, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise CannotBuildError(f"{shlex.join(compiler)} failed: {lines[0] if lines else 'it said nothing'}")
        _checksum_file(target).write_text(_checksum(partial))
        os.replace(partial, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuildError(f"{shlex.join(compiler)} could not build it: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the library is there, and as it was built."""
    try:
        return _checksum(path) == _checksum_file(path).read_text()
    except OSError:
        return False


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for symbol in SYMBOLS.values():
        getattr(library, symbol)
    return library


def _library() -> ctypes.CDLL:
    """The library, from the cache or newly built."""
    if sys.platform not in ("linux", "darwin"):
        raise CannotBuildError(f"the kernel is for Linux and macOS, not {sys.platform}")
    compiler, flags = _compiler(), _flags()
    folder = _folder()
    path = folder / f"recurrence-{_key(compiler, flags)}.so"
    with _locked(path.with_suffix(".lock")):
        # Loading a damaged library can end the process, so it is first known by its checksum.
        if _is_whole(path):
            with contextlib.suppress(OSError, AttributeError):
                return _open(path)
        _compile(compiler, flags, path)
        try:
            return _open(path)
        except (OSError, AttributeError) as error:
            raise CannotBuildError(f"the library that was built does not load: {error}") from error


@functools.cache
def problem() -> str | None:
    """Why there is no kernel on this machine, or None where it is ready; builds it at the first call."""
    try:
        library = _library()
    except CannotBuildError as error:
        return str(error)
    except OSError as error:
        return f"the cache folder does not work: {error}"
    for name, symbol in SYMBOLS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return None


def load() -> None:
    """Makes the kernel ready.

    Raises:
      CannotBuildError: there is none on this machine.
    """
    if problem() is not None:
        raise CannotBuildError(problem())


def is_loaded() -> bool:
    """Whether this process has the kernel already."""
    return problem.cache_info().currsize > 0 and problem() is None


@functools.cache
def warn_once() -> None:
    """Says, once in a process, that there is no kernel and why."""
    warnings.warn(
        f"seqmnist_jax.rnn has no native kernel here and takes the slower 'fused' backend: {problem()}.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def describe() -> str:
    """What the kernel is, for `explain`."""
    return f"a C++ kernel built by {shlex.join(_compiler())} for {platform.machine()}"
