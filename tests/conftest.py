import contextlib
import fcntl
import gc
import json
import math
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import jax
import pytest

from seqmnist_jax.data import cache as data_cache
from seqmnist_jax.rnn.native import compiler
from seqmnist_jax.rnn.native.cpu import calls
from seqmnist_jax.rnn.native.cpu.calls import LAUNCHER
from seqmnist_jax.rnn.native.cpu.source import FOLDER
from seqmnist_jax.training import records
from tests import tiny


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test that is marked `sampled(n)` all cases but n become slow."""
    tests = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for (path, name), cases in tests.items():
        (count,) = cases[0].get_closest_marker("sampled").args
        # Another beginning for each test, so that together they see all cells and backends. A stride by the golden
        # ratio meets all values of each parameter soon.
        first, stride = zlib.crc32(f"{path.stem} {name}".encode()), round(0.618 * len(cases))
        while math.gcd(stride, len(cases)) > 1:
            stride += 1
        run = {(first + i * stride) % len(cases) for i in range(count)}
        for i, item in enumerate(cases):
            if i not in run:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Parameters that modules draw as they are imported are compiled in a hurry too."""
    with tiny.quick_compiler():
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What has been imported stays: Python need not search all of it for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@contextlib.contextmanager
def only_one(path):
    """Lets one worker after the other pass."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def copy_kernel(folder):
    """Takes the kernels from where users have them, if they are there: a compiler takes some seconds for each."""
    native = data_cache.folder() / "native"
    folder.mkdir(mode=0o755)
    for path in native.glob("*"):
        shutil.copy(path, folder)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A folder of this test run that its workers share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def cache_dir(shared_dir, tmp_path_factory):
    """Data and kernels that a test makes go into folders of this test run, not into the user's."""
    folder = shared_dir / "cache"
    with only_one(shared_dir / "cache.lock"):
        if not folder.exists():
            folder.mkdir()
            copy_kernel(folder / "native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMNIST_CACHE_DIR", str(folder))
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield folder


def standard_headers(found, folder):
    """A header of those that kernels include, of which half of their time is made: GCC reads it compiled."""
    headers, texts = folder / "standard.h", [file.read_text() for file in FOLDER.glob("*.h")]
    headers.write_text("\n".join(re.findall("#include <.*", "\n".join(texts))))
    flags = [*compiler.flags_of_machine(), "-Og", "-x", "c++-header"]
    subprocess.run([found, *flags, headers, "-o", f"{headers}.gch"], capture_output=True, check=False)
    return headers


@pytest.fixture(autouse=True, scope="session")
def quick_cxx(shared_dir):
    """Kernels that run a few steps are compiled in a hurry too, in all processes that tests start."""
    found, path = next(filter(None, map(shutil.which, compiler.COMPILERS)), None), shared_dir / "c++"
    with pytest.MonkeyPatch.context() as patch:
        if found and "CXX" not in os.environ:
            with only_one(shared_dir / "cxx.lock"):
                if not path.exists():
                    # What starts the kernels is built once, and as users have it.
                    whole = f'case "$*" in *{LAUNCHER.files[0].name}*) exec {found} "$@";; esac'
                    headers = standard_headers(found, shared_dir)
                    path.write_text(f'#!/bin/sh\n{whole}\nexec {found} "$@" -Og -include {headers}\n')
                    path.chmod(0o755)
            patch.setenv("CXX", str(path))
        yield path


@pytest.fixture(autouse=True, scope="module")
def full_cxx(request, quick_cxx):
    """Where a module's tests are about kernels, these are as users have them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("full_kernels") and os.environ.get("CXX") == str(quick_cxx):
            patch.delenv("CXX")
            number = calls._number  # by its text a kernel is another one than that which was compiled in a hurry
            patch.setattr(calls, "_number", lambda text: number(f"{text}// As users have it.\n"))
        yield


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(cache_dir):
    """Tests that train the same small network compile it once, in whatever process."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(autouse=True, scope="module")
def quick_compiler(request):
    """Of many small programs, each run once, compiling is the cost."""
    with tiny.quick_compiler(not request.node.get_closest_marker("full_compiler")):
        yield


@pytest.fixture(autouse=True, scope="module")
def no_pictures(request):
    """TensorBoard's pictures are a tenth of a small run; its own tests, and processes that are started, draw them."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("pictures"):
            patch.setattr(records, "write_pictures", lambda *given: None)
        yield


@pytest.fixture(scope="session")
def tiny_run(shared_dir, quick_cxx, compilation_cache):
    """Folder and summary of a finished run of `tiny.config()`, one for all workers; to be copied, not changed."""
    folder = shared_dir / "tiny_run"
    with only_one(shared_dir / "tiny_run.lock"):
        if not folder.exists():
            tiny.train(folder)
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.fixture
def mnist_dir():
    """The folder of full MNIST, where the environment names one."""
    named = os.environ.get("SEQMNIST_DATA_DIR")
    if not named:
        pytest.skip("full MNIST is not at hand: SEQMNIST_DATA_DIR is not set")
    return Path(named)
