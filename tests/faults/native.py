"""The kernels' build under every fault that we know of, in real processes, and made kernels under sanitizers.

``python -m tests.faults.native --shapes=500 --cells=30 --seed=0`` runs the sanitizers alone and ends with exit code 1
where they find anything.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native import compiler as cxx
from seqmnist_jax.rnn.native.compiler import Source
from seqmnist_jax.rnn.native.cpu.calls import LAUNCHER
from tests import copier
from tests.copier import Built
from tests.faults import kernel_cases, sanitizers
from tests.faults.outcome import Outcome

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120

# What each process does: a layer by the backend that 'auto' takes, held against JAX's own loop.
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from seqmnist_jax import rnn
params, x = rnn.init_lstm(jax.random.key(0), 5, 3), jnp.ones((2, 4, 5))
_, outputs = rnn.lstm(params, x)
_, expected = rnn.lstm(params, x, backend="scan")
np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
print(rnn.explain(params, x).backend)
"""


class Scene:
    """One try: an empty cache folder, a compiler that copies all cells' library and an LSTM's, and chance."""

    def __init__(self, folder: Path, kernels: list[Built], draw: random.Random):
        self.folder, self.kernels, self.draw = folder, kernels, draw
        self.cache, self.log = folder / "cache", folder / "log"
        self.before = ""  # Python that the process runs first
        self.environment: dict[str, str | None] = {"SEQMNIST_CACHE_DIR": str(self.cache)}
        self.compiler()

    def compiler(self, compiles: str = "", answers: str = "echo copier 1.0") -> None:
        """Makes CXX a script: `answers` to --version; `compiles` stands before a library is copied to ``$target``."""
        path = self.folder / "c++"
        path.write_text(copier.script(self.kernels, self.log, compiles, answers))
        path.chmod(0o700)
        self.environment["CXX"] = str(path)

    def compilers(self) -> list[int]:
        """The processes that have compiled."""
        return [int(pid) for pid in self.log.read_text().split()] if self.log.exists() else []

    def cached(self, shared: Source = LAUNCHER) -> list[Path]:
        """Puts the libraries into the cache, as a process before this one would have; gives their places.

        Args:
          shared: the source of the first one.
        """
        targets = []
        with mock.patch.dict(os.environ, {name: value for name, value in self.environment.items() if value}):
            for source, library in [(shared, self.kernels[0].library), *self.kernels[1:]]:
                key = build._key(source, cxx.flags_of_machine())
                targets.append(build._place(source, build._folder(), key, cxx.command()))
                build._make(targets[-1].parent)
                build._publish(library.read_bytes(), targets[-1])
        return targets

    def without_compiler(self) -> None:
        """As on a machine that has none."""
        self.environment |= {"CXX": None, "PATH": "/nowhere"}

    def start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | self.environment
        return subprocess.Popen(
            [sys.executable, "-c", self.before + SCRIPT],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


# ---- The faults ------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is done before a process starts, the backend it must end with, and what one line must say."""

    name: str
    do: Callable[[Scene], object]
    backend: str
    line: str


def _hangs(scene: Scene) -> None:
    scene.compiler("sleep 1000")
    scene.before = "from seqmnist_jax.rnn.native import compiler\ncompiler.COMPILE_SECONDS = 0.5\n"


def _garbage(scene: Scene) -> None:
    noise = scene.folder / "noise"
    noise.write_bytes(scene.draw.randbytes(1000))
    scene.compiler(f"cat {noise} >&2; exit 1", f"cat {noise}")


def _wrong_library(scene: Scene) -> None:
    noise = scene.folder / "noise"
    noise.write_bytes(scene.draw.randbytes(1000))
    scene.compiler(f'cp {noise} "$target"; exit')


def _truncated(scene: Scene) -> None:
    target = scene.cached()[0]
    with target.open("r+b") as file:
        file.truncate(scene.draw.randrange(target.stat().st_size))


def _flipped(scene: Scene, which: int = 0) -> None:
    target = scene.cached()[which]
    content = bytearray(target.read_bytes())
    content[scene.draw.randrange(len(content))] ^= 1 << scene.draw.randrange(8)
    target.write_bytes(content)


def _checksum_lost(scene: Scene) -> None:
    build._checksum_file(scene.cached()[0]).unlink()


def _checksum_damaged(scene: Scene) -> None:
    build._checksum_file(scene.cached()[0]).write_bytes(scene.draw.randbytes(scene.draw.randrange(100)))


def _stale(scene: Scene) -> None:
    """The kernel of other sources."""
    source = scene.folder / "launch.cc"
    source.write_text(LAUNCHER.files[0].read_text() + "// changed\n")
    scene.cached(LAUNCHER._replace(files=(source, *LAUNCHER.files[1:])))


def _other_cpu(scene: Scene) -> None:
    """The kernel of another machine, on a home folder that both have."""
    with mock.patch.object(build, "_cpu", return_value="another"):
        scene.cached()


def _compiler_gone(scene: Scene) -> None:
    scene.cached()
    scene.without_compiler()


def _in_the_way(scene: Scene) -> None:
    scene.cache.write_text("")


def _writable_by_others(scene: Scene) -> None:
    scene.cached()[0].parent.chmod(0o777)


def _no_locks(scene: Scene) -> None:
    scene.before = "import errno, fcntl\ndef lockf(*_): raise OSError(errno.ENOLCK, 'no locks')\nfcntl.lockf = lockf\n"


def _killed(scene: Scene) -> None:
    """A process before this one is killed while it compiles."""
    scene.compiler("sleep 2")
    with scene.start() as first:
        while not scene.compilers():
            time.sleep(0.01)
        time.sleep(scene.draw.uniform(0, 1))
        first.kill()


def _mount(scene: Scene, options: str) -> None:
    folder = scene.cache / "native"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(folder)], check=True)


# Of what all cells share; a cell's own has lines that say 'cell'.
BUILT = r"^Building a recurrence kernel with "
ALONE = r"^The recurrence kernel is built for this process alone: "
ANEW = r"^The recurrence kernel .* is damaged, and is built anew\.$"
NO_KERNEL = "has no native kernel for this cell and takes the slower 'fused' backend: .*"


def _fails(scene: Scene) -> None:
    scene.compiler("echo error: no such thing >&2; exit 1")


def _no_cell(scene: Scene) -> None:
    scene.compiler("case $source in */cell.cc) exit 1;; esac")


def _vanishes(scene: Scene) -> None:
    scene.compiler(answers='rm "$0"')


FAULTS = (
    Fault("no compiler", Scene.without_compiler, "fused", NO_KERNEL + "there is no C.. compiler"),
    Fault("no compiler, but a kernel in the cache", _compiler_gone, "native", "^The recurrence kernel is one that was"),
    Fault("a compiler that fails", _fails, "fused", NO_KERNEL + "error: no such thing"),
    Fault("a compiler that hangs", _hangs, "fused", NO_KERNEL + "has not built it within 0.5 seconds"),
    Fault("a compiler that vanishes", _vanishes, "fused", NO_KERNEL + "could not build it"),
    Fault("a compiler that prints garbage", _garbage, "fused", NO_KERNEL + "failed: "),
    Fault("a compiler that makes garbage", _wrong_library, "fused", NO_KERNEL + "does not load"),
    Fault("a truncated kernel", _truncated, "native", ANEW),
    Fault("a kernel with a bit flipped", _flipped, "native", ANEW),
    Fault("a cell's kernel with a bit flipped", lambda s: _flipped(s, 1), "native", ANEW.replace("recurrence", "cell")),
    Fault("a cell that cannot be built", _no_cell, "fused", "^Building a cell kernel with "),
    Fault("a kernel whose checksum is lost", _checksum_lost, "native", ANEW),
    Fault("a kernel whose checksum is damaged", _checksum_damaged, "native", ANEW),
    Fault("a kernel of other sources", _stale, "native", BUILT),
    Fault("a kernel of another CPU", _other_cpu, "native", BUILT),
    Fault("a cache folder that cannot be made", _in_the_way, "native", ALONE),
    Fault("a cache folder that others can write", _writable_by_others, "native", ALONE),
    Fault("a file system without locks", _no_locks, "native", BUILT),
    Fault("a build that was killed", _killed, "native", BUILT),
)
# These need a mount, so root.
MOUNTED_FAULTS = (
    Fault("a read-only cache folder", lambda s: _mount(s, "ro"), "native", ALONE),
    Fault("a full cache folder", lambda s: _mount(s, "size=64k"), "native", ALONE + ".*No space left"),
)


CAN_MOUNT = sys.platform == "linux" and os.geteuid() == 0


def wrong(process: subprocess.Popen[str], backend: str, line: str) -> str | None:
    """What is wrong with a process's end, or None."""
    out, err = process.communicate(timeout=PATIENCE)
    if process.returncode != 0 or "Traceback" in err:
        return f"exit code {process.returncode}: {err[-300:]}"
    if out.strip() != backend:
        return f"it took {out.strip()}, not {backend}: {err[-300:]}"
    said = re.findall(line, err, re.MULTILINE)
    return None if len(said) == 1 else f"{len(said)} lines said {line!r}: {err[-300:]}"


def one(fault: Fault, kernels: list[Built], draw: random.Random) -> str | None:
    """One try in a folder of its own; what is wrong with it, or None."""
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name), kernels, draw)
        private = scene.folder / "tmp"
        private.mkdir()
        scene.environment["TMPDIR"] = str(private)
        try:
            fault.do(scene)
            for left in private.iterdir():  # by a process that was killed
                shutil.rmtree(left)
            found = wrong(scene.start(), fault.backend, fault.line)
        finally:
            native = scene.cache / "native"
            if native.is_mount():
                subprocess.run(["umount", str(native)], check=True)
        running = [pid for pid in scene.compilers() if _is_running(pid, name)]
        for what, left in (("files", list(private.iterdir())), ("compilers", running)):
            if left and found is None:
                found = f"it left {what}: {left}"
        return found


def _is_running(pid: int, name: str) -> bool:
    try:
        return name in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def together(kernels: list[Built], processes: int) -> list[str]:
    """Processes that start at once on an empty cache: one builds, all take it. What is wrong, if anything."""
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name), kernels, random.Random(0))
        scene.compiler("sleep 1")
        started = [scene.start() for _ in range(processes)]
        ends = [process.communicate(timeout=PATIENCE) for process in started]
        found = [err[-300:] for out, err in ends if out.strip() != "native"]
        builders = sum(err.count("Building a recurrence kernel") for _, err in ends)
        if (builders, len(scene.compilers())) != (1, len(kernels)):
            found.append(f"{builders} of {processes} processes built it, {len(scene.compilers())} times")
        return found


# ---- The campaign ----------------------------------------------------------------------------


def campaign(tries: int, seed: int) -> list[Outcome]:
    """The build's faults dealt out in turn over `tries` processes, each at least once; `tries` shapes a sanitizer."""
    draw = random.Random(seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        with mock.patch.dict(os.environ, SEQMNIST_CACHE_DIR=name):
            kernels = copier.built(Path(name), "lstm")
        faults = FAULTS + (MOUNTED_FAULTS if CAN_MOUNT else ())
        each = -(-tries // (len(faults) + 1))
        for fault in faults:
            found = [what for _ in range(each) if (what := one(fault, kernels, draw))]
            outcomes.append(_outcome(fault.name, each, found, f"takes {fault.backend}"))
        processes = max(2, each)
        outcomes.append(
            _outcome("first uses at once", processes, together(kernels, processes), "one builds, all take it")
        )
        if not CAN_MOUNT:
            outcomes.append(Outcome("a read-only or full cache folder", 0, 0, 0, "not tried: mounting is for root"))
    return outcomes + sanitized(tries, -(-tries // 20), seed)


def _outcome(fault: str, tries: int, found: list[str], note: str) -> Outcome:
    return Outcome(fault, tries, tries - len(found), len(found), found[0] if found else note)


def sanitized(
    shapes: int, cells: int, seed: int, which: tuple[sanitizers.Sanitizer, ...] = sanitizers.ALL
) -> list[Outcome]:
    """So many cells' kernels on drawn shapes under each sanitizer."""
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        drawn = kernel_cases.draw_cells(cells, seed)
        cases = sanitizers.draw(drawn, shapes, seed, Path(name) / "cases")
        for sanitizer in which:
            fault = f"kernels under {sanitizer.name}"
            if sanitizers.runtime(sanitizer) is None:
                outcomes.append(Outcome(fault, 0, 0, 0, f"not tried: the compiler has no {sanitizer.runtime}"))
                continue
            built = sanitizers.build(sanitizer, drawn, Path(name) / str(sanitizer.runtime))
            found = sanitizers.run(sanitizer, built, cases)
            lost = len(found.findings)
            if lost:  # with the shape before it
                print(found.log[-20000:], file=sys.stderr, flush=True)
            note = found.findings[0] if lost else f"{found.shapes} shapes of {cells} cells, no finding"
            outcomes.append(Outcome(fault, found.shapes, max(0, found.shapes - lost), lost, note))
    return outcomes


def main() -> int:
    """Runs the sanitizers and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, default=500)
    parser.add_argument("--cells", type=int, default=30, help="the layers first, then random ones")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes = sanitized(arguments.shapes, arguments.cells, arguments.seed)
    for outcome in outcomes:
        print(f"{outcome.fault}: {outcome.tries} shapes, {outcome.lost} findings; {outcome.note}")
    return int(any(outcome.lost or not outcome.tries for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
