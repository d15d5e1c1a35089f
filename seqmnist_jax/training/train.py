"""Training: from a run, or several of one program, to work directories with results. Read it top to bottom."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from seqmnist_jax.data.task import SPLITS
from seqmnist_jax.devices import processes
from seqmnist_jax.devices.profiling import StepTrace
from seqmnist_jax.devices.trees import stack, unstack
from seqmnist_jax.errors import SeqMnistError, UsageError
from seqmnist_jax.training import records
from seqmnist_jax.training.clock import Clock, Progress, Standing
from seqmnist_jax.training.programs import Divergence, Programs, Scores
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.scores import score
from seqmnist_jax.training.state import TrainState, as_numbers
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files, provenance
from seqmnist_jax.workdir.checkpoints import CheckpointError, Checkpoints
from seqmnist_jax.workdir.lock import owned
from seqmnist_jax.workdir.metrics import keep_events
from seqmnist_jax.workdir.recorder import Recorder

Say = Callable[[str], None]
Json = dict[str, Any]


def print_at_once(line: str) -> None:
    """Prints a line, also into a pipe, when it is said."""
    print(line, flush=True)


class Diverged(SeqMnistError):
    """The loss or a gradient is NaN or infinite."""


class Stopped(SeqMnistError):
    """The run was asked to stop and has saved where it stands."""


def open_workdir(run: Run, workdir: Path) -> None:
    """Makes a new run of a folder, which is there, or checks that the folder holds this very run.

    Raises:
      WorkdirError: it holds another run; the message names the fields that differ.
    """
    if (workdir / files.CONFIG).exists():
        old = configs.from_json(files.read_config(workdir))
        _check_identity(run, old, files.read_facts(workdir)["content_hash"], str(workdir))
    elif (workdir / files.CHECKPOINTS).exists():
        raise files.WorkdirError(
            f"{workdir} has checkpoints but no {files.CONFIG}, so it can't be told whose they are. "
            "Put the file back, or choose another --workdir."
        )
    else:
        record(run, workdir)


def record(run: Run, workdir: Path) -> None:
    """Writes what the run is, and what it runs in."""
    files.write_json(workdir / files.DATA, run.task.facts())
    files.write_json(workdir / files.ENVIRONMENT, provenance.environment())
    files.write_json(workdir / files.CONFIG, run.config)


def _check_identity(run: Run, config: ml_collections.ConfigDict, content_hash: str, where: str) -> None:
    differing = configs.differences(configs.identity(config, content_hash), run.identity)
    if differing:
        raise files.WorkdirError(
            f"{where} holds another run; it differs in\n  " + "\n  ".join(differing) + "\n"
            "Give the old values to resume it, or another --workdir for a new run."
        )


@dataclasses.dataclass
class Seat:
    """One run in a sitting.

    Attributes:
      run, workdir, checkpoints: what is trained, where it goes, what of it is saved.
      command: how a user would start this run alone, for the record.
      diverged: why training of it ended early; None while all is well.
      lost: the steps of checkpoints that were kept as the best, but could not be read any more.
      problem: why checkpoints can't be saved at the moment, as the user was told; None while they can.
    """

    run: Run
    workdir: Path
    checkpoints: Checkpoints
    command: str | None
    diverged: str | None = None
    lost: list[int] = dataclasses.field(default_factory=list)
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Sitting:
    """What runs that are trained together work with from their start, or resumption, to their end.

    `origin` is what all have in common: versions, device, commit.
    """

    seats: Sequence[Seat]
    origin: Json
    clock: Clock
    say: Say
    tick: Callable[[Standing], None]
    should_stop: Callable[[], bool]

    @property
    def run(self) -> Run:
        """Any of the runs, for what all have in common."""
        return self.seats[0].run

    @property
    def alive(self) -> np.ndarray:
        """Which runs have not diverged, bool [runs]."""
        return np.array([seat.diverged is None for seat in self.seats])

    def share(self) -> Clock:
        """The time that one run of this sitting accounts for."""
        return self.clock.divided(len(self.seats))

    @property
    def where(self) -> Path:
        """The folder of all runs."""
        return self.seats[0].workdir if len(self.seats) == 1 else self.seats[0].workdir.parent

    def save(self, seat: Seat, writer: Recorder, state: TrainState, validated: Scores | None) -> None:
        """Begins to save a checkpoint of a run; what was measured of it where it was evaluated."""
        clock = dataclasses.asdict(self.share())
        facts = {"config": seat.run.config, "data": seat.run.task.facts(), "clock": clock, "lost": seat.lost}
        facts |= self.origin
        self._tell(seat, self.clock.measure("checkpoint", seat.checkpoints.wait))
        # What a checkpoint follows must be on record before it.
        self.clock.measure("checkpoint", lambda: seat.checkpoints.save(state, facts, validated, first=writer.flush))

    def tell_problems(self) -> None:
        """Says where checkpoints can't be saved, and where they can again."""
        for seat in self.seats:
            if not seat.checkpoints.is_saving():
                self._tell(seat, seat.checkpoints.wait())

    def _tell(self, seat: Seat, problem: str | None) -> None:
        if problem and not seat.problem:
            self.say(
                f"WARNING: {seat.workdir}: checkpoints can't be saved ({problem}). Training goes on, and tries "
                f"again with the next; the last good one is of step {seat.checkpoints.last_step() or 0}."
            )
        elif seat.problem and not problem:
            self.say(f"{seat.workdir}: checkpoints are saved again.")
        seat.problem = problem

    def settle(self) -> None:
        """Waits until all is saved.

        Raises:
          CheckpointError: it can't be.
        """
        for seat in self.seats:
            problem = self.clock.measure("checkpoint", seat.checkpoints.wait)
            if problem:
                raise CheckpointError(
                    f"{seat.workdir} can't be saved ({problem}). Its last good checkpoint is of step "
                    f"{seat.checkpoints.last_step() or 0}: mend that, and the same command resumes there."
                )


def train(run: Run, workdir: Path, *, command: str | None = None, **watch: Any) -> Json:
    """Trains one run to its end, from the start or from its last checkpoint.

    Args:
      run: as `build_run` makes it.
      workdir: the run's folder; made, or resumed if it holds this run.
      command: how a user would start this run, for the record.
      **watch: as in `train_replicas`.

    Returns:
      The summary, as written to summary.json.

    Raises:
      as `train_replicas`.
    """
    (summary,) = train_replicas([run], [workdir], commands=[command], **watch)
    assert summary is not None
    return summary


def train_replicas(
    runs: Sequence[Run],
    workdirs: Sequence[Path],
    *,
    commands: Sequence[str | None],
    say: Say = print_at_once,
    tick: Callable[[Standing], None] = lambda standing: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Json | None]:
    """Trains runs of one program together, as replicas, each into its own folder.

    Each run gives what it would give alone, up to the rounding of products that are made together.
    One that diverges stands still, is reported, and leaves the others as they are.

    Args:
      runs: of the same `Run.program`.
      workdirs: their folders; each is made, or resumed if it holds its run.
      commands: how a user would start each alone, for the record.
      say: takes each line meant for the user.
      tick: told where the runs stand, after each dispatch and each line about them.
      should_stop: asked between dispatches; when true the runs save their state and stop.

    Returns:
      The summary of each, as written to its summary.json; None of one that diverged.

    Raises:
      WorkdirError: a folder holds another run.
      InUse: another process works in a folder.
      CheckpointError: the last checkpoint can't be saved.
      TooLarge: the program needs more memory than there is.
      Diverged: of all runs the loss, a gradient or a parameter is not finite.
      Stopped: `should_stop` said so.
    """
    with ExitStack() as exits, _explaining_full_disk(workdirs):
        _open(exits, runs, workdirs)
        seats = [
            Seat(run, workdir, exits.enter_context(Checkpoints(workdir / files.CHECKPOINTS)), command)
            for run, workdir, command in zip(runs, workdirs, commands, strict=True)
        ]
        sitting = Sitting(seats, provenance.origin(), Clock(), say, tick, should_stop)
        step = _common_step(sitting)
        summaries = [finished(seat.workdir, step) if step == seat.run.steps else None for seat in seats]
        if processes.agree(all(summaries)):
            say(f"{sitting.where} is finished: all its {step} steps are done.")
            return list(summaries)
        states = stack([_begin(sitting, seat, step) for seat in seats])
        processes.wait("all have read what is there")
        if processes.is_main():
            for seat in seats:
                _clear(seat, step)
                record(seat.run, seat.workdir)  # a resumed run may have more steps, or its data in another place
        _announce(sitting, states, step)
        writers = [exits.enter_context(closing(_writer(seat, step))) for seat in seats]
        compiled_before = sitting.clock.compile
        programs = Programs(runs, states, sitting.clock)
        say(f"Compiled the training step in {sitting.clock.compile - compiled_before:.1f} s. {programs.memory_plan}")
        if step == 0:
            for seat, writer in zip(seats, writers, strict=True):
                records.introduce(writer.tensorboard, seat.run, programs.traced)
        trace = exits.enter_context(StepTrace(sitting.where, runs[0].profile_steps))
        states = _train_loop(sitting, programs, writers, programs.place(states), step, trace)
        return list(_test(sitting, programs, writers, states))


@contextmanager
def _explaining_full_disk(workdirs: Sequence[Path]) -> Iterator[None]:
    """Says what a failure to write means for the runs."""
    try:
        yield
    except OSError as e:
        where = e.filename or workdirs[0]
        raise files.WorkdirError(
            f"{where} can't be written ({e.strerror or e}). What was saved before is whole: mend that, and the same "
            "command resumes from the last checkpoint."
        ) from e


def _open(stack: ExitStack, runs: Sequence[Run], workdirs: Sequence[Path]) -> None:
    """Opens the folders; process 0 first, which owns them and makes what the others find."""
    if not processes.is_main():
        processes.wait("folders")
    for run, workdir in zip(runs, workdirs, strict=True):
        if processes.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owned(workdir))
            files.remove_half_written(workdir)
        open_workdir(run, workdir)
    if processes.is_main():
        processes.wait("folders")


def _writer(seat: Seat, step: int) -> Recorder:
    return Recorder(seat.workdir, first_step=step + 1, writes=processes.is_main())


def _common_step(sitting: Sitting) -> int:
    """The step to go on from: the last of which every run has a checkpoint; 0 where there is none.

    What any run has beyond it, after the process died among their checkpoints, is made again, and so
    is what is damaged.
    """
    damaged = {}
    for seat in sitting.seats:
        damaged[seat.workdir] = seat.checkpoints.set_aside_damaged(seat.run.learner.template())
        for told in damaged[seat.workdir].values():
            sitting.say(f"WARNING: {told}")
    processes.wait("damaged checkpoints are set aside")
    for seat in sitting.seats:
        seat.checkpoints.refresh()
    step = max(set.intersection(*(set(seat.checkpoints.steps()) for seat in sitting.seats)), default=0)
    step = processes.agree(step)
    for seat in sitting.seats:
        last = seat.checkpoints.last_step() or 0
        if last > seat.run.steps:
            raise UsageError(f"{seat.workdir} has done {last} steps already, but train.steps is {seat.run.steps}.")
        seat.checkpoints.drop_after(step)
        seat.lost = [one for one in damaged[seat.workdir] if one < step]
        if seat.lost:
            sitting.say(
                f"WARNING: {seat.workdir}: checkpoint {', '.join(map(str, seat.lost))} was the best by validation. "
                "The result will be that of the best of the others, and its summary says so."
            )
    return step


def _begin(sitting: Sitting, seat: Seat, step: int) -> TrainState:
    """The state to start from: a checkpoint's, with its clock, or a new one."""
    run, checkpoints = seat.run, seat.checkpoints
    if step == 0:
        return jax.jit(run.learner.init_from)(run.learner.seed, run.learner.hyper)
    metadata = checkpoints.metadata(step)
    _check_identity(
        run,
        configs.from_json(metadata["config"]),
        metadata["data"]["content_hash"],
        f"{seat.workdir}, checkpoint {step},",
    )
    seat.lost += metadata.get("lost", [])
    sitting.clock.add(Clock(**metadata["clock"]))
    return checkpoints.restore(step, run.learner.template())


def finished(workdir: Path, step_count: int) -> Json | None:
    """The summary of a run that is finished at this number of steps; None where it is not."""
    path = workdir / files.SUMMARY
    summary = files.read_json(path) if path.exists() else {}
    return summary if summary.get("steps") == step_count else None


def _clear(seat: Seat, step: int) -> None:
    """Removes what an earlier, shorter run left as its result, and what it recorded after the checkpoint."""
    for name in (files.SUMMARY, files.PREDICTIONS, files.DIVERGED):
        (seat.workdir / name).unlink(missing_ok=True)
    keep_events(seat.workdir, lambda event: event["step"] <= step and event["split"] != "test")


def _announce(sitting: Sitting, states: TrainState, step: int) -> None:
    """The first lines: the parameters, the data, where it all goes."""
    run, task, say, count = sitting.run, sitting.run.task, sitting.say, len(sitting.seats)
    if task.dataset.warning:
        say(f"\n{'!' * 78}\nWARNING: {task.dataset.warning}\n{'!' * 78}\n")
    say(clu.parameter_overview.get_parameter_overview(unstack(states, count)[0].params, include_stats=False))
    sizes = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"Data: {task.dataset.name} ({task.dataset.source}): {sizes}; permutation {task.protocol.permutation}.")
    start = f"Resuming at step {step}" if step else "Training"
    where = sitting.where if count == 1 else f"{count} replicas of {sitting.where}"
    say(f"{start}: {run.steps} steps of {run.batch_size}, in {where}")


def _train_loop(
    sitting: Sitting,
    programs: Programs,
    writers: Sequence[Recorder],
    states: TrainState,
    step: int,
    trace: StepTrace,
) -> TrainState:
    """Dispatch steps up to the next point where the host has something to do; do it; repeat."""
    run, clock, seats = sitting.run, sitting.clock, sitting.seats
    progress = Progress(step, run.steps, clock, runs=len(seats), validated=_validated(seats))
    saved_at = time.perf_counter()
    # A stop came between the last steps and their report.
    owes_report = step > 0 and step % run.eval_every == 0 and _has_metrics(unstack(states, len(seats)))
    while step < run.steps or owes_report:
        # 1. Steps, as many as may pass without the host, in a dispatch of bounded time.
        if not owes_report:
            ends = [step + progress.steps_within(run.dispatch_seconds), run.steps]
            ends += [step + every - step % every for every in (run.eval_every, run.checkpoint_every)]
            ends += trace.ends(step)
            trace.at(step)
            before = clock.train
            states, step, alive = programs.train(states, step, processes.agree(min(ends) - step), sitting.alive)
            if (alive != sitting.alive).any():
                apart = unstack(states, len(seats))
                for index, (seat, writer) in enumerate(zip(seats, writers, strict=True)):
                    if seat.diverged is None and not alive[index]:
                        good = int(apart[index].step)
                        seat.checkpoints.wait()
                        if good not in (0, seat.checkpoints.last_step()):
                            sitting.save(seat, writer, apart[index], None)
                        _retire(sitting, seat, programs.divergence(index, apart[index]))
            trace.at(step)
            progress.advance(step, clock.train - before)
        owes_report = False
        rates = _learning_rates(seats, step)
        sitting.tick(progress.standing(rates))

        # 2. Metrics, unless it is asked to stop: then the resumed run makes them.
        validated: list[Scores | None] = [None] * len(seats)
        is_end = step == run.steps
        stopping = processes.any_of(sitting.should_stop()) and not is_end
        is_report = (step % run.eval_every == 0 or is_end) and not stopping
        trained: list[Scores] = []
        if is_report or processes.agree(progress.is_due()):
            apart = unstack(states, len(seats))
            trained = [as_numbers(state.metrics) for state in apart]
        if is_report:
            times = {"steps_per_second": progress.close_window(), "seconds": sitting.share().train}
            scores = [
                {f"train/{name}": value for name, value in (one | times | {"learning_rate": rate}).items()}
                for one, rate in zip(trained, rates, strict=True)
            ]
            split = run.task.measured_split
            logits: list[np.ndarray | None] = [None] * len(seats)
            if run.task.part(split):
                for index, (found, logits[index]) in enumerate(programs.evaluate(states.variables, split)):
                    if seats[index].diverged is None and not math.isfinite(found["loss"]):
                        _retire(sitting, seats[index], f"step {step}: the loss on {split} is {found['loss']}")
                    validated[index] = found
                    scores[index] |= {f"{split}/{name}": value for name, value in (found | times).items()}
            for seat, writer, state, told, said in zip(seats, writers, apart, scores, logits, strict=True):
                if seat.diverged is None:
                    writer.write_scalars(step, told)
                    records.write_histograms(writer.tensorboard, run, state)
                    if said is not None and records.has_pictures(run, step):
                        records.write_pictures(writer.tensorboard, run, step, split, said)
            if step % run.eval_every == 0:  # not at an end between evaluations, which more steps may pass over
                states = programs.place(states.replace(metrics=jax.tree.map(jnp.zeros_like, states.metrics)))
            sitting.say(progress.line(_mean(sitting, scores)))
            sitting.tick(progress.standing(rates))
        elif trained:
            scores = [{f"train/{name}": value for name, value in one.items()} for one in trained]
            sitting.say(progress.line(_mean(sitting, scores)))
            sitting.tick(progress.standing(rates))

        # 3. A checkpoint: wherever a model was measured that may turn out the best, and when it is time.
        is_time = run.checkpoint_seconds > 0 and processes.any_of(
            time.perf_counter() - saved_at > run.checkpoint_seconds
        )
        if any(validated) or step % run.checkpoint_every == 0 or is_time or is_end or stopping:
            apart = unstack(states, len(seats))
            for seat, writer, state, measured in zip(seats, writers, apart, validated, strict=True):
                if seat.diverged is None:
                    sitting.save(seat, writer, state, measured)
            saved_at = time.perf_counter()
        sitting.tell_problems()
        if stopping:
            break
    sitting.settle()
    if processes.any_of(sitting.should_stop()):
        raise Stopped(f"Stopped at step {step} of {run.steps}; saved. The same command resumes {sitting.where}.")
    return states


def _has_metrics(apart: Sequence[TrainState]) -> bool:
    """Whether any state has training metrics that were not reported."""
    return any(int(state.metrics.loss.count) > 0 for state in apart)


def _mean(sitting: Sitting, scores: Sequence[Scores]) -> Scores:
    """The mean of each score over the runs that are alive."""
    alive = [one for one, is_alive in zip(scores, sitting.alive, strict=True) if is_alive]
    return {name: float(np.mean([one[name] for one in alive])) for name in alive[0]}


def _retire(sitting: Sitting, seat: Seat, what: Divergence | str) -> None:
    """Ends a run that has diverged, and leaves a report of it beside its checkpoints.

    Raises:
      Diverged: no run is left.
    """
    seat.checkpoints.wait()
    last = seat.checkpoints.last_step()
    good = "There is no checkpoint before it" if last is None else f"The last good checkpoint is of step {last}"
    told = what if isinstance(what, str) else f"step {what.step}: {what.reason()}"
    seat.diverged = (
        f"Training diverged at {told}. {good}; {seat.workdir / files.DIVERGED} says more. "
        "Try a lower optimizer.learning_rate or optimizer.clip.norm, in a new work directory."
    )
    if processes.is_main():
        report = {} if isinstance(what, str) else what.facts()
        files.write_json(seat.workdir / files.DIVERGED, {"reason": seat.diverged, "last_checkpoint": last, **report})
    if len(sitting.seats) > 1:
        sitting.say(f"{seat.workdir.name}: {seat.diverged}")
    if not sitting.alive.any():
        raise Diverged(seat.diverged if len(sitting.seats) == 1 else "All replicas have diverged; see above.")


def _learning_rates(seats: Sequence[Seat], step: int) -> list[float]:
    """The rate of the step after `step` of each run, as the shortest decimal that names the float32."""
    factor = np.float32(seats[0].run.learner.unit_rate(jnp.int32(step)))  # one program has one schedule
    return [float(str(np.float32(seat.run.learner.hyper.learning_rate) * factor)) for seat in seats]


def _validated(seats: Sequence[Seat]) -> list[tuple[int, float]]:
    """The steps at which all runs were measured before, and their mean accuracy there."""
    split, found = seats[0].run.task.measured_split, Counter[int]()
    total: dict[int, float] = {}
    for seat in seats:
        path = seat.workdir / files.METRICS
        for line in path.read_text().splitlines() if path.exists() else []:
            event = json.loads(line)  # `_clear` left whole lines alone
            if event["split"] == split:
                found[event["step"]] += 1
                total[event["step"]] = total.get(event["step"], 0.0) + event["accuracy"]
    return [(step, total[step] / len(seats)) for step in sorted(found) if found[step] == len(seats)]


def _test(
    sitting: Sitting, programs: Programs, writers: Sequence[Recorder], states: TrainState
) -> Iterator[Json | None]:
    """The results: the one use of the test set, by each run's selected checkpoint (and, beside it, the last)."""
    run, seats = sitting.run, sitting.seats
    apart = unstack(states, len(seats))
    selects = run.task.protocol.selection != "last"
    processes.wait("all checkpoints are made")
    for seat in seats:
        seat.checkpoints.refresh()
    best_steps = [(seat.checkpoints.best_step() if selects else None) or run.steps for seat in seats]
    last = programs.evaluate(states.variables, "test")
    best = last
    if any(step != run.steps for step in best_steps):
        variables = [
            state.variables
            if step == run.steps or seat.diverged
            else seat.checkpoints.restore_variables(step, seat.run.learner.template())
            for seat, state, step in zip(seats, apart, best_steps, strict=True)
        ]
        best = programs.evaluate(programs.place(stack(variables)), "test")
    for index, (seat, writer) in enumerate(zip(seats, writers, strict=True)):
        if seat.diverged is not None:
            yield None
        else:
            both = {"last_logits": last[index][1], "logits": best[index][1]}
            yield _summarize(sitting, seat, writer, apart[index], best_steps[index], **both)


def _summarize(
    sitting: Sitting,
    seat: Seat,
    writer: Recorder,
    state: TrainState,
    best_step: int,
    *,
    last_logits: np.ndarray,
    logits: np.ndarray,
) -> Json:
    """Writes the result of a run: its metrics, predictions and summary, and gives the summary."""
    run, workdir, clock = seat.run, seat.workdir, sitting.share()
    labels = run.task.part("test").labels
    scores = score(logits, labels)
    last = scores if logits is last_logits else score(last_logits, labels)
    told = {name: scores[name] for name in ("loss", "accuracy", "calibration_error")}
    times = {"steps_per_second": run.steps / clock.train, "seconds": clock.train}
    writer.write_scalars(run.steps, {f"test/{name}": value for name, value in (told | times).items()})
    records.write_pictures(writer.tensorboard, run, run.steps, "test", logits)
    writer.tensorboard.write_end(run.steps)
    writer.flush()
    predictions = logits.argmax(-1).astype(np.uint8)
    if processes.is_main():
        files.write_arrays(workdir / files.PREDICTIONS, labels=labels, predictions=predictions, logits=logits)
    dataset = run.task.facts()
    del dataset["permutation_indices"]
    measured = seat.checkpoints.validation(best_step)
    selects = run.task.protocol.selection != "last" and measured is not None
    validated = measured if run.task.measured_split == "validation" else None
    summary = {
        "test_accuracy": scores["accuracy"],
        "test_accuracy_interval": scores["accuracy_interval"],
        "test_loss": scores["loss"],
        "test_calibration_error": scores["calibration_error"],
        "last_test_accuracy": last["accuracy"],
        "validation_accuracy": None if validated is None else validated["accuracy"],
        "selected_on": run.task.measured_split if selects else "last",
        "best_step": best_step,
        "lost_checkpoints": seat.lost,
        "steps": run.steps,
        # Of a run among replicas: its share of what they took together.
        "replicas": len(sitting.seats),
        "processes": jax.process_count(),
        "train_seconds": clock.train,
        "compile_seconds": clock.compile,
        "evaluate_seconds": clock.evaluate,
        "checkpoint_seconds": clock.checkpoint,
        "steps_per_second": run.steps / clock.train,
        "parameters": int(clu.parameter_overview.count_parameters(state.params)),
        "dataset": dataset,
        "seed": run.learner.seed,
        "identity": run.identity,
        "command": seat.command,
        **sitting.origin,
    }
    if processes.is_main():
        files.write_json(workdir / files.SUMMARY, summary)
    return summary
