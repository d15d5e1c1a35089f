"""Timing several programs against one another in one process, and writing down what came out.

Programs take turns, round by round. Before each measurement the same program runs untimed for a
while: the threads of PyTorch's OpenMP go on spinning after a call and would slow down whatever is
measured next. A measurement repeats its program until it lasts long enough for the clock.
"""

import dataclasses
import datetime
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from seqmnist_jax.workdir import files, provenance

# Does its work so many times and waits until it is done.
Program = Callable[[int], Any]
Say = Callable[[str], None]

PEERS = ("torch", "keras", "dm-haiku", "equinox")
# How long a program runs untimed before each measurement, at least, if the measurement is that long.
SETTLE_SECONDS = 0.3
MOST = 1_000_000


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that a program takes for its work once.

    Attributes:
      median, lower, upper: of the measurements, the latter two the quartiles.
      count: how many times one measurement repeats the work.
      measurements: how many there are.
    """

    median: float
    lower: float
    upper: float
    count: int
    measurements: int

    def shared(self, parts: int) -> "Timing":
        """The same for one of so many equal parts of the work."""
        times = {name: getattr(self, name) / parts for name in ("median", "lower", "upper")}
        return dataclasses.replace(self, **times)

    def facts(self) -> dict[str, float | int]:
        """As a row of JSON, in milliseconds."""
        return {
            "milliseconds": 1e3 * self.median,
            "lower_quartile": 1e3 * self.lower,
            "upper_quartile": 1e3 * self.upper,
            "repeats": self.count,
            "rounds": self.measurements,
        }


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: None) -> Program:
    """A program that makes a call again and again, and waits for the last one's result, if each does not by itself."""

    def run(count: int) -> None:
        for _ in range(count - 1):
            call()
        wait(call())

    return run


def seconds_of(program: Program, count: int) -> float:
    """How long a program takes for its work, `count` times over."""
    start = time.perf_counter()
    program(count)
    return time.perf_counter() - start


def _estimate(program: Program, seconds: float) -> float:
    """About how long the work takes once; its first time, which may compile, does not count."""
    program(1)
    count = 1
    while (elapsed := seconds_of(program, count)) < seconds / 4 and count < MOST:
        count *= 4
    return elapsed / count


def alternate(
    programs: Mapping[str, Program],
    *,
    rounds: int = 5,
    seconds: float = 1.0,
    least: int = 1,
    budget: float = math.inf,
    say: Say = print,
) -> dict[str, Timing]:
    """Measures programs in alternating rounds, every second round in reverse order.

    Args:
      programs: by name.
      rounds: measurements of each.
      seconds: how long one measurement lasts, about.
      least: how often it repeats the work at least, however long that takes.
      budget: seconds that all rounds of one program may take; one that would take longer is left out.
      say: told what is left out.

    Returns:
      The timings by name, in the order given.
    """
    counts, settling = {}, {}
    for name, program in programs.items():
        once = _estimate(program, seconds)
        count = min(max(math.ceil(seconds / once), least), MOST)
        settle = min(count, math.ceil(SETTLE_SECONDS / once))
        needed = rounds * (count + settle) * once
        if needed > budget:
            say(f"  {name} left out: it would take {needed:.0f} s, more than the budget of {budget:.0f} s")
        else:
            counts[name], settling[name] = count, settle
    samples: dict[str, list[float]] = {name: [] for name in counts}
    for index in range(rounds):
        for name in list(counts)[:: -1 if index % 2 else 1]:
            programs[name](settling[name])
            samples[name].append(seconds_of(programs[name], counts[name]) / counts[name])
    timings = {}
    for name, found in samples.items():
        lower, median, upper = (float(value) for value in np.percentile(found, [25, 50, 75]))
        timings[name] = Timing(median, lower, upper, counts[name], rounds)
    return timings


def define_names(flag: str, allowed: Sequence[str], meaning: str, usual: Sequence[str] = ()) -> None:
    """A flag that lists some of the allowed names; the usual ones, or all, where it is not given."""
    flags.DEFINE_list(flag, list(usual or allowed), meaning)
    flags.register_validator(
        flag, lambda names: set(names) <= set(allowed), message=f"expected some of {', '.join(allowed)}"
    )


def define_measuring(rounds: int, seconds: float) -> None:
    """The flags that say how to measure and where the figures go, with a command's usual values."""
    flags.DEFINE_integer("rounds", rounds, "Measurements of each; the median counts.")
    flags.DEFINE_float("seconds", seconds, "How long a measurement lasts, about.")
    flags.DEFINE_string("json", "", "A file for the same figures as JSON.")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    versions = provenance.versions()
    for peer in PEERS:
        try:
            versions[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            versions[peer] = None
    return {
        "device": provenance.device(),
        "platform": jax.default_backend(),
        "cores": cores(),
        "versions": versions,
        "commit": provenance.git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes figures with the facts about their origin; nothing where the path is empty."""
    if path:
        files.write_json(Path(path), {**content, **facts()})


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers with three digits, None as nothing."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return "" if value is None else str(value)

    lines = [list(header), ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
