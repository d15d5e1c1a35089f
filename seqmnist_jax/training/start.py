"""From runs and folders to a group that trains: folders opened, checkpoints read, what is there put in order."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import clu.parameter_overview
import jax
import ml_collections
import numpy as np

from seqmnist_jax.data.task import SPLITS
from seqmnist_jax.devices import processes
from seqmnist_jax.devices.trees import stack, unstack
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.clock import Clock, Progress
from seqmnist_jax.training.replicas import Json, Replica, ReplicaGroup, Watch
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.state import TrainState, restore_state
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files, provenance
from seqmnist_jax.workdir.checkpoints import Checkpoints
from seqmnist_jax.workdir.lock import owned
from seqmnist_jax.workdir.metrics import keep_events, read_events
from seqmnist_jax.workdir.recorder import Recorder


@contextmanager
def explaining_full_disk(workdirs: Sequence[Path]) -> Iterator[None]:
    """Says what a failure to write means for the runs."""
    try:
        yield
    except OSError as e:
        where = e.filename or workdirs[0]
        raise files.WorkdirError(
            f"{where} can't be written ({e.strerror or e}). What was saved before is whole: mend that, and the same "
            "command resumes from the last checkpoint."
        ) from e


def open_group(
    exits: ExitStack, runs: Sequence[Run], workdirs: Sequence[Path], commands: Sequence[str | None], watch: Watch
) -> ReplicaGroup:
    """Opens the folders; process 0 first, which owns them and makes what the others find.

    Raises:
      WorkdirError: a folder holds another run.
      InUse: another process works in a folder.
    """
    if not processes.is_main():
        processes.wait("folders")
    are_new = []
    for run, workdir in zip(runs, workdirs, strict=True):
        if processes.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            exits.enter_context(owned(workdir))
            files.remove_half_written(workdir)
        are_new.append(open_workdir(run, workdir))
    if processes.is_main():
        processes.wait("folders")
    replicas = [
        Replica(run, workdir, exits.enter_context(Checkpoints(workdir / files.CHECKPOINTS)), command, is_new)
        for run, workdir, command, is_new in zip(runs, workdirs, commands, are_new, strict=True)
    ]
    return ReplicaGroup(replicas, provenance.origin(), Clock(), watch)


def open_workdir(run: Run, workdir: Path) -> bool:
    """Makes a new run of a folder, which is there, or checks that the folder holds this very run; whether it is new.

    Raises:
      WorkdirError: it holds another run; the message names the fields that differ.
    """
    if (workdir / files.CONFIG).exists():
        old = configs.from_json(files.read_config(workdir))
        _check_identity(run, old, files.read_facts(workdir)["content_hash"], str(workdir))
        return False
    if (workdir / files.CHECKPOINTS).exists():
        raise files.WorkdirError(
            f"{workdir} has checkpoints but no {files.CONFIG}, so it can't be told whose they are. "
            "Put the file back, or choose another --workdir."
        )
    record(run, workdir)
    return True


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


def common_step(group: ReplicaGroup) -> int:
    """The step to go on from: the last of which every run has a checkpoint; 0 where there is none.

    What any run has beyond it, after the process died among their checkpoints, is made again, and so
    is what is damaged.
    """
    damaged = []
    for replica in group.replicas:
        damaged.append(replica.checkpoints.set_aside_damaged(replica.run.learner.template().shapes()))
        for sentence in damaged[-1].values():
            group.watch.say(f"WARNING: {sentence}")
    processes.wait("damaged checkpoints are set aside")
    for replica in group.replicas:
        replica.checkpoints.refresh()
    step = max(set.intersection(*(set(replica.checkpoints.steps()) for replica in group.replicas)), default=0)
    step = processes.agree(step)
    for replica, steps in zip(group.replicas, damaged, strict=True):
        last = replica.checkpoints.last_step() or 0
        if last > replica.run.steps:
            raise UsageError(
                f"{replica.workdir} has done {last} steps already, but train.steps is {replica.run.steps}."
            )
        replica.checkpoints.drop_after(step)
        replica.lost_checkpoints = [lost for lost in steps if lost < step]
        if replica.lost_checkpoints:
            group.watch.say(
                f"WARNING: {replica.workdir}: checkpoint {', '.join(map(str, replica.lost_checkpoints))} was the best "
                "by validation. The result will be that of the best of the others, and its summary says so."
            )
    return step


def finished(workdir: Path, step_count: int) -> Json | None:
    """The summary of a run that is finished at this number of steps; None where it is not."""
    path = workdir / files.SUMMARY
    summary = files.read_json(path) if path.exists() else {}
    return summary if summary.get("steps") == step_count else None


def all_finished(group: ReplicaGroup, step: int) -> list[Json | None] | None:
    """The summaries of a group of which all runs are finished; None where one is not."""
    summaries = [finished(replica.workdir, step) if step == replica.run.steps else None for replica in group.replicas]
    if not processes.agree(all(summaries)):
        return None
    group.watch.say(f"{group.where} is finished: all its {step} steps are done.")
    return summaries


def begin(exits: ExitStack, group: ReplicaGroup, step: int) -> TrainState:
    """Puts the folders in order, opens the recorders, and gives the states to start from, as `stack` makes them."""
    states = stack([_restore_or_init(group, replica, step) for replica in group.replicas])
    processes.wait("all have read what is there")
    for replica in group.replicas:
        if processes.is_main():
            _drop_later(replica, step)
            if not replica.is_new:  # it may have more steps now, or its data in another place
                record(replica.run, replica.workdir)
        recorder = Recorder(replica.workdir, first_step=step + 1, writes=processes.is_main())
        replica.recorder = exits.enter_context(closing(recorder))
    count = len(group.replicas)
    group.progress = Progress(step, group.run.steps, group.clock, runs=count, validated=_validated(group))
    return states


def _restore_or_init(group: ReplicaGroup, replica: Replica, step: int) -> TrainState:
    """The state to start from: a checkpoint's, with its clock, or a new one."""
    run, checkpoints = replica.run, replica.checkpoints
    if step == 0:
        return jax.jit(run.learner.init_from)(run.learner.seed, run.learner.hyper)
    metadata = checkpoints.metadata(step)
    config, content_hash = configs.from_json(metadata["config"]), metadata["data"]["content_hash"]
    _check_identity(run, config, content_hash, f"{replica.workdir}, checkpoint {step},")
    replica.lost_checkpoints += metadata.get("lost", [])
    group.clock.add(Clock(**metadata["clock"]))
    return restore_state(checkpoints, step, run.learner.template())


def _drop_later(replica: Replica, step: int) -> None:
    """Removes what an earlier, shorter run left as its result, and what it recorded after the checkpoint."""
    for name in (files.SUMMARY, files.PREDICTIONS, files.DIVERGED):
        (replica.workdir / name).unlink(missing_ok=True)
    keep_events(replica.workdir, lambda event: event["step"] <= step and event["split"] != "test")


def _validated(group: ReplicaGroup) -> list[tuple[int, float]]:
    """The steps at which all runs were measured before, and their mean accuracy there."""
    split = group.run.task.measured_split
    found = [
        (event["step"], event["accuracy"])
        for replica in group.replicas
        for event in read_events(replica.workdir)
        if event["split"] == split
    ]
    counts = Counter(step for step, _ in found)
    of_all = sorted(step for step, count in counts.items() if count == len(group.replicas))
    return [(step, float(np.mean([accuracy for at, accuracy in found if at == step]))) for step in of_all]


def announce(group: ReplicaGroup, states: TrainState, step: int) -> None:
    """The first lines: the parameters, the data, where it all goes."""
    run, task, say, count = group.run, group.run.task, group.watch.say, len(group.replicas)
    if task.dataset.warning:
        say(f"\n{'!' * 78}\nWARNING: {task.dataset.warning}\n{'!' * 78}\n")
    say(clu.parameter_overview.get_parameter_overview(unstack(states, count)[0].params, include_stats=False))
    sizes = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"Data: {task.dataset.name} ({task.dataset.source}): {sizes}; permutation {task.protocol.permutation}.")
    say(f"Recurrence: {run.recurrence()}.")
    start = f"Resuming at step {step}" if step else "Training"
    where = group.where if count == 1 else f"{count} replicas of {group.where}"
    say(f"{start}: {run.steps} steps of {run.batch_size}, in {where}")
