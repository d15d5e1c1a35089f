"""Files of checkpoints truncated, flipped, emptied and removed: each is noticed, or makes no difference."""

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs import row_lstm
from seqmnist_jax.analysis.trained import load
from seqmnist_jax.errors import SeqMnistError
from seqmnist_jax.training import train as training
from seqmnist_jax.training.replicas import QUIET, Watch
from seqmnist_jax.training.run import Run, build_run
from seqmnist_jax.workdir import files
from tests.faults import runs
from tests.faults.outcome import Outcome

STEPS, STOP = 60, 45
IMAGES = np.random.RandomState(0).randint(0, 256, (8, 28, 28), dtype=np.uint8)


def _flip(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    if flipped:
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "a bit flipped": _flip,
    "truncated": lambda content, draw: content[: draw.randrange(len(content) or 1)],
    "emptied": lambda content, draw: b"",
    "a page of zeros": lambda content, draw: content[:-4096] + bytes(min(4096, len(content))),
    "removed": lambda content, draw: None,
}


def campaign(tries: int, seed: int) -> list[Outcome]:
    """Damages one file of a checkpoint, then resumes the run, or loads the model; every file has its turn."""
    draw = random.Random(seed)
    run = build_run(_config())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, stopped = folder / "whole", folder / "stopped"
        _stop(run, stopped)
        shutil.copytree(stopped, whole)
        training.train(run, whole, watch=QUIET)
        logits = load(whole).logits(IMAGES)
        resumed = _each(
            "file of a checkpoint damaged, run resumed",
            stopped,
            tries - tries // 2,
            draw,
            lambda workdir: _resume(run, workdir, whole),
        )
        loaded = _each(
            "file of a checkpoint damaged, model loaded",
            whole,
            tries // 2,
            draw,
            lambda workdir: _load(workdir, logits),
        )
    return [resumed, loaded]


def _config():
    config = row_lstm.get_config()
    config.data.source = "embedded"
    config.model.hidden_size = 8
    config.train.batch_size = 16
    config.train.steps = STEPS
    config.train.eval_every = 20
    config.runtime.dispatch_seconds = 1e-9
    return config


def _stop(run: Run, workdir: Path) -> None:
    """A run that was stopped on its way."""
    steps_done = [0]
    try:
        training.train(
            run,
            workdir,
            watch=Watch(
                say=lambda line: None,
                show=lambda now: steps_done.append(now.step),
                should_stop=lambda: steps_done[-1] >= STOP,
            ),
        )
    except training.Stopped:
        return
    raise AssertionError("the run did not stop")


def _each(fault: str, template: Path, tries: int, draw: random.Random, use: Callable[[Path], str | None]) -> Outcome:
    """`use` says what went wrong, '' where the damage made no difference, 'detected' where it was said."""
    found: dict[str, int] = {}
    victims = sorted(path.relative_to(template) for path in (template / files.CHECKPOINTS).rglob("*") if path.is_file())
    wrong = []
    for number in range(tries):
        with tempfile.TemporaryDirectory() as name:
            workdir = Path(name) / "run"
            shutil.copytree(template, workdir)
            victim = victims[number % len(victims)]
            how = draw.choice(list(DAMAGES))
            damaged = DAMAGES[how]((workdir / victim).read_bytes(), draw)
            if damaged is None:
                (workdir / victim).unlink()
            else:
                (workdir / victim).write_bytes(damaged)
            try:
                verdict = use(workdir)
            except SeqMnistError:
                verdict = "detected"
            except Exception as e:
                verdict = f"{type(e).__name__}: {e}"
            kind = verdict if verdict in ("detected", "harmless") else "lost"
            found[kind] = found.get(kind, 0) + 1
            wrong += [f"{victim} {how}: {verdict}"] if kind == "lost" else []
    lost = found.get("lost", 0)
    note = f"{len(victims)} files; {found.get('detected', 0)} detected, {found.get('harmless', 0)} harmless"
    return Outcome(fault, tries, tries - lost, lost, "; ".join([note, *wrong]))


def _resume(run: Run, workdir: Path, whole: Path) -> str:
    said: list[str] = []
    summary = training.train(run, workdir, watch=Watch(say=said.append))
    was_told = any("is set aside" in line for line in said)
    if summary["lost_checkpoints"]:
        return "detected" if was_told else "a checkpoint is lost without a word"
    differs = runs.is_same(whole, workdir, with_checkpoints=False)
    if differs:
        return f"silently another result: {differs}"
    return "detected" if was_told else "harmless"


def _load(workdir: Path, logits: np.ndarray) -> str:
    if np.array_equal(load(workdir).logits(IMAGES), logits):
        return "harmless"
    return "silently another model"
