"""The ways in which a user's request can fail, each one readable message.

Code raises these with a text that says what is wrong, where, what was expected
and how to mend it; ``launch.py`` prints that text and leaves with the class's
``exit_code``. Anything else that escapes is a bug of ours and keeps its traceback.
"""

import ast
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class SeqMnistError(Exception):
    """A failure that the user can mend: bad data, a foreign work directory, divergence."""

    exit_code = 1


class Interrupted(SeqMnistError):
    """An end before the end, after which the same command goes on from what was saved."""


class UsageError(SeqMnistError):
    """The request itself is wrong: an unknown name, an impossible value, a missing flag."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of `known`, or '' where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_name(name: str, known: Collection[str], field: str) -> None:
    """Checks what the user asked for by name.

    Args:
      name: what was asked for.
      known: the names that there are.
      field: the config field or argument that held it, for the message.

    Raises:
      UsageError: `name` is none of them; the message lists them.
    """
    if name not in known:
        names = ", ".join(sorted(known))
        raise UsageError(f"{field} is {name!r}; expected one of: {names}.{did_you_mean(str(name), known)}")


def choose(table: Mapping[str, T], name: str, field: str) -> T:
    """Looks `name` up in a table of named choices; arguments and errors as in `check_name`."""
    check_name(name, table, field)
    return table[name]


def parse_mapping(text: str, field: str, example: str) -> dict[Any, Any]:
    """The mapping that a field of text holds, {} where it is empty.

    Args:
      text: a Python dict of literals.
      field, example: for the message.

    Raises:
      UsageError: it is none.
    """
    try:
        found = ast.literal_eval(text) if text else {}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{field} is {text!r}; expected a mapping, as {example}.")
    return found
