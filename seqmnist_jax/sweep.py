"""Many runs by one command: seeds, and all combinations of some fields' values.

Runs that differ in traced numbers alone (`run.TRACED`) are replicas of one program and train
together; the others follow one another, in groups.
"""

import ast
import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from seqmnist_jax import config as configs
from seqmnist_jax import distributed
from seqmnist_jax import workdir as files
from seqmnist_jax.errors import UsageError, did_you_mean
from seqmnist_jax.executors import run_jobs
from seqmnist_jax.memory import TooLarge
from seqmnist_jax.run import Run, build_run
from seqmnist_jax.scores import over_seeds
from seqmnist_jax.train import Diverged, Say, print_at_once, train_replicas

Json = dict[str, Any]
Changes = dict[str, Any]
SEED = "seed"
MOST_RUNS = 10_000


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, made of what is its own, as 'seed=1,learning_rate=0.004'.
      changes: its values of the swept fields.
      run: the run.
    """

    name: str
    changes: Changes
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
    text = config.get("sweep", "")
    try:
        swept = ast.literal_eval(text) if text else {}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        swept = None
    if not isinstance(swept, Mapping):
        raise UsageError(f"sweep is {text!r}; expected a mapping from fields to values, as {{'seed': (1, 2, 3)}}.")
    swept = dict(swept)
    if seeds:
        if SEED in swept:
            raise UsageError("--seeds and config.sweep both name seeds; leave one out.")
        swept = {SEED: parse_seeds(seeds), **swept}
    fields = configs.flatten(configs.to_json(config))
    for field, values in swept.items():
        if field not in fields or field == "sweep" or field.startswith("runtime."):
            known = [name for name in fields if not name.startswith("runtime.") and name != "sweep"]
            raise UsageError(
                f"sweep names {field!r}, which is no field that makes a run another.{did_you_mean(str(field), known)}"
            )
        if not isinstance(values, (tuple, list)) or not values:
            raise UsageError(f"sweep has {values!r} for {field}; expected a tuple of values, as (1, 2).")
        _check_values(field, values, "sweep")
        swept[field] = tuple(values)
    return swept


def _with(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
    changed = copy.deepcopy(config)
    changed.sweep = ""
    for field, value in changes.items():
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


def _name(changes: Changes) -> str:
    """A folder's name: each field by its last part, or whole where two end alike."""
    lasts = [field.split(".")[-1] for field in changes]
    parts = [
        f"{last if lasts.count(last) == 1 else field}={value}"
        for (field, value), last in zip(changes.items(), lasts, strict=True)
    ]
    return re.sub(r"[^\w=.,+-]", "_", ",".join(parts))


def build_members(config: ml_collections.ConfigDict, swept: Mapping[str, tuple[Any, ...]]) -> list[Member]:
    """All runs of a sweep, checked before anything is written; the first field varies slowest.

    Raises:
      UsageError: a value is impossible; the message names it.
    """
    count = 1
    for values in swept.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise UsageError(f"The sweep has {count:,} runs; expected at most {MOST_RUNS:,}.")
    members: list[Member] = []
    tasks: dict[str, Any] = {}
    for values in itertools.product(*swept.values()):
        changes = dict(zip(swept, values, strict=True))
        own = _with(config, changes)
        wanted = repr(configs.to_json(own.data)) + str(own.train.batch_size)
        run = build_run(own, tasks.get(wanted))
        tasks[wanted] = run.task
        members.append(Member(_name(changes), changes, run))
    return members


def train_sweep(
    swept: Mapping[str, tuple[Any, ...]],
    members: Sequence[Member],
    workdir: Path,
    *,
    command: Callable[[Changes], str | None] = lambda changes: None,
    executor: Any = None,
    say: Say = print_at_once,
    **watch: Any,
) -> Json:
    """Trains all runs of a sweep, each into its own folder under `workdir`/replicas.

    Args:
      swept: as `build_sweep` gives it.
      members: as `build_members` makes them.
      workdir: the sweep's folder; made, or resumed: groups that are finished are passed over.
      command: how a user would start the run with these changes alone.
      executor: runs the groups as jobs, as `executors.make_executor` makes it; None for this process.
      say, **watch: as in `train.train_replicas`.

    Returns:
      The sweep's summary, as written to its summary.json.

    Raises:
      UsageError, WorkdirError, CheckpointError, Stopped: as in `train.train_replicas`.
      JobsFailed: jobs of the executor failed; the message names their logs.
    """
    folders = {member.name: workdir / files.REPLICAS / member.name for member in members}
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.run.program, []).append(member)
    say(
        f"{len(members)} runs in {len(groups)} program{'s' if len(groups) > 1 else ''}, in {workdir}: "
        + "; ".join(f"{field} {', '.join(map(str, values))}" for field, values in swept.items())
    )
    if distributed.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / files.SWEEP, {"sweep": dict(swept), "config of one run": members[0].run.config})
    places = {member.name: Place(folders[member.name], command(member.changes)) for member in members}
    waiting = [
        # What has diverged would only do so again.
        [member for member in group if not (folders[member.name] / files.DIVERGED).exists()]
        for group in groups.values()
    ]
    waiting = [group for group in waiting if group]
    if executor is None:
        for group in waiting:
            _train_group(group, places, say, **watch)
    else:
        left = [group for group in waiting if not all(_is_finished(member, places) for member in group)]
        say(f"{len(left)} of {len(groups)} groups go to the executor, their logs to {executor.folder}.")
        jobs = [
            (
                ", ".join(member.name for member in group),
                ([member.run.config for member in group], [tuple(places[member.name]) for member in group]),
            )
            for group in left
        ]
        run_jobs(executor, train_job, jobs)
    distributed.wait("all runs are done")
    summary = _summarize(members, folders, swept)
    if distributed.is_main():
        files.write_json(workdir / files.SUMMARY, summary)
    return summary


class Place(NamedTuple):
    """Where a run goes, and the command that would start it alone."""

    folder: Path
    command: str | None


def _is_finished(member: Member, places: Mapping[str, Place]) -> bool:
    path = places[member.name].folder / files.SUMMARY
    return path.exists() and files.read_json(path).get("steps") == member.run.steps


def train_job(stored: Sequence[Json], places: Sequence[tuple[Path, str | None]]) -> None:
    """Trains the runs of one group, in a process of their own.

    Args:
      stored: their configs as JSON values.
      places: where each goes, as `Place`.
    """
    runs: list[Run] = []
    for values in stored:
        same_data = runs and runs[0].config["data"] == values["data"]
        runs.append(build_run(configs.from_json(values), runs[0].task if same_data else None))
    members = [Member(Path(folder).name, {}, run) for run, (folder, _) in zip(runs, places, strict=True)]
    _train_group(members, {member.name: Place(*place) for member, place in zip(members, places, strict=True)}, print)


def _train_group(members: list[Member], places: Mapping[str, Place], say: Say, **watch: Any) -> None:
    """Trains runs of one program together, in chunks where they don't fit the memory."""
    try:
        train_replicas(
            [member.run for member in members],
            [places[member.name].folder for member in members],
            commands=[places[member.name].command for member in members],
            say=say,
            **watch,
        )
    except TooLarge as e:
        if len(members) == 1:
            raise
        half = len(members) // 2
        say(f"{e} So these {len(members)} replicas train in chunks, of {len(members) - half} and {half}.")
        for chunk in (members[:-half], members[-half:]):
            _train_group(chunk, places, say, **watch)
    except Diverged as e:
        # A run alone in its program; of several each has said so itself.
        if len(members) == 1 and distributed.is_main():
            files.write_json(places[members[0].name].folder / files.DIVERGED, {"reason": str(e)})
        say(str(e))


def _summarize(members: Sequence[Member], folders: Mapping[str, Path], swept: Mapping[str, tuple[Any, ...]]) -> Json:
    """What the runs say together: one entry for each recipe, best validation accuracy first."""
    recipes: dict[str, list[tuple[Member, Json]]] = {}
    diverged = []
    for member in members:
        folder = folders[member.name]
        if (folder / files.DIVERGED).exists():
            diverged.append({"name": member.name, **files.read_json(folder / files.DIVERGED)})
            continue
        recipe = {field: value for field, value in member.changes.items() if field != SEED}
        recipes.setdefault(repr(recipe), []).append((member, files.read_json(folder / files.SUMMARY)))
    entries = []
    for runs in recipes.values():
        summaries = [summary for _, summary in runs]
        validated = [s["validation_accuracy"] for s in summaries if s["validation_accuracy"] is not None]
        entries.append(
            {
                "changes": {field: value for field, value in runs[0][0].changes.items() if field != SEED},
                "replicas": [member.name for member, _ in runs],
                "validation": over_seeds(validated) if validated else None,
                "test": over_seeds([summary["test_accuracy"] for summary in summaries]),
                "train_seconds": sum(summary["train_seconds"] for summary in summaries),
            }
        )
    entries.sort(key=lambda entry: -entry["validation"]["mean"] if entry["validation"] else 0.0)
    return {"sweep": {field: list(values) for field, values in swept.items()}, "ranking": entries, "diverged": diverged}


def as_text(summary: Json) -> str:
    """A sweep's summary for people: the ranking by validation accuracy."""

    def told(scores: Json | None) -> str:
        if scores is None:
            return "-"
        spread = "" if scores["std"] is None else f" ± {100 * scores['std']:.2f}"
        interval = (
            "" if scores["interval"] is None else " ({:.2f} to {:.2f})".format(*(100 * e for e in scores["interval"]))
        )
        return f"{100 * scores['mean']:.2f}{spread}{interval}"

    lines = [("", "runs", "validation, %", "test, %")]
    for entry in summary["ranking"]:
        changes = ", ".join(f"{field}={value}" for field, value in entry["changes"].items()) or "all seeds"
        lines.append((changes, str(entry["test"]["n"]), told(entry["validation"]), told(entry["test"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"DIVERGED {one['name']}: {one['reason']}" for one in summary["diverged"]]
    return "\n".join(text)
