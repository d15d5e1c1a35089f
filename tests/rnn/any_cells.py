"""Steps as their users write them, the package's among them, with parameters drawn and how many arrays they carry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

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


def rotation(hidden, features):
    """A linear recurrence, complex as a pair of reals, and no product of the state."""

    def step(p, carry, x):
        re, im = carry
        size, phase = jnp.exp(-jnp.exp(p["nu"])), jnp.exp(p["theta"])
        u = x @ p["W"]
        re, im = size * (jnp.cos(phase) * re - jnp.sin(phase) * im), size * (jnp.sin(phase) * re + jnp.cos(phase) * im)
        re, im = re + u[:, :hidden], im + u[:, hidden:]
        return (re, im), re - 0.5 * im

    return step, _draw(12, W=(features, 2 * hidden), nu=(hidden,), theta=(hidden,)), 2


def diagonal(hidden, features):
    """A linear recurrence of pairs, with a gate made of x; where x has as many columns they are read as they are."""

    def step(p, carry, x):
        (re, im), cos, sin = carry, 0.9 * jnp.cos(p["w"]), 0.9 * jnp.sin(p["w"])
        u, gate = jnp.split(x if "B" not in p else x @ p["B"], 2, axis=1)
        gate = jax.nn.sigmoid(gate + p["b"])
        re, im = cos * re - sin * im + gate * u, sin * re + cos * im + (1 - gate) * u
        return (re, im), jnp.concatenate([re, im], axis=1)

    matrix = {} if features == 2 * hidden else {"B": (features, 2 * hidden)}
    return step, _draw(12, w=(hidden,), b=(hidden,), **matrix), 2


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
    **{f.__name__: f for f in (gru, gru_reset_before, lstm, lem, concatenating, ind_rnn, diagonal, three_rounds)},
}


# ---- Random cells ----

UNARY = [
    jnp.tanh,
    jax.nn.sigmoid,
    lambda a: jnp.exp(-jnp.abs(a)),
    lambda a: 0.5 * a * a,
    jax.nn.relu,
    lambda a: 1.0 - a,
    jnp.sin,
]
BINARY = [
    lambda a, b: 0.5 * (a + b),
    lambda a, b: a * b,
    lambda a, b: a - 0.5 * b,
    jnp.maximum,
    lambda a, b: jnp.where(a > 0.1, a, 0.3 * b),
    lambda a, b: a / (1.0 + b * b),
]


@st.composite
def random_cells(draw):
    """A step with one to three rounds of one to five products; all that it is made of is drawn."""
    carries = draw(st.integers(1, 2))
    rounds = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3).filter(lambda r: sum(r) <= 5))
    picks = st.integers(0, 99)
    stage = st.lists(st.tuples(picks, picks, picks), min_size=0, max_size=4)
    plan = [(draw(stage), [(draw(picks), draw(picks)) for _ in range(count)]) for count in rounds]
    ends = draw(st.lists(st.tuples(picks, picks), min_size=carries, max_size=carries))
    outputs = draw(st.lists(picks, min_size=1, max_size=2))
    last = draw(stage)

    def cell(hidden, features):
        rng = np.random.default_rng(7)

        def matrix(*shape):
            return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32).astype(np.float64)

        params = {"W": matrix(features, 2 * hidden), "b": matrix(2 * hidden), "v": matrix(2, hidden)}
        params["U"] = [matrix(hidden, hidden) for _ in range(sum(rounds))]

        def elementwise(values, program):
            for op, i, j in program:
                a, b = values[i % len(values)], values[j % len(values)]
                ops = UNARY + BINARY
                f = ops[op % len(ops)]
                values.append(f(a) if f in UNARY else f(a, b))

        def step(p, carry, x):
            state = list(carry) if carries > 1 else [carry]
            inputs = x @ p["W"] + p["b"]
            values = [*state, inputs[:, :hidden], inputs[:, hidden:], state[0] * p["v"][0], state[-1] + p["v"][1]]
            matrices = iter(p["U"])
            for program, products in plan:
                elementwise(values, program)
                sources = [values[i % len(values)] for i, _ in products]
                made = [
                    jnp.tanh(s) @ next(matrices) if how % 2 else s @ next(matrices)
                    for s, (_, how) in zip(sources, products, strict=True)
                ]
                if len(made) == 2 and products[0][1] % 3 == 0:
                    made = [made[0] + made[1]]
                values += made
            elementwise(values, last)
            values = values[::-1]
            new = [
                0.5 * c + 0.5 * jnp.tanh(values[i % len(values)]) if how % 2 else jnp.tanh(values[i % len(values)])
                for c, (i, how) in zip(state, ends, strict=True)
            ]
            y = jnp.concatenate([jnp.tanh(values[i % len(values)]) for i in outputs], axis=1)
            return (tuple(new) if carries > 1 else new[0]), y

        return step, params, carries

    return cell
