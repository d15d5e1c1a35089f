"""One recurrent layer: this repository's beside other libraries', and beside the floor.

    python -m benchmarks.recurrence [--json=FILE] [--cells=gru] [--batch=32,128] [--kinds=step] ...
    python -m benchmarks.recurrence --full
    taskset -c 0 python -m benchmarks.recurrence ...      # one core alone, the floor too

Forward pass and training step (see `benchmarks.peers`) of GRU and LSTM, milliseconds each, and in
brackets how many times as long as ours. By default the shape of the pixel models, hidden 128 and 784
steps, at three batch sizes, and that of the row models. Sizes given by flags are combined with one
another; `--full` combines all, which takes hours. Sequences of 28 steps have 28 features, all others
one. `--single` dispatches each repetition alone (see `benchmarks.peers`).

The floor (see `benchmarks.floor`) is measured in the same run. 'replicas' is 4 layers under vmap at
batch 32 against one at batch 128, which makes as many products.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from benchmarks import floor, peers, timing
from benchmarks.peers import Case
from seqmnist_jax.devices.memory import available_bytes

FLAGS = flags.FLAGS
Row = dict[str, Any]

GRID = {"hidden": (64, 128, 256), "steps": (28, 784, 4096), "batch": (32, 128, 512)}
BASE = {"hidden": 128, "steps": 784, "batch": 32}
# (hidden, steps, batch)
HEADLINE = ((64, 28, 32), (128, 784, 32), (128, 784, 128), (128, 784, 512))
ROWS = 28
REPLICAS = 4
# Repetitions in one dispatch, at least, so that mapping the buffers is not most of the time.
LEAST = 4
# A library that does nothing but this many times the floor's work would be a fast one.
FAST = 1.5


def case(cell: str, hidden: int, steps: int, batch: int, replicas: int = 1) -> Case:
    """A case with the features that go with its number of steps."""
    return Case(cell, hidden, ROWS if steps == ROWS else 1, steps, batch, replicas)


def cases(cells: Sequence[str], hidden: Sequence[int], steps: Sequence[int], batch: Sequence[int]) -> list[Case]:
    """All combinations; the headline's where no size is given, and its parts for those that are not."""
    if hidden or steps or batch:
        sizes = list(itertools.product(hidden or (128,), steps or (784,), batch or (32, 128, 512)))
    else:
        sizes = list(HEADLINE)
    return [case(cell, *size) for cell in cells for size in sizes]


def torch_bytes(case: Case) -> int:
    """About what PyTorch keeps for the way back: some 16 numbers a unit and step."""
    return 16 * 4 * case.steps * case.batch * case.hidden


def fits(library: str, measurable: peers.Measurable, case: Case) -> bool:
    """Whether a program's buffers fit into the memory that is free; says so where not."""
    needed = torch_bytes(case) if measurable.temp_bytes is None else measurable.temp_bytes
    available = available_bytes()
    if available is None or needed <= 0.8 * available:
        return True
    print(f"  {library} left out: it needs {needed / 2**30:.1f} GiB, more than is free")
    return False


def programs(libraries: Sequence[str], case: Case, kind: str, single: bool = False) -> dict[str, peers.Measurable]:
    """What can be measured of a case here; says what can't, and why."""
    found = {}
    for library in libraries:
        layer = peers.build(library, case)
        if layer is None:
            continue
        measurable = layer.measurable(kind)
        if fits(library, measurable, case):
            alone = timing.repeated(functools.partial(measurable.run, 1))
            found[library] = measurable._replace(run=alone) if single else measurable
    return found


def measure(
    case: Case,
    kind: str,
    libraries: Sequence[str],
    rate: floor.Rate,
    *,
    rounds: int = 5,
    seconds: float = 1.0,
    budget: float = math.inf,
    single: bool = False,
) -> list[Row]:
    """One row for each library of one case: its time, and how it stands to ours and to the floor.

    Args:
      case, kind, libraries: what is measured.
      rate: that of the floor.
      rounds, seconds: as in `timing.alternate`.
      budget: seconds that all rounds of one library may take.
      single: whether each repetition is a dispatch of its own.
    """
    print(f"{kind} of {words(case)}", flush=True)
    lowest = floor.flops(case, kind) / rate.flops
    least = 1 if single else LEAST
    if FAST * lowest * rounds * (least + 1) > budget:
        print(f"  left out: the floor alone is {lowest:.1f} s, too much for the budget of {budget:.0f} s")
        return []
    found = programs(libraries, case, kind, single)
    runs = {library: measurable.run for library, measurable in found.items()}
    timings = timing.alternate(runs, rounds=rounds, seconds=seconds, least=least, budget=budget)
    ours = timings.get("ours")
    return [
        {
            **case._asdict(),
            "kind": kind,
            "library": library,
            **took.facts(),
            "against_ours": None if ours is None else took.median / ours.median,
            "floor_milliseconds": 1e3 * lowest,
            "against_floor": took.median / lowest,
            "temp_bytes": found[library].temp_bytes,
        }
        for library, took in timings.items()
    ]


def measure_replicas(
    cell: str, hidden: int, steps: int, batch: int, libraries: Sequence[str], rate: floor.Rate, **options: Any
) -> list[Row]:
    """Training steps of several replicas under vmap, and of one layer at as many sequences in all."""
    many = case(cell, hidden, steps, batch, REPLICAS)
    one = case(cell, hidden, steps, batch * REPLICAS)
    return [row for each in (many, one) for row in measure(each, "step", libraries, rate, **options)]


def words(case: Case) -> str:
    """A case's sizes as text."""
    replicas = f"{case.replicas} replicas of " if case.replicas > 1 else ""
    return f"{replicas}{case.cell}, hidden {case.hidden}, {case.steps} steps of {case.features}, batch {case.batch}"


def table(rows: Sequence[Row]) -> str:
    """Rows as a table with a line for each case and a column for each library."""
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kind", *Case._fields))
        lines.setdefault(key, {})[row["library"]] = row

    def entry(row: Row | None) -> str | None:
        if row is None:
            return None
        ratio = row["against_ours"]
        return f"{row['milliseconds']:.4g}" + ("" if ratio is None or row["library"] == "ours" else f" ({ratio:.2f})")

    body = []
    for (kind, *sizes), found in lines.items():
        some = next(iter(found.values()))
        ours = found.get("ours")
        columns: list[Any] = [entry(found.get(library)) for library in libraries]
        columns += [some["floor_milliseconds"], None if ours is None else ours["against_floor"]]
        body.append([f"{kind}, {words(Case(*sizes))}", *columns])
    return timing.markdown(["milliseconds (against ours)", *libraries, "floor", "ours / floor"], body)


def define_flags() -> None:
    """The flags of this module as a command."""
    timing.define_names("cells", list(floor.GATES), "Which cells.")
    for name, sizes in GRID.items():
        flags.DEFINE_list(name, [], f"Numbers; of {', '.join(map(str, sizes))} with --full.")
    timing.define_names("libraries", list(peers.LIBRARIES), "Which libraries.")
    timing.define_names("kinds", list(peers.KINDS), "Which of forward pass and training step.")
    flags.DEFINE_bool("full", False, "The whole grid of sizes.")
    flags.DEFINE_bool("replicas", True, "Whether replicas are measured too.")
    flags.DEFINE_bool("single", False, "One repetition a dispatch.")
    timing.define_measuring(rounds=5, seconds=1.0)
    flags.DEFINE_float("budget", 300.0, "Seconds for one library and case; what would take longer is left out.")


def main(argv: list[str]) -> None:
    """Measures, prints tables, and writes the JSON file after each case."""
    del argv
    given = {name: tuple(int(number) for number in getattr(FLAGS, name)) for name in GRID}
    sizes = [given[name] or (GRID[name] if FLAGS.full else ()) for name in GRID]
    options: dict[str, Any] = {name: FLAGS[name].value for name in ("rounds", "seconds", "budget", "single")}
    rate = floor.best_rate(rounds=FLAGS.rounds, seconds=min(FLAGS.seconds, 0.2))
    print(floor.words(rate))
    rows: list[Row] = []
    replica_rows: list[Row] = []

    def note(found: list[Row], into: list[Row]) -> None:
        into += found
        content = {"rows": rows, "replicas": replica_rows, "floor": rate._asdict(), "single": FLAGS.single}
        timing.write_json(FLAGS.json, content)

    for each in cases(FLAGS.cells, *sizes):
        for kind in FLAGS.kinds:
            note(measure(each, kind, FLAGS.libraries, rate, **options), rows)
    if FLAGS.replicas:
        libraries = [library for library in FLAGS.libraries if library.startswith("ours")]
        hidden, steps, batch = ((given[name] or (usual,))[0] for name, usual in BASE.items())
        for cell in FLAGS.cells:
            note(measure_replicas(cell, hidden, steps, batch, libraries, rate, **options), replica_rows)
    print(f"\n{timing.facts()['device']}. {floor.words(rate)}\n\n{table(rows)}")
    if "haiku" in FLAGS.libraries and "gru" in FLAGS.cells:
        print("\nHaiku's GRU is another cell: its reset gate acts before the recurrent product.")
    if replica_rows:
        print(f"\nReplicas\n\n{table(replica_rows)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
