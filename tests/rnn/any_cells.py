"""Steps as their users write them, the package's among them, with parameters drawn and how many arrays they carry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.models import CELLS as KNOWN

sigmoid = jax.nn.sigmoid


def _draw(seed, **shapes):
    rng = np.random.default_rng(seed)
    scale = {name: np.sqrt(shape[0]) if len(shape) > 1 else 3.0 for name, shape in shapes.items()}
    return {
        name: np.asarray(rng.standard_normal(shape) / scale[name], np.float32).astype(np.float64)
        for name, shape in shapes.items()
    }


def gru(hidden, features):
    def step(p, h, x):
        x_r, x_z, x_n = jnp.split(x @ p["W"] + p["b"], 3, -1)
        h_r, h_z, h_n = jnp.split(h @ p["U"] + p["c"], 3, -1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        h = (1 - z) * n + z * h
        return h, h

    return step, _draw(2, W=(features, 3 * hidden), U=(hidden, 3 * hidden), b=(3 * hidden,), c=(3 * hidden,)), 1


def gru_reset_before(hidden, features):
    def step(p, h, x):
        given = x @ p["W"] + p["b"]
        r, z = jnp.split(sigmoid(given[:, : 2 * hidden] + h @ p["U"]), 2, -1)
        n = jnp.tanh(given[:, 2 * hidden :] + (r * h) @ p["V"])
        h = n + z * (h - n)
        return h, h

    return step, _draw(3, W=(features, 3 * hidden), U=(hidden, 2 * hidden), V=(hidden, hidden), b=(3 * hidden,)), 1


def lstm(hidden, features):
    def step(p, carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ p["W"] + h @ p["U"] + p["b"], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return step, _draw(4, W=(features, 4 * hidden), U=(hidden, 4 * hidden), b=(4 * hidden,)), 2


def lem(hidden, features):
    def step(p, carry, x):
        y, z = carry
        given = x @ p["W"] + p["b"]
        a, b, c = jnp.split(given[:, : 3 * hidden] + y @ p["U"], 3, -1)
        a, b = p["dt"] * sigmoid(a), p["dt"] * sigmoid(b)
        z = (1 - a) * z + a * jnp.tanh(c)
        y = (1 - b) * y + b * jnp.tanh(z @ p["V"] + given[:, 3 * hidden :])
        return (y, z), y

    shapes = {"W": (features, 4 * hidden), "U": (hidden, 3 * hidden), "V": (hidden, hidden), "b": (4 * hidden,)}
    return step, _draw(7, **shapes) | {"dt": np.asarray(0.625)}, 2


def concatenating(hidden, features):
    """As TensorFlow's cells were written: [x, h] times one matrix; relu, a `where`, and x itself in a gate."""

    def step(p, h, x):
        r, z = jnp.split(sigmoid(jnp.concatenate([x, h], 1) @ p["W"] + 1.0), 2, 1)
        n = jax.nn.relu(jnp.concatenate([x, r * h], -1) @ p["V"] + p["b"])
        n = jnp.where(n > 0.2, n, 0.1 * n)
        h = jax.nn.silu(n) * (1 - z) + z * h * jnp.cos(x[:, :1])
        return h, jnp.concatenate([h, n], 1)

    width = features + hidden
    return step, _draw(9, W=(width, 2 * hidden), V=(width, hidden), b=(1, hidden)), 1


def ind_rnn(hidden, features):
    """No product of the state."""

    def step(p, h, x):
        h = jnp.tanh(x @ p["W"] + p["u"] * h + p["b"])
        return h, h

    return step, _draw(10, W=(features, hidden), u=(hidden,), b=(hidden,)), 1


def three_rounds(hidden, features):
    """Three products one after the other, two more beside them, one matrix transposed, two states."""

    def step(p, carry, x):
        u, v = carry
        a = jnp.exp(-jnp.abs(u @ p["A"] + x @ p["W"]))
        b = jnp.einsum("bi,oi->bo", a * v, p["B"]) + v @ p["C"]
        c = jnp.maximum(jnp.minimum(b, 0.8), -0.5) @ p["D"] + u @ p["E"]
        u, v = 0.5 * u + 0.5 * jnp.tanh(c), v + 0.1 * jnp.sin(b) * (u > 0)
        return (u, v), jnp.concatenate([v, a * c], axis=1)

    square = dict.fromkeys("ABCDE", (hidden, hidden))
    return step, _draw(11, W=(features, hidden), **square), 2


def known(name, hidden, features):
    """One of the package's cells, with parameters drawn as those of the others are."""
    cell = KNOWN[name].cell
    shapes = {key: value.shape for key, value in cell.init(jax.random.key(0), features, hidden).items()}
    return cell.step, _draw(len(name), **shapes), len(jax.tree.leaves(cell.zero_carry(0)))


CELLS = {
    **{name: functools.partial(known, name) for name in ("elman", "peephole_lstm", "ur_lstm", "cornn")},
    **{f.__name__: f for f in (gru, gru_reset_before, lstm, lem, concatenating, ind_rnn, three_rounds)},
}
