"""What a run will do, said without doing any of it."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from seqmnist_jax.devices.trees import tensor_names
from seqmnist_jax.training.run import Run

Json = dict[str, Any]


def describe(
    run: Run, overridden: dict[str, Any], *, runs: Sequence[str] = (), trials: str = "", workdir: str | None = None
) -> Json:
    """The effective config, the parameters, the shapes, the schedule and the data of a run, as JSON values.

    Args:
      run: as `build_run` makes it.
      overridden: the fields that the command line set, by their dotted names.
      runs: the names of a sweep's runs, of which `run` is the first.
      trials: what is done before them, in words.
      workdir: what the folder holds for this run or sweep, None if no folder is named.
    """
    facts = run.task.facts()
    learner = run.learner
    state = learner.template
    examples = len(run.task.part("train"))
    parameters = [
        {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "size": int(leaf.size)}
        for name, leaf in zip(tensor_names(state.params), jax.tree.leaves(state.params), strict=True)
    ]
    return {
        "config": run.config,
        "overridden": sorted(overridden),
        "parameters": parameters,
        "parameter_count": sum(one["size"] for one in parameters),
        "shapes": {
            "input": [run.batch_size, learner.view.sequence_length, learner.view.features],
            "logits": [run.batch_size, facts["num_classes"]],
        },
        "steps": run.steps,
        "batch_size": run.batch_size,
        "steps_per_epoch": examples / run.batch_size,
        "epochs": run.steps * run.batch_size / examples,
        "data": {name: value for name, value in facts.items() if name != "permutation_indices"},
        "permutation": facts["permutation_indices"] or list(range(math.prod(facts["image_shape"]))),
        "device": [str(device) for device in jax.devices()],
        "recurrence": run.recurrence(),
        "remark": run.remark,
        "runs": list(runs),
        "trials": trials,
        "workdir": workdir,
    }
