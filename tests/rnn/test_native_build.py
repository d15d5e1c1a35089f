"""The kernels' build: with no compiler, with bad ones, with damaged or missing caches, and in two processes at once.

Compilers here are shell scripts that copy the kernels built for this session, so nothing is compiled. What all cells
share stands for any library where there need not be several.
"""

import concurrent.futures
import ctypes
import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import pytest

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native import compiler as cxx
from seqmnist_jax.rnn.native.cpu import calls
from seqmnist_jax.rnn.native.cpu.calls import LAUNCHER
from tests import copier
from tests.tiny import QUICK

# What a process says: which backend 'auto' explains, why, and how many warnings came of two calls of either layer.
SCRIPT = """
import warnings
import jax, jax.numpy as jnp
from seqmnist_jax import rnn
params, x = rnn.init_lstm(jax.random.key(0), 5, 3), jnp.ones((2, 4, 5))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _, outputs = rnn.lstm(params, x)
    rnn.lstm(params, x[:, :2])
    rnn.gru(rnn.init_gru(jax.random.key(0), 5, 3), x)
    explanation = rnn.explain(params, x)
ours = [w for w in caught if issubclass(w.category, RuntimeWarning)]
assert outputs.shape == (2, 4, 3) and bool(jnp.isfinite(outputs).all())
print(explanation.backend, len(ours), explanation.why, *[w.message for w in ours], sep=" | ")
"""
# What it builds: what all cells share, an LSTM and a GRU.
BUILDS = 3


def environment(**changes):
    """This process's environment with changes; None takes a name away."""
    changed = os.environ | QUICK | {"JAX_PLATFORMS": "cpu"} | changes
    return {name: str(value) for name, value in changed.items() if value is not None}


def start(**changes):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process):
    """(backend, number of warnings, the rest) of a process that ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    backend, warned, rest = out.strip().split("\n")[-1].split(" | ", 2)
    return backend, int(warned), rest


def script(path, body):
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def copied(need_native, cache_dir, tmp_path_factory):
    """Sources and libraries that this session uses."""
    need_native()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMNIST_CACHE_DIR", str(cache_dir))
        return copier.built(tmp_path_factory.mktemp("sources"), "lstm", "gru")


@pytest.fixture(scope="module")
def built(copied):
    """The library that all cells share."""
    return copied[0].library


@pytest.fixture
def compiler(tmp_path, copied):
    """A compiler that copies libraries, after COPIER_SECONDS each, and a function that tells how often it did."""
    log = tmp_path / "log"
    path = tmp_path / "c++"
    path.write_text(copier.script(copied, log, 'sleep "${COPIER_SECONDS:-0}"'))
    path.chmod(0o700)
    return path, lambda: len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(folder))
    return folder


def place(cache, source=LAUNCHER):
    """Where the library of the compiler that CXX names lies."""
    return build._place(source, cache / "native", build._key(source, cxx.flags_of_machine()), cxx.command())


def changed(folder):
    """The source with something changed."""
    source = folder / "launch.cc"
    source.write_text(LAUNCHER.files[0].read_text() + "// changed\n")
    return LAUNCHER._replace(files=(source, *LAUNCHER.files[1:]))


@pytest.fixture
def first_use(monkeypatch):
    """As in a process that has not asked for a kernel yet."""
    for name in ("_launcher", "_number", "problem", "_trouble_of"):
        monkeypatch.setattr(calls, name, build.once(getattr(calls, name).__wrapped__))
    # XLA takes one library a process, and this one may have another already.
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *given, **options: None)


def kernels(cache):
    return sorted((cache / "native").glob("*.so"))


# ---- Without a kernel --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "why"),
    [({"PATH": "/nowhere", "CXX": None}, "no C++ compiler"), ({"CXX": "/bin/false"}, "/bin/false does not run")],
    ids=["no compiler", "a compiler that fails"],
)
def test_auto_takes_fused_and_says_so_once(cache, changes, why):
    backend, warned, rest = said(start(**changes))
    assert (backend, warned) == ("fused", 1)
    # Both the explanation and the warning give the reason.
    assert rest.count(why) == 2, rest
    assert "fused" in rest.split(" | ")[1]


def test_a_cell_that_cannot_be_built(cache, tmp_path, copied):
    """Where what all cells share, and another cell, can be."""
    shared, _, gru = copied
    path = tmp_path / "c++"
    path.write_text(copier.script([shared, gru], tmp_path / "log", '[ "$library" ] || { echo error: no >&2; exit 1; }'))
    path.chmod(0o700)
    backend, warned, rest = said(start(CXX=path))
    assert (backend, warned) == ("fused", 1)
    assert rest.count("c++ failed: error: no") == 2, rest
    assert len(kernels(cache)) == 2


def test_compiler_that_is_not_there(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.CannotBuildError, match=r"/nowhere/c\+\+ does not run"):
        build.library(LAUNCHER)


def test_first_error_of_the_compiler_is_told(cache, tmp_path, monkeypatch):
    body = 'if [ "$1" = --version ]; then exit 0; fi\n'
    body += 'echo "file.cc: warning: hm" >&2; echo "error: no such thing" >&2; exit 1\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    with pytest.raises(build.CannotBuildError, match="failed: error: no such thing"):
        build.library(LAUNCHER)
    assert list((cache / "native").iterdir()) == list((cache / "native").glob("*.lock"))


def test_compiler_that_makes_rubbish(cache, tmp_path, monkeypatch):
    body = 'if [ "$1" = --version ]; then exit 0; fi\nwhile [ "$1" != -o ]; do shift; done\necho rubbish > "$2"\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    with pytest.raises(build.CannotBuildError, match="does not load"):
        build.library(LAUNCHER)


def test_compiler_that_makes_nothing(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/true")
    with pytest.raises(build.CannotBuildError, match="/bin/true ended without an error and without a library"):
        build.library(LAUNCHER)


def test_cxx_that_is_no_command(cache, monkeypatch):
    monkeypatch.setenv("CXX", "c++ 'unfinished")
    with pytest.raises(build.CannotBuildError, match=r"CXX is .* which is no command"):
        build.library(LAUNCHER)


@pytest.mark.parametrize("step", ["version", "compile"])
def test_compiler_that_hangs_is_ended_with_all_it_started(cache, tmp_path, monkeypatch, step):
    pid = tmp_path / "pid"
    hang = f"sleep 1000 & echo $! > {pid}; wait"
    body = f'case "$*" in *--version) {hang if step == "version" else "exit 0"};; esac\n{hang}\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    monkeypatch.setattr(cxx, "VERSION_SECONDS", 0.5)
    monkeypatch.setattr(cxx, "COMPILE_SECONDS", 0.5)
    with pytest.raises(build.CannotBuildError, match=r"within 0\.5 seconds"):
        build.library(LAUNCHER)
    end = time.monotonic() + 10  # who is killed is gone a moment later
    while is_running(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(int(pid.read_text()))


def is_running(pid):
    """Whether it does anything; one that nobody has waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_compiler_that_vanishes(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", 'rm "$0"\n')))
    with pytest.raises(build.CannotBuildError, match="could not build it"):
        build.library(LAUNCHER)


def test_compiler_that_prints_rubbish(cache, tmp_path, monkeypatch):
    """What it says is no text, on either stream; one line of it is told, printable."""
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(128, 256)) + b"\x1b[2J error" + b"x" * 1000)
    body = f'cat {noise}; if [ "$1" = --version ]; then exit 0; fi; cat {noise} >&2; exit 1\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    with pytest.raises(build.CannotBuildError, match="failed: ") as caught:
        build.library(LAUNCHER)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


# ---- The cache ---------------------------------------------------------------------------


def test_built_once_and_found_again(cache, compiler, monkeypatch):
    path, count = compiler
    monkeypatch.setenv("CXX", f"{path} -Wall")
    first, second = build.library(LAUNCHER), build.library(LAUNCHER)
    assert count() == 1
    assert [first.library._name, second.library._name] == [str(kernels(cache)[0])] * 2
    # Nothing half-made stays behind, and nobody else may write there.
    assert {entry.suffix for entry in (cache / "native").iterdir()} == {".so", ".sha256", ".lock"}
    assert (cache / "native").stat().st_mode & 0o022 == 0


def test_another_compiler_or_source_is_another_kernel(cache, compiler, tmp_path, monkeypatch):
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    build.library(LAUNCHER)
    monkeypatch.setenv("CXX", f"{path} -O1")
    build.library(LAUNCHER)
    build.library(changed(tmp_path))
    assert count() == len(kernels(cache)) == 3


def damage(cache, compiler, monkeypatch, content):
    """Puts something else in the kernel's place; gives that place."""
    monkeypatch.setenv("CXX", str(compiler))
    (cache / "native").mkdir(parents=True, mode=0o700)
    target = place(cache)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("content", [b"", b"rubbish"], ids=["empty", "rubbish"])
def test_rubbish_in_the_cache_is_built_anew(cache, compiler, built, monkeypatch, content):
    path, count = compiler
    target = damage(cache, path, monkeypatch, content)
    assert build.library(LAUNCHER).library._name == str(target)
    assert (count(), target.read_bytes()) == (1, built.read_bytes())


def test_half_a_kernel_is_built_anew(cache, compiler, built, monkeypatch):
    """A full disk leaves such files; in a process of its own, because loading one ends it (SIGBUS)."""
    path, count = compiler
    whole = built.read_bytes()
    target = damage(cache, path, monkeypatch, whole[: len(whole) // 2])
    assert said(start())[:2] == ("native", 0)
    assert (count(), target.read_bytes()) == (BUILDS, whole)


def test_cache_folder_that_cannot_be_made(tmp_path, compiler, monkeypatch):
    """A file stands in its place (who runs tests as root may write anywhere else)."""
    path, count = compiler
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    backend, warned, _ = said(start(CXX=path, SEQMNIST_CACHE_DIR=in_the_way))
    assert (backend, warned, count()) == ("native", 0, BUILDS)
    assert in_the_way.read_text() == ""


@pytest.mark.slow
def test_two_processes_build_once_and_the_next_one_nothing(cache, compiler):
    path, count = compiler
    both = [start(CXX=path, COPIER_SECONDS=0.5), start(CXX=path, COPIER_SECONDS=0.5)]
    assert [said(process)[:2] for process in both] == [("native", 0)] * 2
    assert count() == len(kernels(cache)) == BUILDS
    assert said(start(CXX=path))[:2] == ("native", 0)
    assert count() == BUILDS


# ---- What is in the cache, and who put it there ------------------------------------------


def test_without_a_compiler_what_was_built_here_will_do(cache, compiler, monkeypatch, capfd):
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    first = build.library(LAUNCHER)
    capfd.readouterr()
    for changes in ({"CXX": "/nowhere/c++"}, {"CXX": "", "PATH": "/nowhere"}):
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        found = build.library(LAUNCHER)
        assert (found.library._name, found.origin) == (first.library._name, "built here earlier")
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1
        assert "built here earlier, because" in said[0]
    assert count() == 1


@pytest.mark.parametrize("change", ["flags of CXX", "CPU", "source", "bits"])
def test_without_a_compiler_another_kernel_will_not_do(cache, compiler, tmp_path, monkeypatch, change):
    path, _ = compiler
    monkeypatch.setenv("CXX", str(path))
    kernel = Path(build.library(LAUNCHER).library._name)
    monkeypatch.setenv("CXX", "/nowhere/c++" + (" -fsanitize=address" if change == "flags of CXX" else ""))
    if change == "CPU":
        monkeypatch.setattr(build, "_cpu", lambda: "another")
    source = changed(tmp_path) if change == "source" else LAUNCHER
    if change == "bits":
        content = bytearray(kernel.read_bytes())
        content[len(content) // 2] ^= 1
        kernel.write_bytes(content)
    with pytest.raises(build.CannotBuildError, match="does not run"):
        build.library(source)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "a bit of the kernel": lambda path: flip(path),
    "no checksum": lambda path: build._checksum_file(path).unlink(),
    "a checksum that is no text": lambda path: build._checksum_file(path).write_bytes(b"\xff\x00"),
    "the checksum of another": lambda path: build._checksum_file(path).write_text("0" * 64),
    "half a kernel": lambda path: path.write_bytes(path.read_bytes()[:5000]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_kernel_is_built_anew_and_said(cache, compiler, built, monkeypatch, capfd, damage):
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    target = place(cache)
    build._make(target.parent)
    build._publish(built.read_bytes(), target)
    DAMAGES[damage](target)
    kernel = build.library(LAUNCHER)
    assert (kernel.library._name, count(), target.read_bytes()) == (str(target), 1, built.read_bytes())
    assert capfd.readouterr().err.count("is damaged, and is built anew") == 1
    build.library(LAUNCHER)
    assert count() == 1


OBSTACLES = {
    "a file for the folder": lambda cache, place: cache.write_text(""),
    "a folder for the kernel": lambda cache, place: place.mkdir(parents=True),
    "a folder that others can write": lambda cache, place: (
        place.parent.mkdir(parents=True) or place.parent.chmod(0o777)
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_cache_that_cannot_be_used(cache, compiler, tmp_path, monkeypatch, capfd, obstacle):
    """The kernel works, for this process alone, and leaves no files."""
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    private = tmp_path / "tmp"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    OBSTACLES[obstacle](cache, place(cache))
    made = build.library(LAUNCHER).library
    assert all(made[symbol] for symbol in calls.CALLS.values())
    assert capfd.readouterr().err.count("is built for this process alone: ") == count() == 1
    assert list(private.iterdir()) == []
    assert not list(tmp_path.rglob("*.partial"))


def test_full_cache(cache, compiler, monkeypatch, capfd):
    """As where the disk has no room: at the last moment."""
    path, _ = compiler
    monkeypatch.setenv("CXX", str(path))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    build.library(LAUNCHER)
    assert "for this process alone: [Errno 28] No space left on device" in capfd.readouterr().err
    assert [entry.suffix for entry in (cache / "native").iterdir()] == [".lock"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", ["folder", "kernel"])
def test_kernel_of_another_user_is_not_loaded(cache, compiler, built, monkeypatch, what):
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    target = place(cache)
    build._make(target.parent)
    build._publish(built.read_bytes(), target)
    os.chown(target if what == "kernel" else target.parent, 65534, 65534)
    kernel = build.library(LAUNCHER)
    assert count() == 1
    # In a folder of ours it is replaced by our own; in a folder of theirs nothing is written.
    assert (kernel.library._name == str(target)) == (what == "kernel")
    assert target.stat().st_uid == 0


def test_read_only_cache_is_read(cache, compiler, built, monkeypatch):
    """A kernel that is there needs no lock and nothing to be written."""
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    target = place(cache)
    build._make(target.parent)
    build._publish(built.read_bytes(), target)
    before = {entry.name: entry.stat().st_mtime_ns for entry in target.parent.iterdir()}
    assert build.library(LAUNCHER).library._name == str(target)
    assert {entry.name: entry.stat().st_mtime_ns for entry in target.parent.iterdir()} == before
    assert count() == 0


@pytest.mark.parametrize("trouble", ["no locks", "a holder that has stopped"])
def test_lock_that_cannot_be_had(cache, compiler, monkeypatch, trouble):
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.3)
    if trouble == "no locks":

        def lockf(*_):
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(fcntl, "lockf", lockf)
        assert build.library(LAUNCHER).library._name == str(place(cache))
    else:
        build._make(cache / "native")
        with build._locked(place(cache).with_suffix(".lock")):
            assert build.library(LAUNCHER).library._name == str(place(cache))
    assert count() == 1


def test_threads_build_once(cache, compiler, monkeypatch, first_use):
    """What all cells share, and a cell that two of them ask for at once."""
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    asks = [calls.problem, lambda: calls.unfit(copier.stages("lstm"), copier.OPTIONS)] * 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda ask: ask(), asks)) == [None] * 4
    assert count() == len(kernels(cache)) == 2


def test_forked_process_has_the_kernels(copied, monkeypatch):
    """The libraries are loaded already; the child needs neither files nor the lock."""
    ask = lambda: (calls.problem(), calls.unfit(copier.stages("lstm"), copier.OPTIONS))  # noqa: E731
    assert ask() == (None, None)
    monkeypatch.setattr(build, "library", lambda *_: os._exit(2))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ask() == (None, None) else 1)
    assert os.waitpid(pid, 0)[1] == 0


FORKED = """
import os, threading, time
from seqmnist_jax.rnn.native.cpu import calls as cpu
builder = threading.Thread(target=cpu.problem)
builder.start()
time.sleep(0.7)
pid = os.fork()
if pid == 0:
    os._exit(0 if cpu.problem() is None else 1)
code = os.waitpid(pid, 0)[1]
builder.join()
print(code)
"""


@pytest.mark.slow
def test_process_that_is_forked_while_a_thread_builds(cache, compiler):
    """It has neither that thread nor its locks, waits for the build and finds it."""
    path, count = compiler
    environ = environment(CXX=path, COPIER_SECONDS=2, PYTHONWARNINGS="ignore")
    done = subprocess.run([sys.executable, "-c", FORKED], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0"], done.stderr
    assert count() == 1


# ---- Whatever else goes wrong ------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [RuntimeError("could not determine home"), KeyError("uid not found: 12345"), ModuleNotFoundError("platformdirs")],
)
def test_user_without_a_home(tmp_path, compiler, monkeypatch, error):
    """As in a container, where a number is all that is known of him: his kernel lies with temporary files."""
    path, count = compiler

    def no_home(*_):
        raise error

    monkeypatch.setenv("CXX", str(path))
    monkeypatch.delenv("SEQMNIST_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = [Path(build.library(LAUNCHER).library._name) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].is_relative_to(tmp_path)
    assert count() == 1


@pytest.mark.parametrize(
    "error", [ValueError("null byte"), RuntimeError("no home"), UnicodeError("path"), MemoryError()]
)
def test_any_trouble_is_an_answer(monkeypatch, first_use, error):
    """There is another backend, so nothing that goes wrong here may end a call."""

    def fail(*_):
        raise error

    monkeypatch.setattr(build, "library", fail)
    for answer in (calls.problem(), calls.unfit(copier.stages("gru"), copier.OPTIONS)):
        assert answer == f"the kernel can't be built here: {error}"


def test_where_warnings_are_errors_it_is_said_once_too(monkeypatch):
    monkeypatch.setattr(calls, "_not_said", ["something"])
    monkeypatch.setattr(calls, "_unbuilt", {"no compiler"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls.warn_once("the step has no kernel")
        with pytest.raises(RuntimeWarning, match="takes the slower 'fused' backend: no compiler"):
            calls.warn_once("no compiler")
        calls.warn_once("no compiler")


def test_what_one_user_builds_others_can_read(cache, compiler, monkeypatch):
    """As in an image that root makes, whatever his umask."""
    path, _ = compiler
    monkeypatch.setenv("CXX", str(path))
    before = os.umask(0o027)
    try:
        build.library(LAUNCHER)
    finally:
        os.umask(before)
    modes = {entry.suffix: stat.S_IMODE(entry.stat().st_mode) for entry in (cache / "native").iterdir()}
    assert (modes[".so"], modes[".sha256"]) == (0o644, 0o644)


def test_kernel_that_cannot_be_read_is_none(cache, compiler, monkeypatch, capfd):
    """Nor is it called damaged, nor does it end the search."""
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    build.library(LAUNCHER)
    of_path = Path.read_bytes

    def closed(self):
        if self.suffix == ".so" and self.is_relative_to(cache):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return of_path(self)

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", closed)
    monkeypatch.setattr(Path, "exists", lambda self: denied(self) if self.suffix == ".so" else os.path.exists(self))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "replace", denied)
    capfd.readouterr()
    monkeypatch.setattr(
        cxx, "compile", lambda *given: of_path(place(cache)) and given[-1].write_bytes(of_path(place(cache)))
    )
    assert build.library(LAUNCHER).library[calls.CALLS[calls.FORWARD]]
    said = capfd.readouterr().err
    assert "damaged" not in said
    assert "for this process alone" in said
    assert count() == 1


@pytest.mark.parametrize("forbidden", ["temporary files", "the cache"])
def test_a_place_that_nothing_may_be_run_from(cache, compiler, tmp_path, monkeypatch, forbidden):
    """Mounted noexec: the kernel is loaded from the other place."""
    path, count = compiler
    monkeypatch.setenv("CXX", str(path))
    private = tmp_path / "tmp"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    noexec = private if forbidden == "temporary files" else cache
    load = ctypes.CDLL

    def mapped(name, *given, **options):
        if Path(name).is_relative_to(noexec):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name, *given, **options)

    monkeypatch.setattr(ctypes, "CDLL", mapped)
    assert not Path(build.library(LAUNCHER).library._name).is_relative_to(noexec)
    assert count() == 1
