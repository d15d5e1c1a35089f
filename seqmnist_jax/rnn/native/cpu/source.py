"""The kernel's source for one cell: the struct `Cell`, between the skeleton's headers."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from seqmnist_jax.rnn.native.cpu.body import Body, Started, Write
from seqmnist_jax.rnn.stages import Output, Stages

FOLDER = Path(__file__).parent
# Vectors of sums that a tile of rows has registers for.
MOST_COLUMNS = 3


def _chunks(n: int) -> list[int]:
    """n columns in passes as even as can be."""
    count = -(-n // MOST_COLUMNS)
    return [n // count + (i < n % count) for i in range(count)]


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as (first, count) of neighbours."""
    out: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if out and sum(out[-1]) == n:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((n, 1))
    return out


def _grouped(columns: Iterable[int], terms: Mapping[int, frozenset[int]]) -> list[tuple[list[int], frozenset[int]]]:
    """Columns that have the same terms, in passes."""
    groups: dict[frozenset[int], list[int]] = {}
    for c in columns:
        groups.setdefault(terms[c], []).append(c)
    out = []
    for key, members in groups.items():
        for size in _chunks(len(members)):
            out.append((members[:size], key))
            members = members[size:]
    return out


def _pass(round: int, columns: Sequence[int], terms: Sequence[tuple[int, int]]) -> str:
    text = ", ".join(f"{{{first}, {count}}}" for first, count in terms)
    return f"{{{round}, {len(columns)}, {{{', '.join(map(str, columns))}}}, {len(terms)}, {{{text}}}}}"


def _bool(value: bool) -> str:
    return str(value).lower()


def _table(type: str, name: str, values: Sequence[object]) -> str:
    shown = ", ".join(_bool(value) if isinstance(value, bool) else str(value) for value in values)
    # An array has at least one element; how many count is said elsewhere.
    return f"  static constexpr {type} {name}[] = {{{shown or '{}'}}};"


def _functions(name: str, body: Sequence[Sequence[str]]) -> list[str]:
    lines = []
    for stage, statements in enumerate(body):
        used = any("at." in s for s in statements)
        lines += [
            "  template <class At>",
            f"  static SEQMNIST_INLINE void {name}(Int<{stage}>, const At&{' at' if used else ''}) {{",
            *(f"    {s}" for s in statements),
            "  }",
        ]
    return lines


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The forward stages, and what the tables say of them."""

    started: Started
    body: Body
    has_start: bool
    origins: list[tuple[str, int]]
    own: int
    kept_groups: list[list[int]]
    group_of_stage: list[int]


def _forward(stages: Stages) -> _Forward:
    d, started = stages.division, Started(stages)
    new_carry = [out._replace(text=started.known(out.text)) for out in stages.carry]
    new_sources = [out._replace(text=started.known(out.text)) for out in stages.sources]
    texts = [started.known(text) for text in stages.texts]
    carry_of = {f"u.c[{i}]": i for i in range(len(d.carries))}
    starts = [r == 1 and out.text not in carry_of for (r, _), out in zip(d.sources, new_sources, strict=True)]
    has_start = d.rounds == 0 or any(starts)
    # Stages before the first product belong to the first one after it, where nothing needs them earlier.
    first = 0 if has_start else 1
    least = min(1, d.rounds)

    def at(out: Output) -> int:
        return max(out.stage, least)

    next_at = [at(out) for out in new_carry]
    after = {out.text: i for i, out in reversed(list(enumerate(new_carry)))}
    origins, own, writes = [], 0, []
    for (round, _), out in zip(d.sources, new_sources, strict=True):
        if out.text in carry_of:
            origins.append(("Origin::kBefore", carry_of[out.text]))
        elif out.text in after and next_at[after[out.text]] < round:
            origins.append(("Origin::kAfter", after[out.text]))
        else:
            origins.append(("Origin::kOwn", own))
            writes.append(Write(round - 1, f"at.source({own}, {{}})", out.text))
            own += 1
    writes += [
        Write(stage, f"at.next({i}, {{}})", out.text)
        for i, (stage, out) in enumerate(zip(next_at, new_carry, strict=True))
    ]
    writes += [Write(at(out), f"at.y({i}, {{}})", started.known(out.text)) for i, out in enumerate(stages.outputs)]
    known_at = {s.name: s.stage for s in started.statements}
    known_at |= {f"u.m[{i}]": round for i, (round, _) in enumerate(d.results)}
    kept_at = [max(known_at.get(text, 0), least) for text in texts]
    groups: list[list[int]] = []
    group_of_stage = [-1] * (d.rounds + 1)
    for stage in range(d.rounds + 1):
        members = [i for i, at_stage in enumerate(kept_at) if at_stage == stage]
        if members:
            group_of_stage[stage] = len(groups)
            groups.append(members)
            writes += [Write(stage, f"at.keep({n}, {{}})", texts[i]) for n, i in enumerate(members)]
    late = {f"u.m[{i}]": round for i, (round, _) in enumerate(d.results)}
    body = Body(started.statements, writes, d.rounds, first, late, "cxsp")
    return _Forward(started, body, has_start, origins, own, groups, group_of_stage)


def _columns(stages: Stages) -> list[int]:
    """Where the gradients have the cotangent of each value that is made of x: a result's column if it has the same."""
    if not stages.front:
        return []
    texts = [out.text for out in stages.d_results]
    new = [text for text in dict.fromkeys(out.text for out in stages.d_inputs) if text not in texts]
    return [(texts + new).index(out.text) for out in stages.d_inputs]


def _backward(stages: Stages) -> Body:
    d = stages.division
    statements = [*stages.recall(range(len(stages.kept))), *stages.backward]
    after = sorted(set(stages.after.values()))
    columns = _columns(stages)
    waits = {f"u.ds[{k}]": d.rounds - round + 1 for k, (round, _) in enumerate(d.sources)}
    before_at = [out.stage for out in stages.d_carry]
    while True:
        writes = [Write(out.stage, f"at.remade({k}, {{}})", out.text) for k, out in enumerate(stages.sources_again)]
        writes += [
            Write(d.rounds - d.results[i][0], f"at.dm({i}, {{}})", out.text) for i, out in enumerate(stages.d_results)
        ]
        own = dict(zip(columns, stages.d_inputs, strict=True)) if stages.front else {}
        writes += [Write(o.stage, f"at.dm({c}, {{}})", o.text) for c, o in own.items() if c >= len(d.results)]
        if not stages.front:
            writes += [Write(out.stage, f"at.dx({i}, {{}})", out.text) for i, out in enumerate(stages.d_inputs)]
        writes += [Write(out.stage, f"at.sum({i}, {{}})", out.text) for i, out in enumerate(stages.sums)]
        writes += [
            Write(stage, f"at.before({i}, {{}})", out.text)
            for i, (stage, out) in enumerate(zip(before_at, stages.d_carry, strict=True))
        ]
        body = Body(statements, writes, d.rounds, 0, waits, "kpsa")
        # A cotangent stands where that of the step before comes to stand, so it is replaced once nobody reads it.
        read = [
            max((s for s, n in enumerate(body.loads) if f"u.dn[{i}]" in n), default=0) for i in range(len(before_at))
        ]
        later = [max(a, b) for a, b in zip(before_at, read, strict=True)]
        if later == before_at:
            break
        before_at = later
    for n, i in enumerate(after):
        stage = max((s for s, names in enumerate(body.loads) if f"u.after[{i}]" in names), default=0)
        writes.append(Write(stage, f"at.remember({n}, {{}})", f"u.c[{i}]"))
    return Body(statements, writes, d.rounds, 0, waits, "kpsa")


def cell(stages: Stages) -> str:
    """The struct `Cell`, of stages that make their sources again (`with_sources`)."""
    d = stages.division
    forward, backward = _forward(stages), _backward(stages)
    results_of = {k: frozenset(p.result for p in d.products if p.source == k) for k in range(len(d.sources))}
    sources_of = {m: frozenset(p.source for p in d.products if p.result == m) for m in range(len(d.results))}
    forward_passes, backward_passes, forward_terms = [], [], [1] * (d.rounds + 1)
    for round in range(1, d.rounds + 1):
        results = [m for m, (r, _) in enumerate(d.results) if r == round]
        passes = _grouped(results, sources_of)
        forward_terms[round] = sum(len(terms) for _, terms in passes)
        forward_passes += [_pass(round, columns, [(k, 1) for k in sorted(terms)]) for columns, terms in passes]
        sources = [k for k, (r, _) in enumerate(d.sources) if r == round]
        backward_passes += [_pass(round, columns, _runs(terms)) for columns, terms in _grouped(sources, results_of)]
    outers = []
    columns = _columns(stages)
    # Behind the sources stands x.
    for k, of_source in enumerate([*results_of.values(), columns]):
        for first, count in _runs(set(of_source)):
            for size in _chunks(count):
                outers.append(f"{{{k}, {first}, {size}}}")
                first += size
    after = sorted(set(stages.after.values()))
    place_of = {i: f"{g}, {n}" for g, members in enumerate(forward.kept_groups) for n, i in enumerate(members)}
    counts = [len(members) for members in forward.kept_groups]
    carries = len(d.carries)
    sizes = {
        "kRounds": d.rounds,
        "kProducts": len(d.products),
        "kVectors": d.count("p") + len(columns),
        "kInputs": d.count("x"),
        "kFeatures": d.count("s"),
        "kCarries": carries,
        "kOutputs": d.outputs,
        "kSources": len(d.sources),
        "kResults": len(d.results),
        "kColumns": max(len(d.results), *(c + 1 for c in columns), 0),
        "kOwn": forward.own,
        "kKept": len(stages.kept),
        "kGroups": len(counts),
        "kCross": len(forward.body.cross),
        "kCrossBack": len(backward.cross),
        "kAfter": len(after),
        "kSums": len(stages.sums),
    }
    stage_of = {w.call: w.stage for w in backward.writes}
    front_passes = [f"{{{sum(_chunks(len(columns))[:i])}, {n}}}" for i, n in enumerate(_chunks(len(columns)))]
    reads_x = any(name.startswith("u.x[") for names in backward.loads for name in names)
    tables = [
        _table("Pass", "forward_passes", forward_passes),
        _table("Pass", "backward_passes", backward_passes),
        _table("Outer", "outers", outers),
        _table("int", "forward_terms", forward_terms),
        _table("int", "product_source", [p.source for p in d.products]),
        _table("int", "product_result", [p.result for p in d.products]),
        _table("Origin", "source_origin", [origin for origin, _ in forward.origins]),
        _table("int", "source_index", [i for _, i in forward.origins]),
        _table("int", "source_stage", [out.stage for out in stages.sources_again]),
        _table("int", "column_stage", [stage_of[f"at.dm({i}, {{}})"] for i in range(sizes["kColumns"])]),
        _table("int", "input_column", columns),
        _table("FrontPass", "front_passes", front_passes),
        _table("Term", "front_terms", [f"{{{first}, {count}}}" for first, count in _runs(set(columns))]),
        _table(
            "bool",
            "carry_is_source",
            [any(o != "Origin::kOwn" and i == c for o, i in forward.origins) for c in range(carries)],
        ),
        _table("int", "group_of_stage", forward.group_of_stage),
        _table("int", "kept_count", counts),
        _table("int", "kept_before", [sum(counts[:g]) for g in range(len(counts))]),
        _table("int", "after_carry", after),
        _table("int", "sum_stage", [stage_of[f"at.sum({i}, {{}})"] for i in range(len(stages.sums))]),
    ]
    places: dict[str, Mapping[int, object]] = {"k": place_of, "after": {i: n for n, i in enumerate(after)}}

    def load(kind: str, index: int) -> str:
        """A kept value, or a later carry, is asked for by its place."""
        return f"{kind}({places[kind][index] if kind in places else index})"

    return "\n".join(
        [
            "struct Cell {",
            f"  static constexpr int {', '.join(f'{k} = {v}' for k, v in sizes.items())};",
            f"  static constexpr bool kHasStart = {_bool(forward.has_start)}, kFront = {_bool(stages.front)};",
            f"  static constexpr bool kBackwardReadsX = {_bool(reads_x)};",
            *tables,
            "",
            *forward.started.lines(),
            *_functions("forward", [forward.body.lines(s) for s in range(d.rounds + 1)]),
            "",
            *_functions("backward", [backward.lines(s, load) for s in range(d.rounds + 1)]),
            "};",
        ]
    )


def source(stages: Stages, precision: str) -> str:
    """All of a kernel's source, which includes the standard library alone."""
    above = "products", "call", "stages", "recurrence"
    below = "common", "kernel" if stages.division.rounds else "walk", "library"
    return "\n".join(
        [
            *((FOLDER / f"{name}.h").read_text() for name in above),
            "",
            "namespace seqmnist {",
            "namespace {",
            "",
            f"using Precision = {'BFloat16' if precision == 'bfloat16' else 'Float32'};",
            "",
            cell(stages),
            "",
            "}  // namespace",
            "}  // namespace seqmnist",
            "",
            *((FOLDER / f"{name}.h").read_text() for name in below),
            "",
        ]
    )
