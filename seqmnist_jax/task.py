"""What is to be learned: a data set under a protocol, read by a view."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import ml_collections

from seqmnist_jax.data import protocols
from seqmnist_jax.data.sources import SOURCES, Dataset, Images, Request
from seqmnist_jax.data.views import VIEWS, SequenceView
from seqmnist_jax.errors import UsageError, choose

DATA_DIR_VARIABLE = "SEQMNIST_DATA_DIR"


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, the protocol in force, and the view that makes sequences of its images."""

    dataset: Dataset
    protocol: protocols.Protocol
    view: SequenceView

    @property
    def measured_split(self) -> str:
        """What is measured during training: 'validation', or the 'test:N' that selects."""
        return "validation" if protocols.selection_size(self.protocol.selection) is None else self.protocol.selection

    def part(self, split: str) -> Images:
        """The images of 'train', 'validation', 'test', or the first N as 'test:N'."""
        if split.startswith("test:"):
            return self.dataset.test[: protocols.selection_size(split)]
        return split_part(self.dataset, self.protocol.split, split)

    def facts(self) -> dict[str, Any]:
        """What a result must say of its data, as JSON values."""
        order = self.view.permutation
        return {
            "name": self.dataset.name,
            "source": self.dataset.source,
            "order": self.dataset.order,
            "sizes": {split: len(self.part(split)) for split in SPLITS},
            "content_hash": self.dataset.content_hash,
            "image_shape": list(self.dataset.image_shape),
            "num_classes": self.dataset.num_classes,
            "view": self.view.name,
            "split": self.protocol.split,
            "scaling": self.protocol.scaling,
            "selection": self.protocol.selection,
            "permutation": self.protocol.permutation,
            "permutation_indices": None if order is None else order.tolist(),
            "warning": self.dataset.warning,
        }


SPLITS = ("train", "validation", "test")


def split_part(dataset: Dataset, rule: str, split: str) -> Images:
    """The 'train', 'validation' or 'test' images of a data set, under a protocol's split rule."""
    if split == "test":
        return dataset.test
    size = protocols.validation_size(rule)
    return dataset.train[:size] if split == "validation" else dataset.train[size:]


def find_data_dir(named: str) -> Path | None:
    """The folder that is named, else the environment's, else None."""
    named = named or os.environ.get(DATA_DIR_VARIABLE, "")
    return Path(named).expanduser().absolute() if named else None


def build_request(config: ml_collections.ConfigDict) -> Request:
    """What the config asks of its source."""
    tfds_dir = config.runtime.tfds_dir
    return Request(
        name=config.data.name,
        data_dir=find_data_dir(config.runtime.data_dir),
        tfds_dir=Path(tfds_dir).expanduser() if tfds_dir else None,
    )


def load_dataset(source: str, request: Request) -> Dataset:
    """The data set that a source gives.

    Raises:
      UsageError: an unknown source.
      DataError: its files are missing or damaged.
    """
    return choose(SOURCES, source, "data.source")(request)


def build_protocol(config: ml_collections.ConfigDict, dataset: Dataset) -> protocols.Protocol:
    """The named protocol, with the data set's own split where it has one, and the config's overrides.

    Raises:
      UsageError: an unknown name, or a split that this data set is too small for.
    """
    protocol = choose(protocols.PROTOCOLS, config.data.protocol, "data.protocol")
    overrides = {
        name: config.data[name]
        for name in ("permutation", "split", "scaling", "selection")
        if config.data[name] is not None
    }
    if dataset.split is not None:
        overrides = {"split": dataset.split, **overrides}
    protocol = dataclasses.replace(protocol, **overrides)
    selecting = protocols.selection_size(protocol.selection)
    if selecting is not None and selecting > len(dataset.test):
        raise UsageError(f"data.selection is {protocol.selection!r}, but there are {len(dataset.test):,} test images.")
    count = len(dataset.train)
    if protocols.validation_size(protocol.split) >= count:
        raise UsageError(
            f"data.split is {protocol.split!r}, but {dataset.source} has {count:,} training images; "
            "expected to leave at least one for training."
        )
    return protocol


def build_task(config: ml_collections.ConfigDict) -> Task:
    """The task that config.data describes.

    Raises:
      UsageError: an unknown name or an impossible value.
      DataError: the data can't be read.
    """
    choose(VIEWS, config.data.view, "data.view")
    dataset = load_dataset(config.data.source, build_request(config))
    protocol = build_protocol(config, dataset)
    height, width = dataset.image_shape
    order = protocols.permutation(protocol.permutation, height * width)
    task = Task(dataset, protocol, SequenceView(config.data.view, dataset.image_shape, protocol.scaling, order))
    size = len(task.part("train"))
    if config.train.batch_size > size:
        raise UsageError(f"train.batch_size is {config.train.batch_size}, more than the training set holds ({size:,}).")
    return task
