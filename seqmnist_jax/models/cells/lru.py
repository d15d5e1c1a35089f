"""The linear recurrent unit: a linear recurrence with a complex diagonal matrix.

Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences":

  s' = lambda s + gamma (x B);  y = Re(s' C) + x D;  lambda = exp(-exp(nu) + i exp(theta)).

As many complex states as units, each a pair of reals. Carry: (Re s, Im s); y is no part of it. In the paper y goes
through a gated linear unit with a skip connection; as a layer by itself it is linear in x, and D is a matrix, for x
need not have as many features as the layer has units.

At the start |lambda|^2 is uniform between r_min^2 and r_max^2, the phase between 0 and max_phase, and gamma is
sqrt(1 - |lambda|^2), a parameter as nu and theta are. The defaults are those of the paper's pseudocode. To remember
hundreds of steps, as pixels in sequence ask for, r_min and r_max are taken close to 1.
"""

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]
Carry = tuple[Array, Array]


def step(params: Params, carry: Carry, x: Array) -> tuple[Carry, Array]:
    """One step: Re s and Im s [batch, hidden], and x [batch, features].

    Factors are multiplied into the matrices, not the products: so a kernel needs no product again for a gradient.
    """
    re, im = carry
    size, phase, gamma = jnp.exp(-jnp.exp(params["nu"])), jnp.exp(params["theta"]), jnp.exp(params["gamma"])
    cos, sin = size * jnp.cos(phase), size * jnp.sin(phase)
    b_re, b_im = jnp.split(params["kernel"], 2, axis=-1)
    re, im = cos * re - sin * im + x @ (gamma * b_re), sin * re + cos * im + x @ (gamma * b_im)
    c_re, c_im = jnp.split(params["output_kernel"], 2)
    return (re, im), re @ c_re + im @ -c_im + x @ params["skip_kernel"]


def init(
    key: Array, features: int, hidden_size: int, r_min: float = 0.0, r_max: float = 1.0, max_phase: float = 6.28
) -> Params:
    """The parameters of an LRU, float32.

    Returns:
      nu, theta, gamma [hidden], the logarithms of the equations'; kernel [features, 2 * hidden], Re B beside Im B;
      output_kernel [2 * hidden, hidden], Re C above Im C; skip_kernel [features, hidden].

    Raises:
      ValueError: the ring is none, or there is no phase.
    """
    if not 0 <= r_min < r_max <= 1 or not max_phase > 0:
        raise ValueError(
            f"r_min, r_max, max_phase are {r_min}, {r_max}, {max_phase}; expected 0 <= r_min < r_max <= 1 and a phase "
            "above 0"
        )
    keys = jax.random.split(key, 5)
    # In (0, 1]: a state with |lambda| = 1 would have no input, and one with phase 0 no logarithm.
    ring, part = (1.0 - jax.random.uniform(k, (hidden_size,), jnp.float32) for k in keys[:2])
    square = jnp.minimum(r_min**2 + ring * (r_max**2 - r_min**2), 1.0 - 1e-6)
    return {
        "nu": jnp.log(-0.5 * jnp.log(square)),
        "theta": jnp.log(max_phase * part),
        "gamma": 0.5 * jnp.log1p(-square),
        "kernel": jax.random.normal(keys[2], (features, 2 * hidden_size), jnp.float32) / (2 * features) ** 0.5,
        "output_kernel": jax.random.normal(keys[3], (2 * hidden_size, hidden_size), jnp.float32) / hidden_size**0.5,
        "skip_kernel": jax.random.normal(keys[4], (features, hidden_size), jnp.float32) / features**0.5,
    }


CELL = rnn.cell(step, init, lambda zero: (zero, zero))
