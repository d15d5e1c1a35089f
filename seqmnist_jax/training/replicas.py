"""Runs that train together: a replica is one of them, with its folder; a group is all of them."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqmnist_jax.devices import processes
from seqmnist_jax.errors import Interrupted, SeqMnistError
from seqmnist_jax.training.clock import Clock, Progress, Status
from seqmnist_jax.training.programs import Divergence, Scores
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.state import TrainState
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import Checkpoints, rank
from seqmnist_jax.workdir.metrics import JsonLinesWriter, Scalars, read_events
from seqmnist_jax.workdir.tensorboard import TensorBoardWriter

Json = dict[str, Any]

# What to do about a run that diverged.
_LOWER = "Try a lower optimizer.learning_rate or optimizer.clip.norm, in a new work directory."
_AT_ONCE = (
    "No update came before it, so no rate will mend it: look in the model's equations for a division by zero, or the "
    "root or the logarithm of zero, whose gradient is infinite."
)


class Diverged(SeqMnistError):
    """The loss or a gradient is NaN or infinite."""


def print_at_once(line: str) -> None:
    """Prints a line, also into a pipe, when it is said. Where it can't be printed training goes on."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class Watch(NamedTuple):
    """Who is told how training goes, and may stop it.

    Attributes:
      say: takes each line meant for the user.
      show: told where the runs stand, after each dispatch and each line about them.
      should_stop: asked between dispatches; when true the runs save their state and stop.
    """

    say: Callable[[str], None] = print_at_once
    show: Callable[[Status], Any] = lambda status: None
    should_stop: Callable[[], bool] = lambda: False


ALOUD, QUIET = Watch(), Watch(say=lambda line: None)


class Job(NamedTuple):
    """A run that is asked for, and where it goes.

    Attributes:
      run: what is trained.
      folder: made, or resumed if it holds this run; None for one that only keeps its place in the program of others.
      command: how a user would start this run alone, for the record.
      name: in its sweep.
    """

    run: Run
    folder: Path | None
    command: str | None = None
    name: str = ""


@dataclasses.dataclass
class Replica:
    """One run of a group that trains.

    Attributes:
      place: among the runs of the program.
      run, workdir: what is trained, where it goes.
      command: how a user would start this run alone, for the record.
      is_new: whether its folder was made just now.
      check_place: raises `lock.Moved` where the folder is not in its place any more.
      checkpoints: what is saved of it.
      is_untold: whether it has done steps that no report tells of yet.
      metrics, tensorboard: take what it has to tell; opened once all is read that was told before.
      sittings: of each stretch of steps made in the same place by the same code the first, and that place and code.
      diverged: why training of it ended early; None while all is well.
      save_problem: why checkpoints can't be saved at the moment, as the user was told; None while they can.
    """

    place: int
    run: Run
    workdir: Path
    command: str | None = None
    is_new: bool = False
    check_place: Callable[[], None] = lambda: None
    checkpoints: Checkpoints = dataclasses.field(init=False)
    is_untold: bool = False
    metrics: JsonLinesWriter = dataclasses.field(init=False)
    tensorboard: TensorBoardWriter = dataclasses.field(init=False)
    sittings: list[Json] = dataclasses.field(default_factory=list)
    diverged: str | None = None
    save_problem: str | None = None

    @functools.cached_property
    def facts(self) -> Json:
        """What a checkpoint says of its run."""
        return {"config": self.run.config, "data": self.run.task.facts()}

    def measured(self) -> list[Json]:
        """The events that measured it for the selection."""
        split = self.run.task.measured_split
        return [event for event in read_events(self.workdir) if event["split"] == split]

    def lost_checkpoints(self, left: int | None, end: int) -> list[int]:
        """The step up to `end` that was measured as the best, where the best checkpoint that is left is not it."""
        steps = {one["step"]: rank(one) for one in self.measured()}
        ranks = {step: own for step, own in steps.items() if step <= end and self.run.is_measured(step)}
        if self.run.task.protocol.selection == "last" or left not in ranks:
            return []
        best = max(ranks, key=lambda step: ranks[step])
        return [best] if best != left else []

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Records numbers, named 'split/metric', that hold at `step`, in metrics.jsonl and for TensorBoard."""
        self.metrics.write_scalars(step, scalars)
        self.tensorboard.write_scalars(step, scalars)

    def flush(self) -> None:
        """Hands everything recorded so far to the operating system, metrics.jsonl to the disk.

        Raises:
          OSError: not all of metrics.jsonl could be written; nothing is lost.
        """
        self.metrics.sync()
        self.tensorboard.flush()

    def write_json(self, name: str, value: Json) -> None:
        """Writes a file of the folder, in the one process that writes."""
        self.check_place()
        if processes.is_main():
            files.write_json(self.workdir / name, value)


@dataclasses.dataclass
class ReplicaGroup:
    """What runs that are trained together work with from their start, or resumption, to their end.

    Attributes:
      runs: all runs of one program, also those that only keep their place in it, so that it stays the same one.
      replicas: those that train, or trained until they diverged.
      first_step: the step that they start from.
      clock: the time that all take together.
      watch: who is told of it.
      progress: how far they are; made when the step is known that they start from.
    """

    runs: Sequence[Run]
    replicas: Sequence[Replica]
    first_step: int
    clock: Clock
    watch: Watch
    progress: Progress = dataclasses.field(init=False)

    @property
    def run(self) -> Run:
        """Any of the runs, for what all have in common."""
        return self.replicas[0].run

    @property
    def active(self) -> np.ndarray:
        """Which runs train, bool [runs]."""
        training = {replica.place for replica in self.replicas if replica.diverged is None}
        return np.array([place in training for place in range(len(self.runs))])

    @property
    def where(self) -> Path:
        """The folder of all runs."""
        return self.replicas[0].workdir if len(self.replicas) == 1 else self.replicas[0].workdir.parent

    def clock_of_one(self) -> Clock:
        """The time that one run of this group accounts for."""
        return self.clock.divided(len(self.runs))

    def learning_rates(self, step: int) -> list[float]:
        """The rate of the step after `step` of each run, as the shortest decimal that names the float32."""
        factor = np.float32(self.run.learner.unit_rate(jnp.int32(step)))  # one program has one schedule
        rates = [np.float32(replica.run.learner.hyper.learning_rate) for replica in self.replicas]
        return [float(str(rate * factor)) for rate in rates]

    def show(self, step: int) -> None:
        """Shows where the runs stand."""
        self.watch.show(self.progress.status(self.learning_rates(step)))

    def say_progress(self, step: int, scores: Sequence[Scores]) -> None:
        """Says in one line where the runs stand, with the mean of each score over those that are active and report."""
        told = zip(scores, self.replicas, strict=True)
        of_active = [own for own, replica in told if replica.diverged is None and replica.is_untold]
        if of_active:
            means = {name: float(np.mean([own[name] for own in of_active])) for name in of_active[0]}
            self.watch.say(self.progress.line(means))
        self.show(step)

    def save(self, replica: Replica, state: TrainState, validated: Scores | None) -> None:
        """Begins to save a checkpoint of a run; what was measured of it where it was evaluated."""
        clock = dataclasses.asdict(self.clock_of_one())
        facts = {**replica.facts, "clock": clock, "sittings": replica.sittings}
        checkpoints = replica.checkpoints
        self._tell_problem(replica, self.clock.measure("checkpoint", checkpoints.wait))

        def first() -> None:
            replica.check_place()
            replica.flush()  # what a checkpoint follows must be on record before it

        self.clock.measure("checkpoint", lambda: checkpoints.save(state.split(), facts, validated, first=first))

    def tell_save_problems(self) -> None:
        """Says where checkpoints can't be saved, and where they can again."""
        for replica in self.replicas:
            if not replica.checkpoints.is_saving():
                self._tell_problem(replica, replica.checkpoints.wait())

    def _tell_problem(self, replica: Replica, problem: str | None) -> None:
        if problem and not replica.save_problem:
            self.watch.say(
                f"WARNING: {replica.workdir}: checkpoints can't be saved ({problem}). Training goes on, and tries "
                f"again with the next; the last good one is of step {replica.checkpoints.last_step() or 0}."
            )
        elif replica.save_problem and not problem:
            self.watch.say(f"{replica.workdir}: checkpoints are saved again.")
        replica.save_problem = problem

    def wait_for_saves(self) -> None:
        """Waits until all is saved.

        Raises:
          Interrupted: it can't be.
          Moved: a folder is not in its place any more.
        """
        for replica in self.replicas:
            replica.check_place()
            problem = self.clock.measure("checkpoint", replica.checkpoints.wait)
            if problem:
                raise Interrupted(
                    f"{replica.workdir} can't be saved ({problem}). Its last good checkpoint is of step "
                    f"{replica.checkpoints.last_step() or 0}: mend that, and the same command resumes there."
                )

    def mark_diverged(self, replica: Replica, what: Divergence | str, bad_step: int | None = None) -> None:
        """Ends a run that has diverged, and leaves a report of it beside its checkpoints, of which `bad_step` is none.

        Raises:
          Diverged: no run is left.
        """
        replica.checkpoints.wait()
        last = max((step for step in replica.checkpoints.steps() if step != bad_step), default=None)
        good = "There is no checkpoint before it" if last is None else f"The last good checkpoint is of step {last}"
        happened, facts, advice = what, {}, _LOWER
        if isinstance(what, Divergence):
            happened, facts = f"step {what.step}: {what.reason()}", what.facts()
            advice = _LOWER if what.step > 1 or what.is_finite() else _AT_ONCE
        replica.diverged = f"Training diverged at {happened}. {good}. {advice}"
        run = replica.run
        record = {"seed": run.learner.seed, "steps": run.steps, "identity": run.identity, "choice": run.choice}
        replica.write_json(files.DIVERGED, {"reason": replica.diverged, "last_checkpoint": last, **facts, **record})
        told = f"{replica.diverged} {replica.workdir / files.DIVERGED} says more."
        if len(self.replicas) > 1:
            self.watch.say(f"{replica.workdir.name}: {told}")
        if not self.active.any():
            raise Diverged(told if len(self.replicas) == 1 else "All replicas have diverged; see above.")

    def mark_infinite(self, step: int, split: str, logits: Sequence[np.ndarray]) -> None:
        """Ends the runs whose logits on a split, [count, classes] of each run of the program, are not finite.

        Raises:
          Diverged: no run is left.
        """
        for replica in self.replicas:
            bad = int((~np.isfinite(logits[replica.place])).any(-1).sum())
            if replica.diverged is None and bad:
                images = f"{bad:,} of {len(logits[replica.place]):,} images"
                self.mark_diverged(
                    replica, f"step {step}: the loss on {split} is not finite: the logits of {images}", step
                )
