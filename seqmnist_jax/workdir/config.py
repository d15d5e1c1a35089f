"""Configs as plain values: their JSON form, what is wrong with them, when two are one run."""

import functools
import json
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from seqmnist_jax.errors import UsageError, did_you_mean

Json = Any
FlatConfig = dict[str, Json]

# Of an identity, beside the config's fields.
CONTENT = "content hash of the data"
CELL_CONTENT = "content hash of the cell's file"
# What a stored config has beside the fields of configs/default.py, where the cell is one of the user's own.
CELL_FILE, CELL_HASH = "runtime.cell_file", "model.cell_hash"
# Fields of the config as a whole that make several runs of it, with the values that make one.
OF_SWEEPS: dict[str, Any] = {"sweep": "", "choose": "", "choose_steps": 0}
SECTIONS = ("data", "model", "optimizer", "train", "runtime")
# Fields that configs of earlier versions lack, with the values that say what those runs did.
ADDED = {
    "data.permuted": False,
    "model.precision": "float32",
    "model.remat": 0,
    "model.name": "rnn",
    "model.kernel_size": 7,
    "model.cell_options": "",
    "model.longest_time_scale": 0,
    "model.stages": "",
    "model.shorten": 4,
    "model.reading": "last",
    "model.head_layers": 0,
    "model.memory": 0,
    "optimizer.drop_steps": 1000,
    "optimizer.recurrent_rate": 1.0,
    "optimizer.ema_decay": 0.0,
    "train.accumulate": 1,
    "train.label_smoothing": 0.0,
    "train.noise": 0.0,
    "runtime.backend": "auto",
    "runtime.eval_precision": "float32",
}
# The least and the largest value of fields that no builder checks; counts are int32 on the device.
MOST = 2**31 - 1
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, MOST),
    "train.batch_size": (1, MOST),
    "train.steps": (1, MOST),
    # Norms of so many steps are remembered.
    "train.eval_every": (1, 10**6),
    "model.hidden_size": (1, 10**6),
    # Each is compiled apart.
    "model.num_layers": (1, 1000),
    "model.unroll": (1, MOST),
    "model.forget_bias": (-1e4, 1e4),
    "model.remat": (0, MOST),
    "model.kernel_size": (2, MOST),
    "model.longest_time_scale": (0, MOST),
    "model.shorten": (2, MOST),
    "model.head_layers": (0, 1000),
    "model.memory": (0, 10**4),
    "optimizer.warmup_steps": (0, MOST),
    "optimizer.drop_steps": (1, MOST),
    "choose_steps": (0, MOST),
    # Also where no schedule reads it: a NaN in a stored config differs from itself, and the run could not resume.
    "optimizer.final_fraction": (0, 1),
    "runtime.eval_batch_size": (1, MOST),
    "runtime.dispatch_seconds": (1e-9, 3600),
    "runtime.checkpoint_every": (0, MOST),
    "runtime.checkpoint_seconds": (0, 1e9),
}


def to_json(config: ml_collections.ConfigDict) -> dict[str, Json]:
    """The config as JSON gives it back: nested dicts, tuples as lists."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Json]) -> ml_collections.ConfigDict:
    """The config whose JSON form this is, also where an earlier version wrote it."""
    config = ml_collections.ConfigDict(values)
    for field, value in OF_SWEEPS.items():
        if field not in config:
            config[field] = value
    for field, value in ADDED.items():
        section, name = field.split(".")
        if section in config and name not in config[section]:
            config[section][name] = value
    return config


def flatten(values: dict[str, Json], prefix: str = "") -> FlatConfig:
    """Nested fields by their dotted names."""
    flat: FlatConfig = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


DEFAULT = Path(__file__).parents[2] / "configs" / "default.py"


@functools.cache
def defaults() -> FlatConfig:
    """The fields of configs/default.py; none where the package stands without it."""
    return flatten(runpy.run_path(str(DEFAULT))["get_config"]().to_dict()) if DEFAULT.is_file() else {}


def meanings() -> dict[str, str]:
    """What configs/default.py says of its fields, by the one that each comment stands above."""
    told, sections, above = {}, {"config": ""}, []
    for line in DEFAULT.read_text(encoding="utf-8").splitlines() if DEFAULT.is_file() else []:
        if comment := re.fullmatch(r" +# (.*)", line):
            above.append(comment[1])
        elif section := re.match(r" +(\w+) = (\w+)\.(\w+) = ", line):  # data = config.data = ...
            sections[section[1]] = f"{sections[section[2]]}{section[3]}."
        elif (field := re.match(r" +(\w+)\.(\w+) = ", line)) and above:
            told[sections[field[1]] + field[2]] = " ".join(above)
            above = []
    return told


def _check_fields(flat: FlatConfig) -> None:
    """Checks names and types against configs/default.py."""
    known = defaults() or flat
    for field in flat.keys() - known.keys():
        raise UsageError(f"The config has {field}; configs/default.py has no such field.{did_you_mean(field, known)}")
    for field in known.keys() - flat.keys():
        raise UsageError(f"The config lacks {field}; start from get_config() of configs/default.py.")
    for field, default in known.items():
        kinds = (int, float) if isinstance(default, float) else (str, type(None)) if default is None else type(default)
        if not isinstance(flat[field], kinds) or isinstance(flat[field], bool) != isinstance(default, bool):
            raise UsageError(f"{field} is {flat[field]!r}; expected a value of the kind of {default!r}.")


def check_read(flat: FlatConfig, unread: dict[str, str], named: Iterable[str]) -> None:
    """Checks that no field is set that would change nothing.

    Args:
      flat: the config.
      unread: fields that nothing reads, and why not.
      named: fields that were set by name, of which none may be unread. A clip's norm from the config file may stand
        beside `optimizer.clip.mask=none`.

    Raises:
      UsageError: a field is, to another value than its default.
    """
    for field, why in unread.items():
        default = defaults().get(field, flat[field])
        if flat[field] != default and (field in named or not field.startswith("optimizer.clip.")):
            raise UsageError(
                f"{field} is {flat[field]!r}, but with {why} nothing reads it, so it would change nothing; expected "
                f"its default, {default!r}."
            )


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the fields that no builder reads.

    Raises:
      UsageError: a name or a type is not that of configs/default.py, or a value is impossible.
    """
    for section in SECTIONS:
        if not isinstance(config.get(section), ml_collections.ConfigDict):
            raise UsageError(f"The config has no section {section!r}; start from get_config() of configs/default.py.")
    flat = flatten(config.to_dict())
    _check_fields({field: value for field, value in flat.items() if field not in (CELL_FILE, CELL_HASH)})
    for field, (least, largest) in BOUNDS.items():
        if field in flat and not least <= flat[field] <= largest:
            raise UsageError(f"{field} is {flat[field]}; expected {least:,} to {largest:,}.")


def is_measured(step: int, eval_every: int, steps: int) -> bool:
    """Whether a run of so many steps, evaluated so often, is measured after this one."""
    return step % eval_every == 0 or step == steps


def of_one_run(flat: FlatConfig) -> FlatConfig:
    """The fields that make a run another: not those of how and where it runs, nor those that ask for several."""
    return {name: value for name, value in flat.items() if not name.startswith("runtime.") and name not in OF_SWEEPS}


def completed(identity: FlatConfig) -> FlatConfig:
    """An identity, as an earlier version wrote it, with the fields that it lacks."""
    return {name: value for name, value in ADDED.items() if not name.startswith("runtime.")} | identity


def identity(config: ml_collections.ConfigDict, content_hash: str) -> FlatConfig:
    """What makes a run this run and no other, by field.

    Everything but `runtime`, and the data by their content, not by their source.
    `train.steps` counts only where the learning rate depends on it: otherwise a longer run
    is the same run, continued.
    """
    flat = of_one_run(flatten(to_json(config)))
    # What a run is, said without the device that it runs on; there is no other value that depends on it.
    if flat["model.precision"] == "auto":
        flat["model.precision"] = "float32"
    if flat["optimizer.clip.mask"] == "none":
        flat |= {"optimizer.clip.norm": None, "optimizer.clip.unit": None}
    # Which data these are is told by their content, not by how they were found.
    del flat["data.source"], flat["data.name"]
    if config.optimizer.schedule != "warmup_cosine":  # another number of steps then changes nothing of those before
        del flat["train.steps"]
    own_cell = {CELL_CONTENT: flat.pop(CELL_HASH)} if CELL_HASH in flat else {}
    return {**flat, **own_cell, CONTENT: content_hash}


def differences(old: FlatConfig, new: FlatConfig) -> list[str]:
    """One line for each field on which two flat configs differ."""
    names, missing = old.keys() | new.keys(), "(absent)"
    if old.get("optimizer.schedule") != new.get("optimizer.schedule"):
        names -= {"train.steps"}  # which counts by that schedule: see `identity`
    return [
        f"{name}: {old.get(name, missing)!r} there, {new.get(name, missing)!r} here"
        for name in sorted(names)
        if old.get(name, missing) != new.get(name, missing)
    ]
