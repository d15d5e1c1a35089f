"""Each backend inside JAX's transformations and programs: the same numbers as the plain call's."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqmnist_jax import rnn
from tests.tiny import QUICK_FLAG

LENGTHS = np.array([4, 7, 0], np.int32)


def assert_close(a, b, tolerance=2e-5):
    """By the largest element of each tensor."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for ours, theirs in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(initial=1e-30))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def waves(tree):
    """A number that depends on every entry."""
    return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in jax.tree.leaves(tree))


def with_gradients(run):
    """run's results and the gradients of `waves` of them, in all of run's arguments."""

    def call(*arguments):
        results, pull_back = jax.vjp(run, *arguments)
        return results, pull_back(jax.grad(waves)(results))

    return jax.jit(call)


# Those with a way back of their own, which JAX must take through its transformations. A scan is JAX's.
some_layers = pytest.mark.parametrize("layer", ["gru-fused", "lstm-native"], indirect=True)
# What is made of layers, whichever they be.
any_layer = pytest.mark.parametrize("layer", ["lstm", "gru"], indirect=True)


# ---- Programs ----------------------------------------------------------------------------


@pytest.mark.sampled(1)
@some_layers
def test_checkpoint_inside_a_scan(layer, draw):
    """A loop around the layer, its body rematerialised: outputs of a pass are the next one's input."""
    params, x, carry = draw(features=6)

    def looped(body):
        def run(params, x, carry):
            def one(state, _):
                x, carry = state
                carry, outputs = body(params, x, carry)
                return (outputs, carry), None

            return jax.lax.scan(one, (x, carry), None, length=3)[0]

        return with_gradients(run)(params, x, carry)

    def by_hand(params, x, carry):
        for _ in range(3):
            carry, x = layer.run(params, x, carry)
        return x, carry

    want = with_gradients(by_hand)(params, x, carry)
    assert_close(looped(layer.run), want)
    assert_close(looped(jax.checkpoint(layer.run)), want)


@some_layers
def test_donated_arguments(layer, draw):
    """Results may take the arguments' memory; reading and writing must not meet in it."""
    params, x, carry = jax.tree.map(jnp.asarray, draw(features=6))

    def step(params, x, carry):
        def loss(params):
            carry_out, outputs = layer.run(params, x, carry)
            return waves(outputs), (carry_out, outputs)

        gradients, (carry_out, outputs) = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), outputs, carry_out

    def three(step):
        state = jax.tree.map(jnp.array, (params, x, carry))
        for _ in range(3):
            state = step(*state)
        return state

    assert_close(three(jax.jit(step, donate_argnums=(0, 1, 2))), three(jax.jit(step)), 1e-6)


@pytest.mark.sampled(1)
@some_layers
def test_static_data_closed_over(layer, draw):
    """Under jit constants are known values, yet what is computed from them is not."""
    params, x, carry = draw()
    want = layer.run(params, x, carry, lengths=LENGTHS)
    for of in (np.asarray, jnp.asarray):
        data, ends = of(x), of(LENGTHS)
        assert_close(
            jax.jit(lambda params, data=data: layer.run(params, data, carry))(params), layer.run(params, x, carry)
        )
        assert_close(
            jax.jit(lambda params, data=data, ends=ends: layer.run(params, data, carry, lengths=ends))(params), want
        )


# ---- remat -------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("layer", "steps", "lengths", "reverse", "return_sequences"),
    [
        ("lstm", 1, LENGTHS, False, True),
        ("gru", 2, LENGTHS, False, False),
        ("lstm", 3, LENGTHS, True, True),
        ("gru", 3, None, False, True),
        ("lstm", 7, None, True, False),
        ("gru", 8, LENGTHS, True, True),
    ],
    indirect=["layer"],
)
def test_remat_is_the_plain_layer(layer, draw, steps, lengths, reverse, return_sequences):
    """In whole segments, with a remainder, in one, and in less than one."""
    params, x, carry = draw()

    def call(run):
        options = {"reverse": reverse, "return_sequences": return_sequences}
        return with_gradients(lambda *arguments: run(*arguments, lengths=lengths, **options))(params, x, carry)

    assert_close(call(rnn.remat(layer.run, steps)), call(layer.run))


@any_layer
def test_remat_without_a_carry(layer, draw):
    params, x, _ = draw()
    assert_close(rnn.remat(layer.run, 3)(params, x), layer.run(params, x), 1e-6)


@any_layer
@pytest.mark.parametrize("steps", [0, -1])
def test_remat_needs_a_step(layer, steps):
    with pytest.raises(ValueError, match=rf"^steps is {steps}"):
        rnn.remat(layer.run, steps)


@any_layer
def test_remat_checks_as_the_layer_does(layer, draw):
    params, x, carry = draw()
    run = rnn.remat(layer.run, 2)
    with pytest.raises(ValueError, match=r"^x has shape"):
        run(params, x[0], carry)
    with pytest.raises(ValueError, match=r"^lengths has values"):
        run(params, x, carry, lengths=LENGTHS + 1)
    with pytest.raises(ValueError, match=r"^carry"):
        run(params, x, "carry")
    with pytest.raises(ValueError, match=r"^x .*NaN"):
        run(params, np.full_like(x, np.nan), carry)


# ---- Export ------------------------------------------------------------------------------


def reloaded(program):
    """After a way through bytes, where the package that makes them is installed."""
    try:
        return export.deserialize(program.serialize())
    except ImportError:
        return program


@some_layers
def test_export(layer, draw):
    """Of values and gradients; with the kernel the caller must say that he knows its calls."""
    params, x, carry = draw()
    arguments = (params, x, carry, LENGTHS)

    def run(params, x, carry, lengths):
        return with_gradients(lambda *arguments: layer.run(*arguments, lengths=lengths))(params, x, carry)

    checks = []
    if layer.backend == "native":
        with pytest.raises(ValueError, match="seqmnist_rnn_forward"):
            export.export(jax.jit(run))(*arguments)
        names = ("seqmnist_rnn_forward", "seqmnist_rnn_backward")
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in names]
    program = export.export(jax.jit(run), disabled_checks=checks)(*arguments)
    assert_close(reloaded(program).call(*arguments), run(*arguments), 1e-6)


def test_export_of_a_forward_pass_names_one_custom_call(layer, draw):
    params, x, _ = draw()
    checks = [export.DisabledSafetyCheck.custom_call("seqmnist_rnn_forward")] if layer.backend == "native" else []
    program = export.export(jax.jit(layer.run), disabled_checks=checks)(params, x)
    assert_close(reloaded(program).call(params, x), layer.run(params, x), 1e-6)


# ---- Several devices ---------------------------------------------------------------------

SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from seqmnist_jax import rnn
jax.config.update("jax_disable_most_optimizations", True)
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
split = (P(), P("batch"), P("batch"), P("batch"))
x, bars = (jnp.asarray(rng.standard_normal((6, 5, size)), jnp.float32) for size in (3, 9))
results, asked = {}, json.loads(sys.argv[1])
for cell, init in ((rnn.lstm, rnn.init_lstm), (rnn.gru, rnn.init_gru)):
    arguments = (init(jax.random.key(0), 3, 9), x, jnp.array([5, 2, 0, 3, 5, 1], jnp.int32), bars)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arguments, split)]
    def loss(backend):
        return lambda params, x, lengths, bars: jnp.vdot(cell(params, x, lengths=lengths, backend=backend)[1], bars)
    want = jax.jit(jax.value_and_grad(loss("scan"), (0, 1)))(*arguments)
    for backend in {"lstm": ("scan", "native"), "gru": ("fused", "native", "auto")}[cell.__name__]:
        one = loss(backend)
        def outside(check):  # The whole loss by shard_map, differentiated from outside.
            total = lambda *arguments: jax.lax.psum(one(*arguments), "batch")
            return jax.value_and_grad(
                jax.shard_map(total, mesh=mesh, in_specs=split, out_specs=P(), check_vma=check), (0, 1))
        def inside(check):  # Each device's gradients, added up by hand where JAX does not.
            def both(*arguments):
                value, (d_params, dx) = jax.value_and_grad(one, (0, 1))(*arguments)
                if not check:
                    d_params = jax.lax.psum(d_params, "batch")
                return jax.lax.psum(value, "batch"), (d_params, dx)
            return jax.shard_map(
                both, mesh=mesh, in_specs=split, out_specs=(P(), (P(), P("batch"))), check_vma=check)
        for name, program in {"jit": jax.value_and_grad(one, (0, 1)),
                              "outside unchecked": outside(False), "inside unchecked": inside(False)}.items():
            if f"{cell.__name__} {backend} {name}" not in asked:
                continue
            try:
                got = jax.jit(program)(*placed)
                error = max(float(np.abs(a - b).max() / np.abs(b).max())
                            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"[:400]
            results[f"{cell.__name__} {backend} {name}"] = error
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def sharded(request):
    """The error of each way to run on two devices that a test asks for, made in a process that has them."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_two_devices"]
    asked = [" ".join(item.callspec.params[name] for name in ("cell", "backend", "way")) for item in tests]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK_FLAG}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, json.dumps(asked)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["jit", "outside unchecked", "inside unchecked"])
@pytest.mark.parametrize(
    ("cell", "backend"), [("lstm", "scan"), ("gru", "fused"), ("lstm", "native"), ("gru", "native"), ("gru", "auto")]
)
def test_two_devices(sharded, need_native, cell, backend, way):
    """Sharded by the compiler; by shard_map, with and without its own checks of what varies over devices."""
    need_native(backend)
    error = sharded[f"{cell} {backend} {way}"]
    assert isinstance(error, float), error
    assert error <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fused", "native"])
def test_gradients_with_and_without_x_in_one_process(backend, need_native):
    """The inner function is traced once for both; what one left behind must not serve the other."""
    if backend == "native":
        need_native()
    params = rnn.init_gru(jax.random.key(0), 3, 4)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))

    def loss(params, x, backend):
        return jnp.sum(jnp.sin(rnn.gru(params, x, backend=backend)[1]))

    for _ in range(2):
        for argnums in (0, 1, (0, 1)):
            got, want = (jax.jit(jax.grad(loss, argnums), static_argnums=2)(params, x, b) for b in (backend, "scan"))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
