"""What protocols, cells and published figures are from: the entries of references.bib."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("references.bib")


class Reference(NamedTuple):
    """A paper or text.

    Attributes:
      authors: their surnames.
      title, year, url: of it.
    """

    authors: tuple[str, ...]
    title: str
    year: str
    url: str

    @property
    def short(self) -> str:
        """As a sentence names it: 'Gu, Goel and Ré 2022', 'Knigge et al. 2023'."""
        *others, last = self.authors
        if len(self.authors) > 3 or last == "others":
            return f"{self.authors[0]} et al. {self.year}"
        return f"{', '.join(others)}{' and ' if others else ''}{last} {self.year}"

    @property
    def full(self) -> str:
        """With title and address."""
        return f"{self.short}, {self.title}, {self.url}"


@functools.cache
def read() -> dict[str, Reference]:
    """All entries by their key."""
    found = {}
    for key, body in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}$", PATH.read_text(encoding="utf-8"), re.M | re.S):
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M))
        authors = tuple(author.split(",")[0] for author in fields["author"].split(" and "))
        found[key] = Reference(authors, fields["title"], fields["year"], fields["url"])
    return found
