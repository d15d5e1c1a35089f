"""What came of injecting a fault many times."""

from collections.abc import Sequence
from typing import NamedTuple


class Outcome(NamedTuple):
    """The result of one kind of fault.

    Attributes:
      fault: what was done.
      tries: how often.
      survived: how often all ended as it must: with the right result, or with a clear error where that is right.
      lost: how often not.
      note: what else is to be said of it.
    """

    fault: str
    tries: int
    survived: int
    lost: int
    note: str = ""


def as_table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in Markdown."""
    rows = [("fault", "tries", "survived", "lost", ""), ("---",) * 5]
    rows += [(one.fault, f"{one.tries:,}", f"{one.survived:,}", f"{one.lost:,}", one.note) for one in outcomes]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
