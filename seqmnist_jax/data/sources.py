"""Where images come from: each source is a function ``(data_dir) -> Dataset`` in `SOURCES`.

To add a source, write such a function and name it in the table.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.data import cache, embedded
from seqmnist_jax.data.idx import DataError, find_file, read_idx

NUM_CLASSES = 10

# What the content hashes of well-known data sets say about a folder of IDX files.
KNOWN_CONTENT = {
    "f7151d6e42dcafbd1d629e7dfdd1f879191b9705629211dec8df83fbbd27d938": "mnist",
    "02effb3111fde940eb6a6e9117e48ed52ca3c965a1ed9cc2b1ad9b6114a38595": "fashion_mnist",
}

FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images uint8 [count, height, width] and their labels uint8 [count], in the source's order."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "Images":
        return Images(self.images[part], self.labels[part])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a source gives.

    Attributes:
      name: the data set's own name ('mnist'), recognised by its content, or 'unknown'.
      source: the name of the source that gave it.
      train, test: the two parts, as the files have them.
      content_hash: SHA-256 over all arrays and their shapes: part of a run's identity.
      split: the source's own split where the protocol's can't hold, as protocols name it.
      warning: what every result on these data must say, or None.
    """

    name: str
    source: str
    train: Images
    test: Images
    content_hash: str
    split: str | None = None
    warning: str | None = None
    num_classes: int = NUM_CLASSES

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image."""
        _, height, width = self.train.images.shape
        return height, width


def _content_hash(arrays: cache.Arrays) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _check(folder: Path, arrays: cache.Arrays) -> None:
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {len(images):,} {part} images but {len(labels):,} labels; expected as many of each. "
                "The files belong to different data sets, or one is incomplete."
            )
        if len(images) == 0 or 0 in images.shape:
            raise DataError(f"{folder}: the {part} images have shape {images.shape}; expected at least one image.")
        if labels.max() >= NUM_CLASSES:
            raise DataError(
                f"{folder}: a {part} label is {labels.max()}; expected 0 to {NUM_CLASSES - 1}. "
                "This is not a ten-class data set in MNIST's form."
            )
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise DataError(
            f"{folder}: training images are {arrays['train_images'].shape[1:]} and test images "
            f"{arrays['test_images'].shape[1:]}; expected the same size."
        )


def _read_folder(folder: Path) -> tuple[cache.Arrays, str]:
    """The four arrays of a folder of IDX files, through the cache where they are gzipped."""
    paths = {name: find_file(folder, stem) for name, (stem, _) in FILES.items()}

    def decode() -> cache.Arrays:
        arrays = {name: read_idx(paths[name], dimensions) for name, (_, dimensions) in FILES.items()}
        _check(folder, arrays)
        return {**arrays, "content_hash": np.array(_content_hash(arrays))}

    if all(path.suffix != ".gz" for path in paths.values()):
        arrays = decode()
    else:
        digest = hashlib.sha256()
        for path in paths.values():
            try:
                digest.update(path.read_bytes())
            except OSError as e:
                raise DataError(f"{path} can't be read: {e.strerror or e}.") from e
        arrays = cache.cached(digest.hexdigest(), lambda a: str(a["content_hash"]) == _content_hash(a), decode)
    return arrays, str(arrays["content_hash"])


def _load_folder(folder: Path, source: str, **own: Any) -> Dataset:
    """The data set of a folder; `own` are fields that the source knows better than the files."""
    arrays, content_hash = _read_folder(folder)
    facts = {"name": KNOWN_CONTENT.get(content_hash, "unknown"), "source": source, **own}
    return Dataset(
        train=Images(arrays["train_images"], arrays["train_labels"]),
        test=Images(arrays["test_images"], arrays["test_labels"]),
        content_hash=content_hash,
        **facts,
    )


def load_idx(data_dir: Path | None) -> Dataset:
    """A folder of four IDX files in MNIST's names, each gzipped or not.

    Raises:
      DataError: no folder is named, or a file is missing or damaged, or they don't fit together.
    """
    if data_dir is None:
        raise DataError(
            "data.source is 'idx' but no folder is named; set --config.runtime.data_dir=DIR or SEQMNIST_DATA_DIR."
        )
    return _load_folder(data_dir, "idx")


def load_embedded(data_dir: Path | None = None) -> Dataset:
    """The 5,000 digits inside the package; `data_dir` plays no part."""
    del data_dir
    return _load_folder(
        embedded.FOLDER,
        "embedded",
        name="mnist-5k",
        split=f"first:{embedded.VALIDATION_SIZE}",
        warning=(
            "Trained on the 5,000 digits that ship with the package (4,000 train, 500 validate, 500 test), "
            "NOT on MNIST: the result can't be compared with any MNIST result. For MNIST set "
            "SEQMNIST_DATA_DIR, or --config.runtime.data_dir, to a folder with its four IDX files."
        ),
    )


def load_auto(data_dir: Path | None) -> Dataset:
    """The folder where one is named, else the embedded digits with their warning."""
    return load_embedded() if data_dir is None else load_idx(data_dir)


SOURCES: dict[str, Callable[[Path | None], Dataset]] = {
    "auto": load_auto,
    "idx": load_idx,
    "embedded": load_embedded,
}
