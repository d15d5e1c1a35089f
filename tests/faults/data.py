"""Data files and cache entries damaged in every way: each gives a clear error or the right data."""

import collections
import gzip
import os
import random
import struct
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import numpy as np

from seqmnist_jax.data import cache
from seqmnist_jax.data.idx import DataError, read_idx, write_idx
from seqmnist_jax.data.sources import FILES, Dataset, Request, load_idx
from tests.faults.outcome import Outcome

SHAPE = (5, 4)
COUNTS = {"train": 60, "test": 20}
CLASSES = 10
# How a try may end. A plain file has no checksum: another pixel is other data, which the content hash, a part
# of every run's identity, tells apart: a run resumed or evaluated on them names it.
REFUSED, SAME, OTHER = "refused by name", "the same data", "other data by its content hash"
Fault = Callable[[Path, random.Random], str]


def campaign(tries: int, seed: int) -> list[Outcome]:
    """Flips, truncates and extends files of a small data set, invents headers, and spoils the cache."""
    draw = random.Random(seed)
    kinds: dict[str, Fault] = {
        "gzipped data file: a bit flipped": lambda folder, draw: _damage(folder, draw, ".gz", _flip),
        "gzipped data file: truncated or extended": lambda folder, draw: _damage(folder, draw, ".gz", _resize),
        "plain data file: a bit flipped": lambda folder, draw: _damage(folder, draw, "", _flip),
        "plain data file: truncated or extended": lambda folder, draw: _damage(folder, draw, "", _resize),
        "IDX header invented": _invent,
        "cache entry damaged": _spoil_cache,
    }
    outcomes = []
    with (
        tempfile.TemporaryDirectory() as name,
        unittest.mock.patch.dict(os.environ, SEQMNIST_CACHE_DIR=name),
    ):
        for kind, does in kinds.items():
            count = -(-tries // len(kinds))
            ends = collections.Counter(_one(does, draw) for _ in range(count))
            survived = sum(ends[end] for end in (REFUSED, SAME, OTHER))
            note = ", ".join(f"{ends[end]} {end}" for end in sorted(ends))
            outcomes.append(Outcome(kind, count, survived, count - survived, note))
    return outcomes


def _one(does: Fault, draw: random.Random) -> str:
    with tempfile.TemporaryDirectory() as name:
        try:
            return does(Path(name), draw)
        except Exception as e:
            return f"{type(e).__name__}: {e}"


def _arrays() -> dict[str, np.ndarray]:
    numbers = np.random.RandomState(0)
    arrays = {}
    for part, count in COUNTS.items():
        arrays[f"{part}_images"] = numbers.randint(0, 256, (count, *SHAPE)).astype(np.uint8)
        arrays[f"{part}_labels"] = numbers.randint(0, CLASSES, count).astype(np.uint8)
    return arrays


def _write(folder: Path, suffix: str) -> list[Path]:
    paths = []
    for name, (stem, _) in FILES.items():
        paths.append(folder / (stem + suffix))
        write_idx(paths[-1], _arrays()[name])
    return paths


def _flip(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _resize(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.7:
        return content[: draw.randrange(len(content))]
    more = draw.randbytes(draw.randrange(1, 50))
    return content + draw.choice((more, bytes(len(more)), gzip.compress(more), content))


def _damage(folder: Path, draw: random.Random, suffix: str, how: Callable[[bytes, random.Random], bytes]) -> str:
    victim = draw.choice(_write(folder, suffix))
    right = load_idx(Request(data_dir=folder))
    victim.write_bytes(how(victim.read_bytes(), draw))
    try:
        found = load_idx(Request(data_dir=folder))
    except DataError as e:
        return REFUSED if str(victim) in str(e) or str(folder) in str(e) else f"the file is not named: {e}"
    if _is_same(found, right):
        return SAME
    if suffix == "" and how is _flip and found.content_hash != right.content_hash:
        return OTHER
    return f"{victim.name}: other data without a word"


def _is_same(found: Dataset, right: Dataset) -> bool:
    return found.content_hash == right.content_hash and all(
        np.array_equal(getattr(getattr(found, part), kind), getattr(getattr(right, part), kind))
        for part in COUNTS
        for kind in ("images", "labels")
    )


def _invent(folder: Path, draw: random.Random) -> str:
    """A header of likely and unlikely numbers before a random payload."""
    dimensions = draw.choice((1, 3))
    sizes = [draw.choice((0, 1, 2, 3, 5, 28, 255, 2**16, 2**31, 2**32 - 1)) for _ in range(draw.randrange(5))]
    if draw.random() < 0.3:
        sizes = [draw.randrange(1, 9) for _ in range(dimensions)]
    head = (draw.choice((0, 0, 0, 0, 1)), draw.choice((0, 0, 0, 0, 8)), draw.choice((8, 8, 8, 8, 8, 9, 13)))
    magic = bytes((*head, len(sizes)))
    if draw.random() < 0.2:
        magic = draw.randbytes(draw.randrange(5))
    wanted = int(np.prod(sizes, dtype=object)) if sizes else 0
    payload = draw.randbytes(wanted if wanted < 2000 and draw.random() < 0.5 else draw.randrange(200))
    content = magic + struct.pack(f">{len(sizes)}I", *sizes) + payload
    path = folder / "invented"
    path.write_bytes(gzip.compress(content) if draw.random() < 0.3 else content)
    legal = magic == bytes((0, 0, 8, dimensions)) and len(sizes) == dimensions and wanted == len(payload)
    try:
        found = read_idx(path, dimensions)
    except DataError as e:
        named = str(path) in str(e)
        return REFUSED if named and not legal else f"legal: {legal}, named: {named}: {e}"
    right = legal and found.shape == tuple(sizes) and found.tobytes() == payload
    return SAME if right else f"accepted {content[:20].hex()}... as {found.shape}"


def _spoil_cache(folder: Path, draw: random.Random) -> str:
    _write(folder, ".gz")
    for other in cache.folder().glob("*.npz"):
        other.unlink()
    right = load_idx(Request(data_dir=folder))
    (entry,) = cache.folder().glob("*.npz")
    entry.write_bytes(draw.choice((_flip, _resize))(entry.read_bytes(), draw))
    return SAME if _is_same(load_idx(Request(data_dir=folder)), right) else "the cache gave other data"
