"""Two finished runs, measured on the same test images: is one better?"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.analysis import rerun
from seqmnist_jax.analysis.recorded import Answers, is_trial, read_answers, task_differences
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import scores
from seqmnist_jax.workdir import caveats, files
from seqmnist_jax.workdir import config as configs

Json = dict[str, Any]

SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a finished run left: its summary, what it knew of its data, and its answers to the test images.

    Attributes:
      workdir: the run's folder.
      facts: as in data.json.
      summary: as in summary.json.
      answers: those to the test images, in their order.
    """

    workdir: Path
    facts: Json
    summary: Json
    answers: Answers

    @property
    def data(self) -> str:
        """The data set in words."""
        name, source = (self.facts[field] for field in ("name", "source"))
        return f"{name} ({source}, content {self.facts['content_hash'][:12]}, {len(self.answers.labels):,} test images)"


def compare(first: Path, second: Path) -> Json:
    """Compares the test results of two finished runs, image by image.

    The two models are compared, each from one seed; whether their configs differ takes several seeds of each.

    Args:
      first: the work directory of a finished run.
      second: another.

    Returns:
      JSON values: dataset, content_hash and examples, the test images of both; first and second, of each run
      workdir, best_step, selected_on, accuracy, accuracy_interval, loss and calibration_error as
      `scores.score` has them; mcnemar, as `scores.mcnemar` has it, the first run as a; verdict, a sentence;
      warnings, what must be said with it; rerun, None unless both are the same run, of one config, data and
      seed, made twice: then first_difference, as `rerun.Difference`, or None where nothing differs.

    Raises:
      WorkdirError: one is no work directory, is not finished, or has a damaged file.
      UsageError: they were not measured on the same test images.
    """
    a, b = _read(Path(first).expanduser()), _read(Path(second).expanduser())
    if a.facts["content_hash"] != b.facts["content_hash"] or not np.array_equal(a.answers.labels, b.answers.labels):
        differ = "data sets" if a.facts["content_hash"] != b.facts["content_hash"] else f"labels in {files.PREDICTIONS}"
        raise UsageError(
            f"{a.workdir} and {b.workdir} were not measured on the same test images, their {differ} differ: {a.data} "
            f"against {b.data}. Compare runs on the same data, or train one of them on the other's."
        )
    test = scores.mcnemar(a.answers.labels, a.answers.predictions, b.answers.predictions)
    return {
        "dataset": a.facts["name"],
        "content_hash": a.facts["content_hash"],
        "examples": len(a.answers.labels),
        "first": _result(a),
        "second": _result(b),
        "mcnemar": test,
        "verdict": _verdict(a, b, test),
        "warnings": _warnings(a, b),
        "rerun": _rerun(a, b),
    }


def _rerun(a: Measured, b: Measured) -> Json | None:
    """Where a run and its rerun part; None for runs of different configs, data or seeds."""
    if _identity(a) != _identity(b) or task_differences(a.facts, b.facts):
        return None
    found = rerun.first_difference(a.workdir, b.workdir)
    return {"first_difference": None if found is None else found._asdict()}


def _identity(run: Measured) -> configs.FlatConfig:
    """What makes it this run, its length too."""
    return configs.completed(run.summary["identity"]) | {"train.steps": run.summary["steps"]}


def _read(workdir: Path) -> Measured:
    facts = files.read_facts(workdir)
    is_summed_up = (workdir / files.SUMMARY).exists()
    if (workdir / files.DIVERGED).exists():
        raise files.WorkdirError(f"{workdir} diverged, so there are no answers of it to compare.")
    if is_trial(workdir) and not (workdir / files.PREDICTIONS).exists():
        raise files.WorkdirError(
            f"{workdir} is a trial, by which hyperparameters are chosen: its test images stay unseen."
        )
    for name in (files.SUMMARY, files.PREDICTIONS):
        if not (workdir / name).exists():
            # A run with a summary counts as finished, so that training would not test it again.
            first = f"remove its {files.SUMMARY} and " if is_summed_up else ""
            raise files.WorkdirError(
                f"{workdir} is not finished: it has no {name}. To finish it, {first}give the command that trained it "
                f"again, with --workdir={workdir}."
            )
    summary = files.read_json(workdir / files.SUMMARY, needed=("selected_on", "best_step", "identity", "steps"))
    try:
        return Measured(workdir, facts, summary, read_answers(workdir))
    except files.WorkdirError as e:
        raise files.WorkdirError(
            f"{e} To make it anew, remove it and "
            f"{files.SUMMARY} and give the command that trained the run again, with --workdir={workdir}."
        ) from e


def _result(run: Measured) -> Json:
    measures = ("accuracy", "accuracy_interval", "loss", "calibration_error")
    return {
        "workdir": str(run.workdir),
        **{name: run.summary[name] for name in ("best_step", "selected_on")},
        **{name: run.answers.score[name] for name in measures},
    }


def _verdict(a: Measured, b: Measured, test: Json) -> str:
    p = "p < 1e-6" if test["p_value"] < 1e-6 else f"p = {test['p_value']:.2g}"
    if test["p_value"] >= SIGNIFICANCE:
        return f"The test images do not tell these two trained models apart (exact McNemar test, {p})."
    better = a if test["accuracy_difference"] > 0 else b
    first, second = _identity(a), _identity(b)
    same = "their configs are the same" + ("" if first == second else " but for the seed")
    if {**first, "seed": None} != {**second, "seed": None}:
        takes = "whether its config is better takes several seeds of each"
    elif differing := _differences(a, b):
        takes = f"{same}, but they differ in {', '.join(differing)}"
    elif first == second:
        takes = "they are the same run made twice, so it was chance, other code or another device"
    else:
        takes = f"{same}, so it was the luckier seed"
    return (
        f"{better.workdir} is the better of these two trained models, by "
        f"{100 * abs(test['accuracy_difference']):.2f} percentage points (exact McNemar test, {p}); "
        f"{takes}."
    )


def _differences(a: Measured, b: Measured) -> list[str]:
    """In what beside their configs two runs differ: their tasks, and how exact their products were."""
    tasks = task_differences(a.facts, b.facts)
    if "permutation" in tasks and "permutation_indices" in tasks:
        tasks.remove("permutation_indices")  # the name says it
    told = [
        name
        if name == "permutation_indices"  # hundreds of numbers
        else f"{name} ({a.facts[name]!r} against {b.facts[name]!r})"
        for name in tasks
    ]
    measured = [(words, a.summary.get(field), b.summary.get(field)) for field, words in caveats.PRECISIONS.items()]
    return told + [
        f"{words} ({one} against {other})" for words, one, other in measured if one and other and one != other
    ]


def _warnings(a: Measured, b: Measured) -> list[str]:
    """What must be said with a comparison of these two, each thing once."""
    warnings = []
    for run in (a, b):
        told = caveats.warnings(run.facts, run.summary)
        # What is said of the data is said once.
        warnings += [one if one == run.facts.get("warning") else f"{run.workdir}: {one}" for one in told]
    if a.workdir.resolve() == b.workdir.resolve():
        warnings.append(f"{a.workdir} is compared with itself.")
    if differing := _differences(a, b):
        were = "were not set the same task; they " if task_differences(a.facts, b.facts) else ""
        warnings.append(f"The two runs {were}differ in {', '.join(differing)}.")
    return list(dict.fromkeys(warnings))
