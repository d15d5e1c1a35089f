"""How long a run spends on what, how far it is, and how fast it goes."""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

# A progress line at least this often (seconds), where evaluations are farther apart.
PROGRESS_SECONDS = 10.0
# The first dispatch measures the speed by which later ones are sized.
FIRST_DISPATCH_STEPS = 10


@dataclasses.dataclass
class Clock:
    """Seconds spent on each thing, over all sessions of a run. Nothing is timed without waiting for the device."""

    train: float = 0.0
    evaluate: float = 0.0
    checkpoint: float = 0.0
    compile: float = 0.0

    def measure(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, ready on the device; its seconds are added to `what`."""
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)
        return result

    def add(self, other: "Clock") -> None:
        """Adds another's seconds."""
        for name, seconds in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + seconds)

    def divided(self, count: float) -> "Clock":
        """The share of one of `count` runs that were timed together."""
        return Clock(**{name: seconds / count for name, seconds in dataclasses.asdict(self).items()})


class Status(NamedTuple):
    """Where a run stands, or several that train together, whose scores are then means.

    Attributes:
      step, total: how many steps are done, and of how many.
      rate: steps a second of the last dispatch; 0 before it.
      seconds_left: about how long it will take, with all that is not training; None before the first step.
      learning_rates: the least and the largest, of the next step.
      scores: what was last measured, by 'split/metric'.
      validated: the steps at which the runs were measured during training, and the accuracy there.
      runs: how many the program computes, also those that only keep their place.
    """

    step: int
    total: int
    rate: float
    seconds_left: float | None
    learning_rates: tuple[float, float]
    scores: Mapping[str, float]
    validated: Sequence[tuple[int, float]]
    runs: int


class Progress:
    """How far a run is and how fast it goes: sizes the dispatches and words the progress lines."""

    def __init__(self, step: int, total: int, clock: Clock, runs: int = 1, validated: Sequence[tuple[int, float]] = ()):
        """Begins at `step`, for so many runs; `validated` is what was measured before, as in `Status`."""
        self._total = total
        self._clock = clock
        self._runs = runs
        self._start = self._last_line = time.perf_counter()
        self._compiled_before = clock.compile
        self._first_step = self._step = self._window_step = step
        self._window_seconds = clock.train
        self._rate: float | None = None
        self._scores: dict[str, float] = {}
        self._validated = list(validated)

    def steps_within(self, seconds: float) -> int:
        """About how many steps fit into this time; at least one."""
        return FIRST_DISPATCH_STEPS if self._rate is None else max(1, math.floor(self._rate * seconds))

    def advance(self, step: int, train_seconds: float) -> None:
        """Notes that a dispatch brought the run to `step` in this time."""
        self._rate = (step - self._step) / max(train_seconds, 1e-9)
        self._step = step

    def close_window(self) -> float | None:
        """Steps a second of one run's share of the training time since the last call; None where there was no step."""
        steps_done, seconds = self._step - self._window_step, self._clock.train - self._window_seconds
        self._window_step, self._window_seconds = self._step, self._clock.train
        return steps_done * self._runs / max(seconds, 1e-9) if steps_done else None

    def is_due(self) -> bool:
        """Whether the user has waited long for a line."""
        return time.perf_counter() - self._last_line > PROGRESS_SECONDS

    def status(self, learning_rates: Sequence[float]) -> Status:
        """Where the runs stand, given the rate of each."""
        return Status(
            step=self._step,
            total=self._total,
            rate=self._rate or 0.0,
            seconds_left=self._seconds_left() if self._step > self._first_step else None,
            learning_rates=(min(learning_rates), max(learning_rates)),
            scores=dict(self._scores),
            validated=tuple(self._validated),
            runs=self._runs,
        )

    def _seconds_left(self) -> float:
        # What a start compiles is paid once: after a few steps it would stand for most of the time.
        passed = time.perf_counter() - self._start - (self._clock.compile - self._compiled_before)
        return passed / max(1, self._step - self._first_step) * (self._total - self._step)

    def line(self, scores: dict[str, float]) -> str:
        """Notes what was measured, and words it in a line: step, each split's loss and accuracy, speed, time left."""
        self._last_line = time.perf_counter()
        total = f"{self._total:,}"
        parts = [f"step {self._step:>{len(total)},}/{total}"]
        for split in [name.removesuffix("/loss") for name in scores if name.endswith("/loss")]:
            short = "val" if split == "validation" else split  # so that a line fits into 79 columns
            parts.append(f"{short} {scores[f'{split}/loss']:.3f} {scores[f'{split}/accuracy']:.2%}")
            if split != "train":
                self._validated.append((self._step, scores[f"{split}/accuracy"]))
        self._scores |= scores
        if self._rate is not None:
            parts.append(f"{self._rate:,.0f}/s" if self._rate >= 10 else f"{self._rate:.1f}/s")
            parts.append(f"{as_time(self._seconds_left())} left")
        return "  ".join(parts)


def as_time(seconds: float) -> str:
    """Seconds as '0:01:05'."""
    return str(datetime.timedelta(seconds=round(seconds)))
