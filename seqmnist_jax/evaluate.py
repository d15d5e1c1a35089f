"""A trained model, from nothing but its work directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from seqmnist_jax import config as configs
from seqmnist_jax import steps
from seqmnist_jax import workdir as files
from seqmnist_jax.checkpoints import CheckpointError, Checkpoints
from seqmnist_jax.data.sources import Dataset
from seqmnist_jax.data.views import SequenceView
from seqmnist_jax.errors import UsageError
from seqmnist_jax.run import build_learner
from seqmnist_jax.scores import score
from seqmnist_jax.task import SPLITS, build_request, find_data_dir, load_dataset, split_part

Json = dict[str, Any]
# Where in a sequence the text shows how much is known.
ANYTIME_SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The selected checkpoint of a run, ready to read images.

    Attributes:
      config: the run's config.
      step: the checkpoint's step.
      facts: what the run knew of its data (see data.json).
      variables: the model's parameters and norm statistics.
    """

    config: ml_collections.ConfigDict
    step: int
    facts: Json
    variables: steps.Variables
    _predict: Any
    _read: Any

    @property
    def params(self) -> Any:
        """The model's parameters, a tree of arrays."""
        return self.variables["params"]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 [count, classes] of images.

        Args:
          images: uint8 [count, height, width] or [count, height * width], 0 to 255 as in
            the data set; scaling and permutation are the model's own.

        Raises:
          ValueError: another shape or dtype.
        """
        images = np.asarray(images)
        height, width = self.facts["image_shape"]
        if images.dtype != np.uint8:
            raise ValueError(f"images has dtype {images.dtype}; expected uint8, pixels 0 to 255 as in the data set")
        if images.shape[1:] not in ((height, width), (height * width,)):
            raise ValueError(
                f"images has shape {images.shape}; expected [count, {height}, {width}] or [count, {height * width}]"
            )
        if not len(images):
            return np.zeros((0, self.facts["num_classes"]), np.float32)
        return np.asarray(self._predict(self.variables, jnp.asarray(images.reshape(-1, height, width))))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The most probable class of each image, int64 [count]; images as in `logits`."""
        return self.logits(images).argmax(-1)

    def anytime(self, images: np.ndarray, labels: np.ndarray) -> steps.Anytime | None:
        """Accuracy and entropy after each step, [time] each; None of a model that reads both ways.

        Args:
          images: uint8 [count, height, width], at least one.
          labels: integers [count].
        """
        if self.config.model.bidirectional:
            return None
        found = self._read(self.variables, jnp.asarray(images), jnp.asarray(labels))
        return jax.tree.map(np.asarray, found)


def load(workdir: str | Path) -> TrainedModel:
    """The trained model of a run: its selected checkpoint, restored with orbax.

    Args:
      workdir: a folder that `launch.py --mode=train` made.

    Raises:
      WorkdirError: it is no work directory.
      CheckpointError: it has no checkpoint, or the checkpoint can't be read.
    """
    workdir = Path(workdir)
    if (workdir / files.SWEEP).exists():
        raise files.WorkdirError(f"{workdir} holds a sweep; name one of its runs, in {workdir / files.REPLICAS}.")
    config = configs.from_json(files.read_config(workdir))
    facts = files.read_facts(workdir)
    try:
        learner = build_learner(config, _view(facts), facts["num_classes"])
    except (AttributeError, KeyError) as e:
        raise files.WorkdirError(
            f"{workdir} was made by another version of this package, or its {files.CONFIG} was cut: {e}"
        ) from e
    folder = workdir / files.CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{workdir} has no checkpoint yet; train it first.")
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = None if facts["selection"] == "last" else checkpoints.best_step()
        step = checkpoints.last_step() if best is None else best
        if step is None:
            raise CheckpointError(f"{workdir} has no checkpoint yet; train it first.")
        variables = checkpoints.restore_variables(step, learner.template())
        saved = checkpoints.metadata(step)["data"]
    if _reading(saved) != _reading(facts):
        raise CheckpointError(
            f"{workdir / files.DATA} is not what checkpoint {step} was trained on; it differs in\n  "
            + "\n  ".join(configs.differences(_reading(saved), _reading(facts)))
        )
    batch_size = config.runtime.eval_batch_size
    predict, read = jax.jit(learner.predict_logits(batch_size)), jax.jit(learner.read_anytime(batch_size))
    return TrainedModel(config, step, facts, variables, predict, read)


def _reading(facts: Json) -> Json:
    """What decides how a model reads an image, and on which data it was trained."""
    names = ("content_hash", "view", "image_shape", "scaling", "permutation_indices", "split", "selection")
    return {name: facts.get(name) for name in names}


def _view(facts: Json) -> SequenceView:
    order = facts["permutation_indices"]
    return SequenceView(
        facts["view"],
        tuple(facts["image_shape"]),
        facts["scaling"],
        None if order is None else np.asarray(order, np.int32),
    )


def evaluate(workdir: Path, *, split: str = "test", data_dir: str = "", allow_other_data: bool = False) -> Json:
    """What a run's selected checkpoint is worth on one split.

    The result has the statistics of `scores.score` and, as 'anytime', the accuracy and the entropy
    after each step (None of a model that reads both ways).

    Args:
      workdir: the run.
      split: 'train', 'validation' or 'test'.
      data_dir: a folder of IDX files; '' means the one the run was trained from.
      allow_other_data: accept data with another content hash, as for a test of transfer.

    Raises:
      UsageError: an unknown or empty split, or other data than the run's.
      DataError, WorkdirError, CheckpointError: a file is missing or damaged.
    """
    if split not in SPLITS:
        raise UsageError(f"--split is {split!r}; expected one of: {', '.join(SPLITS)}.")
    model = load(workdir)
    facts = model.facts
    request = build_request(model.config)
    if data_dir:
        request, source = dataclasses.replace(request, data_dir=find_data_dir(data_dir)), "idx"
    else:
        # A folder's data may have come to be at hand another way.
        source = "embedded" if facts["source"] == "embedded" else "auto"
        if request.data_dir is not None and not request.data_dir.is_dir():
            # Gone, or another machine's: the environment may name one.
            request = dataclasses.replace(request, data_dir=find_data_dir(""))
    dataset = load_dataset(source, request)
    same = dataset.content_hash == facts["content_hash"]
    if not same and not allow_other_data:
        raise UsageError(
            f"These data are not those of the run: {dataset.name} ({dataset.source}, content "
            f"{dataset.content_hash[:12]}) against {facts['name']} ({facts['source']}, content "
            f"{facts['content_hash'][:12]}). Name the right folder by --data_dir, or evaluate on these all "
            "the same with --allow_other_data."
        )
    if list(dataset.image_shape) != facts["image_shape"]:
        raise UsageError(f"These images are {dataset.image_shape}; the model reads {tuple(facts['image_shape'])}.")
    part = split_part(dataset, facts["split"], split)
    if not len(part):
        raise UsageError(f"The {split} split of these data is empty (split {facts['split']}).")
    scores = score(model.logits(part.images), part.labels)
    anytime = model.anytime(part.images, part.labels)
    return {
        "workdir": str(workdir),
        "checkpoint_step": model.step,
        "split": split,
        "examples": len(part),
        **scores,
        "anytime": None if anytime is None else {name: array.tolist() for name, array in anytime._asdict().items()},
        "dataset": dataset.name,
        "source": dataset.source,
        "content_hash": dataset.content_hash,
        "data_of_the_run": same,
        "warnings": _warnings(facts, dataset),
    }


def _warnings(facts: Json, dataset: Dataset) -> list[str]:
    """What must be said with a result of a model with these facts on this data set."""
    warnings = [facts["warning"]] if facts["warning"] else []
    if dataset.content_hash != facts["content_hash"]:
        seen = ""
        if dataset.source == "embedded" and facts["name"] == "mnist":
            seen = " They are 500 of MNIST's training images, most of which the model has been trained on."
        warnings.append(f"Measured on other data ({dataset.name}) than the run's own test set ({facts['name']}).{seen}")
    return warnings


def as_text(result: Json) -> str:
    """The result of `evaluate` for people."""
    low, high = result["accuracy_interval"]
    lines = [
        f"{result['split']} accuracy {result['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}), loss "
        f"{result['loss']:.4f}, calibration error {result['calibration_error']:.4f}, on {result['examples']:,} "
        f"images of {result['dataset']} ({result['source']}), by checkpoint {result['checkpoint_step']}"
    ]
    if result["anytime"] is not None:
        accuracy, entropy = result["anytime"]["accuracy"], result["anytime"]["entropy"]
        at = sorted({max(1, round(len(accuracy) * share)) for share in ANYTIME_SHARES})
        lines += ["", "steps read  " + " ".join(f"{step:>7}" for step in at)]
        lines += ["accuracy    " + " ".join(f"{accuracy[step - 1]:>7.2%}" for step in at)]
        lines += ["entropy     " + " ".join(f"{entropy[step - 1]:>7.3f}" for step in at) + "  nats"]
    counts = result["confusion"]
    width = max(len(str(count)) for row in counts for count in row) + 1
    heading = "".join(f"{name:>{width}}" for name in range(len(counts)))
    lines += ["", f"true \\ predicted{heading}   accuracy"]
    for name, (row, one) in enumerate(zip(counts, result["per_class"], strict=True)):
        share = "-" if one["accuracy"] is None else f"{one['accuracy']:.2%}"
        lines.append(f"{name:>16}{''.join(f'{count:>{width}}' for count in row)}   {share:>8}")
    return "\n".join(lines + [f"WARNING: {warning}" for warning in result["warnings"]])
