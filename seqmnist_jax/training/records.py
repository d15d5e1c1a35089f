"""What a run records of itself beside its scores, to look at in TensorBoard: what it is, its tensors, its mistakes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from seqmnist_jax.data.protocols import FIELDS
from seqmnist_jax.devices.trees import tensor_names
from seqmnist_jax.training.programs import ARGUMENTS
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.state import TrainState
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import pictures
from seqmnist_jax.workdir.graph import graph_def
from seqmnist_jax.workdir.tensorboard import TensorBoardWriter

# Of the evaluations of a run about so many leave pictures, evenly spread: each takes as long as some steps.
PICTURES = 5
# Bins of a parameter's histogram, of equal width.
BUCKETS = 60


def introduce(runs: Sequence[tuple[TensorBoardWriter, Run]], traced: Any) -> None:
    """Writes what there is to see of runs before their first step.

    Args:
      runs: those of one program, each with what takes its config as text, its fields as hyperparameters, and the
        training step as a graph.
      traced: as `Programs.traced`.
    """
    graph = graph_def(traced, tuple(ARGUMENTS), root=type(runs[0][1].learner.model).__name__)
    for writer, run in runs:
        fields = configs.flatten(run.config)
        writer.write_texts(0, {"config": "\n".join(f"    {name} = {value!r}" for name, value in fields.items())})
        facts = run.task.facts()
        # In place of what the config leaves to the protocol, what the protocol says.
        fields |= {f"data.{name}": facts[name] for name in FIELDS}
        writer.write_hparams(configs.of_one_run(fields))
        writer.write_graph(graph)


def write_histograms(writer: TensorBoardWriter, run: Run, state: TrainState) -> None:
    """Writes the parameters, and the gradient norms of the steps since the last report, before and after the clip."""
    step, names = int(state.step), tensor_names(state.params)
    norms = np.asarray(state.gradient_norms)[: (step - 1) % run.eval_every + 1]
    for place, kind in enumerate(("raw", "clipped")):
        told = {f"gradient_norm_{kind}/{name}": norms[:, place, tensor] for tensor, name in enumerate(names)}
        writer.write_histograms(step, told)
    leaves = jax.tree.leaves(state.params)
    params = {f"parameters/{name}": np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
    writer.write_histograms(step, params, BUCKETS)


def has_pictures(run: Run, step: int) -> bool:
    """Whether the evaluation after this step is one of those that leave pictures; that at the end is."""
    evaluations = -(-run.steps // run.eval_every)
    return step == run.steps or step // run.eval_every % -(-evaluations // PICTURES) == 0


def write_pictures(writer: TensorBoardWriter, run: Run, step: int, split: str, logits: np.ndarray) -> None:
    """Writes the confusion matrix of a split, and the images that the model is most surely wrong about.

    Args:
      writer, run, step: where, and of what.
      split: as `Task.part` takes it.
      logits: the model's, float [count, classes].
    """
    part = run.task.part(split)
    drawn = {
        f"{split}/confusion": pictures.confusion(logits, part.labels),
        f"{split}/mistakes": pictures.mistakes(part.images, logits, part.labels),
    }
    writer.write_images(step, {name: pixels for name, pixels in drawn.items() if pixels is not None})
