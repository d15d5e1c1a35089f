"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax import rnn

README = (Path(__file__).parent.parent / "README.md").read_text()


def block_with(text):
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in block]
    assert len(blocks) == 1, f"{len(blocks)} code blocks hold {text!r}"
    return blocks[0]


def test_swap_from_flax():
    names = {"nn": nn}
    exec(block_with("rnn.init_gru, x.shape[-1]"), names)
    net = names["Net"]()
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    variables = net.init(jax.random.key(1), x)
    y = net.apply(variables, x)
    # What it replaces, with the same weights.
    before = nn.RNN(nn.GRUCell(128))
    theirs = {"params": {"cell": rnn.to_flax(variables["params"]["rnn"])}}
    np.testing.assert_allclose(y, before.apply(theirs, x), atol=1e-5)


def test_trained_flax_weights_move():
    before = nn.RNN(nn.GRUCell(128))
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    variables = before.init(jax.random.key(1), x)
    names = {"variables": variables, "rnn": rnn, "x": x}
    exec(block_with("rnn.from_flax"), names)
    np.testing.assert_allclose(names["y"], before.apply(variables, x), atol=1e-5)


def test_library_block():
    names = {
        "x": jnp.ones((2, 5, 1)),
        "lengths": np.array([3, 5]),
        "my_step": lambda params, carry, x: (carry + params * x, carry),
        "my_params": 2.0,
        "my_carry": jnp.zeros((2, 1)),
    }
    exec(block_with("my_step"), names)
    assert names["outputs"].shape == (2, 5, 1)
