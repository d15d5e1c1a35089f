"""What a mode gives to be printed, and how it is: in whole lines, or between a terminal's edges."""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import traceback
from typing import Any, NamedTuple, TextIO


class Output(NamedTuple):
    """What a mode prints.

    Attributes:
      value: the JSON value that --json asks for.
      text: what people read.
      whole: what of it no terminal may break, because it is copied: commands, Markdown.
    """

    value: Any
    text: str = ""
    whole: str = ""


class Unprinted(Exception):
    """What a mode gives could not be printed, and that is said."""


def show(output: Output | None, as_json: bool) -> None:
    """Prints the one or the other of what a mode gives, where it gives anything."""
    if output is None:
        return
    try:
        if as_json:
            print(json.dumps(output.value, indent=2), flush=True)
            return
        if output.text:
            print_text(output.text, sys.stdout)
        if output.whole:
            print(output.whole, flush=True)
    except OSError as e:
        lose(e)
        raise Unprinted from e


def lose(error: OSError) -> None:
    """Gives standard output up, which can't be written, and says so unless its reader has merely left."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        print(f"WARNING: standard output can't be written ({error.strerror or error}).", file=sys.stderr, flush=True)


def replace_unprintable() -> None:
    """Lets the standard streams print a question mark for what they have no sign for."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def drop_late_answers() -> None:
    """Leaves out what tensorstore's threads tell of a read that has failed already, a traceback for each array."""
    tell = sys.unraisablehook

    def tell_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_others


def show_error(message: str, with_traceback: bool = False, kind: str = "error") -> None:
    """Says what went wrong, and where, if asked, of the exception that is being handled."""
    if with_traceback:
        traceback.print_exc()
    print_text(f"{kind}: {message}", sys.stderr)


def print_text(text: str, file: TextIO) -> None:
    """Prints text, its lines broken between words where a terminal ends, and whole elsewhere."""
    if file.isatty():
        wrapper = textwrap.TextWrapper(
            shutil.get_terminal_size().columns, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
        )
        text = "\n".join(wrapper.fill(line) for line in text.split("\n"))
    print(text, file=file, flush=True)
