"""The IDX file format of MNIST, read and written, plain or gzipped.

A file is two zero bytes, a type code (8: uint8, the only one here), the number of
dimensions, each dimension as a big-endian uint32, then the values in C order.
"""

import contextlib
import gzip
import math
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from seqmnist_jax.errors import SeqMnistError

UINT8 = 0x08
PIECE = 1 << 20
# How the names of files begin that are not whole yet.
HALF_WRITTEN = ".half-written-"
# More than any set of this form has; a gzipped file can promise, and hold, without end.
MOST_VALUES = 1 << 32
MEND = "point --config.runtime.data_dir or SEQMNIST_DATA_DIR at a folder with the four MNIST files."


class DataError(SeqMnistError):
    """A data file is missing, damaged or not what it should be."""


def entries(folder: Path) -> list[str]:
    """The names in a folder, sorted; [] where it can't be listed, which does not mean that it can't be entered."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def look_for(folder: Path, name: str) -> Path | None:
    """The file `name` or `name`.gz in `folder`, as whoever has unpacked it writes that; None where it is not there.

    The name itself goes first, then Kaggle's, with a dot before idx; then the same in other letter case. Each
    may also be a folder that holds a file of its own name, as Kaggle's archive has it.

    Raises:
      DataError: the folder can't be entered.
    """
    names = [one + ending for one in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    try:
        names += [entry for one in names for entry in entries(folder) if entry.lower() == one]
        return next((path for one in names for path in (folder / one, folder / one / one) if path.is_file()), None)
    except OSError as e:
        raise DataError(f"{folder} can't be read: {e.strerror}; {MEND}") from e


def find_file(folder: Path, name: str) -> Path:
    """What `look_for` finds.

    Raises:
      DataError: nothing, and the message lists what is there; or the folder can't be entered.
    """
    path = look_for(folder, name)
    if path is not None:
        return path
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {MEND}")
    found = [entry + "/" * (folder / entry).is_dir() for entry in entries(folder)[:8]]
    raise DataError(f"{folder} holds neither {name} nor {name}.gz (it holds: {', '.join(found) or 'nothing'}); {MEND}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes.

    Args:
      path: the file; gzipped if its first two bytes say so, whatever its name.
      dimensions: how many it must have (3 for images, 1 for labels).

    Returns:
      uint8 [count, height, width] or [count].

    Raises:
      DataError: not an IDX file of uint8, another number of dimensions, truncated,
        with bytes to spare, a damaged gzip stream, or too large. At most one byte more than the
        header promises is read, and nothing is allocated by that promise alone.
    """
    mend = "Fetch the file again."
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if zipped else raw as file:
                head = file.read(4)
                if len(head) < 4 or head[:2] != b"\0\0" or head[2] != UINT8:
                    raise DataError(
                        f"{path} is not an IDX file of unsigned bytes: it starts with {head.hex() or 'nothing'}; "
                        f"expected 0000{UINT8:02x}{dimensions:02x}. {mend}"
                    )
                if head[3] != dimensions:
                    raise DataError(
                        f"{path} has {head[3]} dimensions; expected {dimensions} "
                        f"({'images' if dimensions == 3 else 'labels'}). Are images and labels swapped?"
                    )
                sizes = file.read(4 * dimensions)
                if len(sizes) < 4 * dimensions:
                    raise DataError(f"{path} ends within its header. {mend}")
                shape = struct.unpack(f">{dimensions}I", sizes)
                count = math.prod(shape)
                if count > MOST_VALUES:
                    raise DataError(f"{path} promises {count:,} values; expected at most {MOST_VALUES:,}. {mend}")
                values = _read_at_most(file, count + 1)
                if len(values) != count:
                    found = "more" if len(values) > count else f"only {len(values):,}"
                    raise DataError(f"{path} promises {count:,} values (shape {shape}) and holds {found}. {mend}")
                return np.frombuffer(values, np.uint8).reshape(shape)
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path} is a damaged gzip file ({e}). {mend}") from e
    except OSError as e:
        raise DataError(f"{path} can't be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise DataError(f"{path} has an impossible shape in its header ({e}). {mend}") from e


def _read_at_most(file: BinaryIO | gzip.GzipFile, count: int) -> bytes:
    """Up to `count` bytes, read in pieces: ``read(count)`` would allocate them all at once, there or not."""
    content = bytearray()
    while piece := file.read(min(count - len(content), PIECE)):
        content += piece
    return bytes(content)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes uint8 `values` as an IDX file, gzipped if `path` ends in .gz (equal input, equal bytes)."""
    if values.dtype != np.uint8:
        raise ValueError(f"values has dtype {values.dtype}; expected uint8")
    header = struct.pack(f">HBB{values.ndim}I", 0, UINT8, values.ndim, *values.shape)
    content = header + values.tobytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=9, mtime=0)
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that becomes `path` once it is whole and on the disk; where that fails, `path` stays as it was.

    Until then its name is its own: processes that write the same file at once don't write into each other's.

    Raises:
      OSError: it can't be written; its filename is that of `path`.
    """
    name = path.parent / f"{HALF_WRITTEN}{path.name}-{uuid.uuid4().hex}"  # tempfile's would not go by the umask
    try:
        with open(name, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(e, OSError):  # of a name that nobody has given
            e.filename, e.filename2 = str(path), None
        raise
