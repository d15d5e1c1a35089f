"""One owner of a folder at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from seqmnist_jax.errors import Interrupted, SeqMnistError

NAME = "lock"


class InUse(SeqMnistError):
    """Another process works in the folder."""


class Moved(Interrupted):
    """The folder is not in its place any more."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Callable[[], None]]:
    """Makes this process the owner of a folder, which exists; the kernel ends that when the process dies.

    The file stays, and says who had it last. What is given raises `Moved` unless the folder still is in its place.

    Raises:
      InUse: another process owns it; the message names it.
    """
    with (folder / NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"{folder} is in use by {_owner(file)}. Wait for its end, stop it, or choose another --workdir."
            ) from None
        except OSError as e:  # some network file systems have no locks
            warnings.warn(f"{folder} can't be locked ({e}): see that only one process works in it.", stacklevel=2)
        else:
            _sign(file)
        own = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # open, so that no other folder gets its number
        try:
            yield lambda: _check_place(folder, own)
        finally:
            os.close(own)


def _check_place(folder: Path, own: int) -> None:
    try:
        if os.path.samestat(os.stat(folder), os.fstat(own)):
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:  # which says nothing of the place
        return
    raise Moved(
        f"{folder} is not the folder any more that this run began in: it was moved, removed or replaced. Nothing is "
        "written to the one that is there now. Put the run's own back, or name its new place by --workdir."
    )


def _sign(file: IO[str]) -> None:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    # A full disk does not make the lock less of one.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": platform.node(), "since": now}) + "\n")
        file.flush()


def _owner(file: IO[str]) -> str:
    try:
        file.seek(0)
        owner = json.load(file)
        return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
