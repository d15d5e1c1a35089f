"""A linear recurrence with a complex diagonal matrix whose phases are spread evenly over the sequence.

The recurrence of `lru`, without its direct path from x to y:

  s' = lambda s + gamma (x B);  y = Re(s' C);  lambda = exp(-exp(nu) + i theta);  gamma = sqrt(1 - |lambda|^2).

At the start theta_k = 2 pi (k + 1/2) / T for sequences of T steps, so that the states together tell the steps apart,
and the time constants exp(-nu) are log-uniform between `shortest` and `longest` times T. gamma follows from nu, where
`lru` learns it. A layer is linear in x: what makes a network of it stands behind it, as in `deep`.

Carry: (Re s, Im s). Where only the last y is read there is no loop: s_T = sum over t of lambda^(T - t) u_t is one
product with a matrix of powers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn
from seqmnist_jax.rnn.checks import check_sequences, flag

Array = jax.Array
Params = dict[str, Array]
Carry = tuple[Array, Array]

MOST_STATES = 10**6


def _scaled(params: Params) -> tuple[Array, Array]:
    """Re and Im of gamma B, [features, states] each."""
    gamma = jnp.sqrt(-jnp.expm1(-2 * jnp.exp(params["nu"])))
    b_re, b_im = jnp.split(params["kernel"], 2, axis=-1)
    return gamma * b_re, gamma * b_im


def _read(params: Params, states: Array, precision: str = "float32") -> Array:
    """Re(s C) of states [..., 2 * states], Re s beside Im s."""
    c_re, c_im = jnp.split(params["output_kernel"], 2)
    return rnn.product(states, jnp.concatenate([c_re, -c_im]), precision)


def _move(params: Params, carry: Carry, x: Array) -> tuple[Carry, Array]:
    """One step of the states alone: the carry, and it as one array."""
    re, im = carry
    size = jnp.exp(-jnp.exp(params["nu"]))
    cos, sin = size * jnp.cos(params["theta"]), size * jnp.sin(params["theta"])
    b_re, b_im = _scaled(params)
    re, im = cos * re - sin * im + x @ b_re, sin * re + cos * im + x @ b_im
    return (re, im), jnp.concatenate([re, im], axis=-1)


def step(params: Params, carry: Carry, x: Array, precision: str = "float32") -> tuple[Carry, Array]:
    """One step: Re s and Im s [batch, states], and x [batch, features]."""
    carry, states = _move(params, carry, x)
    return carry, _read(params, states, precision)


def init(
    key: Array,
    features: int,
    hidden_size: int,
    sequence_length: int = 784,
    states: int = 0,
    shortest: float = 0.125,
    longest: float = 2.0,
) -> Params:
    """The parameters of such a layer, float32.

    Args:
      key: a PRNG key.
      features, hidden_size: of x and y.
      sequence_length: T, the steps over which the phases are spread.
      states: complex ones; as many as y has features where 0.
      shortest, longest: the ends of the time constants, in sequence lengths.

    Returns:
      nu, theta [states]; kernel [features, 2 * states], Re B beside Im B; output_kernel [2 * states, hidden], Re C
      above Im C.

    Raises:
      ValueError: the time constants are no interval above 0, or there are fewer than 0 states.
    """
    if not 0 < shortest <= longest < math.inf or states not in range(MOST_STATES + 1):
        raise ValueError(
            f"shortest, longest, states are {shortest}, {longest}, {states}; expected 0 < shortest <= longest, and a "
            f"whole number of states, to {MOST_STATES:,}"
        )
    states = int(states) or hidden_size
    keys = jax.random.split(key, 3)
    ends = math.log(shortest * sequence_length), math.log(longest * sequence_length)
    return {
        "nu": -jax.random.uniform(keys[0], (states,), jnp.float32, *ends),
        "theta": 2 * math.pi / sequence_length * (jnp.arange(states, dtype=jnp.float32) + 0.5),
        "kernel": jax.random.normal(keys[1], (features, 2 * states), jnp.float32) / (2 * features) ** 0.5,
        "output_kernel": jax.random.normal(keys[2], (2 * states, hidden_size), jnp.float32) / states**0.5,
    }


def _zero_carry(zero: Array, params: Params) -> Carry:
    states = jnp.zeros((zero.shape[0], params["nu"].size), zero.dtype)
    return states, states


def _last(params: Params, x: Array, reverse: bool, precision: str) -> tuple[Carry, Array]:
    """The states after all steps of x [batch, time, features] from zero, as carry and as one array."""
    # Of x's own dtype, integers of eight bits among them, there may not be as many.
    dtype = jnp.promote_types(jnp.result_type(x, params["nu"]), jnp.float32)
    ago = jnp.arange(x.shape[1], dtype=dtype)[:, None]
    ago = ago if reverse else ago[::-1]
    size, phase = jnp.exp(-ago * jnp.exp(params["nu"])), ago * params["theta"]
    # [batch, features, states]
    columns = jnp.swapaxes(x, 1, 2).astype(dtype)
    re, im = (rnn.product(columns, size * part, precision) for part in (jnp.cos(phase), jnp.sin(phase)))
    b_re, b_im = _scaled(params)
    re, im = (re * b_re - im * b_im).sum(1), (re * b_im + im * b_re).sum(1)
    end = re.astype(jnp.result_type(x, params["nu"])), im.astype(jnp.result_type(x, params["nu"]))
    return end, jnp.concatenate(end, axis=-1)


STATES = rnn.cell(_move, init, _zero_carry)


def layer(
    params: Params, x: Array, carry: Carry | None = None, *, precision: str = "float32", **options: Any
) -> tuple[Carry, Array]:
    """The layer over a whole sequence; arguments and errors as `rnn.lstm`.

    The states move by a loop, which has no product with them, and are read after it.
    """
    reverse = options.get("reverse", False)
    given = {name: option for name, option in options.items() if option is not None and name != "reverse"}
    if carry is None and given in ({"return_sequences": False}, {"return_sequences": False, "backend": "auto"}):
        x, *_ = check_sequences(x)
        end, states = _last(params, x, flag("reverse", reverse), precision)
    else:
        end, states = STATES.layer(params, x, carry, precision=precision, **options)
    return end, _read(params, states, precision)


CELL = STATES._replace(layer=layer, step=step)
