"""Builds cells' kernels under a sanitizer, by the build that users have, and runs drawn calls of them there."""

import concurrent.futures
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax

from seqmnist_jax.rnn.native import compiler as cxx
from seqmnist_jax.rnn.native.compiler import Source
from seqmnist_jax.rnn.native.cpu.calls import LAUNCHER
from tests import tiny
from tests.faults import kernel_cases

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


class Built(NamedTuple):
    """Libraries: what calls the kernels in XLA's place, what all cells share, and each cell's own."""

    caller: Path
    launcher: Path
    cells: list[Path]


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
    """Builds what calls the kernels in XLA's place."""
    command = [str(compiler), *cxx.FLAGS, "-isystem", jax.ffi.include_dir(), str(CALLER), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def build(sanitizer: Sanitizer, cells: list[kernel_cases.Cell], folder: Path) -> Built:
    """Builds everything as users do whose CXX names the sanitizer's compiler."""
    folder.mkdir()
    chosen = compiler(sanitizer, folder)

    def one(number: int) -> Path:
        file, target = folder / f"cell{number}.cc", folder / f"cell{number}.so"
        file.write_text(cells[number].text)
        cxx.compile(Source("cell", (file,)), cxx.command(), cxx.flags_of_machine(), target)
        return target

    with mock.patch.dict(os.environ, CXX=str(chosen)), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = list(pool.map(one, range(len(cells))))
        launcher = folder / "launcher.so"
        cxx.compile(LAUNCHER, cxx.command(), cxx.flags_of_machine(), launcher)
    return Built(build_caller(chosen, folder / "caller.so"), launcher, libraries)


def draw(cells: list[kernel_cases.Cell], shapes: int, seed: int, path: Path, may_be_large: bool = True) -> Path:
    """Writes calls of the cells to a file."""
    with path.open("wb") as file, tiny.quick_compiler():
        for case in kernel_cases.draw_cases(cells, shapes, seed, may_be_large):
            pickle.dump(case, file)
    return path


def run(sanitizer: Sanitizer, built: Built, cases: Path) -> Found:
    """Makes the calls in a process of its own."""
    # NumPy's own threads would be strangers to the thread sanitizer.
    environment = os.environ | sanitizer.options | {"OPENBLAS_NUM_THREADS": "1", "LD_PRELOAD": runtime(sanitizer) or ""}
    command = ["-m", "tests.faults.sanitized_kernel", *map(str, (built.caller, built.launcher, cases, *built.cells))]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    findings = FINDING.findall(done.stderr)
    if done.returncode != 0 and not findings:
        findings = [done.stderr.strip().split("\n")[-1] or f"exit code {done.returncode}"]
    count = re.search(r"^(\d+) shapes$", done.stdout, re.MULTILINE)
    return Found(int(count[1]) if count else done.stderr.count("Case ") - 1, findings, done.stderr)
