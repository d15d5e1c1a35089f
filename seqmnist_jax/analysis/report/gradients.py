"""Gradient norms against the threshold of the clip."""

from typing import Any

import ml_collections
import numpy as np

from seqmnist_jax.analysis.report.runs import Opened
from seqmnist_jax.devices.trees import tensor_names
from seqmnist_jax.training.optimizers import build_clip_groups
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import CheckpointError, read_saved

Json = dict[str, Any]


def describe(opened: Opened) -> Json | None:
    """The norms of the last checkpoint's last steps, before the clip; None without a checkpoint that can be read.

    Returns:
      first_step and last_step, what they are of; threshold, mask and unit of the clip; units, what is clipped
      by one norm, each with its name, the names of its tensors and its norms [steps]; tensors, each with name
      and norms, and clipped, whether it belongs to a unit.
    """
    if opened.model is None:
        return None
    template, step = opened.model.learner.template, opened.model.step
    folder = opened.found.workdir / files.CHECKPOINTS
    try:
        state = read_saved(folder, lambda saved: restore_state(saved, saved.last_step() or step, template))
    except CheckpointError:
        return None
    window = state.gradient_norms.shape[0]
    done = int(state.step)
    rows = [step % window for step in range(max(0, done - window), done)]
    norms = np.asarray(state.gradient_norms)[rows, 0]
    names = tensor_names(state.params)
    groups = _groups(opened.model.config, names)
    clip = opened.found.config["optimizer"]["clip"]
    return {
        "first_step": done - len(rows) + 1,
        "last_step": done,
        "threshold": clip["norm"],
        "mask": clip["mask"],
        "unit": clip["unit"],
        "units": [
            {
                "name": unit,
                "tensors": [names[place] for place in places],
                "norms": _rounded(np.sqrt(np.square(norms[:, places]).sum(1))),
            }
            for unit, places in groups.items()
        ],
        "tensors": [
            {
                "name": name,
                "clipped": any(place in places for places in groups.values()),
                "norms": _rounded(norms[:, place]),
            }
            for place, name in enumerate(names)
        ],
    }


def _groups(config: ml_collections.ConfigDict, names: list[str]) -> dict[str, list[int]]:
    """The places of the tensors that are clipped by one norm, by a name for them."""
    group_of, groups = build_clip_groups(config), dict[str, list[int]]()
    for place, name in enumerate(names):
        group: Any = group_of(tuple(name.split("/")))
        if group is not None:
            groups.setdefault(group if isinstance(group, str) else "/".join(group), []).append(place)
    return groups


def _rounded(norms: np.ndarray) -> list[float]:
    """Four digits of each, which is what a histogram needs."""
    return [float(f"{norm:.4g}") for norm in norms]
