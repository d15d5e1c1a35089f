"""A table of results from work directories: one row for each recipe, over its seeds, and what stands behind it.

Only summary.json and, where it is, metrics.jsonl are read, so that a result can be kept without its checkpoints.
`results_page` makes a page of it.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmnist_jax.analysis.recorded import task_differences
from seqmnist_jax.errors import SeqMnistError, UsageError
from seqmnist_jax.models.build import model_title
from seqmnist_jax.training.scores import over_seeds
from seqmnist_jax.workdir import caveats, files, provenance
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir.metrics import read_events

Json = dict[str, Any]
# What tells runs of one recipe apart.
SEED = "seed"
# The validation accuracies, in percent, of which the table says when they were first reached.
TARGETS = (90, 95, 98, 99)
# What a summary of an earlier version, or of a run without a command line, does not say.
UNKNOWN = "unknown"


# What of a summary must be there, and of which kind.
NUMBER = (int, float)
NEEDED: dict[str, Any] = {"test_accuracy": NUMBER, "train_seconds": NUMBER, "device": str, "selected_on": str}
NEEDED |= {"steps": int, "seed": int, "parameters": int, "dataset": dict, "identity": dict}


class Result(NamedTuple):
    """The result of one run that has ended.

    Attributes:
      folder: its work directory.
      summary: its summary.json; of one that diverged the seed alone.
      recipe: its identity without the seed, with the number of steps, and without what earlier versions had no field
        for and did nevertheless, so that it stays the same recipe in later ones.
      validated: seconds of training and accuracy of each evaluation on the validation images, in order.
    """

    folder: Path
    summary: Json
    recipe: configs.FlatConfig
    validated: list[tuple[float, float]]


class Found(NamedTuple):
    """What `find` finds: the results, and for each run that is left out a sentence that says why."""

    results: list[Result]
    left_out: list[str]


def find(patterns: Sequence[str]) -> Found:
    """The results of all runs in and under the folders that match, those that diverged among them.

    Runs that are not finished, or whose record is damaged, are left out.

    Args:
      patterns: folders, or patterns of a shell for such: 'runs/*'.

    Raises:
      UsageError: a pattern matches no run, or none that has ended.
    """
    finished: set[Path] = set()
    unfinished: set[Path] = set()
    diverged: set[Path] = set()
    for pattern in patterns:
        roots = files.matching(pattern)
        ended, lost, begun = (
            {path.parent for root in roots for path in files.under(root, name)}
            for name in (files.SUMMARY, files.DIVERGED, files.CONFIG)
        )
        if not ended | lost | begun:
            raise UsageError(f"--workdirs: {pattern!r} matches no folder with a run, that is, with a {files.SUMMARY}.")
        finished |= ended
        diverged |= lost - ended
        unfinished |= begun - lost - ended
    results = []
    left_out = [
        f"{folder} is not finished; to go on, give the command that began it with its --workdir."
        for folder in sorted(unfinished)
    ]
    # A sweep's own summary is beside those of its runs, not one of them.
    finished = {folder for folder in finished if not (folder / files.SWEEP).exists()}
    for read, folders in ((_read, finished), (_read_diverged, diverged)):
        for folder in sorted(folders):
            try:
                results.append(read(folder))
            except SeqMnistError as e:
                left_out.append(str(e))
    if not results:
        raise UsageError("--workdirs: no run found has a result.\n  " + "\n  ".join(left_out))
    return Found(results, left_out)


def _read_record(path: Path, names: tuple[str, ...]) -> Json:
    record = files.read_json(path, needed=names)
    for name in names:
        if not isinstance(record[name], NEEDED[name]):
            raise files.WorkdirError(f"{path} is damaged: its {name} is {record[name]!r}.")
    return record


def _read_diverged(folder: Path) -> Result:
    report = _read_record(folder / files.DIVERGED, (SEED, "identity", "steps"))
    return Result(folder, {SEED: report[SEED]}, _recipe(report["identity"], report["steps"]), [])


def _read(folder: Path) -> Result:
    path = folder / files.SUMMARY
    summary = _read_record(path, tuple(NEEDED))
    events = [event for event in read_events(folder) if event["split"] == "validation"]
    times, scores = ([event.get(name) for event in events] for name in ("seconds", "accuracy"))
    pairs = zip(times, scores, strict=True)
    validated = [(t, a) for t, a in pairs if isinstance(t, NUMBER) and isinstance(a, NUMBER)]
    try:
        result = Result(folder, summary, _recipe(summary["identity"], summary["steps"]), validated)
        _row([result])  # what makes no row alone makes none with others
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise files.WorkdirError(f"{path} is damaged ({type(e).__name__}: {e}).") from e
    return result


def _recipe(identity: configs.FlatConfig, steps: int) -> configs.FlatConfig:
    kept = {name: value for name, value in identity.items() if configs.ADDED.get(name, ...) != value and name != SEED}
    return kept | {"train.steps": steps}


def rows(results: Sequence[Result]) -> list[Json]:
    """One row, as JSON values, for each recipe: means over seeds, times in seconds, and where all of it is from.

    A row's `id` and its labels depend on nothing but its own recipe. Times are those of runs on one device by one
    commit, so many together: where most of the seeds ran, of equals the fastest. Recipes of which all seeds diverged
    have no row, see `without_result`.

    Raises:
      UsageError: two runs of one recipe have the same seed or were set different tasks, or all runs diverged.
    """
    groups, lost = _by_recipe(results), without_result(results)
    groups = [group for group in groups if group[0].folder not in lost]
    if not groups:
        raise UsageError(f"--workdirs: all runs found diverged: {', '.join(map(str, lost))}.")
    return sorted(map(_row, groups), key=lambda row: (row["task"], -row["test_accuracy"]))


def _by_recipe(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each recipe, first those of runs that are finished."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: "test_accuracy" not in result.summary):
        groups.setdefault(_id(result.recipe), []).append(result)
    return list(groups.values())


def _id(recipe: configs.FlatConfig) -> str:
    """What names a recipe for good: of seven signs, made of its fields alone."""
    return "r" + hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:6]


def without_result(results: Sequence[Result]) -> list[Path]:
    """The folders of the runs of recipes of which all seeds diverged."""
    lost = [group for group in _by_recipe(results) if "test_accuracy" not in group[0].summary]
    return [result.folder for group in lost for result in group]


def _row(group: Sequence[Result]) -> Json:
    by_seed: dict[int, Path] = {}
    for result in group:
        seed = result.summary[SEED]
        if seed in by_seed:
            raise UsageError(
                f"{by_seed[seed]} and {result.folder} are the same recipe with the same seed, {seed}; "
                "leave one out, since a repeated seed is no further evidence."
            )
        by_seed[seed] = result.folder
    recipe, ended = group[0].recipe, [one for one in group if "test_accuracy" in one.summary]
    summaries = sorted((one.summary for one in ended), key=lambda summary: summary[SEED])
    diverged = sorted(by_seed.keys() - {summary[SEED] for summary in summaries})
    first = summaries[0]
    dataset = first["dataset"]
    for one, other in itertools.combinations(ended, 2):
        here, there = one.summary["dataset"], other.summary["dataset"]
        # A recipe has its protocol by name, and versions may differ in what that stands for.
        if names := task_differences(here, there):
            differing = ", ".join(f"{name} {here[name]!r} against {there[name]!r}" for name in names)
            raise UsageError(
                f"{one.folder} and {other.folder} are the same recipe, set different tasks ({differing}); leave one "
                "out, since a mean of both says nothing of either."
            )
    test = over_seeds([summary["test_accuracy"] for summary in summaries])
    validated = [s["validation_accuracy"] for s in summaries if s["validation_accuracy"] is not None]
    validation = over_seeds(validated) if validated else None
    epochs = first["steps"] * recipe["train.batch_size"] / dataset["sizes"]["train"]
    origin, precision = _origin(summaries), _precision(recipe, summaries)
    command = _command(origin["commands"])
    told = [warning for one in summaries for warning in caveats.warnings(one["dataset"], one)]
    mixed = [*caveats.differences(summaries), *(["command"] if len(origin["commands"]) > 1 else [])]
    return {
        "id": _id(recipe),
        "config": provenance.config_title(command),
        "task": _task(recipe, dataset),
        "model": model_title(recipe | {"model.precision": precision}),
        "precision": precision,
        "protocol": _protocol(recipe, dataset),
        "selected_on": first["selected_on"],
        "parameters": first["parameters"],
        "steps": first["steps"],
        "batch_size": recipe["train.batch_size"],
        "epochs": epochs,
        "learning_rate": recipe["optimizer.learning_rate"],
        "choice": first.get("choice"),
        "seeds": [summary[SEED] for summary in summaries],
        "diverged_seeds": diverged,
        "validation_accuracy": validation and validation["mean"],
        "validation_std": validation and validation["std"],
        "test_accuracy": test["mean"],
        "test_std": test["std"],
        "test_interval": test["interval"],
        "test_range": [test["min"], test["max"]],
        **_times(ended, epochs),
        "folder": _common([one.folder for one in group]),
        **origin,
        "command": command,
        "warnings": [*dict.fromkeys(told), *caveats.of_means(len(diverged), len(group), mixed)],
    }


def _common(folders: Sequence[Path]) -> str:
    """The folder that has all of these."""
    is_mixed = len({folder.is_absolute() for folder in folders}) > 1
    return os.path.commonpath([folder.absolute() if is_mixed else folder for folder in folders]) or "."


def _origin(summaries: Sequence[Json]) -> Json:
    """Where a row's runs are from: for each device, commit, command, version and day the seeds of its runs."""

    def seeds_of(value_of: Callable[[Json], str | None]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for summary in summaries:
            found.setdefault(value_of(summary) or UNKNOWN, []).append(summary[SEED])
        return found

    return {
        "devices": seeds_of(lambda summary: summary["device"]),
        "commits": seeds_of(_commit),
        "commands": seeds_of(_without_seed),
        "versions": seeds_of(_version),
        "dates": seeds_of(lambda summary: summary.get("date")),
    }


def _precision(recipe: configs.FlatConfig, summaries: Sequence[Json]) -> str:
    """In what a row's runs were trained: of 'auto', which a recipe takes for float32, what it was on their devices."""
    meant = recipe.get("model.precision", "float32")
    return " or ".join(sorted({summary.get("precision") or meant for summary in summaries}))


def _version(summary: Json) -> str | None:
    versions = summary.get("versions") or {}
    named = ((versions.get("seqmnist_jax"), ""), (versions.get("jax"), "jax "))
    return ", ".join(f"{package}{version}" for version, package in named if version) or None


def _commit(summary: Json) -> str:
    """The commit, seven digits of it, '+changes' where files differed from it."""
    digits, plus, changes = (summary.get("git_commit") or UNKNOWN).partition("+")
    return digits[:7] + plus + changes


def _without_seed(summary: Json) -> str | None:
    """A run's command but for the seed, which is a config's own where no flag says it."""
    command = summary.get("command")
    return command and re.sub(rf" --config\.seed[= ]{summary[SEED]}(?= |$)", "", command)


def _command(commands: Mapping[str, Any]) -> str | None:
    """Of the commands that made a row's runs the plainest, with SEED for the seed; None where they don't have one."""
    made = sorted(commands.keys() - {UNKNOWN}, key=lambda command: (len(command), command))
    if not made:
        return None
    words = shlex.split(made[0])
    place = words.index("--config") + 2 if "--config" in words else len(words)
    return shlex.join([*words[:place], "--config.seed=SEED", *words[place:]])


def _times(ended: Sequence[Result], epochs: float) -> Json:
    """The mean training times of the runs by one commit on one device, so many together, and which these are."""
    alike: dict[tuple[str, str, int], list[Result]] = {}
    for one in ended:
        made = one.summary["device"], _commit(one.summary), one.summary.get("replicas") or 1
        alike.setdefault(made, []).append(one)

    def seconds(runs: Sequence[Result]) -> float:
        return statistics.fmean(one.summary["train_seconds"] for one in runs)

    (device, commit, together), timed = min(alike.items(), key=lambda item: (-len(item[1]), seconds(item[1])))
    return {
        "train_seconds": seconds(timed),
        "seconds_per_epoch": seconds(timed) / epochs,
        **{f"seconds_to_{target}": _seconds_to(target / 100, [one.validated for one in timed]) for target in TARGETS},
        "timed_seeds": sorted(one.summary[SEED] for one in timed),
        "timed_together": together,
        "device": device,
        "commit": commit,
    }


def _seconds_to(target: float, curves: Sequence[list[tuple[float, float]]]) -> float | None:
    """The mean time of training at which an accuracy was first measured; None where a run never had it."""
    first = [next((seconds for seconds, accuracy in curve if accuracy >= target), None) for curve in curves]
    reached = [seconds for seconds in first if seconds is not None]
    return statistics.fmean(reached) if len(reached) == len(first) else None


def _task(recipe: configs.FlatConfig, dataset: Json) -> str:
    order = "" if dataset["permutation"] == "none" else f", permuted by {dataset['permutation']}"
    return f"{dataset['name']}, {recipe['data.view']}s{order}"


def _protocol(recipe: configs.FlatConfig, dataset: Json) -> str:
    """The protocol's name, and where the run departs from it."""
    own = [f"{name} {dataset[name]}" for name in dataset["overrides"]]
    return recipe["data.protocol"] + (f" but {', '.join(own)}" if own else "")


def write_csv(rows: Sequence[Json], path: Path) -> None:
    """Writes the rows with full precision; lists are separated by spaces, mappings are JSON."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(map(_plain, row.values()))
    files.write_bytes(path, text.getvalue().encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value)
    return " ".join(map(str, value)) if isinstance(value, list) else value
