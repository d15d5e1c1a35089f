import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from seqmnist_jax import rnn

BACKENDS = ("scan", "fused", "native")


@pytest.fixture(autouse=True, scope="module")
def full_matmul_precision():
    """Accelerators that shorten float32 products by default must not do so in comparisons."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True, scope="session")
def native_problem(cache_dir, quick_cxx):
    """Why there is no kernel, or None; asked here first, before a test changes where it is looked for."""
    return rnn.native_problem()


@pytest.fixture(scope="session")
def need_native(native_problem):
    """Skips what needs the kernel where there is none."""

    def need(backend="native"):
        if backend == "native" and native_problem is not None:
            pytest.skip(f"no native kernel: {native_problem}")

    return need


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request, need_native):
    need_native(request.param)
    return request.param


@pytest.fixture(scope="session")
def make_layer(need_native):
    """A function that makes a `layer` from its name, 'lstm-native' or, with the backend left to 'auto', 'lstm'."""

    def make(name):
        cell, _, backend = name.partition("-")
        need_native(backend)
        of_cell = {
            "lstm": {"gates": 4, "init": rnn.init_lstm, "run": rnn.lstm, "step": rnn.lstm_step},
            "gru": {"gates": 3, "init": rnn.init_gru, "run": rnn.gru, "step": rnn.gru_step},
        }[cell]
        if backend:
            of_cell["run"] = functools.partial(of_cell["run"], backend=backend)
        return SimpleNamespace(name=cell, backend=backend or "auto", **of_cell)

    return make


# Session scope, because hypothesis rejects function-scoped fixtures. Modules whose tests ask nothing of
# a backend have a fixture of their own in this one's place.
@pytest.fixture(params=[f"{cell}-{backend}" for cell in ("lstm", "gru") for backend in BACKENDS], scope="session")
def layer(request, make_layer):
    return make_layer(request.param)


def drawer(layer):
    """A function that draws (params, x, carry) as numpy arrays, every entry (biases too) away from zero."""

    def draw(seed=0, batch=3, time=7, features=5, hidden=6, dtype=np.float32):
        if layer.backend == "native" and np.dtype(dtype) != np.float32:
            pytest.skip("the kernel computes in float32 only")
        rng = np.random.default_rng(seed)

        def normal(*shape, scale=1.0):
            return (scale * rng.standard_normal(shape)).astype(dtype)

        params = {
            "kernel": normal(features, layer.gates * hidden, scale=0.5),
            "recurrent_kernel": normal(hidden, layer.gates * hidden, scale=0.5),
            "bias": normal(layer.gates * hidden, scale=0.5),
        }
        if layer.name == "gru":
            params["recurrent_bias"] = normal(layer.gates * hidden, scale=0.5)
        x = normal(batch, time, features)
        carry = normal(batch, hidden) if layer.name == "gru" else (normal(batch, hidden), normal(batch, hidden))
        return params, x, carry

    return draw


@pytest.fixture(scope="session")
def make_draw():
    """The same for modules with a `layer` of their own, which need a `draw` of their own too."""
    return drawer


@pytest.fixture(scope="session")
def draw(layer):
    return drawer(layer)
