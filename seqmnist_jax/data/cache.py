"""A cache of decoded arrays in the user's cache folder.

Inflating the gzipped training images takes longer than everything else that stands
between a start and the first step; the cache holds the same arrays, ready to map.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import platformdirs

from seqmnist_jax.data.idx import DataError, replacing

Arrays = dict[str, np.ndarray]


def folder() -> Path:
    """Where cached arrays live: SEQMNIST_CACHE_DIR, else the platform's cache folder for this package."""
    named = os.environ.get("SEQMNIST_CACHE_DIR")
    return Path(os.path.expanduser(named)) if named else platformdirs.user_cache_path("seqmnist_jax")


def cached(files: Mapping[str, Path], is_valid: Callable[[Arrays], bool], build: Callable[[], Arrays]) -> Arrays:
    """The arrays made from these files, from the cache where it holds them whole, else from `build`.

    An entry's key is made of what the files hold. A damaged or foreign entry is rebuilt. A cache
    that can't be written costs the next start its time and nothing else. Entries appear atomically,
    so processes that start together don't disturb one another.

    Args:
      files: what the arrays are made from, by a name for each.
      is_valid: says whether arrays that were read are those that `build` gives; what it raises says no.
      build: makes the arrays.

    Raises:
      DataError: a file can't be read.
    """
    key = _key(files)
    path = folder() / f"{key}.npz"
    # A damaged zip file fails in more ways than can be listed; each means: make it anew.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as entry:
        arrays = {name: entry[name] for name in entry.files}
        if str(arrays.pop("key")) == key and is_valid(arrays):
            return arrays
    arrays = build()
    with contextlib.suppress(OSError, DataError):
        # Files that were replaced meanwhile are not those that the key was made of.
        if _key(files) == key:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **arrays, key=np.array(key))  # type: ignore[arg-type]
    return arrays


def _key(files: Mapping[str, Path]) -> str:
    """Another one wherever any of the files holds something else: SHA-256 over the names and each file's own."""
    digest = hashlib.sha256()
    for name, path in files.items():
        try:
            with open(path, "rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise DataError(f"{path} can't be read: {e.strerror or e}.") from e
        digest.update(f"{name} {own}\n".encode())
    return digest.hexdigest()
