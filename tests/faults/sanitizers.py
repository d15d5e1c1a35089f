"""Builds the kernel under a sanitizer, by the build that users have, and runs it on random shapes there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native import compiler as cxx

ROOT = Path(__file__).parent.parent.parent
CALLER = Path(__file__).parent / "caller.cc"
# A finding names its line.
DEBUG = "-g -O1 -fno-omit-frame-pointer"


class Sanitizer(NamedTuple):
    """A sanitizer's flags, the runtime that must be loaded first, and what it needs to know."""

    name: str
    flags: str
    runtime: str | None
    options: dict[str, str]


NONE = Sanitizer("no sanitizer", "", None, {})
ADDRESS = Sanitizer(
    "address and undefined-behaviour sanitizers",
    # Unoptimised, because these checks of an optimised kernel take minutes to compile.
    "-O0 -fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
    "libasan.so",
    # Python and NumPy keep memory until the end on purpose.
    {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
)
THREAD = Sanitizer("thread sanitizer", "-fsanitize=thread", "libtsan.so", {"TSAN_OPTIONS": "exitcode=66"})
ALL = (ADDRESS, THREAD)
FINDING = re.compile(r"^.*(?:ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer).*$", re.MULTILINE)


class Found(NamedTuple):
    """What came of a run: shapes that ended, findings in one line each, and all that was said."""

    shapes: int
    findings: list[str]
    log: str


def runtime(sanitizer: Sanitizer) -> str | None:
    """The path of the sanitizer's runtime, None where the compiler has none."""
    if sanitizer.runtime is None:
        return ""
    asked = subprocess.run(
        [*cxx.command(), f"-print-file-name={sanitizer.runtime}"], capture_output=True, text=True, check=True
    )
    path = Path(asked.stdout.strip())
    return str(path) if path.is_absolute() and path.exists() else None


def compiler(sanitizer: Sanitizer, folder: Path) -> Path:
    """A compiler that puts the sanitizer's flags after all others."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(cxx.command())} "$@" {DEBUG} {sanitizer.flags}\n')
    path.chmod(0o700)
    return path


def build_caller(compiler: Path, target: Path) -> Path:
    """Builds what calls the kernel in XLA's place."""
    command = [str(compiler), *cxx.FLAGS, "-isystem", jax.ffi.include_dir(), str(CALLER), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def build_kernel(compiler: Path, target: Path) -> Path:
    """Builds the kernel as users do whose CXX names this compiler."""
    with mock.patch.dict(os.environ, CXX=str(compiler)):
        cxx.compile(build.RECURRENCE, cxx.command(), cxx.flags_of_machine(), target)
    return target


def run(sanitizer: Sanitizer, kernel: Path, caller: Path, shapes: int, seed: int) -> Found:
    """Runs the kernel on random shapes in a process of its own."""
    # NumPy's own threads would be strangers to the thread sanitizer.
    environment = os.environ | sanitizer.options | {"OPENBLAS_NUM_THREADS": "1", "LD_PRELOAD": runtime(sanitizer) or ""}
    command = ["-m", "tests.faults.sanitized_kernel", str(kernel), str(caller), f"--shapes={shapes}", f"--seed={seed}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    findings = FINDING.findall(done.stderr)
    if done.returncode != 0 and not findings:
        findings = [done.stderr.strip().split("\n")[-1] or f"exit code {done.returncode}"]
    count = re.search(r"^(\d+) shapes$", done.stdout, re.MULTILINE)
    return Found(int(count[1]) if count else done.stderr.count("Call(") - 1, findings, done.stderr)
