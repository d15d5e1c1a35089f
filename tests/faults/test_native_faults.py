"""A few of the build's faults in real processes, and kernels on drawn shapes; the slow ones under sanitizers."""

import random
import sys

import pytest

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native.compiler import CannotBuildError
from tests import copier
from tests.faults import kernel_cases, native, sanitizers


@pytest.fixture(scope="module")
def kernels(cache_dir, tmp_path_factory):
    try:
        return copier.built(tmp_path_factory.mktemp("sources"), "lstm")
    except CannotBuildError as error:
        pytest.skip(f"no native kernel: {error}")


@pytest.mark.sampled(1)
@pytest.mark.skipif(not native.CAN_MOUNT, reason="mounting a small file system is for root on Linux")
@pytest.mark.parametrize("fault", native.MOUNTED_FAULTS, ids=lambda fault: fault.name)
def test_cache_that_takes_nothing(kernels, fault):
    """Ends in a working backend and one line that says so."""
    assert native.one(fault, kernels, random.Random(0)) is None


@pytest.mark.slow
def test_kernels_on_drawn_shapes(kernels, tmp_path):
    """By a caller that gives them other numbers of threads than XLA has, and helpers that come too late."""
    lstm, gru = kernel_cases.draw_cells(2, 0)
    wanted = [lstm._replace(reference=None), gru]  # A loop that is held against takes a second to compile.
    cases = sanitizers.draw(wanted, 30, 0, tmp_path / "cases", may_be_large=False)
    cells = []
    for number, cell in enumerate(wanted):
        file = tmp_path / f"{number}.cc"
        file.write_text(cell.text)
        source = build.Source("cell", (file,))
        cells.append(build.library(source).library._name)
    compiler = sanitizers.compiler(sanitizers.NONE, tmp_path)
    caller = sanitizers.build_caller(compiler, tmp_path / "caller.so")
    found = sanitizers.run(sanitizers.NONE, sanitizers.Built(caller, kernels[0].library, cells), cases)
    assert (found.shapes, found.findings) == (30, [])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [sanitizers.ADDRESS, sanitizers.THREAD], ids=lambda s: s.name)
def test_kernels_under_sanitizers(sanitizer):
    if sys.platform != "linux" or sanitizers.runtime(sanitizer) is None:
        pytest.skip(f"the compiler has no {sanitizer.runtime}")
    (outcome,) = native.sanitized(20, 3, 0, (sanitizer,))
    assert (outcome.tries, outcome.lost) == (20, 0), outcome.note


@pytest.mark.slow
@pytest.mark.parametrize("fault", native.FAULTS, ids=lambda fault: fault.name)
def test_every_other_fault(kernels, fault):
    """What can be done without a mount; `test_native_build.py` does most of it in one process."""
    assert native.one(fault, kernels, random.Random(1)) is None


@pytest.mark.slow
def test_first_uses_at_once(kernels):
    assert native.together(kernels, 4) == []
