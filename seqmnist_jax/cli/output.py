"""What a mode gives to be printed, and how it is: in whole lines, or between a terminal's edges."""

import json
import shutil
import sys
import textwrap
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


def show(output: Output | None, as_json: bool) -> None:
    """Prints the one or the other of what a mode gives, where it gives anything."""
    if output is None:
        return
    if as_json:
        print(json.dumps(output.value, indent=2))
        return
    if output.text:
        print_text(output.text, sys.stdout)
    if output.whole:
        print(output.whole)


def show_error(message: str) -> None:
    """Says what went wrong."""
    print_text(f"error: {message}", sys.stderr)


def print_text(text: str, file: TextIO) -> None:
    """Prints text, its lines broken between words where a terminal ends, and whole elsewhere."""
    if file.isatty():
        wrapper = textwrap.TextWrapper(
            shutil.get_terminal_size().columns, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
        )
        text = "\n".join(wrapper.fill(line) for line in text.split("\n"))
    print(text, file=file, flush=True)
