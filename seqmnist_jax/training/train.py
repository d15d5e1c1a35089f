"""Training: from a run, or several of one program, to work directories with results. Read it top to bottom."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp

from seqmnist_jax.devices import processes
from seqmnist_jax.devices.profiling import StepTrace
from seqmnist_jax.devices.trees import unstack
from seqmnist_jax.errors import Interrupted
from seqmnist_jax.training import finish, folders, records, signals, start
from seqmnist_jax.training.programs import Programs, Scores
from seqmnist_jax.training.replicas import ALOUD, Diverged, Job, Json, ReplicaGroup, Watch
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.state import TrainState, as_numbers

# A stop may not wait for the end of a report that takes longer, so there is a checkpoint before it.
LONG_REPORT_SECONDS = signals.GRACE_SECONDS / 2


class Stopped(Interrupted):
    """The run was asked to stop and has saved where it stands."""


def train(run: Run, workdir: Path, *, command: str | None = None, watch: Watch = ALOUD) -> Json:
    """Trains one run to its end, from the start or from its last checkpoint.

    Args:
      run: as `build_run` makes it.
      workdir: the run's folder; made, or resumed if it holds this run.
      command: how a user would start this run, for the record.
      watch: who is told how it goes, and may stop it.

    Returns:
      The summary, as written to summary.json.

    Raises:
      as `train_replicas`.
    """
    (summary,) = train_replicas([Job(run, workdir, command)], watch)
    assert summary is not None
    return summary


def train_replicas(jobs: Sequence[Job], watch: Watch = ALOUD) -> list[Json | None]:
    """Trains runs of one program together, as replicas, each into its own folder.

    Each run gives what it would give alone, up to the rounding of products that are made together.
    One that diverges stands still, is reported, and leaves the others as they are. One that is finished, or has
    diverged before, is left as it is, and keeps its place, so that the others go on to the same bits.

    Args:
      jobs: runs of the same `Run.program`, and where they go.
      watch: who is told how it goes, and may stop it.

    Returns:
      The summary of each, as written to its summary.json; None of one that diverged, or is not asked for.

    Raises:
      UsageError: there is no such mesh for them; nothing is written then.
      WorkdirError: a folder holds something else; nothing is written then.
      InUse: another process works in a folder.
      Moved: a folder is not in its place any more.
      CheckpointError: a checkpoint can't be read at the moment, or is of another run.
      Interrupted: a folder can't be written; what was saved before is whole.
      TooLarge: the program needs more memory than there is.
      Diverged: of all runs the loss, a gradient or a parameter is not finite.
      Stopped: `watch.should_stop` said so.
    """
    jobs = [job._replace(folder=job.folder and Path(job.folder).expanduser()) for job in jobs]
    runs = [job.run for job in jobs]
    runs[0].mesh_for(len(runs))  # before anything is written
    with ExitStack() as owners, folders.explaining_full_disk([job.folder for job in jobs if job.folder is not None]):
        waiting = start.open_folders(owners, jobs)
        done, diverged = start.ended(jobs, waiting, watch)
        while waiting:
            with ExitStack() as exits:
                group = start.open_group(exits, runs, waiting, watch)
                try:
                    done |= train_group(exits, group)
                except Diverged as e:
                    diverged = e
            for replica in group.replicas:
                del waiting[replica.place]
    if diverged and not done:
        raise diverged
    return [done.get(place) for place in range(len(runs))]


def train_group(exits: ExitStack, group: ReplicaGroup) -> dict[int, Json]:
    """Trains runs that stand at one step to their end; arguments and results as the functions here have them."""
    states = start.restore(group)
    start.announce(group)
    compiled_before = group.clock.compile
    programs = Programs(group.runs, states, group.clock)
    seconds = group.clock.compile - compiled_before
    group.watch.say(f"Compiled the training step in {seconds:.1f} s. {programs.memory_plan}")
    start.begin(exits, group)
    if group.first_step == 0:
        records.introduce([(one.tensorboard, one.run) for one in group.replicas], programs.traced)
    trace = exits.enter_context(StepTrace(group.where, group.run.profile_steps))
    states = train_loop(group, programs, trace, LoopState(programs.place(states), group.first_step))
    return finish.write_results(group, programs, states)


@dataclasses.dataclass(frozen=True)
class LoopState:
    """Where the loop stands.

    Attributes:
      stacked: the runs' states, as the programs take them.
      step: the steps done by those that are active; one that has diverged stands still.
      saved_at: when checkpoints were last begun, in seconds of ``time.perf_counter``.
      reported_in: how long the last report took, in seconds.
    """

    stacked: TrainState
    step: int
    saved_at: float = dataclasses.field(default_factory=time.perf_counter)
    reported_in: float = 0.0

    def per_replica(self, group: ReplicaGroup) -> list[TrainState]:
        """The state of each replica, on one device of this process."""
        states = unstack(self.stacked, len(group.runs))
        return [states[replica.place] for replica in group.replicas]


def train_loop(group: ReplicaGroup, programs: Programs, trace: StepTrace, state: LoopState) -> TrainState:
    """Advances up to the next point where the host has something to do; does it; repeats.

    What is asked of other processes (`processes.agree`, `any_of`) all ask at the same points, in the same order.

    Returns:
      The states after the last step.

    Raises:
      Diverged, Interrupted, Moved, Stopped: as `train_replicas`.
    """
    run = group.run
    report_pending = any(replica.is_untold for replica in group.replicas)
    while state.step < run.steps or report_pending:
        is_restored, report_pending = report_pending, False
        if not is_restored:
            state = advance(group, programs, trace, state)
        group.show(state.step)
        for replica in group.replicas:
            replica.check_place()

        is_end = state.step == run.steps
        stopping = processes.any_of(group.watch.should_stop()) and not is_end
        validated: Sequence[Scores | None] = [None] * len(group.replicas)
        # Not where it is asked to stop: then the resumed run reports.
        if (state.step % run.eval_every == 0 or is_end) and not stopping:
            if processes.any_of(state.reported_in > LONG_REPORT_SECONDS) and not is_restored:
                state = save(group, state, validated)
            state, validated = report(group, programs, state)
            stopping = processes.any_of(group.watch.should_stop()) and not is_end
        elif processes.agree(group.progress.is_due()):
            remind(group, state)

        # What stops just as it was restored is saved already, of some runs with what was measured.
        is_saved = is_restored and stopping and not any(validated)
        if not is_saved and (is_save_due(run, state, validated) or stopping):
            state = save(group, state, validated)
        group.tell_save_problems()
        if stopping:
            break
    group.wait_for_saves()
    if processes.any_of(group.watch.should_stop()):
        raise Stopped(f"Stopped at step {state.step} of {run.steps}; saved in {group.where}.")
    return state.stacked


def advance(group: ReplicaGroup, programs: Programs, trace: StepTrace, state: LoopState) -> LoopState:
    """Steps, as many as may pass without the host, in a dispatch of bounded time; ends the runs that diverge in it."""
    run, step, active, before = group.run, state.step, group.active, group.clock.train
    ends = [step + group.progress.steps_within(run.dispatch_seconds), run.steps, *trace.ends(step)]
    ends += [step + every - step % every for every in (run.eval_every, run.checkpoint_every)]
    trace.at(step)
    stacked, step, finite = programs.train(state.stacked, step, processes.agree(min(ends) - step), active)
    state = dataclasses.replace(state, stacked=stacked, step=step)
    for replica, own in zip(group.replicas, state.per_replica(group), strict=True):
        replica.is_untold = True
        if replica.diverged is None and not finite[replica.place]:
            replica.checkpoints.wait()
            if int(own.step) not in (0, replica.checkpoints.last_step()):
                group.save(replica, own, None)
            group.mark_diverged(replica, programs.divergence(replica.place, own))
    trace.at(step)
    group.progress.advance(step, group.clock.train - before)
    return state


def report(group: ReplicaGroup, programs: Programs, state: LoopState) -> tuple[LoopState, list[Scores | None]]:
    """Measures the models and records it, with what was gathered in training; gives what was measured of each.

    A process that died among the saves of several may leave some of them told of and others not.
    """
    run, step, rates = group.run, state.step, group.learning_rates(state.step)
    states = state.per_replica(group)
    pace = group.progress.close_window()  # None where the run was stopped before this report, and goes on with it
    times = ({} if pace is None else {"steps_per_second": pace}) | {"seconds": group.clock_of_one().train}
    scores = [
        _named("train", as_numbers(own.metrics) | times | {"learning_rate": rate})
        for own, rate in zip(states, rates, strict=True)
    ]
    split, began = run.task.measured_split, time.perf_counter()
    validated: list[Scores | None] = [None] * len(scores)
    measured = programs.evaluate(state.stacked.variables, split) if run.task.part(split) else []
    if measured:
        group.mark_infinite(step, split, [logits for _, logits in measured])
        validated = [measured[replica.place][0] for replica in group.replicas]
    for replica, own, told, found in zip(group.replicas, states, scores, validated, strict=True):
        if found is not None:
            told |= _named(split, found | times)
        if replica.diverged is None and replica.is_untold:
            replica.write_scalars(step, told)
            records.write_histograms(replica.tensorboard, run, own)
            if measured and records.has_pictures(run, step):
                records.write_pictures(replica.tensorboard, run, step, split, measured[replica.place][1])
    if step % run.eval_every == 0:  # not at an end between evaluations, which more steps may pass over
        blank = jax.tree.map(jnp.zeros_like, state.stacked.metrics)
        state = dataclasses.replace(state, stacked=programs.place(state.stacked.replace(metrics=blank)))
    group.say_progress(step, scores)
    for replica in group.replicas:
        replica.is_untold = False
    return dataclasses.replace(state, reported_in=time.perf_counter() - began), validated


def remind(group: ReplicaGroup, state: LoopState) -> None:
    """Says where the runs stand, between evaluations that are far apart."""
    group.say_progress(state.step, [_named("train", as_numbers(own.metrics)) for own in state.per_replica(group)])


def _named(split: str, numbers: Scores) -> Scores:
    return {f"{split}/{name}": value for name, value in numbers.items()}


def is_save_due(run: Run, state: LoopState, validated: Sequence[Scores | None]) -> bool:
    """Whether there is to be a checkpoint: wherever a model was measured that may turn out the best, and in time."""
    waited = time.perf_counter() - state.saved_at
    is_time = run.checkpoint_seconds > 0 and processes.any_of(waited > run.checkpoint_seconds)
    return is_time or any(validated) or state.step % run.checkpoint_every == 0 or state.step == run.steps


def save(group: ReplicaGroup, state: LoopState, validated: Sequence[Scores | None]) -> LoopState:
    """Begins to save the runs that are active."""
    for replica, own, measured in zip(group.replicas, state.per_replica(group), validated, strict=True):
        if replica.diverged is None:
            group.save(replica, own, measured)
    return dataclasses.replace(state, saved_at=time.perf_counter())
