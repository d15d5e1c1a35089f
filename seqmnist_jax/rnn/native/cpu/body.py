"""Statements of a cell's stages, put where a kernel for CPUs needs them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from seqmnist_jax.rnn.stages import Stages, Statement, renamed, words


@dataclasses.dataclass(frozen=True)
class Write:
    """A call of the skeleton with a value: `call` has a place for it."""

    stage: int
    call: str
    text: str


class Body:
    """Statements put into the stages in which they are needed.

    A value that is used in a later stage than it is made in crosses in a scratch array, unless it is as cheap to make
    again: then each stage makes it for itself.

    Attributes:
      stages: statements by stage.
      loads: raw values that a stage reads, by stage.
      cross: names that cross, numbered.
    """

    def __init__(
        self,
        statements: Sequence[Statement],
        writes: Sequence[Write],
        last: int,
        first: int,
        late: Mapping[str, int],
        free: str,
    ):
        self._made = {s.name: s for s in statements}
        self._order = {s.name: i for i, s in enumerate(statements)}
        self._first, self._late, self._free = first, late, free
        self._cheap: dict[str, bool] = {}
        self._needed: list[set[str]] = [set() for _ in range(last + 1)]
        self.loads: list[set[str]] = [set() for _ in range(last + 1)]
        self.cross: dict[str, int] = {}
        self.writes = writes
        for write in writes:
            self._want(write.text, write.stage)
        self.stages = [sorted(names, key=self._order.__getitem__) for names in self._needed]

    def home(self, name: str) -> int:
        """The stage in which a value is made."""
        made = self._made.get(name)
        return self._late.get(name, 0) if made is None else max(self._first, made.stage)

    def _is_free(self, name: str) -> bool:
        """Whether every stage may make it for itself."""
        if name not in self._cheap:
            text = self._made[name].text
            self._cheap[name] = "_(" not in text.replace("opened_(", "(") and all(
                self._is_free(w) if w in self._made else not w.startswith("u.") or w[2:].split("[")[0] in self._free
                for w in words(text)
            )
        return self._cheap[name]

    def _want(self, text: str, stage: int) -> None:
        for name in sorted(words(text)):  # in the same order in each process
            if name in self._made:
                home = self.home(name)
                if home != stage and not self._is_free(name):
                    self.cross.setdefault(name, len(self.cross))
                    stage_of = home
                else:
                    stage_of = stage
                if name not in self._needed[stage_of]:
                    self._needed[stage_of].add(name)
                    self._want(self._made[name].text, stage_of)
            elif name.startswith("u."):
                home = self._late.get(name, stage)
                if home < stage:
                    self.cross.setdefault(name, len(self.cross))
                self.loads[home].add(name)

    def lines(self, stage: int, load: Callable[[str, int], str] = "{}({})".format) -> list[str]:
        """The body of one stage; `load` says how the skeleton is asked for a value of a kind."""
        writes = [write for write in self.writes if write.stage == stage]
        here = set(self.stages[stage]) | self.loads[stage]
        read = {w for n in self.stages[stage] for w in words(self._made[n].text)}
        read |= {w for write in writes for w in words(write.text)}
        lines = []
        for name in sorted(self.loads[stage]):
            kind, index = name[2:-1].split("[")
            lines.append(f"const Vec {local(name)} = at.{load(kind, int(index))};")
        for name, place in self.cross.items():
            if name in read and name not in here:
                kind = "(IntVec)" if self._is_bool(name) else ""
                lines.append(f"const auto {local(name)} = {kind}at.crossed({place});")
        for name in self.stages[stage]:
            s = self._made[name]
            text = known(s.text)
            made = f"auto {local(name)} = {text}" if s.kind == "bool" else f"Vec {local(name)} = vec({text})"
            lines.append(f"const {made};")
        lines += [write.call.format(f"vec({known(write.text)})") + ";" for write in writes]
        for name, place in self.cross.items():
            if name in here and self.home(name) == stage:
                lines.append(f"at.cross({place}, (Vec){local(name)});")
        return lines

    def _is_bool(self, name: str) -> bool:
        return name in self._made and self._made[name].kind == "bool"


def local(name: str) -> str:
    """A value's name inside a stage."""
    if not name.startswith("u."):
        return name
    kind, index = name[2:-1].split("[")
    return f"{'kept' if kind == 'k' else kind}{index}"


def known(text: str) -> str:
    """A text with its values by their local names."""
    return renamed(text, {name: local(name) for name in words(text)})


class Started:
    """Forward statements whose sums with what needs no carry are made where the products begin.

    A product's result that is only added to such values starts from them in place of zero: there they are read once for
    all rows of a tile.

    Attributes:
      statements: those that are left.
      starts: by result, the values added, as the names of statements or raw values.
      outer: the statements that make them.
    """

    def __init__(self, stages: Stages):
        read = [w for s in stages.forward for w in words(s.text)]
        read += [out.text for out in (*stages.sources, *stages.carry, *stages.outputs)] + list(stages.texts)
        made = {s.name: s for s in stages.forward}
        outer = {w for s in stages.forward for w in words(s.text) if w.startswith(("u.x", "u.s", "u.p"))}
        for s in stages.forward:
            # A literal has no name; what is made of names that are outside is outside.
            if all(w in outer for w in words(s.text) if w.startswith("u.") or w in made):
                outer.add(s.name)
        self.starts: dict[int, list[str]] = {}
        self._names: dict[str, str] = {}
        gone = set()
        for i in range(len(stages.division.results)):
            name = f"u.m[{i}]"
            while True:
                readers = [s for s in stages.forward if name in words(s.text)]
                if len(readers) != 1 or read.count(name) != 1:
                    break
                terms = readers[0].text.split(" + ")
                if len(terms) != 2 or name not in terms:
                    break
                other = terms[1 - terms.index(name)]
                if other not in outer:
                    break
                self.starts.setdefault(i, []).append(other)
                name = readers[0].name
                gone.add(name)
                self._names[name] = f"u.m[{i}]"
        left = [s for s in stages.forward if s.name not in gone]
        self.outer = [s for s in stages.forward if s.name in outer]
        self.statements = [s._replace(text=self.known(s.text)) for s in left]

    def known(self, text: str) -> str:
        """A text in which sums that are started are products' results."""
        return renamed(text, self._names)

    def lines(self) -> list[str]:
        """The function that gives what a result starts from."""
        lines = []
        for i, names in self.starts.items():
            text = " + ".join(names)
            body = Body(self.outer, [Write(0, "return {}", text)], 0, 0, {}, "xsp")
            lines += [f"    if (result == {i}) {{", *(f"      {line}" for line in body.lines(0)), "    }"]
        at = "at" if lines else ""
        return [
            "  template <class At>",
            f"  static SEQMNIST_INLINE Vec start(int{' result' if lines else ''}, const At& {at}) {{",
            *lines,
            "    return Vec{};",
            "  }",
        ]
