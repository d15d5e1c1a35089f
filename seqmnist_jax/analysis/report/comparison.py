"""Several runs of one task side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.analysis import table
from seqmnist_jax.analysis.recorded import task_differences
from seqmnist_jax.analysis.report import summary as summaries
from seqmnist_jax.analysis.report.runs import Found
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import scores
from seqmnist_jax.training.plan import ranked_in_words
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files

Json = dict[str, Any]


def check_one_task(facts: dict[Path, Json]) -> None:
    """Refuses runs that were not set the same task.

    Args:
      facts: what each run knows of its data, by its folder.

    Raises:
      UsageError: two of them were not; the message names what differs.
    """
    (first, known), *others = facts.items()
    for workdir, facts_there in others:
        changed = ["content_hash"] if known["content_hash"] != facts_there["content_hash"] else []
        differing = [
            f"{name}: {_short(known[name])} there, {_short(facts_there[name])} here"
            for name in (*changed, *task_differences(known, facts_there))
        ]
        if differing:
            raise UsageError(
                f"{first} and {workdir} were not set the same task, so one page can't compare them; they differ in\n  "
                + "\n  ".join(differing)
                + "\nGive each task a page of its own."
            )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:4])) + ", ..."
    return repr(value[:12] + "..." if isinstance(value, str) and len(value) > 40 else value)


def best(runs: Sequence[Found]) -> Found | None:
    """The run with the highest validation accuracy, of equal ones the first; None where none has any.

    One that is not finished, or diverged, has no answers to test images, and comes after those that have.
    """
    validated = [run for run in runs if run.validation_accuracy() is not None]
    return max(validated, key=lambda run: (run.answers is not None, run.validation_accuracy() or 0.0), default=None)


def names(folders: Sequence[Path]) -> list[str]:
    """Of each folder the shortest end of its path that no other has."""
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths) and depth < max(map(len, paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def describe(runs: Sequence[Found], sweeps: Sequence[Path]) -> Json:
    """The runs, what their fields differ in, their curves, tests between them, and what sweeps say of recipes.

    Args:
      runs: of one task.
      sweeps: the folders of sweeps among what was asked for.

    Returns:
      best, the place of the best run by validation, as `best` has it, None where nothing was validated; fields, the
      names of the config's fields in which the runs differ; runs, of each name, those fields' values, state, curves,
      accuracies, and mcnemar: of the best against this one on the same test images, as `scores.mcnemar` has it (the
      best is a), None where it can't be tested; recipes, over seeds, as rows of text and their warnings, [] where a
      ranking has them; rankings, of each sweep its name and its ranking.
    """
    flat = [configs.flatten(configs.from_json(run.config).to_dict()) for run in runs]
    known = sorted(configs.of_one_run({name: None for one in flat for name in one}))
    fields = [name for name in known if len({repr(one.get(name)) for one in flat}) > 1]
    reference = best(runs)
    rankings = {name: _ranking(sweep) for name, sweep in zip(names(sweeps), sweeps, strict=True)} if sweeps else {}
    ranked = [{"sweep": name, "entries": entries} for name, entries in rankings.items() if entries]
    is_one_sweep = len(sweeps) == 1 and all(run.workdir.is_relative_to(sweeps[0]) for run in runs)
    return {
        "best": None if reference is None else list(runs).index(reference),
        "fields": fields,
        "runs": [
            {
                "name": name,
                "fields": [str(one.get(field)) for field in fields],
                "state": run.state,
                "steps": run.last_step() if run.summary is None else run.summary["steps"],
                "validation_accuracy": run.validation_accuracy(),
                "test": _test(run),
                "train_seconds": (run.summary or {}).get("train_seconds"),
                "curves": _overlaid(run),
                "mcnemar": None if reference is None or run is reference else _mcnemar(reference, run),
            }
            for run, name, one in zip(runs, names([run.workdir for run in runs]), flat, strict=True)
        ],
        "recipes": [] if len(ranked) == 1 and is_one_sweep else _recipes(runs),
        "rankings": ranked,
    }


def _overlaid(run: Found) -> Json:
    """The curves of accuracy and loss on the validation set, or in training where there is none."""
    told = summaries.curves(run.events)
    return {
        metric: by_split.get("validation") or by_split.get("train")
        for metric, by_split in told.items()
        if metric in ("accuracy", "loss")
    }


def _test(run: Found) -> Json | None:
    """The test accuracy and its interval; None of a run that is not finished."""
    if run.summary is None:
        return None
    if run.answers is None:
        return {"accuracy": run.summary.get("test_accuracy"), "interval": run.summary.get("test_accuracy_interval")}
    score = run.answers.score
    return {"accuracy": score["accuracy"], "interval": score["accuracy_interval"]}


def _mcnemar(a: Found, b: Found) -> Json | None:
    if a.answers is None or b.answers is None or not np.array_equal(a.answers.labels, b.answers.labels):
        return None
    return scores.mcnemar(a.answers.labels, a.answers.predictions, b.answers.predictions)


def _recipes(runs: Sequence[Found]) -> list[Json]:
    """The runs that have ended, over their seeds, as `table.rows` has them; [] where no recipe has several."""
    ended = [str(run.workdir) for run in runs if run.state != "not finished"]
    try:
        rows = table.rows(table.find(ended).results) if ended else []
    except UsageError:  # a run beside its own rerun
        return []
    if all(len(row["seeds"]) < 2 for row in rows):
        return []
    return [
        {
            "model": row["model"],
            "seeds": [*row["seeds"], *(f"{seed} diverged" for seed in row["diverged_seeds"])],
            "validation": scores.in_percent(row["validation_accuracy"], row["validation_std"]),
            "test": scores.in_percent(row["test_accuracy"], row["test_std"], row["test_interval"]),
            "command": row["command"],
            "warnings": row["warnings"],
        }
        for row in rows
    ]


def _ranking(sweep: Path) -> list[Json]:
    """A finished sweep's ranking by validation, and what of it diverged."""
    if not (sweep / files.SUMMARY).exists():
        return []
    told = files.read_json(sweep / files.SUMMARY, needed=("ranking", "diverged"))
    columns = ("recipe", "runs", "validation", "test")
    return [dict(zip(columns, ranked_in_words(entry), strict=True)) for entry in told["ranking"]] + [
        {"recipe": entry["name"], "runs": 1, "validation": "diverged", "test": "-"} for entry in told["diverged"]
    ]
