"""What leads to the GPU's kernel, tried without a GPU: who takes it, what is asked of it, and what runs elsewhere.

The process is told that it has an H100; programs are lowered for it, and run on the CPU, where the same call is a scan.
"""

import re
from pathlib import Path

import any_cells
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models import CELLS
from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.native import gpu
from seqmnist_jax.rnn.native.gpu import load

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 9, 1))
LENGTHS = jnp.array([9, 4, 0, 1, 7, 9])


@pytest.fixture
def h100(monkeypatch):
    """A process that believes to have an H100; gives the kernels that it asked for."""
    asked = []

    def kernel(stages, shape, name, shared):
        asked.append((shape, name))
        return len(asked)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(load, "problem", lambda: None)
    monkeypatch.setattr(gpu, "problem", lambda: None)
    monkeypatch.setattr(load, "device", lambda: load.Device(90, 132))
    monkeypatch.setattr(gpu, "describe", lambda: "a kernel")
    monkeypatch.setattr(load, "kernel", kernel)
    jax.clear_caches()  # what was traced where there is no GPU
    return asked


@pytest.fixture(autouse=True, scope="module")
def nobody_believes_it_later():
    yield
    jax.clear_caches()


def lowered(function, *arguments):
    """The program for an NVIDIA GPU, as text."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def loss(layer, **options):
    def of(params, x, carry):
        end, outputs = layer(params, x, carry, **options)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((end, outputs)))

    return of


LAYERS = {
    "lstm": (rnn.lstm, rnn.init_lstm(KEY, 1, 8), (jnp.ones((6, 8)), jnp.zeros((6, 8)))),
    "gru": (rnn.gru, rnn.init_gru(KEY, 1, 8), jnp.ones((6, 8))),
    "gru_reset_before": (
        lambda *given, **options: rnn.gru(*given, reset_after=False, **options),
        rnn.init_gru(KEY, 1, 8, reset_after=False),
        jnp.ones((6, 8)),
    ),
    "scan": (
        lambda *given, **options: rnn.scan(rnn.gru_step, *given, **options),
        rnn.init_gru(KEY, 1, 8),
        jnp.ones((6, 8)),
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("precision", ["tensorfloat32", "bfloat16"])
def test_kernel_is_asked_for_by_the_lower_precisions(h100, name, precision):
    layer, params, carry = LAYERS[name]
    text = lowered(jax.grad(loss(layer, precision=precision)), params, X, carry)
    assert load.LAUNCH in text
    assert {shape.half for shape, _ in h100} == {precision == "tensorfloat32"}
    assert {kernel for _, kernel in h100} == {load.FORWARD, load.BACKWARD}


@pytest.mark.parametrize("name", LAYERS)
def test_float32_is_xlas_alone_and_in_full(h100, name):
    layer, params, carry = LAYERS[name]
    with jax.default_matmul_precision(None):
        text = lowered(jax.grad(loss(layer)), params, X, carry)
    assert load.LAUNCH not in text
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products), products


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "reverse", "whole", "lengths"),
    [
        ("lstm", False, True, None),
        ("gru", True, False, LENGTHS),
        ("gru_reset_before", False, True, LENGTHS),
        ("scan", True, True, LENGTHS),
        ("scan", False, False, None),
    ],
    ids=["lstm", "gru", "gru_reset_before", "scan", "scan-last"],
)
def test_elsewhere_the_same_call_is_the_scan(h100, name, reverse, whole, lengths):
    layer, params, carry = LAYERS[name]
    options = {"reverse": reverse, "return_sequences": whole, "lengths": lengths}
    gradients = jax.jit(jax.value_and_grad(loss(layer, precision="tensorfloat32", **options), (0, 1, 2)))
    expected = jax.value_and_grad(loss(layer, backend="scan", **options), (0, 1, 2))(params, X, carry)
    assert not jnp.isnan(expected[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), gradients(params, X, carry), expected
    )
    assert h100  # It was not the scan that was traced.


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ind_rnn", {}),
        ("min_lstm", {"return_sequences": False, "reverse": True}),
        ("lru", {}),
        ("s5", {"return_sequences": False, "reverse": True}),
    ],
    ids=["ind_rnn", "min_lstm-last", "lru", "s5-last"],
)
def test_units_that_see_no_other_have_a_kernel_at_every_precision(h100, name, options):
    """And elsewhere it is the scan, with padding that is no number; readouts are one product for all steps."""
    cell = CELLS[name].cell
    params = cell.init(KEY, 1, 8)
    carry = jax.tree.map(lambda leaf: leaf + 0.5, cell.zero_carry(jnp.zeros((6, 8))))
    x = jnp.where(jnp.arange(9)[None, :, None] < LENGTHS[:, None, None], X, jnp.nan)

    def of(backend, wanted=(0, 1, 2)):
        def layer(params, x, carry, **given):
            # As an argument its values are not known, and a NaN is no error.
            return rnn.scan(cell.step, params, x, carry, lengths=LENGTHS, backend=backend, **options, **given)

        return jax.jit(jax.value_and_grad(loss(layer), wanted))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        of("auto")(params, x, carry),
        of("scan")(params, x, carry),
    )
    text = lowered(of("auto", (0, 2)), params, x, carry)
    assert text.count(f"@{load.LAUNCH}") == 2
    assert {kernel for _, kernel in h100} == {load.FORWARD, load.BACKWARD}
    told = rnn.explain_step(cell.step, params, X, carry)
    assert told.startswith("native: ")
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert bool(products) == ("behind the loop" in told) == (name in ("lru", "s5"))
    assert all("HIGHEST" in line for line in products), products
    # For all steps at once, or for the last alone.
    assert all(("tensor<6x9x" in line) != bool(options) for line in products), products


def test_x_has_a_gradient_where_it_is_asked_for(h100):
    """Its product then stands outside the loop, as inputs that the kernel reads step by step."""
    params = rnn.init_gru(KEY, 1, 8)
    call = recurrence.Call(rnn.gru_step, recurrence.Options("all", False, "bfloat16"), "cuda")
    inside = recurrence.stages_of(call, params, X, jnp.zeros((6, 8)), inline=True).division
    outside = recurrence.stages_of(call, params, X, jnp.zeros((6, 8)), inline=False).division
    assert (inside.count("s"), inside.count("x"), outside.count("s"), outside.count("x")) == (1, 0, 0, 3)
    text = lowered(jax.grad(loss(rnn.gru, precision="bfloat16"), 1), params, X, jnp.zeros((6, 8)))
    assert "tensor<6x9x3x32xf32>" in text


@pytest.mark.parametrize("cell", ["gru", "ind_rnn"])
def test_a_call_has_all_that_the_launcher_reads(h100, cell):
    """Each way once, with every attribute; in float16 the way back is launched thrice, its scales in place."""
    step, params, _ = any_cells.CELLS[cell](8, 1)

    def total(params, x, h):
        return rnn.scan(step, params, x, h, precision="tensorfloat32")[1].sum()

    text = lowered(jax.vmap(jax.grad(total), (None, 0, None)), params, jnp.stack([X, X]), jnp.zeros((6, 8)))
    calls = [line for line in text.splitlines() if f"@{load.LAUNCH}" in line]
    read = re.findall(r'Attr<int64_t>\("(\w+)"\)', Path(gpu.__file__).with_name("launch.cc").read_text())
    assert [set(re.findall(r"(\w+) = -?\d+ : i64", call)) for call in calls] == [set(read)] * 2
    launches = [int(re.search(r"launches = (\d+)", call)[1]) for call in calls]
    assert launches == ([1, 3] if cell == "gru" else [1, 1])
    assert ["output_operand_alias" in call for call in calls] == [False, cell == "gru"]


@pytest.mark.slow
def test_replicas_are_one_call(h100):
    params = jax.vmap(lambda key: rnn.init_gru(key, 1, 8))(jax.random.split(KEY, 5))
    gradient = jax.grad(loss(rnn.gru, precision="bfloat16"))
    text = lowered(jax.vmap(gradient, (0, None, None)), params, X, jnp.zeros((6, 8)))
    assert text.count(f"@{load.LAUNCH}") == 2
    mapped = jax.jit(jax.vmap(gradient, (0, None, None)))(params, X, jnp.zeros((6, 8)))
    alone = gradient(jax.tree.map(lambda leaf: leaf[3], params), X, jnp.zeros((6, 8)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, rtol=2e-5, atol=2e-6), mapped, alone)


def test_what_has_no_kernel_says_why(h100):
    params, h = rnn.init_gru(KEY, 1, 8), jnp.zeros((6, 8))

    def softmax_step(params, h, x):
        h = jax.nn.softmax(rnn.gru_step(params, h, x)[0])
        return h, h

    assert rnn.explain_step(rnn.gru_step, params, X, h, precision="bfloat16").startswith("native: ")
    why = rnn.explain_step(softmax_step, params, X, h, precision="bfloat16")
    assert why.startswith("scan: no kernel can be made of the step: reduce_max of the state")
    assert "test_gpu_backend.py" in why
    assert "precision 'tensorfloat32' and 'bfloat16', not 'float32'" in rnn.explain_step(rnn.gru_step, params, X, h)
    with pytest.raises(ValueError, match=r"backend is 'native', but no kernel can be made of the step: reduce_max"):
        rnn.scan(softmax_step, params, X, h, precision="bfloat16", backend="native")
    end, _ = rnn.scan(softmax_step, params, X, h, precision="bfloat16")
    np.testing.assert_allclose(end.sum(1), 1.0, rtol=1e-5)
    assert rnn.explain(params, X, precision="bfloat16").backend == "native"
    assert rnn.explain(params, X).backend == "fused"
    with pytest.raises(ValueError, match=r"backend is 'native', but the kernel is for precision"):
        rnn.gru(params, X, backend="native")


def test_a_mask_of_the_surroundings_is_the_scans(h100):
    """A step that uses a traced array which is no parameter has no kernel, and is right."""
    params = rnn.init_gru(KEY, 1, 8)

    def run(mask):
        def step(params, h, x):
            h, y = rnn.gru_step(params, h, x)
            return h * mask, y

        return rnn.scan(step, params, X, jnp.zeros((6, 8)), precision="bfloat16")[1].sum()

    mask = jnp.arange(8.0) / 8
    assert load.LAUNCH not in lowered(jax.grad(run), mask)
    assert float(jax.jit(run)(mask)) != float(jax.jit(run)(mask + 1))


def test_kernels_differentiate_once(h100):
    params = rnn.init_gru(KEY, 1, 8)
    with pytest.raises((ValueError, TypeError), match=r"backend='scan'|custom_vjp"):
        jax.hessian(lambda x: loss(rnn.gru, precision="bfloat16")(params, x, jnp.zeros((6, 8))))(X)


def test_without_a_gpu():
    jax.clear_caches()
    assert gpu.problem() == "this process has no NVIDIA GPU"
    params = rnn.init_gru(KEY, 1, 8)
    assert rnn.explain(params, X, platform="gpu", precision="bfloat16").why == "this process has no NVIDIA GPU"
