"""The machine's own C++ compiler: which it is, how it is called, and what it has to say."""

import contextlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax

FLAGS = ("-std=gnu++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
VERSION_SECONDS, COMPILE_SECONDS = 60, 300


class Source(NamedTuple):
    """What a library is built from.

    Attributes:
      name: the beginning of its file's name in the cache.
      files: the first is compiled; it depends on all.
    """

    name: str
    files: tuple[Path, ...]


class CannotBuildError(Exception):
    """There is no kernel on this machine; the message says why."""


def say(line: str) -> None:
    """Tells the user on stderr, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def named() -> list[str]:
    """What CXX says: a compiler and what it adds to every command; empty where it is not set."""
    said = os.environ.get("CXX", "")
    try:
        return shlex.split(said)
    except ValueError as error:
        raise CannotBuildError(f"CXX is {said!r}, which is no command ({error})") from error


def command() -> list[str]:
    """The command that compiles C++: CXX where it is set, else the first one found."""
    if wished := named():
        return wished
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return [found]
    raise CannotBuildError("there is no C++ compiler (c++, g++ or clang++, or what CXX names)")


def flags_of_machine() -> list[str]:
    """Flags for this machine's processor and system."""
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        return [*FLAGS, "-march=native"]
    # Apple's clang and GCC name an ARM processor this way.
    return [*FLAGS, "-mcpu=native"]


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs a compiler in a session of its own, so that one that hangs goes with all that it has started."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def version(compiler: list[str]) -> str:
    """What the compiler says of itself, which names its version."""
    name = shlex.join(compiler)
    try:
        done = _run([*compiler, "--version"], VERSION_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CannotBuildError(f"the compiler {name} does not answer within {error.timeout:g} seconds") from error
    except OSError as error:
        raise CannotBuildError(f"the compiler {name} does not run ({error})") from error
    if done.returncode != 0:
        raise CannotBuildError(f"the compiler {name} does not run (exit code {done.returncode} of --version)")
    return done.stdout


def _first_error(messages: str) -> str:
    """What a compiler has to say, in one printable line."""
    lines = messages.splitlines()
    line = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
    return "".join(c if c.isprintable() else "?" for c in line[:300])


def compile(source: Source, compiler: list[str], flags: list[str], target: Path) -> None:
    """Compiles a source into the library `target`.

    Raises:
      CannotBuildError: the compiler does not run, fails, or takes too long.
    """
    name = shlex.join(compiler)
    say(f"Building a {source.name} kernel with {name}, and keeping it for later: some seconds.")
    try:
        done = _run(
            [*compiler, *flags, "-isystem", jax.ffi.include_dir(), str(source.files[0]), "-o", str(target)],
            COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise CannotBuildError(f"{name} has not built it within {error.timeout:g} seconds") from error
    except OSError as error:
        raise CannotBuildError(f"{name} could not build it: {error}") from error
    if done.returncode != 0:
        raise CannotBuildError(f"{name} failed: {_first_error(done.stderr)}")
    if not target.exists():
        raise CannotBuildError(f"{name} ended without an error and without a library")
