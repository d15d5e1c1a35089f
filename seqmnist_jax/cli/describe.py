"""What a run will do, said without doing any of it."""

import math
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp

from seqmnist_jax.data.protocols import SELECTIONS, TEST_SELECTION
from seqmnist_jax.data.task import SPLITS
from seqmnist_jax.devices.trees import tensor_names
from seqmnist_jax.training.run import Run
from seqmnist_jax.workdir import config as configs

Json = dict[str, Any]


def describe(run: Run, overridden: dict[str, Any]) -> Json:
    """The effective config, the parameters, the shapes, the schedule and the data of a run, as JSON values.

    Args:
      run: as `build_run` makes it.
      overridden: the fields that the command line set, by their dotted names.
    """
    facts = run.task.facts()
    learner = run.learner
    state = learner.template()
    examples = len(run.task.part("train"))
    tensors = dict(zip(tensor_names(state.params), jax.tree.leaves(state.params), strict=True))
    parameters = [
        {
            "name": name,
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "size": int(leaf.size),
        }
        for name, leaf in tensors.items()
    ]
    return {
        "config": run.config,
        "overridden": sorted(overridden),
        "parameters": parameters,
        "parameter_count": sum(int(leaf.size) for leaf in tensors.values()),
        "shapes": {
            "input": [run.batch_size, learner.view.sequence_length, learner.view.features],
            "logits": [run.batch_size, facts["num_classes"]],
        },
        "steps": run.steps,
        "batch_size": run.batch_size,
        "steps_per_epoch": examples / run.batch_size,
        "epochs": run.steps * run.batch_size / examples,
        "data": {name: value for name, value in facts.items() if name != "permutation_indices"},
        "protocol": facts["protocol"],
        "caveats": facts["caveats"],
        "split": facts["split"],
        "scaling": facts["scaling"],
        "selection": facts["selection"],
        "permutation": facts["permutation_indices"] or list(range(math.prod(facts["image_shape"]))),
        "device": [str(device) for device in jax.devices()],
        "recurrence": _recurrence(run),
    }


def _recurrence(run: Run) -> str:
    """What runs the model's recurrence, and why."""
    learner = run.learner
    model = learner.learning.model
    x = jax.ShapeDtypeStruct((run.batch_size, learner.view.sequence_length, learner.view.features), jnp.float32)
    return model.explain_engine(learner.template().params, x, drops_state="state_keep" in learner.learning.drops)


def _protocol(run: Run) -> str:
    """The protocol in force: where it comes from, what of it is replaced, what must be said of the rest."""
    protocol = run.task.protocol
    words = [f"{protocol.name}: {protocol.source}"]
    if protocol.overrides:
        words += [f"overridden: {', '.join(protocol.overrides)}"]
    if protocol.flaws:
        words += [f"caveats: {'; '.join(protocol.flaws.values())}"]
    return "; ".join(words)


def as_text(run: Run, description: Json) -> str:
    """The same for people, without the numbers of the permutation."""
    data, shapes = description["data"], description["shapes"]
    flat = configs.flatten(description["config"])
    width = max(map(len, flat))
    lines = ["Config (* overridden):"]
    lines += [f"{'*' if name in description['overridden'] else ' '} {name:<{width}}  {flat[name]!r}" for name in flat]
    lines += ["", "Parameters:"]
    lines += [clu.parameter_overview.get_parameter_overview(run.learner.template().params, include_stats=False)]
    sizes = ", ".join(f"{data['sizes'][split]:,} {split}" for split in SPLITS)
    lines += [
        "",
        f"Input        {shapes['input']} [batch, time, features] -> logits {shapes['logits']}",
        f"Steps        {description['steps']:,} of {description['batch_size']} examples: "
        f"{description['steps_per_epoch']:,.2f} an epoch, {description['epochs']:.2f} epochs",
        f"Data         {data['name']} from source {data['source']!r}: {sizes}; content {data['content_hash'][:16]}",
        f"Protocol     {_protocol(run)}",
        f"Split        {data['split']}",
        f"Scaling      {data['scaling']}",
        f"Permutation  {data['permutation']}: {', '.join(map(str, description['permutation'][:8]))}, ...",
        f"Selection    {data['selection']}: {SELECTIONS.get(data['selection'], TEST_SELECTION)}",
        f"Device       {', '.join(description['device'])}",
        f"Recurrence   {description['recurrence']}",
    ]
    if data["warning"]:
        lines += ["", f"WARNING: {data['warning']}"]
    return "\n".join(lines)
