"""A trained model, from nothing but its work directory."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from seqmnist_jax.data.views import SequenceView
from seqmnist_jax.models import reading
from seqmnist_jax.models.cells import build_own
from seqmnist_jax.models.reading import Variables
from seqmnist_jax.training.run import Learner, build_learner
from seqmnist_jax.training.state import restore_variables
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import CheckpointError, Checkpoints, read_saved

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The selected checkpoint of a run, ready to read images.

    Images are uint8 [count, height, width] or [count, height * width], 0 to 255 as in the data set;
    scaling and permutation are the model's own. They are read `eval_batch_size` at a time, fewer than that as
    the next power of two, so that a program is compiled for a few sizes only, once for each way to read.
    Results are NumPy arrays.

    Attributes:
      config: the run's config.
      step: the checkpoint's step.
      facts: what the run knew of its data (see data.json).
      variables: the model's parameters and norm statistics.
      learner: the model and its view, as pure functions.
      warnings: what must be said of how it was found, a sentence each.
    """

    config: ml_collections.ConfigDict
    step: int
    facts: Json
    variables: Variables
    learner: Learner
    warnings: tuple[str, ...] = ()

    @property
    def params(self) -> Any:
        """The model's parameters, a tree of arrays."""
        return self.variables["params"]

    @property
    def reads_forwards(self) -> bool:
        """Whether what the model knows after a step depends on no later one."""
        return not any("backward" in directions for directions in self.params.get("rnn", {}).values())

    @property
    def has_states(self) -> bool:
        """Whether the model has recurrent layers, whose outputs `states` gives."""
        return self.config.model.name in ("rnn", "deep")

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The most probable class of each image, int64 [count].

        Raises:
          ValueError: images of another shape or dtype.
        """
        return self.logits(images).argmax(-1)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [count, classes].

        Raises:
          ValueError: images of another shape or dtype.
        """
        return self._in_batches(reading.logits, images)

    def read(self, images: np.ndarray) -> np.ndarray:
        """Probabilities after each step, float32 [count, time, classes].

        At a step they are those of a sequence that ends there. 10,000 images of 784 steps and 10
        classes take 314 MB.

        Raises:
          ValueError: the model reads both ways, so that each step knows all of the image; or images of another
            shape or dtype.
        """
        if not self.reads_forwards:
            raise ValueError(
                "This model reads both ways (model.bidirectional): at no step has it seen a part of the image only. "
                "Choose a model that reads forwards."
            )
        return self._in_batches(reading.probabilities, images)

    def features(self, images: np.ndarray) -> np.ndarray:
        """What the dense layer sees of each image, after the norm: float32 [count, features].

        Raises:
          ValueError: images of another shape or dtype.
        """
        return self._in_batches(reading.features, images)

    def states(self, images: np.ndarray) -> np.ndarray:
        """The top recurrent layer's output at each step, before the norm: float32 [count, time, hidden].

        Of a model that reads both ways, both outputs side by side, [count, time, 2 * hidden]; of a deep stack, what
        its last stage hands on at each of that stage's steps. 1,000 images of 784 steps and 128 units take 401 MB.

        Raises:
          ValueError: the model has no recurrent layer, or images of another shape or dtype.
        """
        if not self.has_states:
            raise ValueError(
                f"This model has no recurrent layer (model.name is {self.config.model.name!r}), so it has no states."
            )
        return self._in_batches(reading.states, images)

    @functools.cached_property
    def _programs(self) -> dict[Callable[..., jax.Array], Callable[..., jax.Array]]:
        """Each way to read a batch, as the compiled ``(variables, images) -> result``."""
        model, view = self.learner.measured, self.learner.view
        ways = (reading.logits, reading.probabilities, reading.features, reading.states)
        return {way: jax.jit(functools.partial(way, model, view)) for way in ways}

    def _in_batches(self, way: Callable[..., jax.Array], images: np.ndarray) -> np.ndarray:
        """What one way to read gives of all images, brought to the host batch by batch."""
        images, program = self._checked(images), self._programs[way]
        count = len(images)
        size = min(self.config.runtime.eval_batch_size, 1 << max(count - 1, 0).bit_length())
        form = jax.eval_shape(program, self.variables, jax.ShapeDtypeStruct((size, *images.shape[1:]), np.uint8))
        result = np.empty((count, *form.shape[1:]), form.dtype)
        for start in range(0, count, size):
            some = images[start : start + size]
            batch = np.pad(some, ((0, size - len(some)), (0, 0), (0, 0)))
            result[start : start + size] = np.asarray(program(self.variables, batch))[: len(some)]
        return result

    def _checked(self, images: np.ndarray) -> np.ndarray:
        """The images as [count, height, width]."""
        images = np.asarray(images)
        height, width = self.facts["image_shape"]
        if images.dtype != np.uint8:
            raise ValueError(f"images has dtype {images.dtype}; expected uint8, pixels 0 to 255 as in the data set")
        if images.shape[1:] not in ((height, width), (height * width,)):
            raise ValueError(
                f"images has shape {images.shape}; expected [count, {height}, {width}] or [count, {height * width}]"
            )
        return images.reshape(-1, height, width)


def load(workdir: str | Path) -> TrainedModel:
    """As `seqmnist_jax.load`."""
    workdir = Path(workdir).expanduser()
    facts = files.read_facts(workdir)
    config = configs.from_json(files.read_config(workdir))
    if config.runtime.backend == "native":  # which this machine may not have; 'auto' takes it where it is
        config.runtime.backend = "auto"
    try:
        learner = build_learner(config, _view(facts), facts["num_classes"])
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise files.WorkdirError(
            f"{workdir} was made by another version of this package, or its {files.CONFIG} or {files.DATA} was cut: {e}"
        ) from e
    folder = workdir / files.CHECKPOINTS
    if not folder.is_dir():
        kept = (workdir / files.SUMMARY).exists()
        why = "only its results were kept" if kept else "has no checkpoint yet; train it first"
        raise CheckpointError(f"{workdir} {'has no checkpoint: ' if kept else ''}{why}.")

    every, steps = config.train.eval_every, config.train.steps

    def read(checkpoints: Checkpoints) -> tuple[int, Variables, Json]:
        is_measured = functools.partial(configs.is_measured, eval_every=every, steps=steps)
        best = None if facts["selection"] == "last" else checkpoints.best_step(is_measured)
        step = checkpoints.last_step() if best is None else best
        if step is None:
            raise CheckpointError(f"{workdir} has no checkpoint yet; train it first.")
        variables = restore_variables(checkpoints, step, learner.template)
        return step, variables, checkpoints.metadata(step)["data"]

    step, variables, saved = read_saved(folder, read)
    if _reading(saved) != _reading(facts):
        raise CheckpointError(
            f"{workdir / files.DATA} is not what checkpoint {step} was trained on; it differs in\n  "
            + "\n  ".join(configs.differences(_reading(saved), _reading(facts)))
        )
    return TrainedModel(config, step, facts, variables, learner, tuple(_changes(config)))


def _changes(config: ml_collections.ConfigDict) -> Iterator[str]:
    """That the file of a cell of the user's own is not what it was."""
    own = build_own(config)
    if own is None or own.content_hash == config.model.cell_hash:
        return
    was = config.runtime.cell_file
    told = "has changed since the run was trained" if str(own.file) == was else f"is not the run's, which was {was}"
    yield f"{own.file}, the file of the cell {config.model.cell}, {told}."


def _reading(facts: Json) -> Json:
    return {name: facts.get(name) for name in files.OF_READING}


def _view(facts: Json) -> SequenceView:
    order = facts["permutation_indices"]
    return SequenceView(
        facts["view"],
        tuple(facts["image_shape"]),
        facts["scaling"],
        None if order is None else np.asarray(order, np.int32),
    )
