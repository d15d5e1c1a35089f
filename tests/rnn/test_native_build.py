"""The kernel's build: with no compiler, with bad ones, with damaged or missing caches, and in two processes at once.

Compilers here are shell scripts that copy the kernel built for this session, so nothing is compiled.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from seqmnist_jax.rnn.native import build

# What a process says: which backend 'auto' explains, why, and how many warnings came of two calls of either layer.
SCRIPT = """
import warnings
import jax, jax.numpy as jnp
from seqmnist_jax import rnn
params, x = rnn.init_lstm(jax.random.key(0), 2, 3), jnp.ones((2, 4, 2))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _, outputs = rnn.lstm(params, x)
    rnn.lstm(params, x[:, :2])
    rnn.gru(rnn.init_gru(jax.random.key(0), 2, 3), x)
    explanation = rnn.explain(params, x)
ours = [w for w in caught if issubclass(w.category, RuntimeWarning)]
assert outputs.shape == (2, 4, 3) and bool(jnp.isfinite(outputs).all())
print(explanation.backend, len(ours), explanation.why, *[w.message for w in ours], sep=" | ")
"""


def environment(**changes):
    """This process's environment with changes; None takes a name away."""
    changed = os.environ | {"JAX_PLATFORMS": "cpu"} | changes
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
def built(need_native, kernel_cache):
    """The kernel that this session uses."""
    need_native()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in kernel_cache.items():
            patch.setenv(name, value)
        return Path(build._library()._name)


@pytest.fixture
def compiler(tmp_path, built):
    """A compiler that takes a second to copy the kernel, and a function that tells how often it did."""
    log = tmp_path / "log"
    body = f"""
case "$*" in *--version) echo 'copier 1.0'; exit 0;; esac
echo "$@" >> {log}
sleep 1
while [ "$1" != -o ]; do shift; done
cp {built} "$2"
"""
    return script(tmp_path / "c++", body), lambda: len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(folder))
    return folder


def kernels(cache):
    return sorted((cache / "native").glob("*.so"))


# ---- Without a kernel --------------------------------------------------------------------


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


def test_compiler_that_is_not_there(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.CannotBuildError, match=r"/nowhere/c\+\+ does not run"):
        build._library()


def test_first_error_of_the_compiler_is_told(cache, tmp_path, monkeypatch):
    body = 'if [ "$1" = --version ]; then exit 0; fi\n'
    body += 'echo "file.cc: warning: hm" >&2; echo "error: no such thing" >&2; exit 1\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    with pytest.raises(build.CannotBuildError, match="failed: error: no such thing"):
        build._library()
    assert list((cache / "native").iterdir()) == list((cache / "native").glob("*.lock"))


def test_compiler_that_makes_rubbish(cache, tmp_path, monkeypatch):
    body = 'if [ "$1" = --version ]; then exit 0; fi\nwhile [ "$1" != -o ]; do shift; done\necho rubbish > "$2"\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    with pytest.raises(build.CannotBuildError, match="does not load"):
        build._library()


def test_compiler_that_makes_nothing(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/true")
    with pytest.raises(build.CannotBuildError, match=r"/bin/true"):
        build._library()


# ---- The cache ---------------------------------------------------------------------------


def test_built_once_and_found_again(cache, compiler, monkeypatch):
    path, count = compiler
    monkeypatch.setenv("CXX", f"{path} -Wall")
    first, second = build._library(), build._library()
    assert count() == 1
    assert [first._name, second._name] == [str(kernels(cache)[0])] * 2
    # Nothing half-made stays behind, and nobody else may write there.
    assert {entry.suffix for entry in (cache / "native").iterdir()} == {".so", ".sha256", ".lock"}
    assert (cache / "native").stat().st_mode & 0o077 == 0


def test_another_compiler_or_source_is_another_kernel(cache, compiler, tmp_path, monkeypatch):
    path, count = compiler
    source = tmp_path / "recurrence.cc"
    source.write_text(build.SOURCE.read_text() + "// changed\n")
    monkeypatch.setenv("CXX", str(path))
    build._library()
    monkeypatch.setenv("CXX", f"{path} -O1")
    build._library()
    monkeypatch.setattr(build, "SOURCE", source)
    build._library()
    assert count() == len(kernels(cache)) == 3


def damage(cache, compiler, monkeypatch, content):
    """Puts something else in the kernel's place; gives that place."""
    monkeypatch.setenv("CXX", str(compiler))
    (cache / "native").mkdir(parents=True)
    target = cache / "native" / f"recurrence-{build._key(build._compiler(), build._flags())}.so"
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("content", [b"", b"rubbish"], ids=["empty", "rubbish"])
def test_rubbish_in_the_cache_is_built_anew(cache, compiler, built, monkeypatch, content):
    path, count = compiler
    target = damage(cache, path, monkeypatch, content)
    assert build._library()._name == str(target)
    assert (count(), target.read_bytes()) == (1, built.read_bytes())


def test_half_a_kernel_is_built_anew(cache, compiler, built, monkeypatch):
    """A full disk leaves such files; in a process of its own, because loading one ends it (SIGBUS)."""
    path, count = compiler
    whole = built.read_bytes()
    target = damage(cache, path, monkeypatch, whole[: len(whole) // 2])
    assert said(start())[:2] == ("native", 0)
    assert (count(), target.read_bytes()) == (1, whole)


def test_cache_folder_that_cannot_be_made(tmp_path, compiler, monkeypatch):
    """A file stands in its place (who runs tests as root may write anywhere else)."""
    path, count = compiler
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    backend, warned, _ = said(start(CXX=path, SEQMNIST_CACHE_DIR=in_the_way))
    assert (backend, warned, count()) == ("native", 0, 1)
    assert in_the_way.read_text() == ""


def test_two_processes_build_once(cache, compiler):
    path, count = compiler
    both = [start(CXX=path), start(CXX=path)]
    assert [said(process)[:2] for process in both] == [("native", 0)] * 2
    assert count() == len(kernels(cache)) == 1
