"""The package's cells by their steps: the kernel that the engine makes of each, beside the floor and other ways.

    python -m benchmarks.cells [--json=FILE] [--cells=elman,lem] [--batch=128,32] [--precisions=float32,bfloat16] ...

Training steps of one layer, all in one process and in turns, many repetitions in a dispatch (see `benchmarks.peers`).
'generated' is the kernel made of the step, 'derived' the same division in plain JAX, 'scan' `lax.scan` with JAX's own
derivative; 'torch', 'torch_compiled' and 'nn_rnn' are PyTorch's (see `benchmarks.torch_steps`). The floor of a cell is
its matrix products at the best rate of `jnp.dot` (see `benchmarks.floor`); that of a cell without any is the time of
writing and reading once what it keeps. 'lru_state' is the LRU's state alone: s' = lambda s + gamma u, which reads u
[batch, time, 2 * hidden] and gives all s, with gradients of both; its floor counts these arrays too.
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
from seqmnist_jax.rnn.cell import first_carry
from seqmnist_jax.rnn.stages import Options

FLAGS = flags.FLAGS
Array = jax.Array
Row = dict[str, Any]

WAYS = ("generated", "derived", "scan", *torch_steps.WAYS)


def lru_state(params: Any, carry: Any, x: Array) -> Any:
    """One step of a linear recurrence with a complex diagonal matrix; complex numbers are pairs of reals."""
    re, im = carry
    u_re, u_im = jnp.split(x, 2, axis=-1)
    cos, sin, gamma = params["re"], params["im"], params["gamma"]
    re, im = cos * re - sin * im + gamma * u_re, sin * re + cos * im + gamma * u_im
    return (re, im), jnp.concatenate([re, im], axis=-1)


def init_lru_state(key: Array, features: int, hidden_size: int) -> dict[str, Array]:
    """lambda on a circle, and its gamma."""
    del features
    phase = jax.random.uniform(key, (hidden_size,), maxval=6.28)
    return {"re": 0.99 * jnp.cos(phase), "im": 0.99 * jnp.sin(phase), "gamma": jnp.full((hidden_size,), 0.14)}


LRU_STATE = "lru_state"
MEASURED = {name: choice.cell for name, choice in CELLS.items()} | {
    LRU_STATE: rnn.cell(lru_state, init_lru_state, lambda zero: (zero, zero))
}


class Case(NamedTuple):
    """A cell's name and sizes, and whether x has a gradient too."""

    cell: str
    batch: int
    steps: int
    features: int
    hidden: int
    precision: str
    of_x: bool = False


def made_by(case: Case, platform: str) -> recurrence.Call:
    """The case's layer on a platform, with its last output or, of a linear recurrence, all."""
    options = Options("all" if case.cell == LRU_STATE else "last", False, case.precision)
    return recurrence.without_readout(
        recurrence.Call(MEASURED[case.cell].step, options, platform), recurrence.Given(*shapes(case))
    )


def output(way: str, case: Case, params: Any, x: Array) -> Array:
    """A layer's output, made in one of the ways."""
    call = made_by(case, {"generated": jax.default_backend(), "derived": "derived", "scan": ""}[way])
    carry = first_carry(MEASURED[case.cell], params, jnp.zeros((case.batch, case.hidden)))
    given = recurrence.Given(params, x, carry, None)
    outputs = (recurrence.plain if way == "scan" else recurrence.run)(call, given)[1]
    assert outputs is not None
    return outputs


def program(way: str, case: Case) -> timing.Program:
    """Training steps, all repetitions in one dispatch."""
    params = MEASURED[case.cell].init(jax.random.key(0), case.features, case.hidden)
    x = jax.random.uniform(jax.random.key(1), (case.batch, case.steps, case.features))
    if way in torch_steps.WAYS:
        return torch_steps.program(way, case.cell, params, x)

    bars = jnp.ones_like(output(way, case, params, x))
    wanted = (0, 1) if case.of_x else 0

    def loss(params: Any, x: Array, bars: Array) -> Array:
        return jnp.vdot(output(way, case, params, x), bars)

    @jax.jit
    def many(params: Any, x: Array, bars: Array, count: Array) -> Any:
        def step(_: Any, params: Any) -> Any:
            gradients = jax.grad(loss, wanted)(params, x, bars)
            return jax.tree.map(lambda p, g: p - FEEDBACK * g, params, gradients[0] if wanted else gradients)

        return jax.lax.fori_loop(0, count, step, params)

    compiled = many.lower(params, x, bars, jnp.int32(1)).compile()
    return lambda count: jax.block_until_ready(compiled(params, x, bars, np.int32(count)))


def shapes(case: Case) -> Any:
    """Those of a case's arrays, as `recurrence.Given` has them."""
    cell = MEASURED[case.cell]
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), case.features, case.hidden))
    x = jax.ShapeDtypeStruct((case.batch, case.steps, case.features), jnp.float32)
    carry = jax.eval_shape(lambda p: first_carry(cell, p, jnp.zeros((case.batch, case.hidden))), params)
    return params, x, carry, None


def products(case: Case) -> int:
    """How many [hidden, hidden] matrices a step multiplies the state with."""
    call, given = made_by(case, jax.default_backend()), shapes(case)
    return len(recurrence.stages_of(call, *given[:3]).division.products)


def keeping(case: Case) -> timing.Program:
    """Writing and reading once what a cell keeps, and its input and output where it has a gradient of all."""
    given = shapes(case)
    count = recurrence.kept_bytes(made_by(case, jax.default_backend()), given) // 4
    count += 2 * given[1].size if case.of_x else 0

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
    timing.define_names("cells", list(MEASURED), "Which cells.")
    timing.define_names("ways", WAYS, "Which ways.", usual=("generated",))
    timing.define_names("precisions", rnn.PRECISIONS, "Which precisions.", usual=("float32",))
    flags.DEFINE_list("batch", ["128", "32"], "Batch sizes.")
    flags.DEFINE_integer("steps", 784, "Steps of a sequence.")
    flags.DEFINE_integer("features", 1, "Values that a step reads.")
    flags.DEFINE_integer("hidden", 128, "Units.")
    flags.DEFINE_bool("of_x", False, "The gradient of x too, as of a layer that reads another one.")
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
                features = 2 * FLAGS.hidden if cell == LRU_STATE else FLAGS.features
                of_x = FLAGS.of_x or cell == LRU_STATE
                case = Case(cell, batch, FLAGS.steps, features, FLAGS.hidden, precision, of_x)
                rows += measure(case, FLAGS.ways, rate, FLAGS.rounds, FLAGS.seconds)
                timing.write_json(FLAGS.json, {"rows": rows, "floor": rate._asdict()})
    print(f"\n{timing.facts()['device']}. {floor.words(rate)}\n\n{table(rows)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
