"""Many runs by one command: seeds, and all combinations of some fields' values.

Runs that differ in seed and hyperparameters alone (`optimizers.SWEEPABLE`) are replicas of one program and train
together; the others follow one another, in groups.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from seqmnist_jax.data.task import Task
from seqmnist_jax.devices import processes
from seqmnist_jax.devices.memory import TooLarge
from seqmnist_jax.errors import UsageError, did_you_mean, parse_mapping
from seqmnist_jax.training.jobs import run_jobs
from seqmnist_jax.training.replicas import ALOUD, Diverged, Watch
from seqmnist_jax.training.run import Run, build_run
from seqmnist_jax.training.scores import over_seeds
from seqmnist_jax.training.signals import StopOnSignal
from seqmnist_jax.training.start import BEGUN, GOING, LEFT_BY_RUNS, NEW, explaining_full_disk, look
from seqmnist_jax.training.train import train_replicas
from seqmnist_jax.workdir import caveats, files
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir.lock import owned

Json = dict[str, Any]
Overrides = dict[str, Any]
Grid = Mapping[str, tuple[Any, ...]]
SEED = "seed"
# Of sweep.json: the names of the runs of each program, in the order in which they train together.
TOGETHER = "together"
MOST_RUNS = 10_000


class SweepPoint(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, made of what is its own, as 'seed=1,learning_rate=0.004'.
      overrides: its values of the swept fields.
      run: the run.
    """

    name: str
    overrides: Overrides
    run: Run


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of '1,2,3', '1-8' or both together.

    Raises:
      UsageError: another form, or a seed that repeats.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise UsageError(f"--seeds is {text!r}; expected numbers or ranges, as in 1,2,3 or 1-8.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= MOST_RUNS:
            raise UsageError(f"--seeds has the range {part.strip()!r}; expected it to rise, as in 1-8.")
        seeds += range(first, last + 1)
    _check_values(SEED, seeds, "--seeds")
    return tuple(seeds)


def _check_values(field: str, values: Sequence[Any], where: str) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UsageError(f"{where} has {value!r} of {field} twice; expected different values.")


def build_sweep(config: ml_collections.ConfigDict, seeds: str = "") -> dict[str, tuple[Any, ...]]:
    """The swept fields and their values, from config.sweep and the short form for seeds.

    Raises:
      UsageError: not such a mapping, an unknown field, a value of another type than the field's, or one that repeats.
    """
    grid = parse_mapping(config.get("sweep", ""), "sweep", "{'seed': (1, 2, 3)}, from fields to values")
    if seeds:
        if SEED in grid:
            raise UsageError("--seeds and config.sweep both name seeds; leave one out.")
        grid = {SEED: parse_seeds(seeds), **grid}
    fields = configs.flatten(configs.to_json(config))
    for field, values in grid.items():
        if field not in fields or field == "sweep" or field.startswith("runtime."):
            known = [name for name in fields if not name.startswith("runtime.") and name != "sweep"]
            raise UsageError(
                f"sweep names {field!r}, which is no field that makes a run another.{did_you_mean(str(field), known)}"
            )
        if not isinstance(values, (tuple, list)) or not values:
            raise UsageError(f"sweep has {values!r} for {field}; expected a tuple of values, as (1, 2).")
        _check_values(field, values, "sweep")
        grid[field] = tuple(values)
    return grid


def _with(config: ml_collections.ConfigDict, overrides: Overrides) -> ml_collections.ConfigDict:
    changed = copy.deepcopy(config)
    changed.sweep = ""
    for field, value in overrides.items():
        *sections, name = field.split(".")
        section = changed
        for part in sections:
            section = section[part]
        try:
            section[name] = value
        except (TypeError, ValueError) as e:
            wanted = type(section[name]).__name__
            raise UsageError(f"sweep has {value!r} for {field}; expected a value of type {wanted}.") from e
    return changed


def _name(overrides: Overrides) -> str:
    """A folder's name: each field by its last part, or whole where two end alike."""
    lasts = [field.split(".")[-1] for field in overrides]
    parts = [
        f"{last if lasts.count(last) == 1 else field}={value}"
        for (field, value), last in zip(overrides.items(), lasts, strict=True)
    ]
    return re.sub(r"[^\w=.,+-]", "_", ",".join(parts))


def build_points(config: ml_collections.ConfigDict, grid: Grid, named: Iterable[str] = ()) -> list[SweepPoint]:
    """All runs of a sweep, checked before anything is written; the first field varies slowest.

    Args:
      config, grid: as in `build_sweep`, and as it gives it.
      named: as in `build_run`, beside the fields that are swept.

    Raises:
      UsageError: a value is impossible; the message names it.
    """
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise UsageError(f"The sweep has {count:,} runs; expected at most {MOST_RUNS:,}.")
    all_overrides = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    runs = build_runs([_with(config, overrides) for overrides in all_overrides], {*named, *grid})
    return [SweepPoint(_name(overrides), overrides, run) for overrides, run in zip(all_overrides, runs, strict=True)]


def build_runs(each: Sequence[ml_collections.ConfigDict], named: Iterable[str] = ()) -> list[Run]:
    """The run of each config; those of the same data share them; `named` as in `build_run`.

    Raises:
      as `build_run`.
    """
    tasks: dict[str, Task] = {}
    runs = []
    for config in each:
        wanted = repr(configs.to_json(config.data)) + str(config.train.batch_size)
        run = build_run(config, tasks.get(wanted), named)
        tasks[wanted] = run.task
        runs.append(run)
    return runs


class Job(NamedTuple):
    """A run, the folder that it goes into, and how a user would start it alone.

    Without a folder it only keeps its place in the program of a group.
    """

    run: Run
    folder: Path | None
    command: str | None


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

    Args:
      grid: as `build_sweep` gives it.
      points: as `build_points` makes them.
      workdir: the sweep's folder; made, or gone on with, also with other values of the same fields: what is finished
        stays as it is.
      command: how a user would start the run with these overrides alone.
      executor: runs the groups as jobs, as `jobs.make_executor` makes it; None for this process.
      watch: who is told how it goes, and may stop it.

    Returns:
      The sweep's summary, as written to its summary.json.

    Raises:
      UsageError, WorkdirError, CheckpointError, Stopped: as in `train.train_replicas`.
      JobsFailed: jobs of the executor failed; the message names their logs.
    """
    workdir = Path(workdir).expanduser()
    with ExitStack() as exits, explaining_full_disk([workdir]):
        _, together = survey(grid, points, workdir)
        check_place: Callable[[], None] = lambda: None  # noqa: E731
        if processes.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            check_place = exits.enter_context(owned(workdir))
            _, together = survey(grid, points, workdir)  # again, now that nobody else can change it
        processes.wait("who trains together is known")
        jobs = {point.name: Job(point.run, _folder(workdir, point), command(point.overrides)) for point in points}
        asked = [[jobs[name] for name in names if name in jobs] for names in together]
        groups = [
            [jobs.get(name, some[0]._replace(folder=None)) for name in names]
            for names, some in zip(together, asked, strict=True)
            if some
        ]
        watch.say(
            f"{len(points)} runs in {len(groups)} program{'s' if len(groups) > 1 else ''}, in {workdir}: "
            + "; ".join(f"{field} {', '.join(map(str, values))}" for field, values in grid.items())
        )
        if processes.is_main():
            told = {"sweep": dict(grid), "config of one run": points[0].run.config, TOGETHER: together}
            files.write_json(workdir / files.SWEEP, told)
        _train_groups(groups, executor, watch)
        processes.wait("all runs are done")
        summary = _summarize(points, workdir, grid)
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
    old: Json = {}
    if (workdir / files.SWEEP).exists():
        old = files.read_json(workdir / files.SWEEP, needed=("sweep", "config of one run"))
        data = points[0].run.identity[configs.CONTENT]  # of which each run's own folder knows
        fields, then = old["sweep"].keys() | grid.keys(), configs.from_json(old["config of one run"])
        identities = [configs.identity(then, data), points[0].run.identity]
        differing = configs.differences({"swept fields": sorted(old["sweep"])}, {"swept fields": sorted(grid)})
        differing += configs.differences(*({n: v for n, v in one.items() if n not in fields} for one in identities))
        if differing:
            raise files.WorkdirError(
                f"{workdir} holds another sweep; it differs in\n  " + "\n  ".join(differing) + "\n"
                "Other values of the same fields may be added to it. For another sweep choose another --workdir."
            )
    elif left := [name for name in (files.CONFIG, *LEFT_BY_RUNS) if (workdir / name).exists()]:
        raise files.WorkdirError(f"{workdir} holds a run ({left[0]}), not a sweep. Choose another --workdir.")
    together, begun = [*old.get(TOGETHER, [])], {name for names in old.get(TOGETHER, []) for name in names}
    new: dict[tuple[str, bool], list[str]] = {}
    for point in points:
        standing = look(point.run, _folder(workdir, point))
        if point.name not in begun:
            new.setdefault((point.run.program, standing == NEW), []).append(point.name)
    return BEGUN if old else NEW, [*together, *new.values()]


def _train_groups(groups: Sequence[list[Job]], executor: Any, watch: Watch) -> None:
    """Trains what is not finished, here or as jobs."""
    if executor is None:
        for group in groups:
            _train_group(group, watch)
        return
    left = [group for group in groups if any(job.folder and look(job.run, job.folder) in GOING for job in group)]
    watch.say(f"{len(left)} of {len(groups)} groups go to the executor, their logs to {executor.folder}.")
    names = [", ".join(job.folder.name for job in group if job.folder) for group in left]
    named = [(name, ([_stored(job) for job in group],)) for name, group in zip(names, left, strict=True)]
    run_jobs(executor, train_stored, named, watch.should_stop)


def _stored(job: Job) -> tuple[Json, Path | None, str | None]:
    """A job as plain values, for another process."""
    return job.run.config, job.folder, job.command


def train_stored(stored: Sequence[tuple[Json, Path | None, str | None]]) -> None:
    """Trains the runs of one group, in a process of their own; a signal stops it as it stops any other.

    Args:
      stored: as `_stored` gives each.
    """
    runs = build_runs([configs.from_json(values) for values, _, _ in stored])
    jobs = [Job(run, folder, command) for run, (_, folder, command) in zip(runs, stored, strict=True)]
    with StopOnSignal(by_hand=False) as stop:
        _train_group(jobs, ALOUD._replace(should_stop=stop))


def _train_group(jobs: list[Job], watch: Watch) -> None:
    """Trains runs of one program together, in chunks where they don't fit the memory."""
    runs, folders, commands = (list(column) for column in zip(*jobs, strict=True))
    try:
        train_replicas(runs, folders, commands, watch)
    except TooLarge as e:
        if len(jobs) == 1:
            raise
        half = len(jobs) // 2
        watch.say(f"{e} So these {len(jobs)} replicas train in chunks, of {len(jobs) - half} and {half}.")
        for chunk in (jobs[:-half], jobs[-half:]):
            if any(job.folder for job in chunk):
                _train_group(chunk, watch)
    except Diverged as e:
        watch.say(str(e))


def _folder(workdir: Path, point: SweepPoint) -> Path:
    return workdir / files.REPLICAS / point.name


def _summarize(points: Sequence[SweepPoint], workdir: Path, grid: Grid) -> Json:
    """What the runs say together: one entry for each recipe, best validation accuracy first."""
    recipes: dict[str, list[tuple[SweepPoint, Json]]] = {}
    diverged: list[Json] = []
    lost: dict[str, list[str]] = {}
    for point in points:
        folder, recipe = _folder(workdir, point), repr(_without_seed(point))
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
                "changes": _without_seed(runs[0][0]),
                "replicas": [point.name for point, _ in runs],
                "scores": {
                    point.name: {split: one[f"{split}_accuracy"] for split in ("validation", "test")}
                    for point, one in runs
                },
                "diverged": lost.get(recipe, []),
                "validation": over_seeds(validated) if validated else None,
                "test": over_seeds([summary["test_accuracy"] for summary in summaries]),
                "train_seconds": sum(summary["train_seconds"] for summary in summaries),
            }
        )
    # Means over those that are left are no recipe's; first come the recipes of which none diverged.
    entries.sort(key=lambda one: (len(one["diverged"]), -one["validation"]["mean"] if one["validation"] else 0.0))
    ended = [summary for runs in recipes.values() for _, summary in runs]
    told = [warning for summary in ended for warning in caveats.warnings(summary["dataset"], summary)]
    if not ended:
        told = caveats.warnings(points[0].run.task.facts(), None, diverged=True)
    return {
        "sweep": {field: list(values) for field, values in grid.items()},
        "datasets": list(dict.fromkeys(f"{s['dataset']['name']} ({s['dataset']['source']})" for s in ended)),
        "ranking": entries,
        "diverged": diverged,
        "warnings": [*dict.fromkeys(told), *caveats.of_means(len(diverged), len(points))],
    }


def _without_seed(point: SweepPoint) -> Overrides:
    return {field: value for field, value in point.overrides.items() if field != SEED}
