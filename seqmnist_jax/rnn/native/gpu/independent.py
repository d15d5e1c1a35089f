"""The kernel of cells without a product of the state, whose units see no other: its source, and its two calls.

A thread takes a unit of a sequence through all steps (`independent.cu`). All is float32, at every precision.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.native.gpu import load
from seqmnist_jax.rnn.native.gpu.source import file, stage_functions, table
from seqmnist_jax.rnn.stages import OUTPUTS, Kept, Operands, Options, Stages, Statement, floats, renamed, words

Array = jax.Array

# Of a block: one warp, so that few sequences still reach every multiprocessor.
THREADS = 32
# Steps that a thread reads ahead, and the numbers that it then holds in registers at most.
MOST_AHEAD, MOST_HELD = 16, 64


class Shape(NamedTuple):
    """All that a kernel is compiled for beside the cell; as in `source.Shape`."""

    hidden: int
    outputs: str
    save: bool
    masked: bool
    reverse: bool

    def source(self, stages: Stages) -> str:
        """All of a kernel's source, which includes nothing."""
        sizes = {"kHidden": self.hidden, "kThreads": THREADS, "kAll": 1, "kLast": 2}
        sizes |= {"kOutputs": OUTPUTS.index(self.outputs)}
        flags = {"kSave": self.save, "kMasked": self.masked, "kReverse": self.reverse}
        constants = [f"constexpr int {', '.join(f'{k} = {v}' for k, v in sizes.items())};"]
        constants += [f"constexpr bool {k} = {str(v).lower()};" for k, v in flags.items()]
        parts = [file("machine.h"), file("stages.h"), "\n".join(constants), cell(stages, self), file("independent.cu")]
        return "\n\n".join(parts)


class Back(NamedTuple):
    """A step backwards, from the carry before it.

    Attributes:
      statements: those that count.
      carries: that they read, before or after the step.
      inputs: the 'x' values that they read.
    """

    statements: list[Statement]
    carries: list[int]
    inputs: list[int]


@functools.lru_cache(maxsize=256)
def back(stages: Stages) -> Back:
    """The step is made again, for nothing in it waits for another unit."""
    d, again = stages.division, {s.name: f"f{s.name}" for s in stages.forward}
    statements = [s._replace(name=again[s.name], text=renamed(s.text, again)) for s in stages.forward]
    statements += [Statement(0, "float", f"t{i}", f"u.after[{carry}]") for i, carry in stages.after.items()]
    for (kind, i), text in zip(stages.kept, stages.texts, strict=True):
        if kind == "t":
            text = renamed(f"opened_({text})" if i in stages.memory else text, again)
            statements.append(Statement(0, "float", f"t{i}", text))
    results = [*stages.d_carry, *stages.d_inputs, *stages.sums]
    read, needed = {word for out in results for word in words(out.text)}, []
    for s in reversed([*statements, *stages.backward]):
        if s.name in read:
            needed.append(s)
            read |= words(s.text)
    carries = [i for i in range(len(d.carries)) if read & {f"u.c[{i}]", f"u.after[{i}]"}]
    return Back(needed[::-1], carries, [i for i in range(d.count("x")) if f"u.x[{i}]" in read])


def in_outputs(stages: Stages, shape: Shape) -> list[int]:
    """Where in the outputs stands each carry that the way back reads; empty if not all do, or are not kept."""
    places = {out.text: i for i, out in enumerate(stages.outputs)}
    found = [places.get(stages.carry[i].text) for i in back(stages).carries]
    return [i for i in found if i is not None] if shape.outputs == "all" and None not in found else []


def _ahead(values: int) -> int:
    """How many steps ahead so many values are read: a power of two."""
    return max(ahead for ahead in (2, 4, 8, MOST_AHEAD) if ahead == 2 or ahead * values <= MOST_HELD)


def cell(stages: Stages, shape: Shape) -> str:
    """The struct `Cell` that the skeleton takes."""
    d, backward = stages.division, back(stages)
    places = in_outputs(stages, shape)
    x, s, outputs = d.count("x"), d.count("s"), d.outputs if shape.outputs == "all" else 0
    sizes = {
        "kVectors": d.count("p"),
        "kCarries": len(d.carries),
        "kScalars": s,
        "kInputs": x,
        "kInputsBack": len(backward.inputs),
        "kOutputs": d.outputs,
        "kStates": len(backward.carries),
        "kSums": len(stages.sums),
        "kAhead": _ahead(x + s),
        "kAheadBack": _ahead(len(backward.inputs) + s + outputs + len(backward.carries)),
    }
    tables = {
        "scalar_at": list(range(s)),
        "input_at": [i * d.hidden for i in range(x)],
        "input_back": backward.inputs,
        "input_back_at": [i * d.hidden for i in backward.inputs],
        "output_at": [i * d.hidden for i in range(d.outputs)],
        "state_carry": backward.carries,
        "state_at": [i * d.hidden for i in (places or range(len(backward.carries)))],
    }
    raw = [f"c[{len(d.carries)}]", *(f"{kind}[{max(d.count(kind), 1)}]" for kind in "xsp")]
    n, y, sums = len(d.carries), max(d.outputs, 1), max(len(stages.sums), 1)
    forward_writes = [(f"u.next[{i}]", out, 0) for i, out in enumerate(stages.carry)]
    forward_writes += [(f"u.y[{i}]", out, 0) for i, out in enumerate(stages.outputs)]
    back_writes = [(f"u.before[{i}]", out, 0) for i, out in enumerate(stages.d_carry)]
    back_writes += [(f"u.dx[{i}]", out, 0) for i, out in enumerate(stages.d_inputs)]
    back_writes += [(f"u.sum[{i}]", out, 0) for i, out in enumerate(stages.sums)]
    after, bars = f"after[{n}], dn[{n}], dy[{y}]", f"before[{n}], dx[{max(x, 1)}], sum[{sums}]"
    return "\n".join(
        [
            "struct Cell : Exact {",
            f"  static constexpr int {', '.join(f'{k} = {v}' for k, v in sizes.items())};",
            f"  static constexpr bool kFromOutputs = {str(bool(places)).lower()};",
            *(table(name, values) for name, values in tables.items()),
            "  struct Forward {",
            f"    float {', '.join(raw)}, next[{n}], y[{y}];",
            "  };",
            "  struct Backward {",
            f"    float {', '.join(raw)}, {after}, {bars};",
            "  };",
            *stage_functions("forward", "Forward", stages.forward, forward_writes, 0)[1],
            *stage_functions("backward", "Backward", backward.statements, back_writes, 0)[1],
            "};",
        ]
    )


def blocks(shape: Shape, batch: int) -> int:
    """Of a replica."""
    return -(-batch * shape.hidden // THREADS)


def _call(stages: Stages, shape: Shape, name: str, results: Any, arguments: tuple[Array, ...]) -> Any:
    batch, time, _ = arguments[3].shape
    number = load.kernel(stages, shape, name, 0)
    integers = {"kernel": number, "few_kernel": number, "few": 0, "tiles": blocks(shape, batch), "blocks": 1}
    integers |= {"threads": THREADS, "shared": 0, "few_shared": 0, "batch": batch, "time": time, "launches": 1}
    call = jax.ffi.ffi_call(load.LAUNCH, results, vmap_method="broadcast_all")
    return call(*arguments, **{name: np.int64(value) for name, value in integers.items()})


def _shape(stages: Stages, options: Options, operands: Operands, save: bool) -> Shape:
    return Shape(stages.division.hidden, options.outputs, save, operands.lengths is not None, options.reverse)


def text(stages: Stages) -> str:
    """The source that is generated for a cell, for whole sequences in training."""
    return Shape(stages.division.hidden, "all", True, False, False).source(stages)


def forward(stages: Stages, options: Options, operands: Operands, save: bool) -> tuple[Array, Array | None, Kept]:
    """The carry after the last step, the outputs, and what is kept."""
    d, shape, (batch, time, _) = stages.division, _shape(stages, options, operands, save), operands.x.shape
    sizes = {"none": (0,), "all": (batch, time, d.outputs, d.hidden), "last": (batch, d.outputs, d.hidden)}
    from_outputs = bool(in_outputs(stages, shape))
    kept = floats(batch if save and not from_outputs else 0, time, len(back(stages).carries), d.hidden)
    results = (floats(len(d.carries), batch, d.hidden), floats(*sizes[options.outputs]), kept)
    end, outputs, states = _call(stages, shape, load.FORWARD, results, (*operands[:5], operands.ends()))
    return end, None if options.outputs == "none" else outputs, Kept(end, outputs if from_outputs else states)


def backward(
    stages: Stages, options: Options, operands: Operands, kept: Kept, d_carry: Array, d_outputs: Array | None
) -> Operands:
    """Gradients of all but x."""
    d, shape, (batch, time, _) = stages.division, _shape(stages, options, operands, True), operands.x.shape
    sizes = (len(d.carries), batch), (batch, time, d.count("x")), (batch, len(stages.sums))
    bars = jnp.zeros((0,), jnp.float32) if d_outputs is None else d_outputs
    results = tuple(floats(*size, d.hidden) for size in sizes)
    arguments = (*operands[:5], operands.ends(), kept.carry, kept.values, d_carry, bars)
    d_start, d_inputs, sums = _call(stages, shape, load.BACKWARD, results, arguments)
    return stages.gradients(operands, operands.weights, sums.sum(0), d_inputs, d_start)
