"""Builds libraries with the machine's own compiler, once for each user, and keeps what is made at some cost.

The library lies in a cache folder under a name made of everything that it depends on:
sources, flags, compiler, CPU and jaxlib. Processes that start together wait for the first
one's build. What stands in the cache is loaded only as it was built (a checksum beside it),
and only where nobody else could have written it. Where the cache can't be used, a library is
built for the process alone; where it can't be built, one that an earlier compiler built will
do. Whatever goes wrong ends in a sentence (`CannotBuildError`, or a line on stderr), never in a crash.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jaxlib

from seqmnist_jax.rnn.native import compiler as cxx
from seqmnist_jax.rnn.native.compiler import CannotBuildError, Source

T = TypeVar("T")

# A little more than a build may take: who holds the lock for longer is not building.
LOCK_SECONDS = cxx.COMPILE_SECONDS + 60


class Kernel(NamedTuple):
    """The library, and where it comes from in words."""

    library: ctypes.CDLL
    origin: str


# ---- The cache ---------------------------------------------------------------------------


def _folder() -> Path:
    """Where built kernels live, beside the package's other caches.

    For a user without a home, and where JAX is all that is installed, among the temporary files.
    """
    if named := os.environ.get("SEQMNIST_CACHE_DIR"):
        return Path(os.path.expanduser(named)) / "native"
    try:
        import platformdirs

        return platformdirs.user_cache_path("seqmnist_jax") / "native"
    except (ModuleNotFoundError, RuntimeError, KeyError):
        return Path(tempfile.gettempdir()) / f"seqmnist_jax-{os.geteuid()}" / "native"


def _cpu() -> str:
    """What names this processor and its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.processor()


def _digest(*parts: str | bytes) -> str:
    encoded = [part.encode(errors="replace") if isinstance(part, str) else part for part in parts]
    return hashlib.sha256(b"\0".join(encoded)).hexdigest()[:20]


def _key(source: Source, flags: list[str]) -> str:
    """Names what a library depends on, the compiler apart. What CXX adds to a compiler's name are flags too."""
    parts = (*flags, *cxx.named()[1:], _cpu(), jaxlib.__version__)
    return _digest(*(file.read_bytes() for file in source.files), *parts)


def _place(source: Source, folder: Path, key: str, command: list[str]) -> Path:
    return folder / f"{source.name}-{key}-{_digest(*command, cxx.version(command))}.so"


def _is_ours(path: Path) -> bool:
    """Whether this user or root has made it, and nobody else can write it."""
    status = path.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _make(folder: Path) -> None:
    """Makes the cache folder.

    Raises:
      OSError: it can't be made, or others could put a library there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    if not _is_ours(folder):
        raise PermissionError(f"{folder} belongs to others or can be written by them")


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_sound(path: Path) -> bool:
    """Whether the file at this place can be trusted; one that is not there can't."""
    try:
        return (
            _is_ours(path.parent)
            and _is_ours(path)
            and _checksum(path.read_bytes()) == _checksum_file(path).read_bytes()
        )
    except OSError:
        return False


def _cached(path: Path) -> ctypes.CDLL | None:
    """The library at this place, or None where there is none that can be trusted."""
    # Loading a damaged library can end the process, so it is first known by its checksum.
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path)) if _is_sound(path) else None
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that dies with its process.

    Where there can be none (a file system without locks, a holder that has stopped) processes build
    side by side, which costs time and nothing else.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(path.open("w"))
            end, waits = time.monotonic() + LOCK_SECONDS, False
            while time.monotonic() < end:
                try:
                    # Not `flock`, which a process that is forked off meanwhile would hold too.
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):
                    if not waits:
                        cxx.say("Another process builds a recurrence kernel; this one waits for it.")
                    waits = True
                    time.sleep(0.05)
        yield


def _publish(made: bytes, target: Path) -> None:
    """Puts a file and its checksum into the cache, each in one move."""
    for content, place in ((_checksum(made), _checksum_file(target)), (made, target)):
        descriptor, name = tempfile.mkstemp(prefix=target.stem, suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)  # What root has built, in an image, serves all.
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise


# ---- The kernel --------------------------------------------------------------------------


def _build(source: Source, command: list[str], flags: list[str], target: Path | None) -> ctypes.CDLL:
    """Builds and loads the library, and leaves it at `target` where that can be."""
    # The compiler needs temporary files anyway; a library that is loaded needs no file any more.
    with tempfile.TemporaryDirectory(prefix="seqmnist_jax-") as scratch:
        made = Path(scratch) / "recurrence.so"
        cxx.compile(source, command, flags, made)
        trouble: Exception | None = None
        if target is not None:
            try:
                _publish(made.read_bytes(), target)
                # From where it stays, so that profilers and debuggers find it, and where it may be run if not here.
                return ctypes.CDLL(str(target))
            except OSError as error:
                trouble = error
                for path in (target, _checksum_file(target)):
                    with contextlib.suppress(OSError):
                        path.unlink()
        try:
            library = ctypes.CDLL(str(made))
        except OSError as error:
            raise CannotBuildError(f"the library that was built does not load: {error}") from error
        if trouble is not None:
            cxx.say(f"The {source.name} kernel is built for this process alone: {trouble}.")
        return library


def _built(source: Source, folder: Path, key: str, flags: list[str]) -> Kernel:
    """The library of today's compiler, from the cache or newly built."""
    command = cxx.command()
    origin = f"built by {shlex.join(command)}"
    target = _place(source, folder, key, command)
    library = _cached(target)
    if library is not None:
        return Kernel(library, origin)
    try:
        _make(folder)
    except OSError as error:
        cxx.say(f"The {source.name} kernel is built for this process alone: {error}.")
        return Kernel(_build(source, command, flags, None), origin)
    with _locked(target.with_suffix(".lock")):
        library = _cached(target)
        if library is None:
            if os.access(target, os.R_OK):
                cxx.say(f"The {source.name} kernel {target} is damaged, and is built anew.")
            library = _build(source, command, flags, target)
    return Kernel(library, origin)


def library(source: Source) -> Kernel:
    """The library, of today's compiler or, where that one fails, of an earlier one.

    Raises:
      CannotBuildError: it can't be built here.
    """
    if sys.platform not in ("linux", "darwin"):
        raise CannotBuildError(f"the kernel is for Linux and macOS, not {sys.platform}")
    folder, flags = _folder(), cxx.flags_of_machine()
    key = _key(source, flags)
    try:
        return _built(source, folder, key, flags)
    except CannotBuildError as error:
        for path in sorted(folder.glob(f"{source.name}-{key}-*.so")):
            found = _cached(path)
            if found is not None:
                cxx.say(f"The {source.name} kernel is one that was built here earlier, because {error}.")
                return Kernel(found, "built here earlier")
        raise


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` makes of a name that says all it depends on: from the cache, or made now and kept where it can be."""
    try:
        path = _folder() / name
        _make(path.parent)
    except OSError:
        return make()
    if _is_sound(path):
        return path.read_bytes()
    content = make()
    with contextlib.suppress(OSError):
        _publish(content, path)
    return content


_one_at_a_time = threading.RLock()
# In a process that is forked off, the thread that held the lock has stayed behind.
os.register_at_fork(after_in_child=lambda: globals().update(_one_at_a_time=threading.RLock()))


def once(make: Callable[..., T]) -> Callable[..., T]:
    """`make`, called once in a process for each of its arguments, also where several threads ask."""
    made = functools.cache(make)

    @functools.wraps(make)
    def locked(*arguments: Any) -> T:
        with _one_at_a_time:
            return made(*arguments)

    return locked
