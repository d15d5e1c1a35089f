"""Many runs by one command: seeds, and all combinations of some fields' values.

Runs that differ in seed and hyperparameters alone (`optimizers.SWEEPABLE`) are replicas of one program and train
together; the others follow one another, in groups.
"""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from seqmnist_jax.devices import processes
from seqmnist_jax.devices.memory import TooLarge
from seqmnist_jax.training import plan
from seqmnist_jax.training.folders import BEGUN, GOING, LEFT_BY_RUNS, NEW, check_folder, explaining_full_disk, look
from seqmnist_jax.training.jobs import run_jobs
from seqmnist_jax.training.plan import Grid, Overrides, SweepPoint
from seqmnist_jax.training.programs import keep_programs
from seqmnist_jax.training.replicas import ALOUD, Diverged, Job, Watch
from seqmnist_jax.training.scores import over_seeds
from seqmnist_jax.training.signals import OF_A_JOB, StopOnSignal
from seqmnist_jax.training.train import Stopped, train_replicas
from seqmnist_jax.workdir import caveats, files
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir.lock import owned

Json = dict[str, Any]
# Of sweep.json: the names of the runs of each program, in the order in which they train together.
TOGETHER = "together"
# Of sweep.json: of which values trials choose, after how many steps.
CHOICE = "choice"


def train_sweep(
    grid: Grid,
    points: Sequence[SweepPoint],
    workdir: Path,
    *,
    command: Callable[[Overrides], str | None] = lambda overrides: None,
    executor: Any = None,
    watch: Watch = ALOUD,
) -> Json:
    """Trains all runs of a sweep, each into its own folder under `workdir`/replicas.

    Where the points have trials these come first: a sweep of their own, in `workdir`/trials.

    Args:
      grid: as `plan.build_sweep` gives it.
      points: as `plan.build_points` makes them.
      workdir: the sweep's folder; made, or gone on with, also with other values of the same fields: what is finished
        stays as it is.
      command: how a user would start the run with these overrides alone.
      executor: runs the groups as jobs, as `jobs.make_executor` makes it; None for this process.
      watch: who is told how it goes, and may stop it.

    Returns:
      The sweep's summary, as written to its summary.json.

    Raises:
      UsageError, WorkdirError, CheckpointError, Interrupted, Stopped: as in `train.train_replicas`.
      JobsFailed: jobs of the executor failed; the message names their logs.
    """
    workdir = Path(workdir).expanduser()
    with ExitStack() as exits, explaining_full_disk([workdir]):
        _, together = survey(grid, points, workdir)
        runs = {point.name: point.run for point in points}
        for names in together if executor is None else ():  # a job's devices are others
            for run in [runs[name] for name in names if name in runs][:1]:
                run.mesh_for(len(names))
        check_place: Callable[[], None] = lambda: None  # noqa: E731
        if processes.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            check_place = exits.enter_context(owned(workdir))
            files.remove_half_written(workdir)
        points = plan.decide(points, workdir)
        if trials := plan.all_trials(points):
            watch.say(f"{plan.trials_in_words(points)}.")
            tried = {key: values for key, values in grid.items() if key != plan.SEED}
            candidates = points[0].candidates
            tried |= {field: tuple({one[field]: 0 for one in candidates}) for field in candidates[0]}
            if processes.is_main() and not (workdir / files.SWEEP).exists():
                _record_sweep(grid, points, workdir, [])  # so that no other run takes the folder
            train_sweep(tried, trials, workdir / files.TRIALS, command=command, executor=executor, watch=watch)
            points = plan.decide(points, workdir)
        for point in {plan.recipe_of(point): point for point in points[::-1] if point.run.choice}.values():
            watch.say(f"Chosen for {point.name} and its other seeds: {plan.choice_in_words(point.run.choice or {})}")
        _, together = survey(grid, points, workdir)  # again, now that nobody else can change it
        processes.wait("who trains together is known")
        jobs = {
            point.name: Job(point.run, plan.folder_of(workdir, point), command(point.overrides), point.name)
            for point in points
        }
        asked = [[jobs[name] for name in names if name in jobs] for names in together]
        groups = [
            [jobs.get(name, some[0]._replace(name=name, folder=None)) for name in names]
            for names, some in zip(together, asked, strict=True)
            if some
        ]
        watch.say(
            f"{len(points)} runs in {len(groups)} program{'s' if len(groups) > 1 else ''}, in {workdir}: "
            + "; ".join(f"{field} {', '.join(map(str, values))}" for field, values in grid.items())
        )

        if processes.is_main():
            _record_sweep(grid, points, workdir, together)
            if any(look(job.run, job.folder) in GOING for job in jobs.values() if job.folder):
                (workdir / files.SUMMARY).unlink(missing_ok=True)  # of shorter runs, which go on now
        _train_groups(groups, workdir, executor, watch)
        processes.wait("all runs are done")
        summary = _summarize(points, workdir, grid)
        others = {name for names in together for name in names} - {point.name for point in points}
        if left_out := [name for name in others if (workdir / files.REPLICAS / name).exists()]:
            lacks = f"Of the runs in the folder {len(left_out)} were not asked for now: no mean or ranking has them."
            summary["warnings"] = [*summary["warnings"], lacks]
        check_place()
        if processes.is_main():
            files.write_json(workdir / files.SUMMARY, summary)
    return summary


def survey(grid: Grid, points: Sequence[SweepPoint], workdir: Path) -> tuple[str, list[list[str]]]:
    """What a folder is to a sweep, and which runs train together, by the names of their folders.

    The first is NEW or BEGUN, as of a run. Who began together stays together, so that a run that goes on, or is made
    anew, comes to the same bits whatever else is asked for now. Nothing is written.

    Raises:
      WorkdirError, UsageError: the folder, or that of a run, holds something else; the message says what.
    """
    check_folder(workdir)
    old: Json = {}
    choice = _choice_asked(points)
    if (workdir / files.SWEEP).exists():
        old = files.read_json(workdir / files.SWEEP, needed=("sweep", "config of one run"))
        data = points[0].run.identity[configs.CONTENT]  # of which each run's own folder knows
        fields = {field for key in (*old["sweep"], *grid) for field in plan.fields_of(key)}
        fields |= {field for one in (choice, old.get(CHOICE, {})) for field in one.get("candidates", [{}])[0]}
        then, now = configs.from_json(old["config of one run"]), configs.flatten(points[0].run.config)
        with then.ignore_type():  # what follows from the value of such a field is no difference
            then.update_from_flattened_dict({field: now[field] for field in fields if field in now})
        fields |= {configs.CELL_CONTENT} if "model.cell" in fields else set()
        fields |= {"optimizer.warmup_steps"} if fields & {"train.steps", "optimizer.schedule"} else set()
        identities = [configs.identity(then, data), points[0].run.identity]
        # In their order, which runs' folders are named by.
        swept = [{"swept fields": [", ".join(plan.fields_of(key)) for key in keys]} for keys in (old["sweep"], grid)]
        differing = configs.differences(swept[0] | old.get(CHOICE, {}), swept[1] | choice)
        differing += configs.differences(*({n: v for n, v in one.items() if n not in fields} for one in identities))
        if differing:
            raise files.WorkdirError(
                f"{workdir} holds another sweep; it differs in\n  " + "\n  ".join(differing) + "\n"
                "Other values of the same fields may be added to it. For another sweep choose another --workdir."
            )
    elif left := [name for name in (files.CONFIG, *LEFT_BY_RUNS) if (workdir / name).exists()]:
        raise files.WorkdirError(f"{workdir} holds a run ({left[0]}), not a sweep. Choose another --workdir.")
    points = plan.decide(points, workdir)
    for trial in plan.all_trials(points):
        look(trial.run, plan.folder_of(workdir / files.TRIALS, trial))
    together, begun = [*old.get(TOGETHER, [])], {name for names in old.get(TOGETHER, []) for name in names}
    new: dict[tuple[str, bool], list[str]] = {}
    for point in points:
        standing = look(point.run, plan.folder_of(workdir, point))
        if point.name not in begun:
            new.setdefault((point.run.program, standing == NEW), []).append(point.name)
    return BEGUN if old else NEW, [*together, *new.values()]


def _train_groups(groups: Sequence[list[Job]], workdir: Path, executor: Any, watch: Watch) -> None:
    """Trains what is not finished, here or as jobs."""
    if executor is None:
        for group in groups:
            _train_group(group, watch, workdir)
        return
    left = [group for group in groups if any(job.folder and look(job.run, job.folder) in GOING for job in group)]
    watch.say(f"{len(left)} of {len(groups)} groups go to the executor, their logs to {executor.folder}.")
    names = [", ".join(job.folder.name for job in group if job.folder) for group in left]
    named = [(name, ([_stored(job) for job in group],)) for name, group in zip(names, left, strict=True)]
    run_jobs(executor, train_stored, named, watch.should_stop)


Stored = tuple[Json, Json, tuple[Path | None, str | None, str]]


def _stored(job: Job) -> Stored:
    """A job as plain values, for another process."""
    own = {"tests": job.run.tests, "choice": job.run.choice}
    return job.run.config, own, job[1:]


def train_stored(stored: Sequence[Stored]) -> None:
    """Trains the runs of one group, in a process of their own; a signal stops it as it stops any other.

    Args:
      stored: as `_stored` gives each.
    """
    runs = plan.build_runs([configs.from_json(values) for values, _, _ in stored])
    jobs = [Job(dataclasses.replace(run, **own), *rest) for run, (_, own, rest) in zip(runs, stored, strict=True)]
    keep_programs(runs[0].config["runtime"]["compilation_cache"])
    try:
        with StopOnSignal(asked_by=OF_A_JOB) as stop:
            _train_group(jobs, ALOUD._replace(should_stop=stop))
    except Stopped:
        if stop.number == signal.SIGUSR2:
            with contextlib.suppress(Exception):  # submitit's, that time is over
                signal.raise_signal(signal.SIGUSR2)  # for its own handler: a job that gave way to another comes back
        raise


def _train_group(jobs: list[Job], watch: Watch, workdir: Path | None = None) -> None:
    """Trains runs of one program together; where they don't fit the memory in chunks.

    These stand in the sweep's folder from then on. A job of an executor, which does not own that, may be cut otherwise
    when it goes on.
    """
    half = len(jobs) // 2
    try:
        train_replicas(jobs, watch)
        return
    except TooLarge as e:
        if len(jobs) == 1:
            raise
        watch.say(f"{e} So these {len(jobs)} replicas train in chunks, of {len(jobs) - half} and {half}.")
    except Diverged as e:
        watch.say(str(e))
        return
    # Not while the error is handled, which holds the arrays of what failed.
    chunks = jobs[:-half], jobs[-half:]
    if workdir is not None and processes.is_main():
        _record_chunks(chunks, workdir)
    for chunk in chunks:
        if any(job.folder for job in chunk):
            _train_group(chunk, watch, workdir)


def _record_sweep(grid: Grid, points: Sequence[SweepPoint], workdir: Path, together: list[list[str]]) -> None:
    """Writes by what the folder is known as this sweep's, and who trains together in it."""
    told: Json = {"sweep": dict(grid), "config of one run": points[0].run.config, TOGETHER: together}
    told |= {CHOICE: _choice_asked(points), files.TRIALS: not points[0].run.tests}
    files.write_json(workdir / files.SWEEP, told)


def _record_chunks(chunks: Sequence[Sequence[Job]], workdir: Path) -> None:
    """Puts these in the place of the group in the sweep's record, so that who goes on comes to the same bits."""
    record, names = files.read_json(workdir / files.SWEEP), [[job.name for job in chunk] for chunk in chunks]
    place = record[TOGETHER].index([name for chunk in names for name in chunk])
    record[TOGETHER][place : place + 1] = names
    files.write_json(workdir / files.SWEEP, record)


def _choice_asked(points: Sequence[SweepPoint]) -> Json:
    """Of which values trials are to choose, after how many steps; {} where there are none."""
    first = points[0]
    return {"candidates": [*first.candidates], "choose_steps": first.trials[0].run.steps} if first.trials else {}


def _summarize(points: Sequence[SweepPoint], workdir: Path, grid: Grid) -> Json:
    """What the runs say together: one entry for each recipe, best validation accuracy first."""
    recipes: dict[str, list[tuple[SweepPoint, Json]]] = {}
    diverged: list[Json] = []
    lost: dict[str, list[str]] = {}
    for point in points:
        folder, recipe = plan.folder_of(workdir, point), plan.recipe_of(point)
        if (folder / files.SUMMARY).exists():
            recipes.setdefault(recipe, []).append((point, files.read_json(folder / files.SUMMARY)))
        else:
            diverged.append({"name": point.name, **files.read_json(folder / files.DIVERGED)})
            lost.setdefault(recipe, []).append(point.name)
    entries = []
    for recipe, runs in recipes.items():
        summaries = [summary for _, summary in runs]
        validated = [s["validation_accuracy"] for s in summaries if s["validation_accuracy"] is not None]
        entries.append(
            {
                "changes": plan.without_seed(runs[0][0].overrides),
                "replicas": [point.name for point, _ in runs],
                "scores": {
                    # Trials read no test images.
                    point.name: {split: one.get(f"{split}_accuracy") for split in ("validation", "test")}
                    for point, one in runs
                },
                "diverged": lost.get(recipe, []),
                "validation": over_seeds(validated) if validated else None,
                "test": over_seeds([s["test_accuracy"] for s in summaries]) if runs[0][0].run.tests else None,
                "choice": runs[0][0].run.choice,
                "train_seconds": sum(summary["train_seconds"] for summary in summaries),
            }
        )
    # Means over those that are left are no recipe's; first come the recipes of which none diverged.
    entries.sort(key=lambda one: (len(one["diverged"]), -one["validation"]["mean"] if one["validation"] else 0.0))
    ended = [summary for runs in recipes.values() for _, summary in runs]
    mixed = {name: 0 for runs in recipes.values() for name in caveats.differences([summary for _, summary in runs])}
    told = [warning for summary in ended for warning in caveats.warnings(summary["dataset"], summary)]
    if not ended:
        told = caveats.warnings(points[0].run.task.facts(), None, diverged=True)
    return {
        "sweep": {field: list(values) for field, values in grid.items()},
        "datasets": list(dict.fromkeys(f"{s['dataset']['name']} ({s['dataset']['source']})" for s in ended)),
        "ranking": entries,
        "diverged": diverged,
        "warnings": [*dict.fromkeys(told), *caveats.of_means(len(diverged), len(points), [*mixed])],
    }
