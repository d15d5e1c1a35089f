"""The GPU kernel's own source on a CPU (`emulated_gpu.h`), against `lax.scan` in float64, and what NVRTC makes of it.

The kernel runs as on a GPU, through `recurrence` and the calls in `native/gpu`: only what starts it is replaced.
"""

import ctypes
import functools
import hashlib
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import any_cells
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax.rnn import cells, recurrence
from seqmnist_jax.rnn.native.compiler import CannotBuildError
from seqmnist_jax.rnn.native.gpu import calls, independent, load, nvrtc, source
from seqmnist_jax.rnn.native.gpu.source import Shape
from seqmnist_jax.rnn.readout import taken_out
from seqmnist_jax.rnn.recurrence import Call, Given, plain
from seqmnist_jax.rnn.stages import Operands, Options

MACHINE = Path(__file__).with_name("emulated_gpu.h")
COMPILER = shutil.which("g++")
emulated_only = pytest.mark.skipif(COMPILER is None, reason="the emulation needs g++")

MAIN = """
void start(void (*kernel)(Pointers, int, int, int), Pointers p, int batch, int time, int tiles, int) {
  kernel(p, batch, time, tiles);
}
void start(void (*kernel)(Pointers, int, int, int, int), Pointers p, int batch, int time, int tiles, int launch) {
  kernel(p, batch, time, tiles, launch);
}
#define RUN(NAME)                                                                                             \\
  extern "C" const char* NAME(int blocks, int bytes, int out, void** at, int batch, int time, int tiles,      \\
                              int launch) {                                                                   \\
    Pointers p;                                                                                               \\
    for (int i = 0; i < 24; i++) p.at[i] = at[i];                                                             \\
    without = out;                                                                                            \\
    return emulated::launch(blocks, kThreads, kBlocks, bytes,                                                 \\
                            [=] { start(recurrence_##NAME, p, batch, time, tiles, launch); });                \\
  }
RUN(forward)
RUN(backward)
extern "C" unsigned barriers_passed() { return passed; }
"""
BARRIER = re.compile(r"^( +)((?:__syncthreads|pair_barrier|cluster_barrier|barrier_wait|fetch_wait<.*>)\()", re.M)


# `without` is the number of the barrier that is left out, in the order of the source; `passed` has the others as bits.
COUNT = """
static int without;
static unsigned passed;
inline bool stands(int barrier) {
  passed |= 1u << barrier;
  return barrier != without;
}
"""


def numbered(text):
    """The source, in which each barrier has a number, and the number of them."""
    at = text.index("struct Pointers")  # where the skeleton begins
    count = itertools.count()
    skeleton = BARRIER.sub(lambda found: f"{found[1]}if (stands({next(count)})) {found[2]}", text[at:])
    return text[:at] + COUNT + skeleton + MAIN, next(count)


OTHERS = {name: functools.partial(any_cells.known, name) for name in ("min_lstm", "min_gru", "lru", "s5")}
OTHERS["rotation"] = any_cells.rotation
INIT = {"gru": (cells.gru_step, cells.init_gru, 1), "lstm": (cells.lstm_step, cells.init_lstm, 2)}


def drawn(cell, hidden, features, batch, time):
    """(step, params, x, carry) in float32."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    if cell in INIT:
        step, init, parts = INIT[cell]
        shapes = jax.eval_shape(lambda key: init(key, features, hidden), jax.random.key(0))
        scale = {1: lambda _: 0.3, 2: lambda shape: shape[0] ** -0.5}
        params = jax.tree.map(lambda s: normal(*s.shape, scale=scale[len(s.shape)](s.shape)), shapes)
    else:
        step, params, parts = (any_cells.CELLS | OTHERS)[cell](hidden, features)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    carry = tuple(normal(batch, hidden, scale=0.5) for _ in range(parts))
    return step, params, normal(batch, time, features), carry if parts > 1 else carry[0]


# ---- Emulation ---------------------------------------------------------------------------


def compile_cpp(*arguments):
    subprocess.run([COMPILER, "-O1", "-std=c++17", "-w", "-fPIC", *map(str, arguments)], check=True)


class Emulator:
    """What stands in for the launcher.

    Attributes:
      sequences: of a block or cluster.
      few: so many sequences or less, of all replicas, stand 4 to a block.
      without: the barrier that is left out.
      change: a function of the kernel's source.
      trouble: what the emulation had to say.
      barriers: of the kernel that ran last, the number of them, and the set of those that were reached.
    """

    def __init__(self, folder):
        self.folder, self.libraries = folder, {}
        # What all kernels include is read once.
        (folder / "standard.h").write_text("\n".join(re.findall("#include <.*", MACHINE.read_text())))
        compile_cpp("-x", "c++-header", folder / "standard.h")
        self.barriers: Any = None
        self.reset()

    def reset(self):
        self.sequences, self.few, self.without, self.trouble = 8, 0, -1, []
        self.change = lambda text: text

    def library(self, stages, shape):
        text = shape.source(stages).replace(source.file("machine.h"), MACHINE.read_text())
        text, count = numbered(self.change(text))
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        if name not in self.libraries:
            path = self.folder / f"{name}.cc"
            path.write_text(text)
            made = path.with_suffix(".so")
            compile_cpp("-include", self.folder / "standard.h", "-shared", path, "-o", made)
            self.libraries[name] = ctypes.CDLL(str(made))
        return self.libraries[name], count

    def call(self, stages, shape, name, results, arguments):
        """In place of `calls._call` and `independent._call`."""
        name = name.removeprefix("recurrence_")
        batch, time, _ = arguments[3].shape
        if isinstance(shape, independent.Shape):
            tiles, per_cluster, shared = independent.blocks(shape, batch), 1, 0
        else:
            per_cluster = shape.blocks

        def run(*arrays):
            nonlocal shape, tiles, shared
            arrays = [np.ascontiguousarray(a) for a in arrays]
            lead = arrays[3].shape[:-3]
            if isinstance(shape, Shape):
                shape = shape._replace(sequences=4 if math.prod(lead) * batch <= self.few else self.sequences)
                tiles = -(-batch // 8) * (8 // shape.sequences)
                shared = source.shared_bytes(stages, shape)[name == "backward"]
            # What is not written is no number.
            out = [np.full((*lead, *r.shape), -1, np.dtype(f"i{r.dtype.itemsize}")).view(r.dtype) for r in results]
            launches = 1
            if name == "backward" and isinstance(shape, Shape):
                launches = calls.LAUNCHES if shape.half else 1
                for place, result in calls.SCALES.items():
                    out[result] = arrays[place] = arrays[place].copy()
            at = (ctypes.c_void_p * 24)(*(a.ctypes.data for a in (*arrays, *out)))
            library, barriers = self.library(stages, shape)
            function = getattr(library, name)
            function.restype = ctypes.c_char_p
            blocks = math.prod(lead) * tiles * per_cluster
            for launch in range(launches):
                trouble = function(blocks, shared, self.without, at, batch, time, tiles, launch)
                self.trouble += [trouble.decode()] if trouble else []
            self.barriers = barriers, {n for n in range(barriers) if library.barriers_passed() >> n & 1}
            return tuple(out)

        return jax.pure_callback(run, tuple(results), *arguments, vmap_method="broadcast_all")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def emulator(compiled, monkeypatch):
    compiled.reset()
    monkeypatch.setattr(calls, "_call", compiled.call)
    monkeypatch.setattr(independent, "_call", compiled.call)
    monkeypatch.setitem(recurrence.KERNELS, "cpu", calls)
    return compiled


class Case(NamedTuple):
    """A call and its kernel."""

    cell: str
    hidden: int = 32
    blocks: int = 1
    sequences: int = 8
    outputs: str = "all"
    lengths: bool = False
    reverse: bool = False
    precision: str = "tensorfloat32"
    batch: int = 8
    features: int = 1
    wants_dx: bool = False
    time: int = 6


def double(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if a.dtype == jnp.float32 else a.dtype), tree)


def worst(got, want):
    """The largest relative error of the leaves, by the norm; of what is zero the largest value."""

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))

    return max(jax.tree.leaves(jax.tree.map(error, got, want)), key=finite)


def finite(error):
    """What errors are ordered by: no number is the largest."""
    return math.inf if math.isnan(error) else error


class Work(NamedTuple):
    """A function of a case's arrays that gives gradients and results, the arrays, and what `lax.scan` makes of them."""

    run: Any
    arrays: Any
    want: Any


@functools.cache
def work(case):
    step, *arrays = drawn(case.cell, case.hidden, case.features, case.batch, case.time)
    lengths = None
    if case.lengths:
        lengths = jnp.asarray([case.time * i // (case.batch - 1) for i in range(case.batch)], jnp.int32)
    options = Options(case.outputs, case.reverse, case.precision)
    call, inner = (
        Call(s, options, "cpu") for s in (step, taken_out(step, case.precision, arrays[0], arrays[2], arrays[1]))
    )
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda *a: plain(call, Given(*a, lengths)), *arrays)
    factors = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), shapes)

    def of(function, call, factors):
        def total(*arrays):
            results = function(call, Given(*arrays, lengths))
            products = jax.tree.map(lambda a, b: (a * b).sum(), results, factors)
            return sum(jax.tree.leaves(products)), results

        return jax.jit(jax.grad(total, (0, 2, 1) if case.wants_dx else (0, 2), has_aux=True))

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, of(plain, call, double(factors))(*double(arrays)))
    return Work(of(recurrence.run, inner, factors), arrays, want)


@pytest.fixture
def errors(emulator, monkeypatch):
    """A function that gives a case's worst errors of gradients and of results."""

    def of(case):
        monkeypatch.setattr(calls, "blocks", lambda _: case.blocks)
        emulator.sequences = case.sequences
        run, arrays, want = work(case)
        got = jax.block_until_ready(run(*arrays))
        return worst(got[0], want[0]), worst(got[1], want[1])

    return of


CASES = {
    "gru": Case("gru", precision="bfloat16"),
    "gru, reversed, last": Case("gru", lengths=True, reverse=True, outputs="last", batch=6),
    "gru, 17 units, 4 sequences": Case("gru", 17, sequences=4, lengths=True, batch=7),
    "lstm, x has a gradient": Case("lstm", sequences=4, features=6, wants_dx=True, reverse=True),
    "lem": Case("lem", 64, batch=4, lengths=True, outputs="none"),
    "cornn": Case("cornn", 64, sequences=4, outputs="none", batch=4),
    "reset before": Case("gru_reset_before", precision="bfloat16"),
    "cluster, gru": Case("gru", 64, 4, lengths=True, batch=6, precision="bfloat16"),
    "cluster, gru, 4 sequences": Case("gru", 50, 4, sequences=4, outputs="last", reverse=True, time=5),
    "cluster, lem": Case("lem", 64, 4, batch=7, features=2, wants_dx=True),
    "cluster, lstm, 192 units": Case("lstm", 192, 4, batch=4, lengths=True, time=3),
}
# Cells whose units see no other.
INDEPENDENT = {
    "ind_rnn": Case("ind_rnn", 33, batch=3),
    "min_lstm": Case("min_lstm", 70, lengths=True, batch=4, time=37),
    "min_gru, nothing but the carry": Case("min_gru", 300, batch=2, outputs="none", reverse=True, time=33),
    "two states": Case("rotation", 20, lengths=True, reverse=True, batch=6, wants_dx=True, features=5, time=19),
    "lru": Case("lru", 20, lengths=True, batch=5, features=2, time=21),
    "s5, last": Case("s5", 33, lengths=True, outputs="last", batch=4, wants_dx=True, reverse=True, features=5),
}
SLOW_INDEPENDENT = {
    "ind_rnn, reversed, last": Case("ind_rnn", 8, lengths=True, reverse=True, outputs="last", batch=5, features=6),
    "min_lstm, x has a gradient": Case(
        "min_lstm", 24, lengths=True, features=3, wants_dx=True, outputs="last", batch=4
    ),
    "two states, x inside": Case("rotation", 40, outputs="last", batch=3, features=2, time=16),
}
# What combines the parts of the cases above them.
SLOW = {
    "gru, x has a gradient": Case("gru", features=3, wants_dx=True, batch=4),
    "lstm, last": Case("lstm", lengths=True, outputs="last", batch=5, precision="bfloat16"),
    "cluster, three rounds": Case("three_rounds", 64, 4, lengths=True, precision="bfloat16", time=4),
    "gru, 4 sequences, lengths": Case("gru", sequences=4, lengths=True, batch=6, precision="bfloat16"),
    "cluster, cornn, 4 sequences": Case("cornn", 64, 4, sequences=4, batch=3, precision="bfloat16"),
    "cluster, gru, 256 units": Case("gru", 256, 4, batch=4, sequences=4, time=3),
    "lstm, 128 units": Case("lstm", 128, time=20),
    "cluster, lstm, 256 units": Case("lstm", 256, 4, lengths=True, batch=6, time=20),
    "cluster, gru, 150 units": Case("gru", 150, 4, outputs="last", precision="bfloat16", time=20),
    "cluster, reset before, 256 units": Case("gru_reset_before", 256, 4, sequences=4, reverse=True, time=20),
}


@pytest.mark.sampled(1)
@emulated_only
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_against_scan_in_float64(name, emulator, errors):
    case = (CASES | SLOW)[name]
    gradients, results = errors(case)
    print(f"{name}: gradients {gradients:.1e}, results {results:.1e}")
    assert emulator.trouble == []
    assert results < 5e-4
    assert gradients < (1.5e-3 if case.precision == "tensorfloat32" else 5e-3)


@pytest.fixture
def exploding(emulator, monkeypatch):
    """A function that gives errors of gradients of which two sequences' begin small and leave float16.

    They grow tenfold a step: of the first of two replicas, whose matrix is twice the other's. Largest of the matrix,
    of both replicas, and of the carry, of each sequence.
    """
    grows = np.isin(np.arange(8), (1, 4))
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    factors = np.where(grows, 2.0**-8, 1.0)[:, None] * rng.standard_normal((8, 64))
    x = np.broadcast_to(np.where(grows, 10.0, 1.0)[:, None, None], (8, 8, 1))
    arrays = [np.stack([turn, 0.5 * turn]), x, 1e-4 * rng.standard_normal((8, 64))]
    w, x, carry, factors = (jnp.asarray(a, jnp.float32) for a in (*arrays, factors))
    call = Call(lambda w, h, x: (h * x @ w,) * 2, Options("last", False, "tensorfloat32"), "cpu")

    def gradients(run, *arrays):
        def total(w, x, carry):
            return (run(call, Given(w, x, carry, None))[1] * arrays[3]).sum()

        return jax.jit(jax.vmap(jax.grad(total, (0, 2)), (0, None, None)))(*arrays[:3])

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, gradients(plain, *double((w, x, carry, factors))))

    def of(blocks):
        monkeypatch.setattr(calls, "blocks", lambda _: blocks)
        of_w, of_carry = gradients(recurrence.run, w, x, carry, factors)
        of_replicas = [worst(of_w[i], want[0][i]) for i in range(2)]
        return max(of_replicas, key=finite), max((worst(of_carry[0, i], want[1][0, i]) for i in range(8)), key=finite)

    return of


@emulated_only
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.sampled(1)
def test_gradients_that_leave_float16(blocks, emulator, exploding):
    of_matrix, of_sequences = exploding(blocks)
    print(f"matrix {of_matrix:.1e}, sequences {of_sequences:.1e}")
    assert emulator.trouble == []
    assert max(of_matrix, of_sequences) < 1.5e-3


@pytest.mark.sampled(1)
@emulated_only
@pytest.mark.parametrize("name", ["gru", "cluster, gru", "two states"])
def test_replicas(name, emulator, errors):
    """Replicas are more blocks of one launch, each with parameters of its own."""
    case = (CASES | INDEPENDENT)[name]
    errors(case)
    run, (params, x, carry), _ = work(case)
    replicas = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
    one_by_one = [run(jax.tree.map(lambda p, i=i: p[i], replicas), x, carry) for i in range(2)]
    together = jax.vmap(run, (0, None, None))(replicas, x, carry)
    assert emulator.trouble == []
    for i, alone in enumerate(one_by_one):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), together, alone)


@emulated_only
@pytest.mark.parametrize("name", ["gru", "cluster, gru"])
@pytest.mark.slow
def test_cotangents_that_share_what_was_kept(name, emulator, errors):
    """`jax.jacrev` maps the way back alone; what was kept is of one forward pass, in the order of its blocks."""
    case = CASES[name]._replace(batch=9, precision="tensorfloat32")
    errors(case)
    emulator.few = 9
    _, (params, x, carry), _ = work(case)
    step = taken_out(INIT["gru"][0], case.precision, params, carry, x)
    call = Call(step, Options("all", False, case.precision), "cpu")
    _, pull = jax.vjp(lambda params: recurrence.run(call, Given(params, x, carry, None))[1], params)
    bars = jnp.asarray(np.random.default_rng(2).standard_normal((3, *x.shape[:2], case.hidden)), jnp.float32)
    together = jax.vmap(pull)(bars)
    assert emulator.trouble == []
    for i, bar in enumerate(bars):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), together, pull(bar))


@emulated_only
def test_replicas_that_differ_in_what_the_loop_does_not_read(emulator):
    """The launcher sees their number on both ways alike: it decides the order of what is kept."""
    _, cell, x, carry = drawn("gru", 32, 1, 9, 6)
    readouts = jnp.asarray(np.random.default_rng(4).standard_normal((3, 32, 32)), jnp.float32)

    def step(params, h, x):
        h, _ = cells.gru_step(params["cell"], h, x)
        return h, h @ params["readout"]

    given = {"cell": cell, "readout": readouts[0]}
    call = Call(taken_out(step, "tensorfloat32", given, carry, x), Options("all", False, "tensorfloat32"), "cpu")
    assert call.step is not step

    def gradients(readout):
        def loss(cell, readout):
            given = Given({"cell": cell, "readout": readout}, x, carry, None)
            return jnp.sin(recurrence.run(call, given)[1]).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(cell, readout)

    emulator.few = 9
    together = jax.vmap(gradients)(readouts)
    assert emulator.trouble == []
    for i, readout in enumerate(readouts):
        assert worst(jax.tree.map(lambda a, i=i: a[i], together), gradients(readout)) < 1.5e-3


# ---- Cells whose units see no other -------------------------------------------------------


@pytest.mark.sampled(1)
@emulated_only
@pytest.mark.parametrize(
    "name", [*INDEPENDENT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_INDEPENDENT)]
)
def test_units_that_see_no_other(name, emulator, errors):
    """In float32 as it is, and without a barrier; LRU's and S5's products stand behind the loop."""
    gradients, results = errors((INDEPENDENT | SLOW_INDEPENDENT)[name])
    print(f"{name}: gradients {gradients:.1e}, results {results:.1e}")
    assert max(gradients, results) < 1e-5
    assert emulator.barriers == (0, set())


# In which order warps run, and when words come to another block.
ORDERS = {
    "in order": {},
    "in reverse": {"EMULATE_REVERSE": "1"},
    "in reverse, late": {"EMULATE_REVERSE": "1", "EMULATE_LATE": "1"},
    "in any order": {"EMULATE_SHUFFLE": "2"},
}


@pytest.fixture
def noticed(emulator, monkeypatch):
    """A function that says whether what gives errors goes wrong in an order, as `emulator` is now."""

    def of(errors, order):
        with monkeypatch.context() as patch:
            for name, value in ORDERS[order].items():
                patch.setenv(name, value)
            wrong = not max(errors(), key=finite) < 5e-3 or bool(emulator.trouble)
        emulator.trouble = []
        return wrong

    return of


@pytest.mark.slow
@emulated_only
@pytest.mark.parametrize("order", ORDERS)
def test_each_barrier_is_needed(order, emulator, errors, exploding, noticed):
    reached = set()
    cases = [functools.partial(errors, CASES[name]) for name in ("gru", "cluster, gru")]
    for of_case in (*cases, again := functools.partial(exploding, 1)):
        emulator.without = -1
        assert not noticed(of_case, order)
        count, barriers = emulator.barriers
        # The later launches have one barrier more a round, which can stand in for another.
        for number in barriers - reached if of_case is again else barriers:
            emulator.without = number
            assert noticed(of_case, order), f"barrier {number}"
        reached |= barriers
    assert reached == set(range(count))


SINGLE = {
    "forward": ("(step & 1) * Cell::kSources * kTile;", "0;"),
    "backward": ("(step & 1) * Cell::kResults * kTileBack;", "0;"),
    "parts": ("(step & 1) * Cell::kSources", "0 * Cell::kSources"),
}


@pytest.mark.slow
@emulated_only
@pytest.mark.parametrize("buffer", SINGLE)
def test_two_buffers_are_needed(buffer, emulator, errors, noticed):
    emulator.change = lambda text: text.replace(*SINGLE[buffer])
    assert any(noticed(functools.partial(errors, CASES["cluster, gru"]), order) for order in ORDERS)


@emulated_only
def test_the_carry_of_an_empty_sequence_reaches_no_gradient(emulator, monkeypatch):
    monkeypatch.setattr(calls, "blocks", lambda _: 1)
    step, params, x, carry = drawn("gru", 32, 1, 8, 2)
    lengths = jnp.asarray([0, 2, 1, 2, 2, 2, 2, 2], jnp.int32)
    call = Call(step, Options("last", False, "tensorfloat32"), "cpu")
    gradients = jax.jit(jax.grad(lambda p, c: recurrence.run(call, Given(p, x, c, lengths))[1].sum()))
    want, got = (gradients(params, carry.at[0].set(value)) for value in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert emulator.trouble == []


# ---- What needs no emulation -------------------------------------------------------------


def test_scale_of_cotangents():
    """It brings the largest near 1 / 16, and has an inverse, whatever stands in steps that don't run."""
    shape = Shape(8, 1, 8, "all", save=True, masked=True, reverse=False, half=True)
    none = jnp.zeros(0)
    operands = Operands(none, none, none, jnp.zeros((2, 3, 1)), none, jnp.asarray([1, 3]))

    def scale(carry, outputs):
        (found, *others) = calls._scales(shape, operands, jnp.full((1, 2, 8), carry), jnp.asarray(outputs))
        assert not np.any(others)
        return float(found)

    outputs = np.full((2, 3, 1, 8), 1e-6, np.float32)
    assert 1 / 32 <= 1e-6 * scale(0.0, outputs) <= 1 / 16
    outputs[0, 1:] = np.nan
    assert 1 / 32 <= 1e-6 * scale(0.0, outputs) <= 1 / 16
    assert 1 / 32 <= 3.0 * scale(3.0, outputs) <= 1 / 16
    assert scale(0.0, 0 * outputs[[1, 1]]) == 1
    for value in (3e38, 2e-38):
        found = np.float32(scale(value, outputs))
        assert 0 < found < np.inf
        assert 0 < 1 / found < np.inf


def stages_of(cell, hidden):
    step, *given = drawn(cell, hidden, 1, 4, 2)
    return divided(step, *given)


def divided(step, params, x, carry):
    step = taken_out(step, "bfloat16", params, carry, x)
    call = recurrence.Call(step, recurrence.Options("all", False, "bfloat16"), "cuda")
    return recurrence.stages_of(call, params, x, carry)


@pytest.fixture
def compiler():
    try:
        nvrtc.version()
    except CannotBuildError as error:
        pytest.skip(str(error))


KERNELS = [
    ("lstm", 128, 80),
    ("gru", 128, 90),
    ("lstm", 128, 90),
    ("lem", 128, 90),
    ("gru", 256, 90),
    ("lstm", 256, 90),
]
KERNELS += [("min_lstm", 128, 80), ("s5", 300, 90)]
KERNELS += [pytest.param(cell, 128, 80, marks=pytest.mark.slow) for cell in ("gru", "lem")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("cell", "hidden", "capability"), KERNELS)
def test_machine_code_spills_nothing(cell, hidden, capability, compiler):
    stages = stages_of(cell, hidden)
    shape = independent.Shape(hidden, "all", save=True, masked=True, reverse=True)
    if stages.division.products:
        assert source.misfit(stages, capability) is None
        shape = Shape(hidden, source.blocks(stages), 8, "last", save=True, masked=False, reverse=False, half=True)
    options = (f"--gpu-architecture=sm_{capability}", *load.OPTIONS, "--ptxas-options=-v")
    _, log = nvrtc.compile(shape.source(stages), options)
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", log)]
    print(re.findall(r"Used (\d+) registers", log), spilled)
    assert len(spilled) == 2
    assert max(spilled) <= (
        8 if cell == "lem" else 0
    )  # LEM has two products one after the other, and two registers less.


def test_what_fits_where():
    assert source.blocks(stages_of("lstm", 128)) == 1
    assert source.blocks(stages_of("lstm", 129)) == 4
    assert source.misfit(stages_of("gru", 256), 90) is None
    assert "need a cluster of blocks" in source.misfit(stages_of("gru", 129), 80)
    assert "at most 256" in source.misfit(stages_of("cornn", 257), 90)

    def wide(params, h, x):
        h = sum(jnp.tanh(x @ params["x"] + h @ weight) for weight in params["h"])
        return h, h

    def many(products, hidden):
        weights = [jnp.zeros((hidden, hidden))] * products
        given = {"h": weights, "x": jnp.zeros((1, hidden))}, jnp.zeros((1, 1, 1)), jnp.zeros((1, hidden))
        return divided(wide, *given)

    assert source.blocks(many(5, 128)) == 1
    assert source.blocks(many(6, 128)) == 4
    assert "take 192 registers" in source.misfit(many(6, 256), 90)


def shares_an_inner_value(p, h, x):
    sum_ = h * (h @ p)
    h = jnp.tanh(sum_) * jnp.tanh(2 * sum_)
    return h, h


def makes_a_tanh_twice(p, h, x):
    product = h @ p
    h = jnp.tanh(jnp.maximum(h, product)) * jnp.tanh(jnp.tanh(product))
    return h, jnp.tanh(product) * h


@pytest.mark.parametrize("step", [shares_an_inner_value, makes_a_tanh_twice])
def test_what_is_made_again_is_made_once_and_before_it_is_read(step):
    stages = divided(step, jnp.ones((4, 4)), jnp.ones((3, 5, 6)), jnp.ones((3, 4)))
    assert stages.spared
    apart = [place for place, (kind, i) in enumerate(stages.kept) if (kind, i) not in {("t", i) for i in stages.spared}]
    known = set()
    for statement in stages.recall(apart, spare=True):
        assert set(re.findall(r"\b[ft]v?\d+\b", statement.text)) <= known
        assert statement.name not in known
        known.add(statement.name)


def test_an_input_that_is_a_gradient_as_it_is_is_read_on_the_way_back():
    times = jax.custom_vjp(lambda a, b: a * b)
    times.defvjp(lambda a, b: (a * b, b), lambda b, bar: (b, bar))

    def step(p, h, x):
        h = times(h @ p["u"], x @ p["w"])
        return h, h

    stages = divided(step, {"u": jnp.ones((4, 4)), "w": jnp.ones((6, 4))}, jnp.ones((3, 5, 6)), jnp.ones((3, 4)))
    text = source.cell(stages, Shape(4, 1, 8, "all", save=True, masked=False, reverse=False, half=True))
    assert re.search(r"kInputsBack = 1\b", text)
