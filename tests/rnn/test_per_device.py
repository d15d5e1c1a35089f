"""Sequences that are explicitly sharded, on two devices of a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.launching import ROOT
from tests.tiny import QUICK_FLAG

PROGRAM = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from seqmnist_jax import rnn
from seqmnist_jax.models.cells.min_gru import CELL as MIN_GRU
jax.config.update("jax_disable_most_optimizations", True)
rng = np.random.default_rng(0)
x, h = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 5, 3), (4, 8)))
lengths = np.array([5, 2, 0, 4], np.int32)
gru, lstm = (init(jax.random.key(0), 3, 8) for init in (rnn.init_gru, rnn.init_lstm))
stack = rnn.init_stack(jax.random.key(0), rnn.GRU, 3, 8, num_layers=1, bidirectional=True)
dropped = {"layer_0": {name: rnn.Masks(outputs=np.full((rows, 8), 2, np.float32))
           for name, rows in (("forward", 1), ("backward", 4))}}

def stacked(params, x, carry=None, lengths=None):
    engine = rnn.Engine(remat=2)
    return (), rnn.stack(rnn.GRU, params, x, lengths=lengths, masks=dropped, engine=engine, return_sequences=True)

ways = {
    "gru scan": (functools.partial(rnn.gru, backend="scan"), gru),
    "gru native": (functools.partial(rnn.gru, backend="native"), gru),
    "lstm fused": (functools.partial(rnn.lstm, backend="fused", reverse=True), lstm),
    "marks": (lambda p, x, carry=None, lengths=None: rnn.gru(
        p, x, carry, mask=jnp.arange(5) != lengths[:, None], resets=x[:, :, 0] > 0, backend="fused"), gru),
    "min_gru": (MIN_GRU.layer, MIN_GRU.init(jax.random.key(0), 3, 8)),
    "scan": (lambda p, x, carry=None, lengths=None: rnn.scan(
        rnn.gru_step, p, x, jnp.zeros((4, 8)) if carry is None else carry, lengths=lengths, backend="fused"), gru),
    "stack": (stacked, stack),
}
devices = jax.devices()
data = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=devices[:1])
pair = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))
cases = {name: (name, data, "data", None) for name in ways} | {
    "a carry": ("marks", data, "data", P()),
    "a sharded carry alone": ("gru native", data, None, P("data")),
    "nothing sharded": ("lstm fused", data, None, None),
    "one device": ("gru native", one, "data", None),
    "two axes": ("gru native", pair, ("data", "model"), None),
}
results, wanted = {}, {}
for name, (way, mesh, axes, carry) in cases.items():
    run, params = ways[way]
    def loss(params, x, carry, lengths):
        end, y = run(params, x, carry, lengths=lengths)
        return sum(jnp.sin(part).sum() for part in jax.tree.leaves((end, y))), (end, y)
    grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    carries = (None, None) if carry is None else (h, jax.device_put(h, NamedSharding(mesh, carry)))
    if (way, carry is None) not in wanted:
        wanted[way, carry is None] = jax.jit(grad)(params, x, carries[0], lengths)
    want = wanted[way, carry is None]
    given = params, jax.device_put(x, NamedSharding(mesh, P(axes))), carries[1], lengths
    try:
        with jax.set_mesh(mesh):
            got = jax.jit(grad)(*given)
        error = max(float(np.abs(np.asarray(a) - np.asarray(b)).max())
                    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
        specs = {str(jax.typeof(part).sharding.spec[0]) for part in jax.tree.leaves(got[0][1])}
        results[name] = [error, sorted(specs), str(axes or (carry and "data"))]
    except Exception as problem:
        results[name] = [f"{type(problem).__name__}: {problem}"[:400]]
refused = {
    "params": lambda p, x: rnn.gru(p | {"bias": jax.sharding.reshard(p["bias"], P("data"))}, x),
    "x": lambda p, x: rnn.gru(p, jax.sharding.reshard(x[:, :4], P(None, "data"))),
    "carry": lambda p, x: rnn.scan(lambda p, c, x: (c + 1, x), p, x, jnp.zeros(())),
}
with jax.set_mesh(data):
    for name, call in refused.items():
        try:
            jax.jit(call)(gru, jax.device_put(x, NamedSharding(data, P("data"))))
        except ValueError as problem:
            results[name] = str(problem)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(native_problem):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK_FLAG}", "JAX_PLATFORMS": "cpu"}
    program = PROGRAM if native_problem is None else PROGRAM.replace('"native"', '"auto"')
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_values_gradients_and_where_outputs_stand(results):
    for name, (error, *standing) in results.items():
        if name in ("params", "x", "carry"):
            continue
        assert isinstance(error, float), (name, error)
        assert error < 1e-5, name
        specs, axes = standing
        assert specs == [axes], name
    assert len(results) == 15


@pytest.mark.slow
def test_other_divisions_are_refused(results):
    assert results["params"].startswith("params has arrays sharded as P('data',)")
    assert results["x"].startswith("x is sharded as P(None, 'data', None); expected axis 0 alone, the batch")
    assert results["carry"] == "carry has shape (); with an explicitly sharded batch expected [batch, ...], batch 4"
