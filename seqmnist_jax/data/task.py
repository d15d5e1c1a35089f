"""What is to be learned: a data set under a protocol, read by a view."""

import dataclasses
import functools
from typing import Any

import ml_collections

from seqmnist_jax.data import protocols
from seqmnist_jax.data.sources import Dataset, Images, build_request, check_name, load_dataset
from seqmnist_jax.data.views import VIEWS, SequenceView
from seqmnist_jax.errors import UsageError, choose


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
        return self._parts[split]

    @functools.cached_property
    def _parts(self) -> dict[str, Images]:
        # Kept, because a part of scattered images is a copy.
        return {split: split_part(self.dataset, self.protocol.split, split) for split in SPLITS}

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
            "protocol": self.protocol.name,
            "overrides": list(self.protocol.overrides),
            "caveats": list(self.protocol.flaws.values()),
            "split": self.protocol.split,
            "scaling": self.protocol.scaling,
            "selection": self.protocol.selection,
            "permutation": self.protocol.permutation,
            "permutation_indices": None if order is None else order.tolist(),
            "warning": self.dataset.warning,
        }


SPLITS = ("train", "validation", "test")


def split_part(dataset: Dataset, rule: str, split: str) -> Images:
    """The 'train', 'validation' or 'test' images of a data set, under a protocol's split rule.

    Raises:
      UsageError: the data set is too small for the rule.
    """
    if split == "test":
        return dataset.test
    train, validation = protocols.partition(rule, len(dataset.train))
    return dataset.train[validation if split == "validation" else train]


def build_protocol(config: ml_collections.ConfigDict, dataset: Dataset) -> protocols.Protocol:
    """The protocol in force: the named one, with the data set's own split where it has one, and the config's values.

    The pixels are in their natural order unless `data.permuted` asks for the protocol's own
    permutation or `data.permutation` names one.

    Raises:
      UsageError: an unknown name, no permutation where one is asked for, or a split or
        selection that this data set is too small for.
    """
    named = choose(protocols.PROTOCOLS, config.data.protocol, "data.protocol")
    asked = {field: config.data[field] for field in protocols.FIELDS if config.data[field] is not None}
    if config.data.permuted and named.permutation == "none" and "permutation" not in asked:
        raise UsageError(
            f"data.permuted is True, but protocol {named.name!r} has no permutation; name one by "
            "--config.data.permutation, or choose another protocol."
        )
    values = {"permutation": named.permutation if config.data.permuted else "none"}
    if dataset.split is not None:
        values["split"] = dataset.split
    # A value is no override where it would have been in force anyway, or is the protocol's own.
    overrides = tuple(
        sorted(field for field, value in asked.items() if value not in (values.get(field), getattr(named, field)))
    )
    protocol = dataclasses.replace(named.replace(**{**values, **asked}), overrides=overrides)
    protocols.partition(protocol.split, len(dataset.train))
    selecting, count = protocols.selection_size(protocol.selection), len(dataset.test)
    if selecting is None or selecting <= count:
        return protocol
    if "selection" in asked:
        raise UsageError(f"data.selection is {protocol.selection!r}, but there are {count:,} test images.")
    # All of fewer than the protocol's data have: its flaw stays.
    return dataclasses.replace(protocol, selection=f"test:{count}")


def build_task(config: ml_collections.ConfigDict) -> Task:
    """The task that config.data describes.

    Raises:
      UsageError: an unknown name or an impossible value.
      DataError: the data can't be read, or are not those asked for.
    """
    choose(VIEWS, config.data.view, "data.view")
    request = build_request(config)
    dataset = load_dataset(config.data.source, request)
    check_name(dataset, request)
    protocol = build_protocol(config, dataset)
    height, width = dataset.image_shape
    order = protocols.permutation(protocol.permutation, height * width)
    task = Task(dataset, protocol, SequenceView(config.data.view, dataset.image_shape, protocol.scaling, order))
    size = len(task.part("train"))
    if config.train.batch_size > size:
        raise UsageError(f"train.batch_size is {config.train.batch_size}, more than the training set holds ({size:,}).")
    return task
