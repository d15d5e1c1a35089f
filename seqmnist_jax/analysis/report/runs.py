"""A run as a report finds it: what of its folder is there and whole, and what must be said of the rest."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.analysis.recorded import Answers, is_tested, read_answers
from seqmnist_jax.analysis.trained import TrainedModel, load
from seqmnist_jax.data.idx import DataError
from seqmnist_jax.data.sources import Images, build_dataset_of_run
from seqmnist_jax.data.task import split_part
from seqmnist_jax.errors import UsageError
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import CheckpointError
from seqmnist_jax.workdir.metrics import read_events

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a work directory has on record.

    Attributes:
      workdir: the folder.
      config: as in config.json.
      facts: as in data.json.
      summary: as in summary.json; None of a run that is not finished.
      events: as in metrics.jsonl, in its order.
      answers: those to the test images, as in predictions.npz; None of a trial, of a run that is not finished, or
        where the file is missing or damaged.
      notices: sentences on what is missing or damaged.
    """

    workdir: Path
    config: Json
    facts: Json
    summary: Json | None
    events: list[Json]
    answers: Answers | None
    notices: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.workdir.resolve().name

    @property
    def state(self) -> str:
        """In a word or two."""
        if (self.workdir / files.DIVERGED).exists():
            return "diverged"
        return "not finished" if self.summary is None else "finished"

    @property
    def split(self) -> str:
        """What is measured: 'test', or of a trial or an unfinished run, whose test images stay unseen, 'validation'."""
        return "test" if is_tested(self.summary) else "validation"

    def last_step(self) -> int:
        """The last step on record."""
        return max((event["step"] for event in self.events), default=0)

    def validation_accuracy(self) -> float | None:
        """That of the selected checkpoint, or the best on record of an unfinished run; None without any."""
        if self.summary is not None:
            return self.summary["validation_accuracy"]
        found = [event["accuracy"] for event in self.events if event["split"] == "validation" and "accuracy" in event]
        return max(found, default=None)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run with what it takes to look closely.

    Attributes:
      found: what is on record.
      model: the selected checkpoint; None where there is none.
      images: uint8 [count, height, width], those of `found.split`; None where the data are not at hand.
      answers: the recorded ones, else the model's own; None where there is neither.
      notices: those of `found`, and more.
    """

    found: Found
    model: TrainedModel | None
    images: np.ndarray | None
    answers: Answers | None
    notices: tuple[str, ...]


def find(workdir: Path) -> Found:
    """Reads what a run has on record, finished or not.

    Raises:
      WorkdirError: it is no work directory, or its config, data.json or summary is damaged.
    """
    notices: list[str] = []
    config, facts = files.read_config(workdir), files.read_facts(workdir)
    summary = _read_summary(workdir, config, notices)
    events = read_events(workdir)
    if not events:
        notices.append(f"There are no learning curves: {files.METRICS} is missing or empty.")
    answers = None
    if is_tested(summary):
        try:
            answers = read_answers(workdir)
        except files.WorkdirError as e:
            notices.append(str(e))
    return Found(workdir, config, facts, summary, events, answers, tuple(notices))


def open_run(found: Found) -> Opened:
    """Loads a run's model and the images that it is measured on, as far as they are at hand.

    Raises:
      WorkdirError: its config or data.json is of another version, or damaged.
    """
    notices = list(found.notices)
    model = None
    try:
        model = load(found.workdir)
    except CheckpointError as e:
        notices.append(f"{e} So there are no weights in this page, and nothing to watch.")
    part = _build_part(configs.from_json(found.config), found.facts, found.split, notices)
    answers = found.answers
    if answers is not None and part is not None and not np.array_equal(answers.labels, part.labels):
        notices.append(f"{found.workdir / files.PREDICTIONS} is damaged: its labels are not those of the test images.")
        answers = None
    if answers is None and part is not None and model is not None:
        logits = model.logits(part.images)
        if not np.isfinite(logits).all():
            notices.append(f"Nothing is measured: the logits of checkpoint {model.step} are not finite.")
            return Opened(found, model, None, None, tuple(notices))
        answers = Answers(part.labels, logits)
        if found.split == "test":
            notices.append("So the answers to the test images are computed anew.")
    return Opened(found, model, None if part is None else part.images, answers, tuple(notices))


def _read_summary(workdir: Path, config: Json, notices: list[str]) -> Json | None:
    if (workdir / files.DIVERGED).exists():
        notices.append(str(files.read_json(workdir / files.DIVERGED, needed=("reason",))["reason"]))
    if not (workdir / files.SUMMARY).exists():
        notices.append(
            f"This run is not finished: it has no {files.SUMMARY} yet, and {config['train']['steps']:,} steps to do "
            "in all. Its test images stay unseen until then; what is measured here is measured on validation images."
        )
        return None
    needed = ("selected_on", "best_step", "validation_accuracy", "steps")
    summary = files.read_json(workdir / files.SUMMARY, needed=needed)
    if not is_tested(summary):
        notices.append("This is a trial: its test images stay unseen; what is measured is so on validation images.")
    return summary


def _build_part(config: Any, facts: Json, split: str, notices: list[str]) -> Images | None:
    """The images of a split of the run's own data; None where they are not at hand."""
    try:
        dataset = build_dataset_of_run(config, facts["source"], facts["content_hash"])
    except (DataError, UsageError) as e:
        notices.append(f"The images of the run are not at hand, so none are shown. {e}")
        return None
    if dataset.content_hash != facts["content_hash"]:
        notices.append(
            f"The images of the run are not at hand, so none are shown: what is found here is {dataset.name} "
            f"({dataset.source}, content {dataset.content_hash[:12]}), and the run had content "
            f"{facts['content_hash'][:12]}. SEQMNIST_DATA_DIR names the folder of its files."
        )
        return None
    part = split_part(dataset, facts["split"], split)
    if not len(part):
        notices.append(f"Nothing is measured: the {split} split of these data is empty (split {facts['split']}).")
        return None
    return part
