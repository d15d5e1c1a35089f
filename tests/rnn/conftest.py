from types import SimpleNamespace

import jax
import numpy as np
import pytest

from seqmnist_jax import rnn


@pytest.fixture(autouse=True, scope="module")
def full_matmul_precision():
    """Accelerators that shorten float32 products by default must not do so in comparisons."""
    with jax.default_matmul_precision("highest"):
        yield


# Session scope, because hypothesis rejects function-scoped fixtures.
@pytest.fixture(params=["lstm", "gru"], scope="session")
def layer(request):
    if request.param == "lstm":
        return SimpleNamespace(name="lstm", gates=4, init=rnn.init_lstm, run=rnn.lstm, step=rnn.lstm_step)
    return SimpleNamespace(name="gru", gates=3, init=rnn.init_gru, run=rnn.gru, step=rnn.gru_step)


@pytest.fixture(scope="session")
def draw(layer):
    """A function that draws (params, x, carry) as numpy arrays, every entry (biases too) away from zero."""

    def draw(seed=0, batch=3, time=7, features=5, hidden=6, dtype=np.float32):
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
