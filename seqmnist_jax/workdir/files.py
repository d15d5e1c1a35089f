"""A run's folder: which files it has, and how each is read and written whole."""

import contextlib
import glob
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from seqmnist_jax.data.idx import HALF_WRITTEN, replacing
from seqmnist_jax.errors import SeqMnistError

CONFIG = "config.json"
DATA = "data.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PREDICTIONS = "predictions.npz"
DIVERGED = "diverged.json"
ENVIRONMENT = "environment.json"
# Of a sweep: what it is, and the folder of its runs.
SWEEP = "sweep.json"
REPLICAS = "replicas"
# Of a sweep that chooses hyperparameters: the sweep of its trials.
TRIALS = "trials"
CHECKPOINTS = "checkpoints"


class WorkdirError(SeqMnistError):
    """A work directory lacks what is asked of it, or belongs to another run."""


def matching(text: str) -> list[Path]:
    """What is there under a name; where nothing is, what the name matches as a pattern of a shell."""
    path = Path(os.path.expanduser(text))  # which leaves the tilde of an unknown user
    # A long list of names is no name, of which `Path.exists` makes an error.
    return [path] if os.path.exists(path) else sorted(map(Path, glob.glob(str(path))))


def under(folder: Path, name: str) -> list[Path]:
    """The files of a name in and below a folder, but for those of the trials of sweeps there."""

    found, seen = [], set[Path]()
    for where, below, names in os.walk(folder, followlinks=True):
        place = Path(where)
        if (real := place.resolve()) in seen or (place != folder and has_trials(place)):  # links may lead in a circle
            below.clear()
            continue
        below.sort()  # of two names of a folder always the same one counts
        seen.add(real)
        found += [place / name] if name in names else []
    return found


def has_trials(folder: Path) -> bool:
    """Whether a folder is that of a sweep's trials, and not just of their name."""
    if folder.name != TRIALS:
        return False
    with contextlib.suppress(WorkdirError):  # an earlier version's does not say it
        return bool(read_json(folder / SWEEP).get(TRIALS, True))
    return (folder / SWEEP).exists() or (folder.parent / SWEEP).exists()


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replaces `path` by what `write` writes, or leaves it as it was; a device, as /dev/stdout, is written to."""
    # The process's own output may lead into a file, which is neither to be replaced nor to be begun anew.
    if own := {"/dev/stdout": sys.stdout, "/dev/stderr": sys.stderr}.get(str(path)):
        own.flush()
        with os.fdopen(os.dup(1 if own is sys.stdout else 2), "wb") as file:
            return write(file)
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            return write(file)
    with replacing(path) as file:
        write(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, atomically."""
    _write_whole(path, lambda file: file.write(content))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, indented for people, atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def remove_half_written(workdir: Path) -> None:
    """Removes what a process that died while it wrote has left. Only the folder's owner may call this."""
    for path in workdir.glob(f"{HALF_WRITTEN}*"):
        path.unlink(missing_ok=True)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a compressed .npz, atomically."""
    _write_whole(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def run_around(place: Path) -> Path | None:
    """The nearest run's folder in which a place lies; None where it lies in none."""
    return next((folder for folder in place.absolute().parents if (folder / CONFIG).exists()), None)


def read_json(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads a JSON file of a run.

    Args:
      path: the file.
      needed: the keys that it must have.

    Raises:
      WorkdirError: it is missing, or not JSON, or no object with these keys.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        around = run_around(path.parent)
        raise WorkdirError(
            f"{path} does not exist; expected a work directory that `launch.py --mode=train` made."
            + (f" Did you mean {around}?" if around else "")
        ) from None
    except (OSError, ValueError) as e:
        raise WorkdirError(f"{path} can't be read as JSON ({e}).") from e
    missing = [key for key in needed if not isinstance(value, dict) or key not in value]
    if not isinstance(value, dict) or missing:
        raise WorkdirError(f"{path} is not that of a run: it lacks {', '.join(missing) or 'an object'}.")
    return value


def read_config(workdir: Path) -> dict[str, Any]:
    """A run's config, in its JSON form."""
    return read_json(workdir / CONFIG, needed=("data", "model", "optimizer", "train", "runtime", "seed"))


# Of a run's facts, what decides how a model reads an image, and on which data it was trained.
OF_READING = ("content_hash", "view", "image_shape", "scaling", "permutation_indices", "split", "selection")


def read_facts(workdir: Path) -> dict[str, Any]:
    """What a run knows of its data, as `Task.facts` gave it.

    Raises:
      WorkdirError: the file is missing or damaged, or the folder is that of a sweep, which is no run.
    """
    if (workdir / SWEEP).exists():
        raise WorkdirError(f"{workdir} holds a sweep; name one of its runs, in {workdir / REPLICAS}.")
    return read_json(workdir / DATA, needed=("name", "source", "num_classes", *OF_READING))
