"""Seconds from `make run` to the first training step, with no compiled program cached.

    python benchmarks/startup.py

The environment must be built (`make setup`). A run of one step prints its first progress
line after that step and the evaluation behind it, so the figure bounds the time to the
step from above. The process's own first start, with cold disk caches, is the first row.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRIES = 3


def seconds_to_first_step(workdir: str) -> float:
    """Runs `make run` for one step and returns when its progress line came."""
    arguments = f"--config.train.steps=1 --workdir={workdir} --config.runtime.compilation_cache=none"
    start = time.perf_counter()
    with subprocess.Popen(
        ["make", "--no-print-directory", "run", f"ARGS={arguments}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                found = time.perf_counter() - start
                process.communicate()
                return found
    sys.exit("The run ended before its first step.")


if __name__ == "__main__":
    for attempt in range(TRIES):
        with tempfile.TemporaryDirectory() as folder:
            print(f"start {attempt + 1}: {seconds_to_first_step(f'{folder}/run'):.1f} s to the first step")
