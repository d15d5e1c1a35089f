"""Cells, and calls of their kernels with what must come of them: drawn here, run in a process without JAX.

What is drawn are the arrays that a kernel takes, not those of a layer, so sizes are free: empty ones too, a tile and
its neighbours, and now and then one of which what is kept goes past the caches.
"""

import functools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn import cells, derived, recurrence
from seqmnist_jax.rnn.jaxprs import NotDivisibleError
from seqmnist_jax.rnn.native.cpu import calls
from seqmnist_jax.rnn.stages import Operands, Options, Stages
from tests.faults.sanitized_kernel import Case
from tests.rnn import any_cells

# The largest sizes but for those that go past the caches: batch, time, features, hidden.
MOST = (140, 9, 40, 70)
# Kept floats from which on they do.
FAR = 8 << 20


class Cell(NamedTuple):
    """A kernel's source, and the float64 stages that it is held against.

    Attributes:
      name: in words.
      precision: of its products.
      few: how many features of x its stages read; None where it takes any number.
      stages: what it is made of.
      reference: the same in float64 for the most units, with x's products outside; None where a rounded number may
        take another branch, so that only what is written can be checked.
    """

    name: str
    precision: str
    few: int | None
    stages: Stages
    reference: Stages | None

    @property
    def text(self) -> str:
        """The kernel's source."""
        return calls.text(self.stages, self.precision)


def _layer(step: Any, gates: int, carries: int, biases: tuple[str, ...] = ("bias",)) -> Any:
    def cell(hidden: int, features: int) -> Any:
        shapes = {"kernel": (features, gates * hidden), "recurrent_kernel": (hidden, gates * hidden)}
        shapes |= dict.fromkeys(biases, (gates * hidden,))
        return step, {name: np.zeros(shape) for name, shape in shapes.items()}, carries

    return cell


# Steps; whether a rounded number always takes the same branch.
STEPS = {
    "lstm": (_layer(cells.lstm_step, 4, 2), True),
    "gru": (_layer(cells.gru_step, 3, 1, ("bias", "recurrent_bias")), True),
    "gru_reset_before": (_layer(cells.gru_step, 3, 1), True),
    "lem": (any_cells.lem, True),
    "ind_rnn": (any_cells.ind_rnn, True),
    "diagonal": (any_cells.diagonal, True),
    "concatenating": (any_cells.concatenating, False),
    "three_rounds": (any_cells.three_rounds, False),
}
# Step, features, whether products of few features are made in the stages, precision: the most telling first.
NAMED = (
    ("lstm", 1, True, "float32"),
    ("gru", 28, False, "float32"),
    ("ind_rnn", 2, True, "float32"),
    ("diagonal", 6, False, "bfloat16"),
    ("gru_reset_before", 3, True, "bfloat16"),
    ("lstm", 28, False, "bfloat16"),
    ("concatenating", 6, False, "float32"),
    ("gru", 1, True, "bfloat16"),
    ("gru_reset_before", 28, False, "float32"),
    ("three_rounds", 6, False, "bfloat16"),
    ("lstm", 28, False, "float32"),
    ("lstm", 4, True, "bfloat16"),
    ("lem", 6, False, "float32"),
    ("gru", 28, False, "bfloat16"),
)


def _stages(cell: Any, hidden: int, features: int, inline: bool, dtype: Any) -> Stages:
    step, params, carries = cell(hidden, features)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    carry = (shape(3, hidden),) * carries
    params = jax.tree.map(lambda array: shape(*np.shape(array)), params)
    call = recurrence.Call(step, Options("all", False, "float32"), "cpu")
    return recurrence.stages_of(call, params, shape(3, 2, features), carry if carries > 1 else carry[0], inline)


def _cell(name: str, step: Any, is_smooth: bool, features: int, inline: bool, precision: str) -> Cell:
    stages = _stages(step, 16, features, inline, jnp.float32)
    reference = None
    if is_smooth:
        with jax.enable_x64(True):
            reference = Stages(_stages(step, MOST[3], features, inline, jnp.float64).division, with_sources=True)
    few = stages.division.count("s") or None
    kind = "x multiplied inside" if stages.front else f"{few} features" if few else "x multiplied outside"
    return Cell(f"{name}, {kind}, {precision}", precision, few, stages, reference)


def draw_cells(count: int, seed: int) -> list[Cell]:
    """So many cells, of different sources: those that have a name, and twice as many from there on that have none."""
    wanted, drawn = [], random.Random(seed)
    for name, features, inline, precision in NAMED[:count]:
        wanted.append(_cell(name, *STEPS[name], features, inline, precision))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=20 * count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate,),
    )
    @hypothesis.given(any_cells.random_cells())
    def more(step: Any) -> None:
        inline, precision = drawn.random() < 0.5, drawn.choice(["float32", "bfloat16"])
        if len(wanted) < count:
            try:
                cell = _cell(f"random {len(wanted)}", step, False, drawn.choice([1, 3, 6]), inline, precision)
            except NotDivisibleError:
                return
            if cell.text not in [other.text for other in wanted]:
                wanted.append(cell)

    if count > len(NAMED):
        more()
    return wanted


# ---- Calls -------------------------------------------------------------------------------


def _sizes(cell: Cell, draw: random.Random, may_be_large: bool) -> tuple[int, int, int, int]:
    """Batch, time, features, hidden."""
    batch, time, features, hidden = (draw.randint(0, most) for most in MOST)
    features = features if cell.few is None else cell.few
    kept = len(cell.stages.kept)
    if may_be_large and kept and draw.randrange(40) == 0:
        time, hidden = draw.randint(200, 600), draw.randint(1, 33)
        units = -(-hidden // calls.PADDING) * calls.PADDING
        batch, features = -(-FAR // (time * units * kept)) + draw.randint(0, 5), min(features, 5)
    return batch, time, features, hidden


def draw_cases(wanted: list[Cell], count: int, seed: int, may_be_large: bool = True) -> Iterator[Case]:
    """So many calls of the cells, in turn."""
    draw = random.Random(seed)
    for i in range(count):
        cell = wanted[i % len(wanted)]
        yield _draw(cell, i % len(wanted), draw, may_be_large)


def _draw(cell: Cell, number: int, draw: random.Random, may_be_large: bool) -> Case:
    stages, d = cell.stages, cell.stages.division
    batch, time, features, hidden = _sizes(cell, draw, may_be_large)
    rng = np.random.default_rng(draw.randrange(2**31))
    replicas = 1 if time > MOST[1] else draw.randint(1, 3)
    own = 1 if draw.random() < 0.5 else replicas  # sets of weights
    outputs = draw.choice(calls.OUTPUTS)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    inputs = d.count("x")
    if stages.front:
        matrix = normal(own, features, inputs, hidden, scale=max(features, 1) ** -0.5)
    else:
        matrix = normal(replicas, batch, time, inputs, hidden)
    output_shape = {"all": (batch, time), "last": (batch,), "none": (0,)}[outputs]
    # Beyond both ends too, which the kernel must not trust.
    ragged = draw.random() < 0.5
    lengths = rng.integers(-2, time + 3, (replicas, batch)) if ragged else np.full((1, batch), time)
    arguments = {
        "weights": normal(own, len(d.products), hidden, hidden, scale=max(hidden, 1) ** -0.5),
        "vectors": normal(own, d.count("p") + (inputs if stages.front else 0), hidden, scale=0.5),
        "inputs": matrix,
        "x": normal(replicas, batch, time, features if stages.front else cell.few or 0),
        "carry": np.tanh(normal(replicas, len(d.carries), batch, hidden)),
        "lengths": lengths.astype(np.int32),
    }
    cotangents = {
        "d_end": normal(replicas, len(d.carries), batch, hidden),
        "d_outputs": normal(replicas, *output_shape, d.outputs, hidden),
    }
    case = Case(
        said=f"{cell.name}: batch {batch}, time {time}, features {features}, hidden {hidden}, replicas {replicas}",
        cell=number,
        outputs=calls.OUTPUTS.index(outputs),
        reverse=draw.random() < 0.5,
        threads=draw.randint(1, 8),
        late=draw.random() < 0.5,
        replicas=replicas,
        backward=draw.random() < 0.8,
        wants_dx=stages.front and draw.random() < 0.5,
        kept=(time, batch, -(-hidden // calls.PADDING) * calls.PADDING, len(stages.kept)),
        output_shape=(*output_shape, d.outputs, hidden),
        sums=len(stages.sums),
        precision=cell.precision,
        arguments=arguments,
        cotangents=cotangents,
        wanted=[],
    )
    if cell.reference is None:
        return case
    return case._replace(wanted=[_wanted(cell, case, replica) for replica in range(replicas)])


# ---- What must come of them ----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_loop(stages: Stages, reverse: bool, operands: Operands, d_carry: Any, d_outputs: Any) -> Any:
    options = Options("all", reverse, "float32")
    end, outputs, kept = derived.forward(stages, options, operands, True)
    return end, outputs, derived.backward(stages, options, operands, kept, d_carry, d_outputs, False)


def _padded(array: np.ndarray, sizes: dict[int, int]) -> np.ndarray:
    """With zeros behind an axis up to such a size: calls of all sizes are one compiled program then."""
    return np.pad(array, [(0, max(0, sizes.get(axis, n) - n)) for axis, n in enumerate(array.shape)])


def _wanted(cell: Cell, case: Case, replica: int) -> dict[str, np.ndarray]:
    """One replica's results, by the kernel's names for them."""
    stages, reference = cell.stages, cell.reference
    assert reference is not None
    given = {name: array[replica % len(array)] for name, array in (case.arguments | case.cotangents).items()}
    given = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in given.items()}
    d, (_, batch, hidden) = reference.division, given["carry"].shape
    time, n = given["x"].shape[1], stages.division.count("x")
    lengths = np.clip(given["lengths"], 0, time)
    inputs, vectors, x = given["inputs"], given["vectors"], given["x"]
    if stages.front:
        inputs = np.einsum("btf,fnh->btnh", x, inputs) + vectors[len(vectors) - n :]
        vectors = vectors[: len(vectors) - n]
    rows = np.arange(batch)
    at = np.zeros(batch, int) if case.reverse else np.maximum(lengths - 1, 0)
    has_last = (lengths > 0)[:, None, None]
    d_outputs = np.zeros((batch, time, d.outputs, hidden))
    if calls.OUTPUTS[case.outputs] == "all":
        d_outputs = given["d_outputs"]
    elif calls.OUTPUTS[case.outputs] == "last" and time:
        d_outputs[rows, at] = np.where(has_last, given["d_outputs"], 0.0)
    many, most, units = MOST[0], MOST[1], MOST[3]
    with jax.enable_x64(True):
        operands = Operands(
            _padded(given["weights"], {1: units, 2: units}),
            _padded(vectors, {1: units}),
            _padded(inputs, {0: many, 1: most, 3: units}),
            _padded(x if cell.few else x[..., :0], {0: many, 1: most}),
            _padded(given["carry"], {1: many, 2: units}),
            _padded(lengths, {0: many}),
        )
        end, outputs, gradients = jax.tree.map(
            np.asarray,
            _by_loop(
                reference,
                case.reverse,
                operands,
                _padded(given["d_end"], {1: many, 2: units}),
                _padded(d_outputs, {0: many, 1: most, 3: units}),
            ),
        )
    outputs = outputs[:batch, :time, :, :hidden]
    d_inputs, d_vectors = gradients.inputs[:batch, :time, :, :hidden], gradients.vectors[:, :hidden]
    wanted = {"end": end[:, :batch, :hidden], "outputs": outputs}
    if calls.OUTPUTS[case.outputs] != "all":
        last = np.where(has_last, outputs[rows, at], 0.0) if time else np.zeros((batch, d.outputs, hidden))
        wanted["outputs"] = last if calls.OUTPUTS[case.outputs] == "last" else last[:0]
    wanted |= {"d_carry": gradients.carry[:, :batch, :hidden], "d_weights": gradients.weights[:, :hidden, :hidden]}
    if stages.front:
        wanted["d_x"] = np.einsum("btnh,fnh->btf", d_inputs, given["inputs"])
        wanted["d_inputs"] = np.einsum("btf,btnh->fnh", x, d_inputs)
        d_vectors = np.concatenate([d_vectors[: len(vectors)], d_inputs.sum((0, 1))])
    else:
        wanted["d_inputs"] = d_inputs
    wanted["sums"] = d_vectors[[stages.sum_of.index(i) for i in range(len(stages.sums))]]
    return wanted
