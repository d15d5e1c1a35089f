"""A long run, watched from outside: does its memory grow, does it slow down?

    python -m benchmarks.soak [--config=configs/row_lstm.py] [--steps=200000] [--json=FILE]

Trains by launch.py as a process. Resident memory is read every second (Linux); the rate is what the run
itself wrote. Compared are the first and the last tenth of the run, after the first twentieth, in which it
compiles and makes its caches.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks import timing
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.metrics import read_events

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent
REPORTS = 100


def define_flags() -> None:
    """The flags of this module as a command."""
    flags.DEFINE_string("config", "configs/row_lstm.py", "What is trained.")
    flags.DEFINE_integer("steps", 200_000, "How many steps.")
    flags.DEFINE_string("json", "", "Where the measurements go.")


def resident_mib(pid: int) -> float:
    """The resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def watch(workdir: Path) -> list[tuple[float, float]]:
    """Trains, and gives (seconds, MiB) all the while."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "launch.py"),
            f"--config={ROOT / FLAGS.config}",
            f"--workdir={workdir}",
            f"--config.train.steps={FLAGS.steps}",
            f"--config.train.eval_every={FLAGS.steps // REPORTS}",
            "--quiet",
        ],
        cwd=ROOT,
    )
    samples, start = [], time.monotonic()
    while process.poll() is None:
        if (workdir / files.METRICS).exists():
            samples.append((time.monotonic() - start, resident_mib(process.pid)))
        time.sleep(1.0)
    if process.returncode:
        raise SystemExit(f"The run ended with exit code {process.returncode}.")
    return samples


def tenths(values: list[float]) -> tuple[float, float]:
    """The medians of the first and the last tenth, after the first twentieth."""
    values = values[len(values) // 20 :]
    tenth = max(1, len(values) // 10)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:])


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    del argv
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name) / "run"
        samples = watch(workdir)
        events = read_events(workdir)
    rates = [event["steps_per_second"] for event in events if event["split"] == "train"]
    rows = []
    for name, values in (("resident memory, MiB", [mib for _, mib in samples]), ("steps a second", rates)):
        first, last = tenths(values)
        rows.append([name, first, last, 100.0 * (last / first - 1.0)])
    print(timing.markdown([f"{FLAGS.steps:,} steps of {FLAGS.config}", "start", "end", "change, %"], rows))
    timing.write_json(FLAGS.json, {"memory": samples, "rates": rates, "steps": FLAGS.steps})


if __name__ == "__main__":
    define_flags()
    app.run(main)
