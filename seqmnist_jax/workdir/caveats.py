"""What must be said with a result: one set of words, from what a run has on record, for all who tell it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# How exact a run's products are, in training and in evaluation.
PRECISIONS = {"precision": "precision", "eval_precision": "precision of evaluation"}
# What of a sitting, beside its command, a result's times and numbers depend on.
ORIGIN = {"device": "device", "versions": "versions of packages", "git_commit": "commit", **PRECISIONS}


def warnings(
    facts: Mapping[str, Any], summary: Mapping[str, Any] | None, *, diverged: bool = False, step: int | None = None
) -> list[str]:
    """What must be said with a run's result, a sentence each.

    Args:
      facts: as in data.json, or a summary's dataset.
      summary: as in summary.json; None of a run that has not ended, or diverged.
      diverged: whether it did.
      step: that of the checkpoint whose result it is, where that is not the summary's.
    """
    known: Mapping[str, Any] = summary or {}
    selections = [str(selection) for selection in (known.get("selected_on"), facts.get("selection"))]
    told = [
        f"The checkpoint was chosen on test images ({name}): its accuracy can't be compared with an honest one."
        for name in [name for name in selections if name.startswith("test")][:1]
    ]
    told += [facts["warning"]] if facts.get("warning") else []
    if diverged:
        told.append("The run diverged." + ("" if step is None else f" This is checkpoint {step}, from before."))
    elif summary is None:
        told.append("The run has not ended." + ("" if step is None else f" This is its checkpoint of step {step}."))
    told += [f"Checkpoint {lost}, once the best, is lost." for lost in known.get("lost_checkpoints", [])]
    if step is not None and known.get("best_step", step) != step:
        told.append(f"This is checkpoint {step}; the result in the summary is that of checkpoint {known['best_step']}.")
    sittings = known.get("sittings", [])
    if differing := differences(sittings):
        starts = [str(one["first_step"]) for one in sittings[:1]]
        starts += [str(one["first_step"]) for before, one in itertools.pairwise(sittings) if differences((before, one))]
        told.append(
            f"The run was made in sittings that differ in {', '.join(differing)}, from steps {', '.join(starts)} on."
        )
    return told


def differences(made: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what of their origin sittings, or the runs of some summaries, differ; earlier versions don't say all."""
    told = {name: [one[field] for one in made if field in one] for field, name in ORIGIN.items()}
    return [name for name, values in told.items() if any(value != values[0] for value in values)]


def of_means(diverged: int, count: int, mixed: Sequence[str] = ()) -> list[str]:
    """What must be said with means over runs of which some diverged, or which differ in these."""
    told = [f"{diverged} of {count} runs diverged, and are in no mean."] if diverged else []
    return told + ([f"The seeds differ in {', '.join(mixed)}."] if mixed else [])
