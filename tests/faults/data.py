"""Data files and cache entries damaged in every way: each gives a clear error or the right data."""

import gzip
import os
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from seqmnist_jax.data import cache
from seqmnist_jax.data.idx import DataError, read_idx, write_idx
from seqmnist_jax.data.sources import FILES, Request, load_idx
from tests.faults.outcome import Outcome

SHAPE = (5, 4)
COUNTS = {"train": 60, "test": 20}
CLASSES = 10


def campaign(tries: int, seed: int) -> list[Outcome]:
    """Flips, truncates and extends files of a small data set, invents headers, and spoils the cache."""
    draw = random.Random(seed)
    kinds: dict[str, Callable[[Path, random.Random], str | None]] = {
        "gzipped data file: a bit flipped": lambda folder, draw: _damage(folder, draw, ".gz", _flip),
        "gzipped data file: truncated or extended": lambda folder, draw: _damage(folder, draw, ".gz", _resize),
        "plain data file: a bit flipped": lambda folder, draw: _damage(folder, draw, "", _flip),
        "plain data file: truncated or extended": lambda folder, draw: _damage(folder, draw, "", _resize),
        "IDX header invented": _invent,
        "cache entry damaged": _spoil_cache,
    }
    outcomes = []
    before = os.environ.get("SEQMNIST_CACHE_DIR")
    with tempfile.TemporaryDirectory() as name:
        os.environ["SEQMNIST_CACHE_DIR"] = name
        try:
            for kind, does in kinds.items():
                count = -(-tries // len(kinds))
                wrong = [found for _ in range(count) if (found := _one(does, draw))]
                outcomes.append(Outcome(kind, count, count - len(wrong), len(wrong), "; ".join(wrong[:3])))
        finally:
            if before is None:
                del os.environ["SEQMNIST_CACHE_DIR"]
            else:
                os.environ["SEQMNIST_CACHE_DIR"] = before
    return outcomes


def _one(does: Callable[[Path, random.Random], str | None], draw: random.Random) -> str | None:
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
    return content + draw.randbytes(draw.randrange(1, 50))


def _damage(folder: Path, draw: random.Random, suffix: str, how: Callable[[bytes, random.Random], bytes]) -> str | None:
    victim = draw.choice(_write(folder, suffix))
    right = load_idx(Request(data_dir=folder))
    victim.write_bytes(how(victim.read_bytes(), draw))
    try:
        found = load_idx(Request(data_dir=folder))
    except DataError as e:
        return None if str(victim) in str(e) or str(folder) in str(e) else f"the message does not name the file: {e}"
    same = all(
        np.array_equal(getattr(getattr(found, part), kind), getattr(getattr(right, part), kind))
        for part in COUNTS
        for kind in ("images", "labels")
    )
    if same:
        return None
    # A plain file has no checksum: another pixel is other data, which the content hash, a part of every
    # run's identity, tells apart.
    if suffix == "" and how is _flip and found.content_hash != right.content_hash:
        return None
    return f"{victim.name}: other data without a word"


def _invent(folder: Path, draw: random.Random) -> str | None:
    """A header of likely and unlikely numbers before a random payload."""
    dimensions = draw.choice((1, 3))
    sizes = [draw.choice((0, 1, 2, 3, 5, 28, 255, 2**16, 2**31, 2**32 - 1)) for _ in range(draw.randrange(5))]
    magic = bytes((draw.choice((0, 0, 0, 1)), draw.choice((0, 0, 0, 8)), draw.choice((8, 8, 8, 9, 13)), len(sizes)))
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
        return None if named and not legal else f"legal: {legal}, named: {named}: {e}"
    right = legal and found.shape == tuple(sizes) and found.tobytes() == payload
    return None if right else f"accepted {content[:20].hex()}... as {found.shape}"


def _spoil_cache(folder: Path, draw: random.Random) -> str | None:
    _write(folder, ".gz")
    for other in cache.folder().glob("*.npz"):
        other.unlink()
    right = load_idx(Request(data_dir=folder))
    (entry,) = cache.folder().glob("*.npz")
    entry.write_bytes(draw.choice((_flip, _resize))(entry.read_bytes(), draw))
    found = load_idx(Request(data_dir=folder))
    if found.content_hash != right.content_hash or not np.array_equal(found.train.images, right.train.images):
        return "the cache gave other data"
    return None
