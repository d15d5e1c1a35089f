"""Which runs a sweep has: all combinations of some fields' values, and the trials that choose hyperparameters for them.

Nothing here trains or writes; a choice is read from what the trials have left.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from seqmnist_jax.data.task import Task
from seqmnist_jax.errors import UsageError, did_you_mean, parse_mapping
from seqmnist_jax.training.folders import GOING, look
from seqmnist_jax.training.optimizers import SWEEPABLE
from seqmnist_jax.training.run import Run, build_run
from seqmnist_jax.training.scores import in_percent
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files

Json = dict[str, Any]
Overrides = dict[str, Any]
# Values of a field, or of several that go together, whose names the key then has with commas between.
Grid = Mapping[str, tuple[Any, ...]]
SEED = "seed"
MOST_RUNS = 10_000
VALIDATED = "validation_accuracy"


class SweepPoint(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, made of what is its own, as 'seed=1,learning_rate=0.004'.
      overrides: its values of the swept fields, and of those chosen for it.
      run: the run; until its trials have ended it has the first of the values from which they choose.
      trials: the runs that choose for it, in the order of the candidates: of equal ones the first.
      candidates: the values that each of them tries.
    """

    name: str
    overrides: Overrides
    run: Run
    trials: tuple["SweepPoint", ...] = ()
    candidates: tuple[Overrides, ...] = ()


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
        if last < first:
            raise UsageError(f"--seeds has the range {part.strip()!r}; expected it to rise, as in 1-8.")
        if last - first >= MOST_RUNS:
            raise UsageError(f"--seeds has the range {part.strip()!r}; expected at most {MOST_RUNS:,} seeds.")
        seeds += range(first, last + 1)
    _check_values(SEED, seeds, "--seeds")
    return tuple(seeds)


def _check_values(field: str, values: Sequence[Any], where: str) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UsageError(f"{where} has {value!r} of {field} twice; expected different values.")


def fields_of(key: str) -> list[str]:
    """The fields that a key of a sweep names, one or several with commas between."""
    return [field.strip() for field in str(key).split(",")]


def build_sweep(config: ml_collections.ConfigDict, seeds: str | None = None) -> dict[str, tuple[Any, ...]]:
    """The swept fields and their values, from config.sweep and the short form for seeds.

    Raises:
      UsageError: not such a mapping, an unknown field, one that is named twice or that the sweep also chooses, a value
        of another type than the field's, or one that repeats.
    """
    grid = _parse(config, "sweep", "{'seed': (1, 2, 3)}")
    swept = [field for key in grid for field in fields_of(key)]
    if seeds is not None:
        if SEED in swept:
            raise UsageError("--seeds and config.sweep both name seeds; leave one out.")
        grid = {SEED: parse_seeds(seeds), **grid}
    for key in grid:
        if SEED in fields_of(key) and key != SEED:
            raise UsageError(f"sweep has {key!r}; expected the seed by itself, for it is no part of a recipe.")
    choice = _parse(config, "choose", "{'optimizer.learning_rate': (1e-3, 4e-3)}")
    if choice and not grid:
        raise UsageError(
            "choose chooses for the runs of a sweep, but there is neither --seeds nor config.sweep. For a single run "
            "give --config.choose= --config.choose_steps=0 too."
        )
    if bool(choice) != bool(config.get("choose_steps", 0)):
        raise UsageError("choose and choose_steps, how long each candidate trains, go together; set both or neither.")
    known = [field for field, _, _ in SWEEPABLE.values()]
    for key in choice:
        if key in swept or key not in known:
            why = "the sweep names too" if key in swept else "is no hyperparameter"
            raise UsageError(
                f"choose names {key!r}, which {why}; expected of {', '.join(known)}.{did_you_mean(key, known)}"
            )
        for value in choice[key]:
            if type(value) not in (int, float):
                raise UsageError(f"choose has {value!r} for {key}; expected numbers.")
    return grid


def _parse(config: ml_collections.ConfigDict, name: str, example: str) -> dict[str, tuple[Any, ...]]:
    """The mapping from fields to values that config's field of this name has; errors as in `build_sweep`."""
    grid = parse_mapping(config.get(name, ""), name, f"{example}, from fields to values")
    fields, seen = configs.flatten(configs.to_json(config)), set[str]()
    known = list(configs.of_one_run(fields))
    for key, values in grid.items():
        together = fields_of(key)
        for field in together:
            if field not in known:
                raise UsageError(
                    f"{name} names {field!r}, which is no field that makes a run another.{did_you_mean(field, known)}"
                )
            if field in seen:
                raise UsageError(f"{name} names {field!r} twice; expected each field once.")
            seen.add(field)
        if not isinstance(values, (tuple, list)) or not values:
            raise UsageError(f"{name} has {values!r} for {key}; expected a tuple of values, as (1, 2).")
        for value in values if len(together) > 1 else ():
            if not isinstance(value, (tuple, list)) or len(value) != len(together):
                raise UsageError(
                    f"{name} has {value!r} for {key}; expected a tuple of {len(together)} values, one for each field."
                )
        _check_values(key, values, name)
        grid[key] = tuple(values)
    return grid


def _combinations(grid: Grid) -> list[Overrides]:
    """All of a grid, the first key varying slowest."""
    found = []
    for values in itertools.product(*grid.values()):
        one: Overrides = {}
        for key, value in zip(grid, values, strict=True):
            fields = fields_of(key)
            one |= dict(zip(fields, value if len(fields) > 1 else (value,), strict=True))
        found.append(one)
    return found


def _with(config: ml_collections.ConfigDict, overrides: Overrides) -> ml_collections.ConfigDict:
    changed = copy.deepcopy(config)
    for field, nothing in configs.OF_SWEEPS.items():
        changed[field] = nothing
    for field, value in overrides.items():
        *sections, name = field.split(".")
        section = changed
        for part in sections:
            section = section[part]
        try:
            section[name] = value
        except (TypeError, ValueError, OverflowError) as e:
            wanted = type(section[name]).__name__
            raise UsageError(f"sweep or choose has {value!r} for {field}; expected a value of type {wanted}.") from e
    return changed


def _name(overrides: Overrides, joint: set[str]) -> str:
    """A folder's name: each field by its last part, or whole where two end alike.

    Args:
      overrides: the values of the fields that are in it.
      joint: of these the ones that go together. What is '' of them is left out, all of which is 'plain', and a
        mapping is told without its brackets and quotes.
    """
    lasts = [field.split(".")[-1] for field in overrides]
    parts = []
    for (field, value), last in zip(overrides.items(), lasts, strict=True):
        if field in joint and value == "":
            continue
        text = re.sub("[{}' \"]", "", str(value)).replace(":", "=") if field in joint else value
        parts.append(f"{last if lasts.count(last) == 1 else field}={text}")
    return re.sub(r"[^\w=.,+-]", "_", ",".join(parts)) or "plain"


def build_points(config: ml_collections.ConfigDict, grid: Grid, named: Iterable[str] = ()) -> list[SweepPoint]:
    """All runs of a sweep, with their trials, checked before anything is written; the first field varies slowest.

    Args:
      config, grid: as in `build_sweep`, and as it gives it.
      named: as in `build_run`, beside the fields that are swept.

    Raises:
      UsageError: a value is impossible; the message names it.
    """
    choice = dict(sorted(_parse(config, "choose", "").items()))  # trials are the same in whatever order it is asked
    runs = math.prod(map(len, grid.values()))
    trials = runs // len(grid.get(SEED, (0,))) * math.prod(map(len, choice.values())) if choice else 0
    if (count := runs + trials) > MOST_RUNS:
        told = f"{count:,} runs{', trials among them' if trials else ''}"
        raise UsageError(f"The sweep has {told}; expected at most {MOST_RUNS:,}.")
    swept = [fields_of(key) for key in grid]
    of_sweep = {*itertools.chain(*swept)}
    named = {*named}
    if both := sorted(named & {*of_sweep, *itertools.chain(*map(fields_of, choice))}):
        raise UsageError(f"{both[0]} is given, but the sweep has values of its own for it; leave one of them out.")
    named |= of_sweep
    joint = {field for fields in swept if len(fields) > 1 for field in fields}
    combinations = _combinations(grid)
    candidates = sorted(_combinations(choice), key=lambda one: [*one.values()]) if choice else []
    start = candidates[0] if candidates else {}
    points = _build(config, [(_name(one, joint), {**one, **start}) for one in combinations], named)
    _check_values("a run's folder", [point.name for point in points], "The sweep")
    if not candidates:
        return points
    firsts: dict[str, SweepPoint] = {}  # whose seed the trials have
    for point in points:
        firsts.setdefault(recipe_of(point), point)
    asked, own = [], {*start, "train.steps"}
    for point in firsts.values():
        kept = {field: value for field, value in without_seed(point.overrides).items() if field not in own}
        length = {SEED: point.run.learner.seed, "train.steps": config.choose_steps}
        asked += [(_name(kept | one, joint), kept | one | length) for one in candidates]
    config = copy.deepcopy(config)
    config.runtime.profile_steps = ""
    try:
        tried = _build(config, asked, {*named, *start})
    except UsageError as error:
        raise UsageError(f"In the trials, of choose_steps = {config.choose_steps:,}: {error}") from None
    for trial in tried:
        _check_validates(trial.run)
    tried = [trial._replace(run=dataclasses.replace(trial.run, tests=False)) for trial in tried]
    each = len(candidates)
    trials_of = {recipe: tuple(tried[place * each :][:each]) for place, recipe in enumerate(firsts)}
    return [point._replace(trials=trials_of[recipe_of(point)], candidates=tuple(candidates)) for point in points]


def _check_validates(run: Run) -> None:
    """Checks that a run measures itself on validation images, by which alone one may choose.

    Raises:
      UsageError: it has none, or its protocol selects by test images.
    """
    if run.task.measured_split != "validation" or not len(run.task.part("validation")):
        raise UsageError(
            f"choose needs validation images, but by data.protocol, data.split and data.selection this run is measured "
            f"on {run.task.measured_split} images; expected a protocol that holds some back, as 'seqmnist'."
        )


def _build(
    config: ml_collections.ConfigDict, asked: Sequence[tuple[str, Overrides]], named: Iterable[str]
) -> list[SweepPoint]:
    runs = build_runs([_with(config, overrides) for _, overrides in asked], named)
    return [SweepPoint(name, overrides, run) for (name, overrides), run in zip(asked, runs, strict=True)]


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


def without_seed(overrides: Overrides) -> Overrides:
    """The values that make a recipe."""
    return {field: value for field, value in overrides.items() if field != SEED}


def recipe_of(point: SweepPoint) -> str:
    """What is the same of points that differ in their seed alone."""
    return repr(without_seed(point.overrides))


def all_trials(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The trials of all points that have no choice yet, each once."""
    return list({trial.name: trial for point in points if not point.run.choice for trial in point.trials}.values())


def trials_in_words(points: Sequence[SweepPoint]) -> str:
    """What is done before the runs of a sweep, '' where nothing is."""
    trials = all_trials(points)
    if not trials:
        return ""
    candidates = "; ".join(_values_in_words(one) for one in points[0].candidates)
    fields = ", ".join(points[0].candidates[0])
    return (
        f"{len(trials)} trials of {trials[0].run.steps:,} steps come first, which choose {fields} for each recipe, of "
        f"{candidates}, by the validation images; they read no test images"
    )


def folder_of(workdir: Path, point: SweepPoint) -> Path:
    """Where a point's run is, of the sweep in a folder."""
    return workdir / files.REPLICAS / point.name


def decide(points: Sequence[SweepPoint], workdir: Path) -> list[SweepPoint]:
    """The points with what was chosen for them: what a run of the same recipe has on record, or else by their trials.

    Of these the values of the best by its best validation accuracy; one that diverged is the worst, of equal ones the
    smaller values win. A point stays as it is if it has its choice, or if one of its trials has not ended.

    Args:
      points: as `build_points` makes them.
      workdir: the sweep's. The trials may have been removed since a run put the choice on record.

    Raises:
      as `folders.look`, of the trials' folders.
    """
    open_points = [point for point in points if point.trials and not point.run.choice]
    choices: dict[str, Json | None] = {}  # of each recipe
    for point, name in itertools.product(open_points, (files.SUMMARY, files.DIVERGED)):
        choice = _read(folder_of(workdir, point) / name).get("choice")
        if choice and _is_asked(choice, point):
            choices.setdefault(recipe_of(point), choice)
    for point in open_points:
        if recipe_of(point) not in choices:
            choices[recipe_of(point)] = _choose(point, workdir / files.TRIALS)
    decided = []
    for point in points:
        choice = choices.get(recipe_of(point))
        if choice is None:
            decided.append(point)
            continue
        run = build_run(_with(configs.from_json(point.run.config), choice["chosen"]), point.run.task)
        run = dataclasses.replace(run, choice=choice, remark=point.run.remark)
        decided.append(point._replace(overrides=point.overrides | choice["chosen"], run=run))
    return decided


def _read(path: Path) -> Json:
    """What a run has on record there, {} where it has nothing."""
    return files.read_json(path) if path.exists() else {}


def _choose(point: SweepPoint, workdir: Path) -> Json | None:
    """What the trials of a point choose; None if one of them has not ended."""
    folders = {folder_of(workdir, trial): trial.run for trial in point.trials}
    if any(look(run, folder) in GOING for folder, run in folders.items()):
        return None
    found: list[float | None] = [_read(folder / files.SUMMARY).get(VALIDATED) for folder in folders]
    first_best = np.argmax([-1.0 if one is None else one for one in found])
    return {
        "chosen": point.candidates[int(first_best)],
        "candidates": [one | {VALIDATED: score} for one, score in zip(point.candidates, found, strict=True)],
        "steps": point.trials[0].run.steps,
        SEED: point.trials[0].run.learner.seed,
    }


def _is_asked(choice: Json, point: SweepPoint) -> bool:
    """Whether a choice was made among the candidates of a point, by trials as long as its own."""
    tried = [{field: value for field, value in one.items() if field != VALIDATED} for one in choice["candidates"]]
    return tried == [*point.candidates] and choice["steps"] == point.trials[0].run.steps


def choice_in_words(choice: Json) -> str:
    """What was chosen, for people: 'learning_rate 0.004 of 0.001 (91.20%), 0.004 (93.10%), 0.016 (diverged)'."""

    told = [
        f"{_values_in_words(one)} ({'diverged' if one[VALIDATED] is None else f'{one[VALIDATED]:.2%}'})"
        for one in choice["candidates"]
    ]
    names = ", ".join(field.split(".")[-1] for field in choice["chosen"])
    return f"{names} {_values_in_words(choice['chosen'])} of {', '.join(told)}"


def ranked_in_words(entry: Json) -> tuple[str, str, str, str]:
    """An entry of a sweep's ranking: its recipe, how many runs it has, validation and test accuracy in percent."""
    recipe = ", ".join(f"{field}={value}" for field, value in entry["changes"].items()) or "all seeds"
    runs, lost = len(entry["replicas"]), len(entry.get("diverged", []))
    validation, test = (
        "-" if one is None else in_percent(one["mean"], one["std"], one["interval"])
        for one in (entry["validation"], entry["test"])
    )
    return recipe, f"{runs} of {runs + lost}" if lost else str(runs), validation, test


def _values_in_words(one: Overrides) -> str:
    return ", ".join(f"{value:.4g}" for field, value in one.items() if field != VALIDATED)
