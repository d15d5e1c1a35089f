"""Kernels made of a step against `lax.scan` over it in float64: values, and gradients of everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cells import CELLS

from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.stages import Options

DERIVED = ("derived", np.float64, 1e-9)
CPU = ("cpu", np.float32, 1e-4)


def case(cell, batch=4, time=6, features=1, hidden=8, ragged=False, seed=0, bias=0.0):
    """A step and the arrays of a call in float64, all of them numbers that float32 holds."""
    step, params, carries = cell(hidden, features)
    rng = np.random.default_rng([seed, batch, time, features, hidden])

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    if "b" in params:
        params["b"] = params["b"] + bias
    carry = tuple(np.tanh(normal(batch, hidden)).astype(np.float32).astype(np.float64) for _ in range(carries))
    lengths = None
    if ragged:
        lengths = rng.integers(0, time + 1, batch)
        lengths[rng.integers(batch)] = 0
        lengths[rng.integers(batch)] = time
    return step, recurrence.Given(params, normal(batch, time, features), carry[0] if carries == 1 else carry, lengths)


def bars_of(step, options, given, seed=1):
    """Cotangents of the end's carry and of the outputs."""
    rng = np.random.default_rng(seed)
    call = recurrence.Call(step, options, "")
    shapes = jax.eval_shape(functools.partial(recurrence.plain, call), given)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32).astype(np.float64), shapes)


def by_scan(step, options, given, bars):
    call = recurrence.Call(step, options, "")

    @jax.jit
    def run(params, x, carry, bars):
        out, pull = jax.vjp(lambda *p: recurrence.plain(call, recurrence.Given(*p, given.lengths)), params, x, carry)
        return out, pull(bars)

    return run(*given[:3], bars)


def by_kernel(platform, step, options, given, bars, dtype, inline=True):
    given, bars = (
        jax.tree.map(lambda a: jnp.asarray(a, dtype if jnp.asarray(a).dtype != jnp.int64 else jnp.int32), tree)
        for tree in (given, bars)
    )
    call = recurrence.Call(step, options, platform)

    @jax.jit
    def run(given, bars):
        end, outputs, kept = recurrence._kernel_forward(call, True, inline, given)
        gradients = recurrence._kernel_backward(call, inline, given, kept, bars)
        again = recurrence._kernel_forward(call, False, inline, given)[:2]
        return (end, outputs), again, gradients[:3]

    out, again, gradients = run(given, bars)
    compare("without a way back, ", again, out, 1e-6)
    return out, (gradients[0], None if inline else gradients[1], gradients[2])


def compare(name, got, wanted, tolerance):
    """Each array within a part of its own largest number, or of 1 where that is smaller than 1e-3."""
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        w = np.asarray(w)
        if not w.size:
            continue
        error = np.max(np.abs(np.asarray(g, np.float64) - w)) / max(np.max(np.abs(w)), 1e-3)
        assert error < tolerance, f"{name}{jax.tree_util.keystr(path)}: {error:.1e}"


def check(kernel, step, options, given, inline=True):
    platform, dtype, tolerance = kernel
    with jax.enable_x64(True):
        bars = bars_of(step, options, given)
        wanted, wanted_gradients = by_scan(step, options, given, bars)
        got, gradients = by_kernel(platform, step, options, given, bars, dtype, inline)
        compare("result", got, wanted, tolerance)
        for name, g, w in zip(("params", "x", "carry"), gradients, wanted_gradients, strict=True):
            if g is not None:
                compare(name, g, w, tolerance)


KERNELS = pytest.mark.parametrize("kernel", [CPU, DERIVED], ids=lambda k: k[0])


@KERNELS
@pytest.mark.parametrize("name", CELLS)
def test_cell(kernel, name):
    check(kernel, *case_options(CELLS[name]))
    check(kernel, *case_options(CELLS[name], features=6), inline=False)


def case_options(cell, outputs="all", reverse=False, precision="float32", **sizes):
    step, given = case(cell, **sizes)
    return step, Options(outputs, reverse, precision), given


@KERNELS
@pytest.mark.parametrize("name", ["lstm", "gru_reset_before", "cornn", "ind_rnn"])
@pytest.mark.parametrize("outputs", ["all", "last", "none"])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_and_outputs(kernel, name, outputs, reverse):
    check(kernel, *case_options(CELLS[name], outputs, reverse, batch=5, ragged=True))
