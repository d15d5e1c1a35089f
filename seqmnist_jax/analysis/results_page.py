"""The page that tells a table's rows: what was measured, where each is from, how long it took, what others have."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqmnist_jax.analysis.table import TARGETS, UNKNOWN
from seqmnist_jax.data import references
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.scores import in_percent

Json = dict[str, Any]

RESULTS = ["Row", "Config", "Task", "Model", "Protocol", "Parameters", "Epochs", "Seeds"]
RESULTS += ["Validation, %", "Test, %", "95 % t interval of the test mean", "Test, least to largest"]
ORIGINS = ["Row", "Runs", "Ended", "Commit", "Version", "Device"]
TIMES = ["Row", "Config", "Timed seeds", "Training time", "Seconds an epoch"]
TIMES += [*(f"{target} %" for target in TARGETS), "Device", "Commit"]


def duration(seconds: float | None) -> str:
    """For people, or '-' where there is none."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def as_markdown(
    rows: Sequence[Json], published: Sequence[dict[str, str]] = (), without_result: Sequence[Path] = ()
) -> str:
    """The table for people, the command of each row, and what others have published.

    Args:
      rows: as `table.rows` makes them.
      published: figures of others, as `read_published` reads them.
      without_result: the runs of recipes that have no row, because they diverged.
    """
    text = [
        markdown(RESULTS, (result_cells(row).values() for row in rows)),
        "",
        "Validation and test: mean ± standard deviation over the seeds; of one seed its accuracy. The t interval is "
        "that of the mean over seeds. A row's name is made of its recipe alone, so that it stays the same.",
    ]
    if told := warnings(rows, without_result):
        text += ["", *(f"- WARNING: {sentence}" for sentence in told)]
    text += ["", "## Where each row is from", "", markdown(ORIGINS, map(_origin, rows))]
    text += ["", "Where a row's seeds differ, each value is followed by its seeds."]
    text += [
        *("", "## Times", "", markdown(TIMES, map(_times, rows)), ""),
        "Means over runs of one device and one commit, where most of a row's seeds ran (of equals the fastest). "
        "Training time is without compilation, evaluation and checkpoints; of replicas trained together it is a run's "
        f"share. {', '.join(f'{target} %' for target in TARGETS)}: training time until the validation images were "
        "first read so well, '-' where a run never did; measured every `train.eval_every` steps, under the learning "
        "rate's schedule for the whole run.",
    ]
    if commands := [f"- `{row['id']}`: `{row['command']}`" for row in rows if row["command"]]:
        text += ["", "## Commands", "", "At the row's commit, with the row's seeds for SEED:", "", *commands]
    if published:
        header = list(published[0])
        lines = [[_cited(cell) for cell in row.values()] for row in published]
        text += ["", "## Published by others", "", markdown(header, lines)]
    return "\n".join(text)


def warnings(rows: Sequence[Json], without_result: Sequence[Path]) -> list[str]:
    """What must be said with rows, each sentence with the names of those that it is said of."""
    told: dict[str, list[str]] = {}
    for row in rows:
        for warning in row["warnings"]:
            told.setdefault(warning, []).append(row["id"])
    if without_result:
        told["All seeds diverged, so there is no row."] = [str(folder) for folder in without_result]
    return [f"{warning} ({', '.join(names)})" for warning, names in told.items()]


def markdown(header: Sequence[str], lines: Any) -> str:
    """A table in Markdown, of lines of cells."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _cited(cell: str) -> str:
    """A cell, or where it is a key of references.bib what that names, with a link."""
    reference = references.read().get(cell)
    return cell if reference is None else f"[{reference.short}]({reference.url})"


def result_cells(row: Json) -> dict[str, str]:
    """What the table of results says of a row, by the names of its columns."""
    seeds = [", ".join(map(str, row["seeds"]))]
    if row["diverged_seeds"]:
        seeds.append(f"{', '.join(map(str, row['diverged_seeds']))} diverged")
    cells = [
        f"`{row['id']}`",
        row["config"] or "-",
        row["task"],
        row["model"],
        row["protocol"] + (" **(selected on test)**" if row["selected_on"].startswith("test") else ""),
        f"{row['parameters']:,}",
        f"{row['epochs']:.3g}",
        "; ".join(seeds),
        in_percent(row["validation_accuracy"], row["validation_std"]),
        in_percent(row["test_accuracy"], row["test_std"]),
        _bounds(row["test_interval"]),
        _bounds(row["test_range"] if len(row["seeds"]) > 1 else None),
    ]
    return dict(zip(RESULTS, cells, strict=True))


def _bounds(two: Sequence[float] | None) -> str:
    return "-" if two is None else f"{100 * two[0]:.2f} to {100 * two[1]:.2f}"


def _origin(row: Json) -> list[str]:
    told = [_of_seeds(row[name]) for name in ("dates", "commits", "versions", "devices")]
    return [f"`{row['id']}`", f"[{row['folder']}]({row['folder'].replace(' ', '%20')})", *told]


def _of_seeds(values: Mapping[str, Sequence[int]]) -> str:
    """Values that a row's runs have, with the seeds of each where there are several."""
    told = {("-" if value == UNKNOWN else value): found for value, found in values.items()}
    if len(told) == 1:
        return next(iter(told))
    seeds_of = {
        value: f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}" for value, found in told.items()
    }
    return "; ".join(f"{value} ({seeds})" for value, seeds in seeds_of.items())


def _times(row: Json) -> list[str]:
    timed = f"{len(row['timed_seeds'])} of {len(row['seeds'])}"
    return [
        f"`{row['id']}`",
        row["config"] or "-",
        timed + (f", {row['timed_together']} together" if row["timed_together"] > 1 else ""),
        duration(row["train_seconds"]),
        f"{row['seconds_per_epoch']:.3g}",
        *(duration(row[f"seconds_to_{target}"]) for target in TARGETS),
        row["device"],
        row["commit"],
    ]


def read_published(path: Path) -> list[dict[str, str]]:
    """Figures of others from a CSV file with a header, whose cells may be keys of references.bib.

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
