"""A few of the build's faults in real processes, and the kernel on random shapes; the slow ones under sanitizers."""

import random
import sys
from pathlib import Path

import pytest

from seqmnist_jax.rnn.native import build
from tests.faults import native, sanitizers


@pytest.fixture(scope="module")
def kernel(cache_dir):
    try:
        return Path(build._kernel().library._name)
    except build.CannotBuildError as error:
        pytest.skip(f"no native kernel: {error}")


@pytest.mark.skipif(not native.CAN_MOUNT, reason="mounting a small file system is for root on Linux")
@pytest.mark.parametrize("fault", native.MOUNTED_FAULTS, ids=lambda fault: fault.name)
def test_cache_that_takes_nothing(kernel, fault):
    """Ends in a working backend and one line that says so."""
    assert native.one(fault, kernel, random.Random(0)) is None


def test_kernel_on_random_shapes(kernel, tmp_path):
    """By a caller that gives it other numbers of threads than XLA has, and helpers that come too late."""
    compiler = sanitizers.compiler(sanitizers.NONE, tmp_path)
    caller = sanitizers.build_caller(compiler, tmp_path / "caller.so")
    found = sanitizers.run(sanitizers.NONE, kernel, caller, 30, 0)
    assert (found.shapes, found.findings) == (30, [])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [sanitizers.ADDRESS, sanitizers.THREAD], ids=lambda s: s.name)
def test_kernel_under_sanitizers(sanitizer):
    if sys.platform != "linux" or sanitizers.runtime(sanitizer) is None:
        pytest.skip(f"the compiler has no {sanitizer.runtime}")
    (outcome,) = native.sanitized(10, 0, (sanitizer,))
    assert (outcome.tries, outcome.lost) == (10, 0), outcome.note


@pytest.mark.slow
@pytest.mark.parametrize("fault", native.FAULTS, ids=lambda fault: fault.name)
def test_every_other_fault(kernel, fault):
    """What can be done without a mount; `test_native_build.py` does most of it in one process."""
    assert native.one(fault, kernel, random.Random(1)) is None


@pytest.mark.slow
def test_first_uses_at_once(kernel):
    assert native.together(kernel, 4) == []
