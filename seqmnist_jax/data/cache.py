"""A cache of decoded arrays in the user's cache folder.

Inflating the gzipped training images takes longer than everything else that stands
between a start and the first step; the cache holds the same arrays, ready to map.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs

Arrays = dict[str, np.ndarray]


def folder() -> Path:
    """Where cached arrays live: SEQMNIST_CACHE_DIR, else the platform's cache folder for this package."""
    named = os.environ.get("SEQMNIST_CACHE_DIR")
    return Path(named) if named else platformdirs.user_cache_path("seqmnist_jax")


def cached(key: str, is_valid: Callable[[Arrays], bool], build: Callable[[], Arrays]) -> Arrays:
    """The arrays under `key`, from the cache where it holds them whole, else from `build`.

    A damaged or foreign entry is rebuilt. A cache that can't be written costs the next
    start its time and nothing else. Entries appear atomically, so processes that start
    together don't disturb one another.

    Args:
      key: names the content that the arrays are made from.
      is_valid: says whether arrays that were read are those that `build` gave.
      build: makes the arrays.
    """
    path = folder() / f"{key}.npz"
    # A damaged zip file fails in more ways than can be listed; each means: make it anew.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as entry:
        arrays = {name: entry[name] for name in entry.files}
        if str(arrays.pop("key")) == key and is_valid(arrays):
            return arrays
    arrays = build()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {**arrays, "key": np.array(key)})
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
