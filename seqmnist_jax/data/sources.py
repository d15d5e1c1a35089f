"""Where images come from: each source is a function ``(request) -> Dataset`` in `SOURCES`.

To add a source, write such a function and name it in the table.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from seqmnist_jax.data import cache, embedded, registry
from seqmnist_jax.data.idx import DataError, entries, find_file, look_for, read_idx
from seqmnist_jax.errors import choose

DATA_DIR_VARIABLE = "SEQMNIST_DATA_DIR"
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

    def __getitem__(self, part: slice | np.ndarray) -> "Images":
        """Those of a slice (which shares memory) or of int row numbers (copied)."""
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
      num_classes: how many classes the labels name.
      order: 'original', that of the files; or 'tfds', shuffled as TFDS prepared it, so that
        the same split holds other images.
    """

    name: str
    source: str
    train: Images
    test: Images
    content_hash: str
    split: str | None = None
    warning: str | None = None
    num_classes: int = NUM_CLASSES
    order: str = "original"

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image."""
        _, height, width = self.train.images.shape
        return height, width


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a source.

    Attributes:
      name: the data set's name, for sources that have several.
      data_dir: a folder of IDX files, or with such sub-folders named after data sets; or None.
    """

    name: str = "mnist"
    data_dir: Path | None = None


def _content_hash(arrays: cache.Arrays) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _check(where: str, arrays: cache.Arrays, num_classes: int) -> None:
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if len(images) != len(labels):
            raise DataError(
                f"{where}: {len(images):,} {part} images but {len(labels):,} labels; expected as many of each. "
                "The files belong to different data sets, or one is incomplete."
            )
        if len(images) == 0 or 0 in images.shape:
            raise DataError(f"{where}: the {part} images have shape {images.shape}; expected at least one image.")
        if labels.max() >= num_classes:
            raise DataError(
                f"{where}: a {part} label is {labels.max()}; expected 0 to {num_classes - 1}. "
                "The file is damaged, or of a data set with other classes."
            )
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise DataError(
            f"{where}: training images are {arrays['train_images'].shape[1:]} and test images "
            f"{arrays['test_images'].shape[1:]}; expected the same size."
        )


def _checked(arrays: cache.Arrays, where: str, num_classes: int) -> cache.Arrays:
    """The arrays, found good, with their content hash."""
    _check(where, arrays, num_classes)
    return {**arrays, "content_hash": np.array(_content_hash(arrays))}


def _through_cache(
    files: Mapping[str, Path], where: str, num_classes: int, decode: Callable[[], cache.Arrays]
) -> cache.Arrays:
    """The arrays that `decode` makes of these files, found good, with their content hash."""

    def is_valid(arrays: cache.Arrays) -> bool:
        # Good for so many classes, too: the entry may be of another request.
        _check(where, arrays, num_classes)
        return str(arrays["content_hash"]) == _content_hash(arrays)

    return cache.cached(files, is_valid, lambda: _checked(decode(), where, num_classes))


def _read_files(paths: dict[str, Path], where: str, num_classes: int) -> cache.Arrays:
    """The four arrays and their content hash, through the cache where they are gzipped."""

    def decode() -> cache.Arrays:
        return {name: read_idx(paths[name], dimensions) for name, (_, dimensions) in FILES.items()}

    if all(path.suffix != ".gz" for path in paths.values()):
        return _checked(decode(), where, num_classes)
    return _through_cache(paths, where, num_classes, decode)


def _dataset(arrays: cache.Arrays, source: str, **own: Any) -> Dataset:
    """A data set of these arrays; `own` are fields that the source knows better than the content."""
    content_hash = str(arrays["content_hash"])
    facts = {"name": KNOWN_CONTENT.get(content_hash, "unknown"), "source": source, **own}
    return Dataset(
        train=Images(arrays["train_images"], arrays["train_labels"]),
        test=Images(arrays["test_images"], arrays["test_labels"]),
        content_hash=content_hash,
        **facts,
    )


def _read_folder(folder: Path) -> cache.Arrays:
    paths = {name: find_file(folder, stem) for name, (stem, _) in FILES.items()}
    return _read_files(paths, str(folder), NUM_CLASSES)


def _find_folder(folder: Path, name: str) -> Path:
    """`folder`, or where it has none of the files, a folder below it that has.

    That is the one called `name`, or nearly so, as torchvision's FashionMNIST is; or `raw` in it or in `folder`,
    where torchvision keeps the files.
    """

    def letters(text: str) -> str:
        return re.sub("[^a-z0-9]", "", text.lower())

    below = [folder / name, *(folder / entry for entry in entries(folder) if letters(entry) == letters(name))]
    places = [folder, *below, *(path / "raw" for path in (folder, *below))]
    return next((place for place in places if any(look_for(place, stem) for stem, _ in FILES.values())), folder)


def load_idx(request: Request) -> Dataset:
    """A folder of four IDX files in MNIST's names and form, ten classes, each file gzipped or not.

    Where the folder that is asked has none of them but one below it has, as torchvision lays them out, that is read.

    Raises:
      DataError: no folder is named, or a file is missing or damaged, or they don't fit together.
    """
    if request.data_dir is None:
        raise DataError(
            "data.source is 'idx' but no folder is named; set --config.runtime.data_dir=DIR or SEQMNIST_DATA_DIR."
        )
    return _dataset(_read_folder(_find_folder(request.data_dir, request.name)), "idx")


def check_name(dataset: Dataset, request: Request) -> None:
    """Checks that a named folder does not hold another well-known data set than the one asked for.

    Raises:
      DataError: it does.
    """
    if dataset.source == "idx" and dataset.name in KNOWN_CONTENT.values() and dataset.name != request.name:
        raise DataError(
            f"{request.data_dir} holds {dataset.name}, but data.name asks for {request.name}; "
            f"set --config.data.name={dataset.name}, or name another folder by --config.runtime.data_dir or "
            "SEQMNIST_DATA_DIR."
        )


def load_embedded(request: Request | None = None) -> Dataset:
    """The 5,000 digits inside the package, whatever is asked."""
    del request
    return _dataset(
        _read_folder(embedded.FOLDER),
        "embedded",
        name="mnist-5k",
        split=f"first:{embedded.VALIDATION_SIZE}",
        warning=(
            "Trained on the 5,000 digits that ship with the package (4,000 train, 500 validate, 500 test), "
            "NOT on MNIST: the result can't be compared with any MNIST result. For MNIST set "
            "SEQMNIST_DATA_DIR, or --config.runtime.data_dir, to a folder with its four IDX files."
        ),
    )


def _load_registered(request: Request, paths: dict[str, Path]) -> Dataset:
    """The data set whose IDX files TFDS has fetched."""
    classes = registry.num_classes(request.name)
    arrays = _read_files(paths, request.name, classes)
    return _dataset(arrays, "tfds", name=request.name, num_classes=classes)


def _load_local_copy(request: Request) -> Dataset | None:
    """What TFDS has fetched before, else what it has prepared; None where it has neither."""
    paths = registry.fetched_files(request.name, offline=True)
    if paths is not None:
        return _load_registered(request, paths)
    prepared = registry.find_prepared(request.name)
    if prepared is None:
        return None
    classes = registry.num_classes(request.name)
    arrays = _through_cache(prepared.files(), request.name, classes, prepared.read)
    return _dataset(arrays, "tfds", name=request.name, num_classes=classes, order="tfds")


def _find_by_name(request: Request) -> Dataset | None:
    """TFDS's copy, else what it fetches; None where there is no copy and the host can't be reached."""
    found = _load_local_copy(request)
    if found is None and registry.is_reachable(request.name):
        paths = registry.fetched_files(request.name)
        assert paths is not None
        found = _load_registered(request, paths)
    return found


def load_tfds(request: Request) -> Dataset:
    """A data set by its name, through TFDS: a copy it has already, else fetched.

    Raises:
      UsageError: an unknown name.
      DataError: its host can't be reached, it can't be fetched, or a file is damaged.
    """
    found = _find_by_name(request)
    if found is None:
        raise DataError(
            f"{request.name} is not at hand and its host can't be reached; name a folder with its four IDX "
            "files by --config.runtime.data_dir or SEQMNIST_DATA_DIR, which data.source 'auto' and 'idx' read."
        )
    return found


def load_auto(request: Request) -> Dataset:
    """The first of: a named folder, TFDS's copy, a download, and for MNIST the embedded digits.

    Raises:
      UsageError: an unknown name.
      DataError: the named folder or a copy is damaged, or nothing is at hand of another set than MNIST.
    """
    if request.data_dir is not None:
        return load_idx(request)
    if request.name != "mnist":
        return load_tfds(request)
    found = _find_by_name(request)
    return load_embedded() if found is None else found


SOURCES: dict[str, Callable[[Request], Dataset]] = {
    "auto": load_auto,
    "idx": load_idx,
    "embedded": load_embedded,
    "tfds": load_tfds,
}


def find_data_dir(named: str) -> Path | None:
    """The folder that is named, else the environment's, else None."""
    named = named or os.environ.get(DATA_DIR_VARIABLE, "")
    return Path(os.path.expanduser(named)).absolute() if named else None  # the tilde of an unknown user stays


def build_request(config: ml_collections.ConfigDict) -> Request:
    """What the config asks of its source."""
    return Request(config.data.name, find_data_dir(config.runtime.data_dir))


def load_dataset(source: str, request: Request) -> Dataset:
    """The data set that a source gives.

    Raises:
      UsageError: an unknown source.
      DataError: its files are missing or damaged.
    """
    return choose(SOURCES, source, "data.source")(request)


def build_dataset_of_run(config: ml_collections.ConfigDict, source: str, content_hash: str) -> Dataset:
    """The data that a run was trained on, where they are at hand; its content hash says whether they are the same.

    Args:
      config: the run's.
      source, content_hash: of its data, as its data.json has them.

    Raises:
      UsageError, DataError: nothing is found, or it is damaged.
    """
    request = build_request(config)
    if request.data_dir is not None and not request.data_dir.is_dir():
        # Gone, or another machine's: the environment may name one.
        request = dataclasses.replace(request, data_dir=find_data_dir(""))
    if source == "tfds":
        # Not what a folder has that is named for other data. What TFDS has may be damaged, or it may not import.
        with contextlib.suppress(Exception):
            copy = _load_local_copy(request)
            if copy is not None and copy.content_hash == content_hash:
                return copy
    # A folder's data may have come to be at hand another way.
    return load_dataset("auto" if source in ("idx", "tfds") else source, request)
