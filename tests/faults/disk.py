"""Disks that fill up or can't be written, while real processes train on them."""

import contextlib
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from seqmnist_jax.workdir import files
from tests.faults import runs
from tests.faults.outcome import Outcome

SIZE = "2m"


def campaign(tries: int, seed: int) -> list[Outcome]:
    """A disk that is full for a while, one that stays full, a folder that can't be written."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with _small_disk(folder / "probe"):
                pass
        except subprocess.CalledProcessError as e:
            return [Outcome("disk full or read-only", 0, 0, 0, f"skipped: no tmpfs can be mounted here ({e})")]
        code, _, errors = runs.finish(folder / "reference")
        assert code == 0, errors
        kinds = (
            ("disk full for a while during the run", _full_for_a_while, tries // 2),
            ("disk full to the end, then resumed", _full_to_the_end, tries - tries // 2),
            ("folder read-only, then resumed", _read_only, max(1, tries // 4)),
        )
        return [_each(fault, fails, count, folder, draw) for fault, fails, count in kinds]


def _each(fault, fails, tries, folder, draw) -> Outcome:
    wrong = []
    for number in range(tries):
        with _small_disk(folder / f"{fails.__name__}-{number}") as disk:
            found = fails(disk, folder / "reference", draw)
            wrong += [found] if found else []
    return Outcome(fault, tries, tries - len(wrong), len(wrong), "; ".join(wrong) or "all bit-identical")


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 10))
    return filler


def _wait_for_checkpoint(process, workdir: Path, draw: random.Random) -> None:
    wanted = draw.randrange(30, runs.STEPS // 2)
    while process.poll() is None and runs.progress(workdir) < wanted:
        time.sleep(0.002)


def _full_for_a_while(disk: Path, reference: Path, draw: random.Random) -> str | None:
    workdir = disk / "run"
    process = runs.start(workdir)
    _wait_for_checkpoint(process, workdir, draw)
    filler = _fill(disk)
    time.sleep(draw.uniform(0.2, 0.7))
    filler.unlink(missing_ok=True)
    code, _, errors = runs.end(process)
    return f"exit code {code}: {errors[-300:]}" if code else runs.is_same(reference, workdir)


def _full_to_the_end(disk: Path, reference: Path, draw: random.Random) -> str | None:
    workdir = disk / "run"
    process = runs.start(workdir)
    _wait_for_checkpoint(process, workdir, draw)
    filler = _fill(disk)
    code, out, errors = runs.end(process)
    if code != 1 or "error:" not in errors or "Traceback" in errors:
        return f"exit code {code} with a full disk: {errors[-300:]}"
    if "checkpoints can't be saved" not in out:
        return "the full disk was not said before the end"
    filler.unlink()
    return _resumed(workdir, reference)


def _read_only(disk: Path, reference: Path, draw: random.Random) -> str | None:
    workdir = disk / "run"
    process = runs.start(workdir)
    _wait_for_checkpoint(process, workdir, draw)
    process.kill()
    process.communicate()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, _, errors = runs.finish(workdir)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    if code != 1 or "error:" not in errors or "Traceback" in errors or str(workdir) not in errors:
        return f"exit code {code} in a read-only folder: {errors[-300:]}"
    return _resumed(workdir, reference)


def _resumed(workdir: Path, reference: Path) -> str | None:
    code, _, errors = runs.finish(workdir)
    if code or not (workdir / files.SUMMARY).exists():
        return f"exit code {code} when resumed: {errors[-300:]}"
    return runs.is_same(reference, workdir)
