"""Two processes on one folder, and clocks that jump."""

import random
import signal
import tempfile
import time
from pathlib import Path

from tests.faults import runs
from tests.faults.outcome import Outcome

# The time of day leaps by up to a year, either way, at every look.
JUMPING_CLOCK = """
import random, time
draw, real = random.Random({seed}), time.time
time.time = lambda: max(0.0, real() + draw.uniform(-3e7, 3e7))
"""


def campaign(tries: int, seed: int) -> list[Outcome]:
    """A second process on a folder in use; the time of day jumping while a run is killed and resumed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, _, errors = runs.finish(folder / "reference")
        assert code == 0, errors
        kinds = (("a second process on the same folder", _second), ("the clock jumps by up to a year", _clock))
        return [_each(fault, does, tries, folder, draw) for fault, does in kinds]


def _each(fault, does, tries, folder, draw) -> Outcome:
    wrong = [found for number in range(tries) if (found := does(folder / f"{does.__name__}-{number}", folder, draw))]
    return Outcome(fault, tries, tries - len(wrong), len(wrong), "; ".join(wrong) or "all bit-identical")


def _second(workdir: Path, folder: Path, draw: random.Random) -> str | None:
    first = runs.start(workdir)
    while first.poll() is None and runs.progress(workdir) == 0:
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.3))
    dies = draw.random() < 0.5
    # It waits, so that it has not ended before the second begins.
    first.send_signal(signal.SIGSTOP)
    code, _, errors = runs.finish(workdir)
    if code != 1 or f"process {first.pid}" not in errors or "Traceback" in errors:
        first.kill()
        return f"the second ended with {code}: {errors[-300:]}"
    first.send_signal(signal.SIGCONT)
    if dies:
        # Its death releases the folder, at once.
        first.kill()
        first.communicate()
        code, _, errors = runs.finish(workdir)
    else:
        code, _, errors = runs.end(first)
    return f"exit code {code}: {errors[-300:]}" if code else runs.is_same(folder / "reference", workdir)


def _clock(workdir: Path, folder: Path, draw: random.Random) -> str | None:
    before = JUMPING_CLOCK.format(seed=draw.randrange(1000))
    process = runs.start(workdir, before=before)
    while process.poll() is None and runs.progress(workdir) < draw.randrange(30, 300):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    code, _, errors = runs.end(runs.start(workdir, before=before))
    return f"exit code {code}: {errors[-300:]}" if code else runs.is_same(folder / "reference", workdir)
