"""The kernel itself: its gate functions' accuracy, its determinism, and calls of it that do not fit."""

import contextlib
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.rnn.native.cpu import calls
from tests import copier

B, T, F, H = 3, 4, 6, 5
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])
pytestmark = pytest.mark.full_kernels
LAYERS = {"lstm": (rnn.lstm, rnn.init_lstm, 4), "gru": (rnn.gru, rnn.init_gru, 3)}


@pytest.fixture(autouse=True)
def with_kernel(need_native):
    need_native()


SOURCES = """
import hashlib, jax, jax.numpy as jnp
from seqmnist_jax.models import CELLS
from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.native.cpu import calls
for name in ("lem", "gru_reset_before", "cornn"):
    cell = CELLS[name].cell
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 9 if name == "gru_reset_before" else 1, 16))
    state = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    carry = state if name == "gru_reset_before" else (state, state)
    x = jax.ShapeDtypeStruct((4, 5, params["kernel"].shape[0]), jnp.float32)
    call = recurrence.Call(cell.step, recurrence.Options("all", False, "float32"), "cpu")
    text = calls.text(recurrence.stages_of(call, params, x, carry), "float32")
    print(name, hashlib.sha256(text.encode()).hexdigest())
"""


def test_the_same_source_in_every_process():
    """Else each would build kernels of its own, and know those of another's exported program by other numbers."""
    runs = [
        subprocess.Popen([sys.executable, "-c", SOURCES], stdout=-1, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "12"
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert first.count(b"\n") == 3
    assert first == second


# ---- Gate functions ----------------------------------------------------------------------


def points():
    tiny = np.logspace(-30, 0, 500)
    x = np.concatenate([np.linspace(-30, 30, 20001), tiny, -tiny, [0.0]])
    return x.astype(np.float32)


def one_gate(cell, weights, biases, state):
    """The state after one step of one unit, for x at each of `points`: all weights but x's are zero."""
    # More features than products are made of inside the stages: then the kernel is the one of all other tests here.
    x = np.pad(points()[:, None, None], ((0, 0), (0, 0), (0, F - 1)))
    run, _, gates = LAYERS[cell]
    params = {
        "kernel": np.pad(np.float32([weights]), ((0, F - 1), (0, 0))),
        "recurrent_kernel": np.zeros((1, gates), np.float32),
        "bias": np.float32(biases),
    }
    if cell == "gru":
        params["recurrent_bias"] = np.zeros(gates, np.float32)
    state = np.full((len(x), 1), state, np.float32)
    carry = (state, np.zeros_like(state)) if cell == "lstm" else state
    end, _ = run(params, x, carry, backend="native")
    return np.asarray(end[0] if cell == "lstm" else end)[:, 0].astype(np.float64)


# Gates i, f, g, o: c' = f c + i g. Gates r, z, n: h' = (1 - z) n + z h. A bias of 100 opens a gate, -100 closes it.
GATES = {
    "lstm f": ("sigmoid", "lstm", [0, 1, 0, 0], [-100, 0, 0, 0], 1.0),
    "gru z": ("sigmoid", "gru", [0, 1, 0], [0, 0, 0], 1.0),
    "lstm g": ("tanh", "lstm", [0, 0, 1, 0], [100, 0, 0, 0], 0.0),
    "gru n": ("tanh", "gru", [0, 0, 1], [0, -100, 0], 0.0),
}


@pytest.mark.parametrize("gate", GATES)
def test_gate_functions_are_accurate(gate):
    function, *arguments = GATES[gate]
    got, x = one_gate(*arguments), points().astype(np.float64)
    want = np.tanh(x) if function == "tanh" else 1 / (1 + np.exp(-x))
    absolute = np.abs(got - want).max()
    relative = (np.abs(got - want) / np.maximum(np.abs(want), 1e-30)).max()
    print(f"worst error of {gate}: {absolute:.1e} absolute, {relative:.1e} relative")
    assert absolute <= 2e-7
    assert relative <= 5e-7
    assert np.abs(got).max() <= 1


@pytest.mark.parametrize("gate", [gate for gate in GATES if "lstm" in gate])
def test_gate_functions_at_the_ends(gate, monkeypatch):
    """Beyond what exponentials hold the gates stand at their ends."""
    ends = np.float32([-3e38, -1e4, -120, 120, 1e4, 3e38])
    monkeypatch.setitem(globals(), "points", lambda: ends)
    function, *arguments = GATES[gate]
    low = -1.0 if function == "tanh" else 0.0
    np.testing.assert_allclose(one_gate(*arguments), [low] * 3 + [1.0] * 3, rtol=0, atol=1e-30)


@pytest.mark.parametrize("gate", GATES)
def test_gate_functions_rise(gate):
    """To rounding, they nowhere fall."""
    order = np.argsort(points(), kind="stable")
    values = one_gate(*GATES[gate][1:])[order]
    assert np.diff(values).min() >= -2.5e-7


# ---- Determinism -------------------------------------------------------------------------


def draw(cell, batch, seed=0, time=6, features=5, hidden=21):
    rng = np.random.default_rng(seed)
    _, init, _ = LAYERS[cell]
    params = jax.tree.map(np.asarray, init(jax.random.key(seed), features, hidden))
    params = {name: value + np.float32(0.1) for name, value in params.items()}

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    state = normal(batch, hidden)
    carry = (state, normal(batch, hidden)) if cell == "lstm" else state
    return params, normal(batch, time, features), carry, rng.integers(0, time + 1, batch).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("precision",))
def by_sequence(cell, backend, reverse, params, x, carry, lengths, precision="float32"):
    """What belongs to single sequences: outputs, last carry, gradients of x and carry. And the weights' gradients."""

    def run(params, x, carry):
        return LAYERS[cell][0](params, x, carry, lengths=lengths, reverse=reverse, backend=backend, precision=precision)

    results, pull_back = jax.vjp(run, params, x, carry)
    d_params, *gradients = pull_back(jax.tree.map(jnp.cos, results))
    return (results, gradients), d_params


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@cells
def test_twice_the_same(cell, precision):
    arguments = draw(cell, 130)
    first = by_sequence(cell, "native", False, *arguments, precision=precision)
    for _ in range(3):
        assert_same_bits(by_sequence(cell, "native", False, *arguments, precision=precision), first)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("precision", "reverse"), [("float32", False), ("bfloat16", True)])
@cells
def test_rows_are_the_same_in_any_batch(cell, precision, reverse):
    """Alone, among a few, as one of several slices: the same bits, gradients of x and carry too."""
    params, x, carry, lengths = draw(cell, 130)
    whole, _ = by_sequence(cell, "native", reverse, params, x, carry, lengths, precision=precision)
    for rows in ([7], range(60, 97)):
        rows = np.array(rows)
        part = jax.tree.map(lambda array, rows=rows: array[rows], (x, carry, lengths))
        few, _ = by_sequence(cell, "native", reverse, params, *part, precision=precision)
        assert_same_bits(few, jax.tree.map(lambda array, rows=rows: array[rows], whole))


@cells
def test_replicas_are_the_same_as_single_calls(cell):
    several = [draw(cell, 9, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *several)
    mapped = jax.vmap(functools.partial(by_sequence, cell, "native", False))(*stacked)
    for i, arguments in enumerate(several):
        part = jax.tree.map(lambda array, i=i: array[i], mapped)
        assert_same_bits(part, by_sequence(cell, "native", False, *arguments))


# ---- Calls that do not fit ---------------------------------------------------------------


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def operands(cell, name):
    """Arguments and results of a call that fits, of all outputs."""
    stages = copier.stages(cell)
    d, inputs = stages.division, stages.division.count("x")
    arguments = {
        "weights": zeros(len(d.products), H, H),
        "vectors": zeros(d.count("p") + inputs, H),
        "inputs": zeros(F, inputs, H),
        "x": zeros(B, T, F),
        "carry": zeros(len(d.carries), B, H),
        "lengths": jnp.full(B, T, jnp.int32),
    }
    carry, outputs = arguments["carry"], zeros(B, T, d.outputs, H)
    kept = zeros(T, B, calls.PADDING, len(stages.kept))
    if name == calls.FORWARD:
        return arguments, {"end": carry, "outputs": outputs, "kept": kept}
    results = {f"d_{key}": arguments[key] for key in ("carry", "inputs", "weights")}
    results |= {"sums": zeros(len(stages.sums), H), "d_x": arguments["x"]}
    return arguments | {"kept": kept, "d_end": carry, "d_outputs": outputs}, results


def number_of(cell):
    return calls._number(calls.text(copier.stages(cell), "float32"))


def call(cell, name, arguments, results, **attributes):
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in results.values()]
    attributes = {"kernel": np.int64(number_of(cell)), "outputs": np.int64(1), "reverse": False} | attributes
    return jax.block_until_ready(jax.ffi.ffi_call(name, shapes)(*arguments.values(), **attributes))


# What may be left out, by an array without elements: the results that nobody reads.
OPTIONAL = {(calls.FORWARD, "kept"), (calls.BACKWARD, "d_x")}
CHANGES = {
    "one less": lambda a: a[:-1] if a.shape[0] else None,
    "last axis longer": lambda a: jnp.concatenate([a, a[..., :1]], axis=-1),
    "transposed": lambda a: a.T if a.ndim > 1 and a.T.shape != a.shape else None,
    "one axis more": lambda a: a[None],
    "an axis less": lambda a: a[0] if a.shape[0] else None,
    "half precision": lambda a: a.astype(jnp.float16),
    "the other numbers": lambda a: a.astype(jnp.int32 if a.dtype == jnp.float32 else jnp.float32),
    "nothing": lambda a: a[:0] if a.shape[0] else None,
}

ways = pytest.mark.parametrize("name", calls.CALLS, ids=["forward", "backward"])


@ways
@cells
def test_call_that_fits(cell, name):
    call(cell, name, *operands(cell, name))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("change", CHANGES)
@ways
@cells
def test_any_array_that_does_not_fit_is_an_error(cell, name, change):
    arguments, results = operands(cell, name)
    tried = 0
    for group in (arguments, results):
        for key, value in group.items():
            other = CHANGES[change](value)
            if other is None or (other.shape, other.dtype) == (value.shape, value.dtype):
                continue  # An empty one does not grow by doubling.
            if other.size == 0 and group is results and (name, key) in OPTIONAL:
                continue
            changed = [g | {key: other} if g is group else g for g in (arguments, results)]
            with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
                call(cell, name, *changed)
            tried += 1
    assert tried > 5


@ways
@cells
@pytest.mark.sampled(1)
def test_another_number_of_arrays_is_an_error(cell, name):
    arguments, results = operands(cell, name)
    for count in range(len(arguments)):
        with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
            call(cell, name, dict(list(arguments.items())[:count]), results)
    for count in range(1, len(results)):  # A call without results would not be made.
        with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
            call(cell, name, arguments, dict(list(results.items())[:count]))
    more = {"more": zeros(1)}
    for changed in ((arguments | more, results), (arguments, results | more), ({}, results)):
        with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
            call(cell, name, *changed)


@ways
@cells
def test_the_other_cell_is_an_error(cell, name):
    other = np.int64(number_of("gru" if cell == "lstm" else "lstm"))
    with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
        call(cell, name, *operands(cell, name), kernel=other)


@ways
def test_a_kernel_that_is_not_loaded_is_an_error(name):
    with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: the cell's kernel is not loaded"):
        call("lstm", name, *operands("lstm", name), kernel=np.int64(1))


@ways
def test_outputs_have_the_shape_of_their_kind(name):
    arguments, results = operands("gru", name)
    group = results if name == calls.FORWARD else arguments
    key = "outputs" if name == calls.FORWARD else "d_outputs"
    every = group[key]
    of_kind = dict(zip(calls.OUTPUTS, (every[:0, 0], every, every[:, 0]), strict=True))
    for number, kind in enumerate(calls.OUTPUTS):
        for other, shaped in of_kind.items():
            group[key] = shaped
            fits = contextlib.nullcontext() if other == kind else pytest.raises(Exception, match=f"rnn: {key} ")
            with fits:
                call("gru", name, arguments, results, outputs=np.int64(number))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@ways
@cells
def test_lengths_of_any_value_stay_inside(cell, name, reverse):
    """The layer clamps them; the kernel does not trust it."""
    arguments, results = operands(cell, name)
    bounds = np.iinfo(np.int32)
    for low, high in ((-1, T + 1), (bounds.min, bounds.max)):
        got = call(cell, name, arguments | {"lengths": jnp.array([low, high, T], jnp.int32)}, results, reverse=reverse)
        clamped = call(cell, name, arguments | {"lengths": jnp.array([0, T, T], jnp.int32)}, results, reverse=reverse)
        assert all(bool(jnp.isfinite(value).all()) for value in got[:1])
        assert_same_bits(got[:2], clamped[:2])


@ways
def test_replicas_that_do_not_fit_are_an_error(name):
    """Axes in front are replicas: as many everywhere, or one."""
    arguments, results = operands("lstm", name)
    arguments = {key: value[None] for key, value in arguments.items()}
    results = {key: jnp.stack([value] * 3) for key, value in results.items()}
    call("lstm", name, arguments, results)
    for key in arguments:
        two = arguments | {key: jnp.concatenate([arguments[key]] * 2)}
        with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
            call("lstm", name, two, results)
    for key in results:
        with pytest.raises(Exception, match=r"seqmnist_jax\.rnn: "):
            call("lstm", name, arguments, results | {key: results[key][:2]})


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("batch", "features", "hidden"), [(0, 2, 5), (3, 0, 5), (3, 2, 0)])
@cells
def test_axes_of_size_zero_are_left_to_others(cell, batch, features, hidden):
    params, x, carry, lengths = draw(cell, batch, features=max(features, 1), hidden=max(hidden, 1))
    params = {
        "kernel": params["kernel"][:features, : LAYERS[cell][2] * hidden],
        "recurrent_kernel": params["recurrent_kernel"][:hidden, : LAYERS[cell][2] * hidden],
    } | {key: value[: LAYERS[cell][2] * hidden] for key, value in params.items() if "bias" in key}
    x, carry = x[..., :features], jax.tree.map(lambda part: part[:, :hidden], carry)
    got = by_sequence(cell, "native", False, params, x, carry, lengths)
    want = by_sequence(cell, "scan", False, params, x, carry, lengths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
