"""From runs and folders to a group that trains: folders owned, checkpoints read, all put in order."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np

from seqmnist_jax.data.task import SPLITS
from seqmnist_jax.devices import processes
from seqmnist_jax.devices.trees import stack
from seqmnist_jax.models.build import model_title
from seqmnist_jax.training.clock import Clock, Progress
from seqmnist_jax.training.folders import GOING, NEW, check_identity, check_result_stays, look
from seqmnist_jax.training.replicas import Diverged, Job, Json, Replica, ReplicaGroup, Watch
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.state import TrainState, restore_state
from seqmnist_jax.workdir import caveats, files, provenance
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir.checkpoints import CheckpointError, Checkpoints, read_saved, saved_steps
from seqmnist_jax.workdir.lock import owned
from seqmnist_jax.workdir.metrics import JsonLinesWriter, keep_events
from seqmnist_jax.workdir.tensorboard import TensorBoardWriter


def ended(jobs: Sequence[Job], waiting: Mapping[int, Replica], watch: Watch) -> tuple[dict[int, Json], Diverged | None]:
    """Of the runs that have nothing to do the summaries, by place, and what is said of the last that diverged."""
    summaries, diverged = {}, None
    for place, (run, folder, *_) in enumerate(jobs):
        if folder is not None and place not in waiting:
            if (folder / files.SUMMARY).exists():
                summaries[place] = _finished(run, folder, watch)
                watch.say(f"{folder} is finished: all its {run.steps} steps are done.")
            else:
                report = files.read_json(folder / files.DIVERGED, needed=("reason",))
                if report.get("steps", 0) < run.steps and processes.is_main():  # it is one of the longer runs now
                    files.write_json(folder / files.DIVERGED, report | {"steps": run.steps})
                diverged = Diverged(f"{folder} has diverged. {report['reason']}")
    return summaries, diverged


def _finished(run: Run, workdir: Path, watch: Watch) -> Json:
    """The summary of a finished run, which stands as it is.

    Where the checkpoint that it is the result of can't be read any more, that is set aside, and the summary says so.
    """
    summary = files.read_json(workdir / files.SUMMARY)
    folder, step, shapes = workdir / files.CHECKPOINTS, summary.get("best_step"), run.learner.template.shapes()
    if step not in saved_steps(folder) or not processes.is_main():
        return summary
    with contextlib.suppress(CheckpointError):
        read_saved(folder, lambda checkpoints: checkpoints.check(step, shapes))
        return summary
    with owned(workdir), Checkpoints(folder) as checkpoints:
        aside = checkpoints.set_aside_damaged(shapes)
    for sentence in aside.values():
        watch.say(f"WARNING: {sentence}")
    if step not in aside:
        return summary
    summary["lost_checkpoints"] = [*summary.get("lost_checkpoints", []), step]
    summary["warnings"] = caveats.warnings(summary["dataset"], summary)
    files.write_json(workdir / files.SUMMARY, summary)
    watch.say(
        f"WARNING: {workdir}: checkpoint {step} is lost, whose result the summary has. What is read from the folder "
        "from now on is another checkpoint."
    )
    return summary


def open_folders(exits: ExitStack, jobs: Sequence[Job]) -> dict[int, Replica]:
    """Owns the folders of runs that have steps to do; process 0 first, which makes what the others find.

    Args:
      exits: what ends the ownership.
      jobs: as `train.train_replicas` takes them.

    Returns:
      The runs that train, by their place.

    Raises:
      WorkdirError, UsageError: as `look`, before anything is written.
      InUse: another process works in a folder.
    """
    if not processes.is_main():
        processes.wait("folders")
    replicas = {
        place: Replica(place, job.run, job.folder, job.command)
        for place, job in enumerate(jobs)
        if job.folder is not None and look(job.run, job.folder) in GOING
    }
    if processes.is_main():
        for replica in replicas.values():
            run, workdir = replica.run, replica.workdir
            workdir.mkdir(parents=True, exist_ok=True)
            replica.check_place = exits.enter_context(owned(workdir))
            files.remove_half_written(workdir)
            replica.is_new = look(run, workdir) == NEW  # again, now that nobody else can change it
            if replica.is_new:
                record(run, workdir)
        processes.wait("folders")
    return replicas


def record(run: Run, workdir: Path) -> None:
    """Writes what the run is, and what it runs in; where it has run in something else, that too."""
    now, environment = provenance.environment(), workdir / files.ENVIRONMENT
    first = now
    with contextlib.suppress(files.WorkdirError):  # it is lost, or was never there
        first = files.read_json(environment)
    later = first.pop("later", [])
    if now not in (first, *later):
        later.append(now)
    files.write_json(workdir / files.DATA, run.task.facts())
    files.write_json(environment, {**first, **({"later": later} if later else {})})
    files.write_json(workdir / files.CONFIG, run.config)


def open_group(exits: ExitStack, runs: Sequence[Run], waiting: Mapping[int, Replica], watch: Watch) -> ReplicaGroup:
    """The runs that go on together first, of those that wait, with the step at which all of them stand.

    That is where the one that is furthest behind has its last checkpoint (0 where it has none). Others join that
    have this as their last or the one before, as after a death among the saves; who is further on waits for
    another turn, and loses nothing. What is damaged is set aside.
    """
    ends = {}
    for replica in waiting.values():
        run, folder = replica.run, replica.workdir / files.CHECKPOINTS
        replica.checkpoints = exits.enter_context(Checkpoints(folder, lasts=run.stays_measured))
        for sentence in replica.checkpoints.set_aside_damaged(run.learner.template.shapes()).values():
            watch.say(f"WARNING: {sentence}")
    processes.wait("damaged checkpoints are set aside")
    for place, replica in waiting.items():
        replica.checkpoints.refresh()
        ends[place] = [0, *replica.checkpoints.steps()][-2:]
        if ends[place] == [0]:
            check_result_stays(replica.run, replica.workdir)
    step = processes.agree(min(end[-1] for end in ends.values()))
    group = ReplicaGroup(runs, [waiting[place] for place in ends if step in ends[place]], step, Clock(), watch)
    for replica in group.replicas:
        left = replica.checkpoints.best_step(replica.run.is_measured)
        if lost := replica.lost_checkpoints(left, step):
            watch.say(
                f"WARNING: {replica.workdir}: checkpoint {lost[0]} was the best by validation, and "
                "is lost. Unless a later one is better, the result will be that of the best that is left, and say so."
            )
    return group


def restore(group: ReplicaGroup) -> TrainState:
    """The states to start from, as `stack` makes them."""
    init = jax.jit(group.run.learner.init_from)  # compiled once for all
    states = {replica.place: _restore_or_init(group, replica, init) for replica in group.replicas}
    group.clock = group.clock.divided(len(group.replicas) / len(group.runs))  # of all that the program computes
    processes.wait("all have read what is there")
    any_state = states[group.replicas[0].place]  # for who only keeps a place, and does no step
    return stack([states.get(place, any_state) for place in range(len(group.runs))])


def _restore_or_init(group: ReplicaGroup, replica: Replica, init: Callable[..., TrainState]) -> TrainState:
    """The state to start from: a checkpoint's, with its clock, or a new one."""
    run, checkpoints, step = replica.run, replica.checkpoints, group.first_step
    at = {"precision": run.learner.model.precision, "eval_precision": run.learner.eval_precision}
    origin = {**provenance.origin(), **at, "command": replica.command}
    if step == 0:
        replica.sittings = [{"first_step": 1, **origin}]
        return init(run.learner.seed, run.learner.hyper)
    metadata = checkpoints.metadata(step)
    config, facts = configs.from_json(metadata["config"]), metadata["data"]
    identity = configs.identity(config, facts["content_hash"])
    check_identity(run, identity, facts, f"{replica.workdir}, checkpoint {step},")
    before = metadata["sittings"]
    is_same = {**before[-1], "first_step": 0} == {**origin, "first_step": 0}
    replica.sittings = before if is_same else [*before, {"first_step": step + 1, **origin}]
    group.clock.add(Clock(**metadata["clock"]))
    state = restore_state(checkpoints, step, run.learner.template)
    # A stop came between the last steps and their report, which an end has too: their metrics are there still.
    is_due = step % run.eval_every == 0 or (step == run.steps and checkpoints.validation(step) is None)
    replica.is_untold = is_due and int(state.metrics.loss.count) > 0
    return state


def begin(exits: ExitStack, group: ReplicaGroup) -> None:
    """Puts the folders in order, now that everything is ready to train, and opens the writers."""
    step = group.first_step
    for replica in group.replicas:
        is_told = replica.run.is_measured(step) and not replica.is_untold
        if processes.is_main():
            replica.checkpoints.drop_after(step)
            _drop_later(replica, step if is_told else step - 1)
            if not replica.is_new:  # it may have more steps now, or its data in another place
                record(replica.run, replica.workdir)
        writes, first = processes.is_main(), step + 1 if is_told else step
        metrics = JsonLinesWriter(replica.workdir / files.METRICS if writes else Path(os.devnull))
        replica.metrics = exits.enter_context(closing(metrics))
        replica.tensorboard = exits.enter_context(closing(TensorBoardWriter(replica.workdir, first, writes=writes)))
    count = len(group.runs)  # each has its share of the time of all
    group.progress = Progress(step, group.run.steps, group.clock, runs=count, validated=_validated(group))


def _drop_later(replica: Replica, step: int) -> None:
    """Removes the result of an earlier, shorter run, what it measured at its end alone, and what was after `step`."""
    for name in (files.SUMMARY, files.PREDICTIONS, files.DIVERGED):
        (replica.workdir / name).unlink(missing_ok=True)
    keep_events(
        replica.workdir,
        lambda event: event["step"] <= step and event["split"] != "test" and replica.run.is_measured(event["step"]),
    )


def _validated(group: ReplicaGroup) -> list[tuple[int, float]]:
    """The steps at which all runs were measured before, and their mean accuracy there."""
    found = [(event["step"], event["accuracy"]) for replica in group.replicas for event in replica.measured()]
    counts = Counter(step for step, _ in found)
    of_all = sorted(step for step, count in counts.items() if count == len(group.replicas))
    return [(step, float(np.mean([accuracy for at, accuracy in found if at == step]))) for step in of_all]


def announce(group: ReplicaGroup) -> None:
    """The first lines: what is trained, the parameters, the data, where it all goes."""
    run, task, say, count = group.run, group.run.task, group.watch.say, len(group.replicas)
    say(_title(group))
    if task.dataset.warning:
        say(f"\n{'!' * 78}\nWARNING: {task.dataset.warning}\n{'!' * 78}\n")
    say(run.overview())
    sizes = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"Data: {task.dataset.name} ({task.dataset.source}): {sizes}; permutation {task.protocol.permutation}.")
    say(f"Recurrence: {run.recurrence()}.")
    if run.remark:
        say(f"Schedule: {run.remark}")
    start = f"Resuming at step {group.first_step} of {run.steps}" if group.first_step else "Training"
    say(f"{start} in {group.where}" + (f": {count} replicas, of which each line tells the means" if count > 1 else ""))


def _title(group: ReplicaGroup) -> str:
    """What is trained, in a line: config, model, optimiser, seed, length."""
    run, runs = group.run, [replica.run for replica in group.replicas]
    config = provenance.config_title(group.replicas[0].command)
    flat = configs.flatten(run.config)
    rates = sorted({float(one.learner.hyper.learning_rate) for one in runs})
    rate = " to ".join(f"{rate:.4g}" for rate in dict.fromkeys((rates[0], rates[-1])))
    seeds = sorted({one.learner.seed for one in runs})
    epochs = run.steps * run.batch_size / len(run.task.part("train"))
    words = [model_title(flat), f"{flat['optimizer.name']} {rate}"]
    words += [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"]
    words += [f"{run.steps:,} steps of {run.batch_size} ({epochs:.3g} epochs)"]
    return (f"{config.partition(',')[0]}: " if config else "") + ", ".join(words)
