"""The kernel's source for one cell and shape: the skeleton `recurrence.cu`, and what is generated of the stages."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seqmnist_jax.rnn.stages import OUTPUTS, Output, Stages, Statement, crossing, renamed

FOLDER = Path(__file__).parent
# Of a cluster. The registers of one multiprocessor hold 128 units with five products, those of four 256.
BLOCKS = 4
MOST_UNITS, MOST_UNITS_OF_BLOCK = 256, 128
# Registers of a thread that weights may take, of 255: with five products in place of four a dozen bytes are spilled.
MOST_WEIGHTS = 160
# Steps that the way back fetches ahead, as in `recurrence.cu`; arrays of a call, as there and in `launch.cc`.
STAGES = 6
MOST_ARRAYS = 24
# Of a block, in KB, by compute capability; another has at least the smallest.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


class Shape(NamedTuple):
    """All that a kernel is compiled for beside the cell.

    Attributes:
      hidden: units.
      blocks: that share them, 1 or a cluster of `BLOCKS`.
      sequences: of a block or cluster, 8 or 4.
      outputs: a name in `OUTPUTS`.
      save: whether the forward pass keeps what the way back needs.
      masked: sequences of different lengths, or a batch that does not fill the last block.
      reverse: from the last step to the first.
      half: the way back in float16, else in bfloat16.
    """

    hidden: int
    blocks: int
    sequences: int
    outputs: str
    save: bool
    masked: bool
    reverse: bool
    half: bool

    @property
    def units(self) -> int:
        """Hidden in whole tiles of the products."""
        tile = 32 if self.blocks == 1 else 64
        return -(-self.hidden // tile) * tile

    @property
    def split(self) -> int:
        """Warps that share 16 units."""
        return 1 if self.blocks == 1 else 2

    @property
    def threads(self) -> int:
        """Of a block."""
        return 2 * self.units * self.split // self.blocks

    @property
    def pairs(self) -> int:
        """Of a unit and a sequence, of a thread."""
        return self.sequences // 2 // self.split

    def source(self, stages: Stages) -> str:
        """All of a kernel's source, which includes nothing."""
        parts = [file("machine.h"), file("stages.h"), constants(self), cell(stages, self), file("recurrence.cu")]
        return "\n\n".join(parts)


def blocks(stages: Stages) -> int:
    """How many blocks share the units: 1 where one multiprocessor's registers hold the weights."""
    one = Shape(stages.division.hidden, 1, 8, "all", save=True, masked=True, reverse=False, half=True)
    return 1 if one.units <= MOST_UNITS_OF_BLOCK and _weights(stages, one) <= MOST_WEIGHTS else BLOCKS


def _weights(stages: Stages, shape: Shape) -> int:
    """Registers of a thread that hold weights."""
    return len(stages.division.products) * shape.units // 16 // shape.split * 4


def misfit(stages: Stages, capability: int) -> str | None:
    """Why no kernel for these stages, which have products, fits a GPU of a capability (90 for 9.0), or None."""
    d = stages.division
    gpu = "a GPU of compute capability {}.{}".format(*divmod(capability, 10))
    shape = Shape(d.hidden, blocks(stages), 8, "all", save=True, masked=True, reverse=False, half=False)
    what = f"{len(d.products)} product{'s' * (len(d.products) > 1)} of {d.hidden} units"
    if shape.units > MOST_UNITS:
        return f"it has {d.hidden} units; the GPU kernel has at most {MOST_UNITS}"
    if (weights := _weights(stages, shape)) > MOST_WEIGHTS:
        return f"the weights of {what} take {weights} registers of a thread, where {MOST_WEIGHTS} are free for them"
    if shape.blocks > 1 and capability < 90:
        return f"{what} need a cluster of blocks, which {gpu} does not have"
    if (arrays := 14 + 2 * len(groups(stages))) > MOST_ARRAYS:
        return f"it has {arrays} arrays; the GPU kernel has at most {MOST_ARRAYS}"
    there = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    kilobytes = max(*shared_bytes(stages, shape), *shared_bytes(stages, shape._replace(half=True))) / 1024
    if kilobytes > there:
        return f"{what} need {kilobytes:.0f} KB of shared memory in a block, where {gpu} has {there}"
    return None


def groups(stages: Stages) -> list[tuple[list[int], list[int]]]:
    """Sources and results that products join: each group's weights' gradients are one product."""
    products = stages.division.products
    left, out = {(p.source, p.result) for p in products}, []
    while left:
        sources, results = {min(left)[0]}, set[int]()
        while True:
            more = {p for p in left if p[0] in sources or p[1] in results}
            if not more:
                break
            left -= more
            sources |= {s for s, _ in more}
            results |= {r for _, r in more}
        out.append((sorted(sources), sorted(results)))
    return out


def table(name: str, values: Sequence[int]) -> str:
    """A table of numbers as a function of the compiler's."""
    text = "".join(f"i == {i} ? {v} : " for i, v in enumerate(values))
    return f"  static constexpr int {name}(int i) {{ return {text}0; }}"


def stage_functions(
    name: str, struct: str, statements: list[Statement], writes: list[tuple[str, Output, int]], last: int
) -> tuple[list[str], list[str]]:
    """One function a stage; what crosses stages lives in the struct, whose fields come first."""
    cross = crossing(statements, [(out, stage) for _, out, stage in writes])
    fields = [f"    {kind} {name};" for name, kind in cross.items()]

    def known(text: str) -> str:
        return renamed(text, {name: f"u.{name}" for name in cross})

    lines = []
    for stage in range(last + 1):
        lines.append(f"  static DEVICE void {name}(Int<{stage}>, {struct}& u) {{")
        for s in statements:
            if s.stage == stage:
                to = (
                    f"u.{s.name}"
                    if s.name in cross
                    else s.name
                    if s.name.startswith("u.")
                    else f"const {s.kind} {s.name}"
                )
                lines.append(f"    {to} = {known(s.text)};")
        lines += [f"    {to} = {known(out.text)};" for to, out, at in writes if at == stage]
        lines.append("  }")
    return fields, lines


def recalled(stages: Stages, shape: Shape) -> list[tuple[int, int]]:
    """Carries that are a source as they are, and this source: in float16 they need not be kept a second time."""
    places = {out.text: i for i, out in reversed(list(enumerate(stages.sources)))}
    kept = [i for kind, i in stages.kept if kind == "c"] if shape.half else []
    return [(i, places[f"u.c[{i}]"]) for i in kept if f"u.c[{i}]" in places]


def spares(shape: Shape) -> bool:
    """Whether less is kept and more made again: with 8 sequences to a block memory is what takes the time."""
    return shape.sequences == 8


def kept_apart(stages: Stages, shape: Shape) -> list[int]:
    """The places in `Stages.kept` of what is kept beside the sources."""
    again = {("c", i) for i, _ in recalled(stages, shape)}
    again |= {("t", i) for i in stages.spared} if spares(shape) else set()
    return [place for place, what in enumerate(stages.kept) if what not in again]


def cell(stages: Stages, shape: Shape) -> str:
    """The struct `Cell` that the skeleton takes."""
    d = stages.division
    from_sources, apart = recalled(stages, shape), kept_apart(stages, shape)
    joined = groups(stages)
    group_of_source = {s: (g, i) for g, (sources, _) in enumerate(joined) for i, s in enumerate(sources)}
    group_of_result = {r: (g, i) for g, (_, results) in enumerate(joined) for i, r in enumerate(results)}
    ends = (*stages.d_carry, *stages.d_results, *stages.d_inputs, *stages.sums)
    on_the_way = [*(s.text for s in stages.backward), *(out.text for out in ends)]
    inputs_back = [i for i in range(d.count("x")) if any(f"u.x[{i}]" in text for text in on_the_way)]
    sizes = {
        "kProducts": len(d.products),
        "kVectors": d.count("p"),
        "kCarries": len(d.carries),
        "kScalars": d.count("s"),
        "kInputs": d.count("x"),
        "kInputsBack": len(inputs_back),
        "kOutputs": d.outputs,
        "kSources": len(d.sources),
        "kResults": len(d.results),
        "kRounds": d.rounds,
        "kKept": len(apart),
        "kRecalled": len(from_sources),
        "kGroups": len(joined),
        "kSums": len(stages.sums),
    }
    tables = {
        "source_round": [round for round, _ in d.sources],
        "result_round": [round for round, _ in d.results],
        "product_source": [p.source for p in d.products],
        "product_result": [p.result for p in d.products],
        "source_group": [group_of_source[s][0] for s in range(len(d.sources))],
        "source_place": [group_of_source[s][1] for s in range(len(d.sources))],
        "result_group": [group_of_result[r][0] for r in range(len(d.results))],
        "result_place": [group_of_result[r][1] for r in range(len(d.results))],
        "group_sources": [len(sources) for sources, _ in joined],
        "group_results": [len(results) for _, results in joined],
        "input_back": inputs_back,
        "recalled_carry": [carry for carry, _ in from_sources],
        "recalled_source": [source for _, source in from_sources],
    }
    at = lambda n: max(n, 1)  # noqa: E731
    raw = (
        f"float c[{at(len(d.carries))}], m[{at(len(d.results))}], x[{at(d.count('x'))}], "
        f"s[{at(d.count('s'))}], p[{at(d.count('p'))}];"
    )
    writes = [(f"u.source[{i}]", out, d.sources[i][0] - 1) for i, out in enumerate(stages.sources)]
    writes += [(f"u.next[{i}]", out, d.rounds) for i, out in enumerate(stages.carry)]
    writes += [(f"u.y[{i}]", out, d.rounds) for i, out in enumerate(stages.outputs)]
    writes += [(f"u.k[{i}]", Output(stages.texts[place], 0), d.rounds) for i, place in enumerate(apart)]
    fields, functions = stage_functions("forward", "Forward", stages.forward, writes, d.rounds)
    back = [*stages.recall(apart, spares(shape)), *stages.backward]
    if shape.outputs == "none":  # Zeros that the compiler would add, for what they do to a negative zero.
        back = [s._replace(text=re.sub(r" \+ u\.dy\[\d+\]$", "", s.text)) for s in back]
    back_writes = [(f"u.dm[{i}]", out, d.rounds - d.results[i][0]) for i, out in enumerate(stages.d_results)]
    back_writes += [(f"u.dx[{i}]", out, d.rounds) for i, out in enumerate(stages.d_inputs)]
    back_writes += [(f"u.sum[{i}]", out, d.rounds) for i, out in enumerate(stages.sums)]
    back_writes += [(f"u.before[{i}]", out, d.rounds) for i, out in enumerate(stages.d_carry)]
    back_fields, back_functions = stage_functions("backward", "Backward", back, back_writes, d.rounds)
    return "\n".join(
        [
            "struct Cell {",
            f"  static constexpr int {', '.join(f'{k} = {v}' for k, v in sizes.items())};",
            *(table(name, values) for name, values in tables.items()),
            "  struct Forward {",
            f"    {raw}",
            f"    float source[{at(len(d.sources))}], next[{at(len(d.carries))}];",
            f"    float y[{at(d.outputs)}], k[{at(len(apart))}];",
            *fields,
            "  };",
            *functions,
            "  struct Backward {",
            f"    {raw}",
            f"    float k[{at(len(apart))}], after[{at(len(d.carries))}], ds[{at(len(d.sources))}];",
            f"    float dn[{at(len(d.carries))}], dy[{at(d.outputs)}], dm[{at(len(d.results))}];",
            f"    float dx[{at(d.count('x'))}], sum[{at(len(stages.sums))}], before[{at(len(d.carries))}];",
            *back_fields,
            "  };",
            *back_functions,
            "};",
        ]
    )


def constants(shape: Shape) -> str:
    """What the skeleton is told of the shape."""
    flags = {"kSave": shape.save, "kMasked": shape.masked, "kReverse": shape.reverse, "kHalf": shape.half}
    sizes = {"kHidden": shape.hidden, "kUnits": shape.units, "kBlocks": shape.blocks, "kSequences": shape.sequences}
    sizes |= {"kAll": 1, "kLast": 2, "kOutputs": OUTPUTS.index(shape.outputs)}
    cluster = f" __cluster_dims__({shape.blocks}, 1, 1)" if shape.blocks > 1 else ""
    return "\n".join(
        [f"#define CLUSTER{cluster}", f"constexpr int {', '.join(f'{k} = {v}' for k, v in sizes.items())};"]
        + [f"constexpr bool {k} = {str(v).lower()};" for k, v in flags.items()]
    )


@functools.cache
def file(name: str) -> str:
    """A file of this folder."""
    return (FOLDER / name).read_text()


def piece_words(stages: Stages, shape: Shape) -> int:
    """32-bit words that a thread keeps of a step, beside the sources."""
    return (len(kept_apart(stages, shape)) * shape.pairs + 1) // 2


def shared_bytes(stages: Stages, shape: Shape) -> tuple[int, int]:
    """The shared memory of a block, forward and backward."""
    d = stages.division
    tile, tile_back = (8 * (units + 8) * 2 for units in (shape.units, shape.units // shape.blocks))
    words = piece_words(stages, shape) + len(recalled(stages, shape)) * shape.sequences // 4
    forward, back = 2 * len(d.sources) * tile, STAGES * 4 * shape.threads * words + 2 * len(d.results) * tile_back
    if shape.blocks > 1:
        barriers = 2 * 8 * d.rounds
        forward += len(d.results) * shape.threads * shape.sequences + barriers
        back += 2 * len(d.sources) * shape.units * shape.sequences * 4 + barriers
    if shape.half:
        back += 4 * shape.threads // 32 * shape.sequences
    return forward, back
