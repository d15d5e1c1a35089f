"""The package's cells by their steps: the kernel that the engine makes of each, beside the floor and other ways.

    python -m benchmarks.cells [--json=FILE] [--cells=elman,lem] [--batch=128,32] [--precisions=float32,bfloat16] ...

Training steps of one layer, all in one process and in turns, many repetitions in a dispatch (see `benchmarks.peers`).
'generated' is the kernel made of the step, 'derived' the same division in plain JAX, 'scan' `lax.scan` with JAX's own
derivative; 'torch', 'torch_compiled' and 'nn_rnn' are PyTorch's (see `benchmarks.torch_steps`). The floor of a cell is
its matrix products at the best rate of `jnp.dot` (see `benchmarks.floor`); that of a cell without any is the time of
writing and reading once what it keeps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import floor, timing, torch_steps
from benchmarks.peers import FEEDBACK
from seqmnist_jax import rnn
from seqmnist_jax.models import CELLS
from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.stages import Options

FLAGS = flags.FLAGS
Array = jax.Array
Row = dict[str, Any]

WAYS = ("generated", "derived", "scan", *torch_steps.WAYS)


class Case(NamedTuple):
    """A cell's name and sizes."""

    cell: str
    batch: int
    steps: int
    features: int
    hidden: int
    precision: str


def last_output(way: str, case: Case, params: Any, x: Array) -> Array:
    """A layer's last output [batch, hidden], made in one of the ways."""
    cell = CELLS[case.cell].cell
    platform = {"generated": jax.default_backend(), "derived": "derived", "scan": ""}[way]
    call = recurrence.Call(cell.step, Options("last", False, case.precision), platform)
    given = recurrence.Given(params, x, cell.zero_carry(jnp.zeros((case.batch, case.hidden))), None)
    outputs = (recurrence.plain if way == "scan" else recurrence.recurrence)(call, given)[1]
    assert outputs is not None
    return outputs


def program(way: str, case: Case) -> timing.Program:
    """Training steps, all repetitions in one dispatch."""
    params = CELLS[case.cell].cell.init(jax.random.key(0), case.features, case.hidden)
    x = jax.random.uniform(jax.random.key(1), (case.batch, case.steps, case.features))
    if way in torch_steps.WAYS:
        return torch_steps.program(way, case.cell, params, x)

    def loss(params: Any, x: Array) -> Array:
        return jnp.sum(jnp.square(last_output(way, case, params, x)))

    @jax.jit
    def many(params: Any, x: Array, count: Array) -> Any:
        def step(_: Any, params: Any) -> Any:
            return jax.tree.map(lambda p, g: p - FEEDBACK * g, params, jax.grad(loss)(params, x))

        return jax.lax.fori_loop(0, count, step, params)

    compiled = many.lower(params, x, jnp.int32(1)).compile()
    return lambda count: jax.block_until_ready(compiled(params, x, np.int32(count)))


def products(case: Case) -> int:
    """How many [hidden, hidden] matrices a step multiplies the state with."""
    cell = CELLS[case.cell].cell
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), case.features, case.hidden))
    x = jax.ShapeDtypeStruct((case.batch, case.steps, case.features), jnp.float32)
    carry = jax.eval_shape(lambda: cell.zero_carry(jnp.zeros((case.batch, case.hidden))))
    call = recurrence.Call(cell.step, Options("last", False, case.precision), jax.default_backend())
    return len(recurrence.stages_of(call, params, x, carry).division.products)


def keeping(case: Case) -> timing.Program:
    """Writing and reading once what a cell keeps."""
    cell = CELLS[case.cell].cell
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), case.features, case.hidden))
    x = jax.ShapeDtypeStruct((case.batch, case.steps, case.features), jnp.float32)
    carry = jax.eval_shape(lambda: cell.zero_carry(jnp.zeros((case.batch, case.hidden))))
    call = recurrence.Call(cell.step, Options("last", False, case.precision), jax.default_backend())
    count = recurrence.kept_bytes(call, (params, x, carry, None)) // 4

    @jax.jit
    def copies(array: Array, n: Array) -> Array:
        return jax.lax.fori_loop(0, n, lambda _, a: a * 1.0000001, array)

    compiled = copies.lower(jax.ShapeDtypeStruct((count,), jnp.float32), jnp.int32(1)).compile()
    array = jnp.ones((count,), jnp.float32)
    return lambda n: jax.block_until_ready(compiled(array, np.int32(n)))


def measure(case: Case, ways: Sequence[str], rate: floor.Rate, rounds: int, seconds: float) -> list[Row]:
    """One row for each way of one case."""
    print(f"{case.cell}, batch {case.batch}, {case.precision}", flush=True)
    found = {way: program(way, case) for way in ways if way not in torch_steps.WAYS or torch_steps.has(way, case.cell)}
    count = products(case)
    if count == 0:
        found["floor"] = keeping(case)
    timings = timing.alternate(found, rounds=rounds, seconds=seconds)
    lowest = 6.0 * count * case.batch * case.steps * case.hidden**2 / rate.flops
    if count == 0:
        lowest = timings.pop("floor").median
    ours = timings.get("generated")
    return [
        {
            **case._asdict(),
            "way": way,
            **took.facts(),
            "floor_milliseconds": 1e3 * lowest,
            "against_floor": took.median / lowest,
            "against_generated": None if ours is None else took.median / ours.median,
        }
        for way, took in timings.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows as a table with a line for each."""
    names = ("cell", "batch", "precision", "way", "milliseconds", "against_floor", "against_generated")
    return timing.markdown([name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows])


def define_flags() -> None:
    """The flags of this module as a command."""
    timing.define_names("cells", list(CELLS), "Which cells.")
    timing.define_names("ways", WAYS, "Which ways.", usual=("generated",))
    timing.define_names("precisions", rnn.PRECISIONS, "Which precisions.", usual=("float32",))
    flags.DEFINE_list("batch", ["128", "32"], "Batch sizes.")
    flags.DEFINE_integer("steps", 784, "Steps of a sequence.")
    flags.DEFINE_integer("features", 1, "Values that a step reads.")
    flags.DEFINE_integer("hidden", 128, "Units.")
    timing.define_measuring(rounds=5, seconds=1.0)


def main(argv: list[str]) -> None:
    """Measures, prints a table, and writes the JSON file after each case."""
    del argv
    rate = floor.best_rate(rounds=FLAGS.rounds, seconds=min(FLAGS.seconds, 0.2))
    print(floor.words(rate))
    rows: list[Row] = []
    for precision in FLAGS.precisions:
        for cell in FLAGS.cells:
            for batch in map(int, FLAGS.batch):
                case = Case(cell, batch, FLAGS.steps, FLAGS.features, FLAGS.hidden, precision)
                rows += measure(case, FLAGS.ways, rate, FLAGS.rounds, FLAGS.seconds)
                timing.write_json(FLAGS.json, {"rows": rows, "floor": rate._asdict()})
    print(f"\n{timing.facts()['device']}. {floor.words(rate)}\n\n{table(rows)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
