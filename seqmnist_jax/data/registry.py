"""Data sets by name, through tensorflow_datasets and without TensorFlow.

TFDS is the registry: it knows names, addresses and checksums, and its download manager
fetches and caches the files. Those of MNIST's family are IDX files, which our own reader
decodes in their original order; TFDS itself would need TensorFlow for that. A copy that
somebody has prepared with TFDS is read too, but preparing shuffles.

Only this module imports tensorflow_datasets, and only when it is asked for data.
"""

import contextlib
import os
import socket
import threading
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.data.idx import DataError, replacing
from seqmnist_jax.errors import UsageError, did_you_mean

PROBE_SECONDS = 3.0
NAMES = ("mnist", "fashion_mnist", "kmnist", "emnist/balanced", "emnist/digits", "emnist/letters", "emnist/mnist")


class Files:
    """The download manager that a TFDS builder asks for its files: fetches them, but leaves gzip to our reader."""

    def __init__(self, manager: Any, folder: Path):
        """Wraps a ``tfds.download.DownloadManager``; members of zip files go below `folder`."""
        self._manager = manager
        self._folder = folder

    def download_and_extract(self, urls: Any) -> Any:
        """The fetched files, as they are."""
        return self._manager.download(urls)

    def extract(self, paths: dict[str, str]) -> dict[str, Path]:
        """The files at these paths, of which a part may be a zip file; only the named members are written."""
        return {name: self._member(Path(path)) for name, path in paths.items()}

    def _member(self, path: Path) -> Path:
        for archive in path.parents:
            if archive.is_file():
                target = self._folder / path.name
                with zipfile.ZipFile(archive) as opened:
                    member = opened.getinfo(path.relative_to(archive).as_posix())
                    if not _holds(target, member):
                        self._folder.mkdir(parents=True, exist_ok=True)
                        with replacing(target) as file:
                            file.write(opened.read(member))
                return target
        return path


def _holds(path: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file is there and is what an archive has of it."""
    if not path.is_file() or path.stat().st_size != member.file_size:
        return False
    return zlib.crc32(path.read_bytes()) == member.CRC


def _builder(name: str) -> Any:
    """TFDS's builder of a data set.

    Raises:
      UsageError: a name that is not in MNIST's form, or that TFDS does not know.
    """
    if name not in NAMES:
        raise UsageError(f"data.name is {name!r}; expected one of: {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    import tensorflow_datasets as tfds

    return tfds.builder(name)


def num_classes(name: str) -> int:
    """How many classes a data set has."""
    return _builder(name).info.features["label"].num_classes


def fetched_files(name: str, *, offline: bool = False) -> dict[str, Path] | None:
    """The four IDX files of a data set, fetched unless they are there.

    Args:
      name: one of `NAMES`.
      offline: use only what is there; None is returned where that is not all.

    Raises:
      UsageError: an unknown name.
      DataError: a download failed, was cut, or has the wrong checksum; nothing of it is kept.
    """
    builder = _builder(name)
    from tensorflow_datasets.core import download

    root = Path(os.fspath(builder._data_dir_root))  # the only way to TFDS's folder
    folder = root / "downloads"
    if offline and not folder.is_dir():
        return None  # a manager would make the folder, which a look must not need
    try:
        manager = download.DownloadManager(
            download_dir=folder,
            url_infos=builder.url_infos,
            dataset_name=builder.name,
            force_checksums_validation=True,
        )
        if offline:
            manager._download = _refuse
        with _progress_bar(shown=not offline):
            generators = builder._split_generators(Files(manager, folder / "idx"))
    except _NotCachedError:
        return None
    except Exception as e:  # requests, TFDS and the operating system each have their own
        reason = str(e).strip().partition("\n")[0]
        raise DataError(
            f"{name} could not be fetched: {type(e).__name__}: {reason} Nothing of it is "
            "used. Try again, or name a folder with its IDX files by --config.runtime.data_dir or SEQMNIST_DATA_DIR."
        ) from e
    parts = {str(generator.name): generator.gen_kwargs for generator in generators}
    return {
        f"{part}_{kind}s": Path(os.fspath(parts[part][f"{key}_path"]))
        for part in ("train", "test")
        for kind, key in (("image", "data"), ("label", "label"))
    }


class _NotCachedError(Exception):
    """A file is not there, and may not be fetched."""


def _refuse(*unused: object, **unused_too: object) -> Any:
    raise _NotCachedError


@contextlib.contextmanager
def _progress_bar(*, shown: bool) -> Iterator[None]:
    """TFDS's own progress bars, or not: nothing is fetched, then there is nothing to show."""
    import tensorflow_datasets as tfds

    if not shown:
        tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def is_reachable(name: str) -> bool:
    """Whether the host of a data set answers within `PROBE_SECONDS` (or the proxy that stands before it)."""
    url = urllib.parse.urlsplit(_builder(name).URL)
    proxy = None if urllib.request.proxy_bypass(url.hostname or "") else urllib.request.getproxies().get(url.scheme)
    # Some name a proxy without its scheme.
    target = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}") if proxy else url
    answered = threading.Event()

    def probe() -> None:
        port = target.port or {"http": 80, "https": 443}.get(target.scheme, 443)
        with contextlib.suppress(OSError), socket.create_connection((target.hostname or "", port), PROBE_SECONDS):
            answered.set()

    # In a thread, because looking a name up has no time-out of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


class PreparedCopy:
    """A copy that TFDS has prepared, in its shuffled order."""

    def __init__(self, builder: Any, parts: dict[str, Any]):
        """A copy with these data sources by part."""
        self._builder = builder
        self._parts = parts

    def files(self) -> dict[str, Path]:
        """The copy's files by their names."""
        folder = Path(os.fspath(self._builder.data_path))
        return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}

    def read(self) -> dict[str, np.ndarray]:
        """All images and labels, decoded one by one.

        Raises:
          DataError: a file is damaged.
        """
        arrays = {}
        try:
            for part, source in self._parts.items():
                examples = [source[index] for index in range(len(source))]
                images = [np.asarray(example["image"], np.uint8)[..., 0] for example in examples]
                arrays[f"{part}_images"] = np.stack(images)
                arrays[f"{part}_labels"] = np.asarray([example["label"] for example in examples], np.uint8)
        except Exception as e:  # array_record, protobuf and PIL each have their own
            raise DataError(f"TFDS's prepared copy in {self._builder.data_path} can't be read ({e}).") from e
        return arrays


def find_prepared(name: str) -> PreparedCopy | None:
    """The copy that TFDS has prepared; None where there is none.

    TFDS reads without TensorFlow what was prepared with ``file_format='array_record'``; a copy in
    another format is passed over.
    """
    builder = _builder(name)
    if not builder.is_prepared():
        return None
    try:
        return PreparedCopy(builder, {part: builder.as_data_source(part) for part in ("train", "test")})
    except NotImplementedError:
        return None
