"""A table of results from work directories: one row for each recipe, over its seeds.

Only summary.json and, where it is, metrics.jsonl are read, so that a result can be kept without its checkpoints.
"""

import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmnist_jax.data.protocols import FIELDS
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models.cells import cell_title
from seqmnist_jax.training.scores import in_percent, over_seeds
from seqmnist_jax.workdir import caveats, files
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir.metrics import read_events

Json = dict[str, Any]
# What tells runs of one recipe apart.
SEED = "seed"
# The validation accuracies, in percent, of which the table says when they were first reached.
TARGETS = (90, 95, 98, 99)


# What of a summary must be there, and of which kind.
NUMBER = (int, float)
NEEDED: dict[str, Any] = {"test_accuracy": NUMBER, "train_seconds": NUMBER, "device": str, "selected_on": str}
NEEDED |= {"steps": int, "seed": int, "parameters": int, "dataset": dict}


class Result(NamedTuple):
    """The result of one run that has ended.

    Attributes:
      folder: its work directory.
      summary: its summary.json; of one that diverged the seed alone.
      recipe: its identity without the seed, and the number of steps.
      validated: seconds of training and accuracy of each evaluation on the validation images, in order.
    """

    folder: Path
    summary: Json
    recipe: configs.FlatConfig
    validated: list[tuple[float, float]]


def find(patterns: Sequence[str]) -> list[Result]:
    """The results of all runs in and under the folders that match, and those that diverged.

    Args:
      patterns: folders, or patterns of a shell for such: 'runs/*'.

    Raises:
      UsageError: a pattern matches no run, or a run is not finished; the message names them.
      WorkdirError: a summary can't be read.
    """
    summaries: set[Path] = set()
    unfinished: set[Path] = set()
    diverged: set[Path] = set()
    for pattern in patterns:
        roots = files.matching(pattern)
        found = {path for root in roots for path in root.rglob(files.SUMMARY)}
        lost = {path.parent for root in roots for path in root.rglob(files.DIVERGED)} - {path.parent for path in found}
        started = {path.parent for root in roots for path in root.rglob(files.CONFIG)} - lost
        diverged |= lost
        if not found and not started and not lost:
            raise UsageError(f"--workdirs: {pattern!r} matches no folder with a run, that is, with a {files.SUMMARY}.")
        summaries |= found
        unfinished |= started - {path.parent for path in found}
    if unfinished:
        raise UsageError(
            "These runs are not finished; the command that began each resumes it, or leave them out:\n  "
            + "\n  ".join(map(str, sorted(unfinished)))
        )
    # A sweep's own summary is beside those of its runs, not one of them.
    results = [_read(path) for path in sorted(summaries) if not (path.parent / files.SWEEP).exists()]
    return results + [_read_diverged(folder) for folder in sorted(diverged)]


def _read_diverged(folder: Path) -> Result:
    config, identity = files.read_config(folder), _identity_of_config(folder)
    recipe = {name: value for name, value in identity.items() if name != SEED}
    return Result(folder, {SEED: config[SEED]}, recipe | {"train.steps": config["train"]["steps"]}, [])


def _read(path: Path) -> Result:
    summary = files.read_json(path, needed=tuple(NEEDED))
    for name, kind in NEEDED.items():
        if not isinstance(summary[name], kind):
            raise files.WorkdirError(f"{path} is damaged: its {name} is {summary[name]!r}.")
    identity = summary.get("identity") or _identity_of_config(path.parent)
    recipe = {name: value for name, value in identity.items() if name != SEED} | {"train.steps": summary["steps"]}
    events = [event for event in read_events(path.parent) if event["split"] == "validation"]
    times, scores = ([event.get(name) for event in events] for name in ("seconds", "accuracy"))
    pairs = zip(times, scores, strict=True)
    validated = [(t, a) for t, a in pairs if isinstance(t, NUMBER) and isinstance(a, NUMBER)]
    return Result(path.parent, summary, recipe, validated)


def _identity_of_config(folder: Path) -> configs.FlatConfig:
    """The identity of a run whose summary, by an earlier version, does not hold it."""
    config = configs.from_json(files.read_config(folder))
    return configs.identity(config, files.read_facts(folder)["content_hash"])


def rows(results: Sequence[Result]) -> list[Json]:
    """One row, as JSON values, for each recipe: means over seeds, and times in seconds.

    Times are those of the runs on one device, that on which they were shortest. Recipes of which all seeds diverged
    have none, see `without_result`.

    Raises:
      UsageError: two runs of one recipe have the same seed, or all runs diverged.
      WorkdirError: a summary is not as it must be; the message names its folder.
    """
    groups = _by_recipe(results)
    if lost := without_result(results):
        groups = [group for group in groups if group[0].folder not in lost]
    if not groups:
        raise UsageError(f"--workdirs: all runs found diverged: {', '.join(map(str, lost))}.")
    made = [_row(group) for group in groups]
    _tell_apart(made, [group[0].recipe for group in groups])
    return sorted(made, key=lambda row: (row["task"], -row["test_accuracy"]))


def _by_recipe(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each recipe, first those of runs that are finished."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: "test_accuracy" not in result.summary):
        groups.setdefault(repr(sorted(result.recipe.items())), []).append(result)
    return list(groups.values())


def without_result(results: Sequence[Result]) -> list[Path]:
    """The folders of the runs of recipes of which all seeds diverged."""
    lost = [group for group in _by_recipe(results) if "test_accuracy" not in group[0].summary]
    return [result.folder for group in lost for result in group]


def _tell_apart(rows: Sequence[Json], recipes: Sequence[configs.FlatConfig]) -> None:
    """Adds to each row the values by which it differs from others of the same model, protocol and length."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        key = (row["task"], row["model"], row["protocol"], row["epochs"])
        alike.setdefault(key, []).append(i)
    for indices in alike.values():
        names = sorted({name for i in indices for name in recipes[i]})
        differing = [name for name in names if len({repr(recipes[i].get(name)) for i in indices}) > 1]
        for i in indices:
            rows[i]["recipe"] = ", ".join(f"{name.rpartition('.')[2]} {recipes[i].get(name)}" for name in differing)


def _row(group: list[Result]) -> Json:
    try:
        return _row_of(group)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        folders = ", ".join(str(result.folder) for result in group)
        raise files.WorkdirError(f"{files.SUMMARY} is not as it must be ({type(e).__name__}: {e}) in {folders}.") from e


def _row_of(group: list[Result]) -> Json:
    by_seed: dict[int, Path] = {}
    for result in group:
        seed = result.summary["seed"]
        if seed in by_seed:
            raise UsageError(
                f"{by_seed[seed]} and {result.folder} are the same recipe with the same seed, {seed}; "
                "leave one out, since a repeated seed is no further evidence."
            )
        by_seed[seed] = result.folder
    recipe, summaries = group[0].recipe, [one.summary for one in group if "test_accuracy" in one.summary]
    diverged = sorted(one.summary[SEED] for one in group if "test_accuracy" not in one.summary)
    told = [warning for one in summaries for warning in caveats.warnings(one["dataset"], one)]
    first = summaries[0]
    test = over_seeds([summary["test_accuracy"] for summary in summaries])
    validated = [s["validation_accuracy"] for s in summaries if s["validation_accuracy"] is not None]
    validation = over_seeds(validated) if validated else None
    seconds, device = _fastest(summaries)
    curves = [result.validated for result in group if result.summary.get("device") == device]
    epochs = first["steps"] * recipe["train.batch_size"] / first["dataset"]["sizes"]["train"]
    dataset = first["dataset"]
    return {
        "task": _task(recipe, dataset),
        "model": _model(recipe),
        "recipe": "",  # as `_tell_apart` says
        "protocol": _protocol(recipe, dataset),
        "selected_on": first["selected_on"],
        "parameters": first["parameters"],
        "steps": first["steps"],
        "batch_size": recipe["train.batch_size"],
        "epochs": epochs,
        "seeds": sorted(by_seed.keys() - set(diverged)),
        "diverged_seeds": diverged,
        "validation_accuracy": validation and validation["mean"],
        "validation_std": validation and validation["std"],
        "test_accuracy": test["mean"],
        "test_std": test["std"],
        "test_interval": test["interval"],
        "train_seconds": seconds,
        "seconds_per_epoch": seconds / epochs,
        **{f"seconds_to_{target}": _seconds_to(target / 100, curves) for target in TARGETS},
        "device": device,
        "command": _command(summaries),
        "warnings": [*dict.fromkeys(told), *caveats.of_means(len(diverged), len(group))],
    }


def _fastest(summaries: Sequence[Json]) -> tuple[float, str]:
    """The mean training time on the device where that is shortest, and the device."""
    by_device: dict[str, list[float]] = {}
    for summary in summaries:
        by_device.setdefault(summary["device"], []).append(summary["train_seconds"])
    return min((statistics.fmean(seconds), device) for device, seconds in by_device.items())


def _seconds_to(target: float, curves: Sequence[list[tuple[float, float]]]) -> float | None:
    """The mean time of training at which an accuracy was first measured; None where a run never had it."""
    first = [next((seconds for seconds, accuracy in curve if accuracy >= target), None) for curve in curves]
    reached = [seconds for seconds in first if seconds is not None]
    return statistics.fmean(reached) if len(reached) == len(first) else None


def _task(recipe: configs.FlatConfig, dataset: Json) -> str:
    order = "" if dataset["permutation"] == "none" else f", permuted by {dataset['permutation']}"
    return f"{dataset['name']}, {recipe['data.view']}s{order}"


def _model(recipe: configs.FlatConfig) -> str:
    if recipe.get("model.name", "rnn") == "tcn":
        return f"TCN, {recipe['model.num_layers']} levels of {recipe['model.hidden_size']}"
    layers = "" if recipe["model.num_layers"] == 1 else f"{recipe['model.num_layers']} x "
    both = " both ways" if recipe["model.bidirectional"] else ""
    precision = "" if recipe.get("model.precision", "float32") == "float32" else f", {recipe['model.precision']}"
    return f"{cell_title(recipe['model.cell'])} {layers}{recipe['model.hidden_size']}{both}{precision}"


def _protocol(recipe: configs.FlatConfig, dataset: Json) -> str:
    """The protocol's name, and where the run departs from it."""
    overrides = dataset.get("overrides")
    if overrides is None:  # a run of an earlier version
        overrides = [name for name in FIELDS if recipe.get(f"data.{name}") is not None]
    own = [f"{name} {dataset[name]}" for name in overrides]
    return recipe["data.protocol"] + (f" but {', '.join(own)}" if own else "")


def _command(summaries: Sequence[Json]) -> str | None:
    """The command of these runs, with SEED for the seed; None where they don't have one."""
    commands = {
        re.sub(rf"(--config\.seed[= ]){summary['seed']}\b", r"\1SEED", summary["command"])
        for summary in summaries
        if summary.get("command")
    }
    if not commands:
        return None
    # The config's own seed needs no flag, so a command that names one stands for all; of several the plainest.
    return min(commands, key=lambda command: ("SEED" not in command, len(command), command))


HEADER = (
    "Task",
    "Model",
    "Protocol",
    "Parameters",
    "Epochs",
    "Seeds",
    "Validation, %",
    "Test, %",
    "Training time",
    "Seconds an epoch",
    "Device",
)


def _name(row: Json) -> str:
    return row["model"] + (f" ({row['recipe']})" if row["recipe"] else "")


def _cells(row: Json) -> list[str]:
    selected = " **(selected on test)**" if row["selected_on"].startswith("test") else ""
    return [
        row["task"],
        _name(row),
        row["protocol"] + selected,
        f"{row['parameters']:,}",
        f"{row['epochs']:.3g}",
        ", ".join([*map(str, row["seeds"]), *(f"{seed} diverged" for seed in row["diverged_seeds"])]),
        in_percent(row["validation_accuracy"], row["validation_std"]),
        in_percent(row["test_accuracy"], row["test_std"], row["test_interval"]),
        duration(row["train_seconds"]),
        f"{row['seconds_per_epoch']:.3g}",
        row["device"],
    ]


def _times(row: Json) -> list[str]:
    targets = [duration(row[f"seconds_to_{target}"]) for target in TARGETS]
    return [row["task"], _name(row), in_percent(row["test_accuracy"], row["test_std"]), *targets, row["device"]]


def duration(seconds: float | None) -> str:
    """For people, or '-' where there is none."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def as_markdown(
    rows: Sequence[Json], published: Sequence[dict[str, str]] = (), without_result: Sequence[Path] = ()
) -> str:
    """The table for people, the command of each row, and what others have published.

    Args:
      rows: as `rows` makes them.
      published: figures of others, as `read_published` reads them.
      without_result: the runs of recipes that have no row, because they diverged.
    """
    text = [
        _markdown(HEADER, [_cells(row) for row in rows]),
        "",
        "Test and validation: mean ± standard deviation over the seeds, in brackets the 95 % t interval of the "
        "mean. Training time: a run's mean on the device named, without compilation, evaluation and checkpoints; of "
        "replicas trained together, a run's share.",
    ]
    told: dict[str, list[str]] = {}
    for row in rows:
        for warning in row["warnings"]:
            told.setdefault(warning, []).append(f"{_name(row)}, {row['task']}")
    if without_result:
        told["All seeds diverged, so there is no row."] = [str(folder) for folder in without_result]
    text += ["", *(f"- WARNING: {warning} ({'; '.join(names)})" for warning, names in told.items())] if told else []
    timed = [row for row in rows if any(row[f"seconds_to_{target}"] is not None for target in TARGETS)]
    if timed:
        header = ["Task", "Model", "Test, %", *(f"{target} %" for target in TARGETS), "Device"]
        text += [
            "",
            "Training time until the validation images were first read so well:",
            "",
            _markdown(header, [_times(row) for row in timed]),
            "",
            "Mean over the seeds, '-' where one of them never was. Measured every `train.eval_every` steps, under the "
            "learning rate's schedule for the whole run.",
        ]
    commands = dict.fromkeys(f"{_name(row)}, {row['task']}: `{row['command']}`" for row in rows if row["command"])
    if commands:
        text += ["", "The command of each:", "", *(f"- {command}" for command in commands)]
    if published:
        header = list(published[0])
        text += [
            "",
            "Published by others:",
            "",
            _markdown(header, [[row[name] for name in header] for row in published]),
        ]
    return "\n".join(text)


def write_csv(rows: Sequence[Json], path: Path) -> None:
    """Writes the rows with full precision; lists are separated by spaces."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(" ".join(map(str, v)) if isinstance(v, list) else v for v in row.values())


def read_published(path: Path) -> list[dict[str, str]]:
    """Figures of others from a CSV file with a header.

    Raises:
      UsageError: it is missing, no such file, or has no rows, or one with more or fewer cells than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = [line for line in csv.reader(file) if line] or [[]]
    except (OSError, UnicodeError, csv.Error) as e:
        raise UsageError(f"--published: {path} can't be read as CSV in UTF-8 ({e}).") from e
    for line in lines:
        if len(line) != len(header):
            raise UsageError(f"--published: {path} has {line}; expected {len(header)} cells, as in its header.")
    found = [dict(zip(header, line, strict=True)) for line in lines]
    if not found:
        raise UsageError(f"--published: {path} has no rows; expected a CSV file with a header.")
    return found
