"""Processes killed and stopped at random instants, then resumed: the result must be that of an undisturbed run."""

import random
import signal
import tempfile
import time
from pathlib import Path

from seqmnist_jax.workdir import files
from tests.faults import runs
from tests.faults.outcome import Outcome

KILLS_A_RUN = 5
# A process that was asked to stop is gone within this time.
MOST_SECONDS = 10.0


def campaign(tries: int, seed: int) -> list[Outcome]:
    """SIGKILL at random instants, SIGKILL in the middle of a save, SIGTERM and SIGINT at random instants."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, _, errors = runs.finish(folder / "reference")
        assert code == 0, errors
        kinds = {
            "SIGKILL at a random instant, resumed": (tries // 2, _kill_at_random),
            "SIGKILL while a checkpoint is written, resumed": (tries // 4, _kill_in_save),
            "SIGTERM or SIGINT at a random instant, resumed": (tries - tries // 2 - tries // 4, _ask_to_stop),
        }
        draw = random.Random(seed)
        return [_interrupted(kind, count, interrupt, folder, draw) for kind, (count, interrupt) in kinds.items()]


def _interrupted(kind, count, interrupt, folder, draw) -> Outcome:
    """Interrupts runs, each several times, until there are `count`; each run is then finished and compared."""
    done = survived = runs_made = 0
    notes = []
    while done < count:
        workdir = folder / f"{interrupt.__name__}-{runs_made}"
        runs_made += 1
        here, wrong = 0, None
        # A process may end before its instant comes: that is no try.
        for _ in range(3 * KILLS_A_RUN):
            if here == KILLS_A_RUN or done + here == count or wrong or (workdir / files.SUMMARY).exists():
                break
            process = runs.start(workdir)
            was_interrupted, wrong = interrupt(process, workdir, draw)
            here += was_interrupted
        if not wrong:
            code, _, errors = runs.finish(workdir)
            wrong = f"exit code {code}: {errors[-300:]}" if code else runs.is_same(folder / "reference", workdir)
        done += here
        survived += 0 if wrong else here
        notes += [wrong] if wrong else []
    return Outcome(kind, done, survived, done - survived, "; ".join(notes) or f"{runs_made} runs, all bit-identical")


def _wait(process, workdir, draw) -> bool:
    """Until a random instant: before the process trains, or after. Says whether it is there still."""
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0.0, 3.0))
    else:
        before = runs.progress(workdir)
        while process.poll() is None and runs.progress(workdir) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.4))
    return process.poll() is None


def _kill_at_random(process, workdir, draw) -> tuple[bool, str | None]:
    is_there = _wait(process, workdir, draw)
    process.kill()
    process.communicate()
    return is_there, None


def _kill_in_save(process, workdir, draw) -> tuple[bool, str | None]:
    """Kills at the first sight of a half-written checkpoint, after a few whole ones or none."""
    wait_until = runs.progress(workdir) + draw.choice((0, 30, 90, 210))
    while process.poll() is None:
        half = list((workdir / files.CHECKPOINTS).glob("*tmp*"))
        if half and runs.progress(workdir) >= wait_until:
            time.sleep(draw.uniform(0.0, 0.03))
            process.kill()
            process.communicate()
            return True, None
        time.sleep(0.0005)
    process.communicate()
    return False, None


def _ask_to_stop(process, workdir, draw) -> tuple[bool, str | None]:
    number = draw.choice((signal.SIGTERM, signal.SIGINT))
    _wait(process, workdir, draw)
    asked = time.monotonic()
    process.send_signal(number)
    code, out, errors = runs.end(process)
    seconds = time.monotonic() - asked
    if (workdir / files.SUMMARY).exists():
        return False, None  # it came after the end
    # Before the process trains there is nothing to save: the signal's own end, or Python's.
    fine = code == 128 + number or ("Compiled the training step" not in out and code in (-number, 1))
    if not fine or seconds > MOST_SECONDS:
        return True, f"{number.name}: exit code {code} after {seconds:.1f} s: {errors[-300:]}"
    return True, None
