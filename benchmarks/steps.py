"""Cells of the field as a user would write them: a step and its parameters, nothing that knows a device or a kernel.

What the engine makes of a cell that it has never seen is measured with these. Each step is
``step(params, carry, x) -> (carry, y)``, as `rnn.scan` takes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Array]

# Of the published recipes on permuted pixels.
LEM_DT = 0.31
CORNN_DT, CORNN_GAMMA, CORNN_EPSILON = 0.076, 0.4, 8.0


class Cell(NamedTuple):
    """A cell: its step, its parameters from (key, features, hidden), and how many arrays its carry has."""

    step: Callable[[Params, Any, Array], tuple[Any, Array]]
    init: Callable[[Array, int, int], Params]
    carries: int

    def zero_carry(self, batch: int, hidden: int) -> Any:
        """The carry before the first step."""
        zeros = jnp.zeros((batch, hidden))
        return zeros if self.carries == 1 else (zeros,) * self.carries


def _kernel(key: Array, rows: int, columns: int) -> Array:
    """Uniform, with the variance that Glorot gives a square matrix of so many rows."""
    limit = (3.0 / rows) ** 0.5
    return jax.random.uniform(key, (rows, columns), minval=-limit, maxval=limit)


def _params(key: Array, features: int, hidden: int, gates: int, recurrent: int) -> Params:
    """W for the input of all gates, U for the state of some, a bias for all."""
    w, u, b = jax.random.split(key, 3)
    return {
        "W": _kernel(w, features, gates * hidden),
        "U": _kernel(u, hidden, recurrent * hidden),
        "b": 0.1 * jax.random.normal(b, (gates * hidden,)),
    }


def elman_step(params: Params, h: Array, x: Array) -> tuple[Array, Array]:
    """Elman 1990: h' = tanh(x W + h U + b)."""
    h = jnp.tanh(x @ params["W"] + h @ params["U"] + params["b"])
    return h, h


def init_elman(key: Array, features: int, hidden: int) -> Params:
    """Parameters of `elman_step`."""
    return _params(key, features, hidden, 1, 1)


def ur_lstm_step(params: Params, carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
    """Gu et al. 2020, an LSTM whose forget gate is refined by another, and whose input gate is what it leaves."""
    c, h = carry
    f, r, u, o = jnp.split(x @ params["W"] + h @ params["U"] + params["b"], 4, axis=-1)
    f, r = jax.nn.sigmoid(f), jax.nn.sigmoid(r)
    g = 2 * r * f + (1 - 2 * r) * f**2
    c = g * c + (1 - g) * jnp.tanh(u)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def init_ur_lstm(key: Array, features: int, hidden: int) -> Params:
    """Parameters of `ur_lstm_step`: forget gates evenly between closed and open, the refining ones against them."""
    params = _params(key, features, hidden, 4, 4)
    share = jax.random.uniform(jax.random.fold_in(key, 1), (hidden,), minval=1 / hidden, maxval=1 - 1 / hidden)
    forget = jnp.log(share) - jnp.log1p(-share)
    params["b"] = params["b"].at[: 2 * hidden].set(jnp.concatenate([forget, -forget]))
    return params


def lem_step(params: Params, carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
    """Rusch et al. 2022, long expressive memory: two states, the second of which sees the first's new value."""
    y, z = carry
    hidden = y.shape[-1]
    i = x @ params["W"] + params["b"]
    a, b, c = jnp.split(i[:, : 3 * hidden] + y @ params["U"], 3, axis=-1)
    a, b = LEM_DT * jax.nn.sigmoid(a), LEM_DT * jax.nn.sigmoid(b)
    z = (1 - a) * z + a * jnp.tanh(c)
    y = (1 - b) * y + b * jnp.tanh(z @ params["Z"] + i[:, 3 * hidden :])
    return (y, z), y


def init_lem(key: Array, features: int, hidden: int) -> Params:
    """Parameters of `lem_step`."""
    return _params(key, features, hidden, 4, 3) | {"Z": _kernel(jax.random.fold_in(key, 1), hidden, hidden)}


def cornn_step(params: Params, carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
    """Rusch and Mishra 2021, coupled oscillators: positions y and velocities z."""
    y, z = carry
    force = jnp.tanh(y @ params["U"] + z @ params["Z"] + x @ params["W"] + params["b"])
    z = z + CORNN_DT * (force - CORNN_GAMMA * y - CORNN_EPSILON * z)
    y = y + CORNN_DT * z
    return (y, z), y


def init_cornn(key: Array, features: int, hidden: int) -> Params:
    """Parameters of `cornn_step`."""
    return _params(key, features, hidden, 1, 1) | {"Z": _kernel(jax.random.fold_in(key, 1), hidden, hidden)}


CELLS = {
    "lem": Cell(lem_step, init_lem, 2),
    "cornn": Cell(cornn_step, init_cornn, 2),
    "elman": Cell(elman_step, init_elman, 1),
    "ur_lstm": Cell(ur_lstm_step, init_ur_lstm, 2),
}
