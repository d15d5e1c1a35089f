"""Small runs as real processes, for the faults that are done to them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from seqmnist_jax.analysis.rerun import first_difference
from seqmnist_jax.cli import text
from seqmnist_jax.workdir import files
from tests.tiny import QUICK

ROOT = Path(__file__).parent.parent.parent
STEPS = 3000
SMALL = (
    "--config.data.source=embedded",
    "--config.model.hidden_size=8",
    "--config.train.batch_size=16",
    f"--config.train.steps={STEPS}",
    "--config.train.eval_every=100",
    "--config.runtime.checkpoint_every=30",
    "--config.runtime.dispatch_seconds=0.1",
)
# Of the summary, what does not depend on when and how often a run was interrupted.
RESULTS = (
    "test_accuracy",
    "test_loss",
    "test_calibration_error",
    "last_test_accuracy",
    "validation_accuracy",
    "best_step",
    "lost_checkpoints",
    "steps",
    "identity",
)
PATIENCE = 180


def start(workdir: Path, *arguments: str, before: str = "") -> subprocess.Popen[str]:
    """A process that trains the small run; `before` is Python that it runs first."""
    launch = [str(ROOT / "launch.py")]
    if before:
        launch = ["-c", f"import runpy\n{before}\nrunpy.run_path({launch[0]!r}, run_name='__main__')"]
    return subprocess.Popen(
        [
            sys.executable,
            *launch,
            f"--config={ROOT / 'configs' / 'row_lstm.py'}",
            f"--workdir={workdir}",
            *SMALL,
            *arguments,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "SEQMNIST_DATA_DIR"} | QUICK,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a process: its exit code and what it said."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\n(killed after {PATIENCE} s)"
    return process.returncode, out, err


def finish(workdir: Path, *arguments: str) -> tuple[int, str, str]:
    """Trains, or resumes, the small run to its end."""
    return end(start(workdir, *arguments))


def is_same(reference: Path, other: Path, *, with_checkpoints: bool = True) -> str | None:
    """What two finished runs differ in, times aside; None where all they left is the same.

    Args:
      reference, other: the work directories.
      with_checkpoints: whether checkpoints of the same steps must be left, too. One that was made because a
        stop was asked for is not made again.
    """
    summaries = [files.read_json(folder / files.SUMMARY) for folder in (reference, other)]
    for name in RESULTS:
        if summaries[0][name] != summaries[1][name]:
            return f"{name}: {summaries[0][name]} against {summaries[1][name]}"
    kept = [sorted(path.name for path in (folder / files.CHECKPOINTS).iterdir()) for folder in (reference, other)]
    if with_checkpoints and kept[0] != kept[1]:
        return f"checkpoints {kept[0]} against {kept[1]}"
    found = first_difference(reference, other)
    if found is not None:
        return text.difference(found._asdict())
    left = [path.name for path in other.rglob("*") if "tmp" in path.name or path.name.startswith(files.HALF_WRITTEN)]
    return f"half-written files are left: {left}" if left else None


def progress(workdir: Path) -> int:
    """The newest checkpoint's step; 0 before there is one."""
    with contextlib.suppress(OSError):
        names = [path.name for path in (workdir / files.CHECKPOINTS).iterdir()]
        return max((int(name) for name in names if name.isdigit()), default=0)
    return 0


def events(workdir: Path) -> list[dict[str, object]]:
    """The events of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / files.METRICS).read_text().splitlines()]
