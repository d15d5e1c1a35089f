"""C++ source to a loaded library, kept in the kernels' cache under a name made of all that it depends on."""

import ctypes
import functools
import shlex
import tempfile
from pathlib import Path

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native.build import CannotBuildError

FOLDER = Path(__file__).parent


@functools.cache
def _headers() -> bytes:
    return b"\0".join(path.read_bytes() for path in (build.HEADER, *sorted(FOLDER.glob("*.h"))))


@functools.cache
def _identity() -> str:
    """What all libraries of this process depend on beside their source."""
    compiler = build._compiler()
    return build._digest(_headers(), *build._flags(), *compiler, build._version(compiler), build._cpu())


def key(text: str, *flags: str) -> str:
    """A name for a library of this source on this machine.

    Raises:
      CannotBuildError: there is no compiler.
    """
    return build._digest(text, *flags, _identity())


def _compile(text: str, flags: tuple[str, ...], target: Path) -> None:
    compiler = build._compiler()
    name, source = shlex.join(compiler), target.with_suffix(".cc")
    source.write_text(text)
    command = [*compiler, *build._flags(), "-I", str(FOLDER), *flags, str(source), "-o", str(target)]
    done = build._run(command, build.COMPILE_SECONDS)
    if done.returncode != 0 or not target.exists():
        raise CannotBuildError(f"{name} failed: {build._first_error(done.stderr)}")


def load(prefix: str, text: str, *flags: str) -> ctypes.CDLL:
    """The library of a source, from the cache or newly built.

    Raises:
      CannotBuildError: there is none on this machine; the message says why.
    """
    place = build._folder() / f"{prefix}-{key(text, *flags)}.so"
    library = _cached(place)
    if library is not None:
        return library
    try:
        build._make(place.parent)
        with build._locked(place.with_suffix(".lock")):
            library = _cached(place)
            return _build(text, flags, place) if library is None else library
    except OSError:
        return _build(text, flags, None)


def _cached(place: Path) -> ctypes.CDLL | None:
    """The library at this place, or None where there is none that can be trusted."""
    try:
        if not (build._is_ours(place.parent) and build._is_ours(place)):
            return None
        # Loading a damaged library can end the process, so it is first known by its checksum.
        if build._checksum(place) == build._checksum_file(place).read_bytes():
            return ctypes.CDLL(str(place))
    except OSError:
        pass
    return None


def _build(text: str, flags: tuple[str, ...], place: Path | None) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="seqmnist_jax-") as scratch:
        made = Path(scratch) / "kernel.so"
        _compile(text, flags, made)
        if place is not None:
            build._publish(made, place)
        # A library that is loaded needs no file any more; from where it stays profilers find it.
        return ctypes.CDLL(str(place or made))
