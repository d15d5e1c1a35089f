"""metrics.jsonl: the numbers of a run, one JSON object a line for each step and split, written and read.

Scalars are named 'split/metric', as in 'validation/accuracy'.
"""

import contextlib
import json
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seqmnist_jax.workdir.files import METRICS, write_bytes

Scalars = Mapping[str, float | int]


class JsonLinesWriter:
    """One JSON object a line for each (step, split): {"step", "split", metrics...}.

    Lines that can't be written, because the disk is full, wait in memory for the next flush. It may
    be called from another thread.
    """

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._lock = threading.Lock()

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """One event for each split named in `scalars`."""
        events: dict[str, dict[str, Any]] = {}
        for name, value in scalars.items():
            split, _, metric = name.partition("/")
            events.setdefault(split, {"step": step, "split": split})[metric] = value
        with self._lock:
            self._waiting += b"".join(json.dumps(event, allow_nan=False).encode() + b"\n" for event in events.values())
        with contextlib.suppress(OSError):
            self.flush()  # for who follows the file

    def flush(self) -> None:
        """Hands all that waits to the operating system.

        Raises:
          OSError: not all could be written; nothing is lost.
        """
        with self._lock:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Hands all to the disk, so that it outlives a power cut; errors as of `flush`."""
        self.flush()
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):  # /dev/null lies on none
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self.flush()
        finally:
            self._file.close()


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """The whole events of metrics.jsonl; [] where there is no such file.

    A run that goes on may be about to write its last line.
    """
    path = workdir / METRICS
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            event = json.loads(line, parse_constant=_refuse)
            if isinstance(event, dict) and isinstance(event.get("step"), int) and "split" in event:
                events.append(event)
    return events


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def keep_events(workdir: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the events of metrics.jsonl that are not to be kept, and a half-written last line."""
    path = workdir / METRICS
    if path.exists():
        kept = [json.dumps(event) + "\n" for event in read_events(workdir) if keep(event)]
        write_bytes(path, "".join(kept).encode())
