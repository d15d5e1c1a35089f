"""A diagonal state-space layer: a linear differential equation, read at steps of a length that is learned.

The layer of Smith et al. 2023 (S5, "Simplified State Space Layers for Sequence Modeling"), with the eigenvalues of
Gu et al. 2022 (S4D-Lin, "On the Parameterization and Initialization of Diagonal State Space Models"):

  s' = exp(L dt) s + ((exp(L dt) - 1) / L) (x B);  y = 2 Re(s' C) + x D,

where each complex state stands for itself and its conjugate, and its input holds still for a step (zero-order hold). As
many states as units, each a pair of reals. Carry: (Re s, Im s); y is no part of it. The papers put y through a
nonlinearity with a skip connection; as a layer by itself it is linear in x, and D is a matrix, as in `lru`.

L starts at -1/2 + i pi n, n = 0 to hidden - 1 (S5's starts at the eigenvalues of HiPPO-N, in blocks); dt, one for each
state, log-uniform between dt_min and dt_max. B starts with the variance 1 / features, as the LRU's (S5's with one over
twice the states), either part of C with 1 / (2 hidden), as S5's, D with 1 / features.
"""

import math

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
    decay, omega, dt = -jnp.exp(params["decay"]), params["omega"], jnp.exp(params["dt"])
    size = jnp.exp(decay * dt)
    cos, sin = size * jnp.cos(omega * dt), size * jnp.sin(omega * dt)
    # (exp(L dt) - 1) / L, whose numerator is small where dt is.
    less = jnp.expm1(decay * dt) * jnp.cos(omega * dt) - 2 * jnp.sin(omega * dt / 2) ** 2
    square = decay**2 + omega**2
    hold_re, hold_im = (less * decay + sin * omega) / square, (sin * decay - less * omega) / square
    b_re, b_im = jnp.split(params["kernel"], 2, axis=-1)
    re, im = (
        cos * re - sin * im + x @ (hold_re * b_re - hold_im * b_im),
        sin * re + cos * im + x @ (hold_re * b_im + hold_im * b_re),
    )
    c_re, c_im = jnp.split(params["output_kernel"], 2)
    return (re, im), re @ (2 * c_re) + im @ (-2 * c_im) + x @ params["skip_kernel"]


def init(key: Array, features: int, hidden_size: int, dt_min: float = 1e-3, dt_max: float = 1e-1) -> Params:
    """The parameters of such a layer, float32.

    Returns:
      decay, omega, dt [hidden], the logarithm of -Re L, Im L, the logarithm of dt; kernel [features, 2 * hidden], Re B
      beside Im B; output_kernel [2 * hidden, hidden], Re C above Im C; skip_kernel [features, hidden].

    Raises:
      ValueError: dt_min and dt_max are no interval above 0.
    """
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min, dt_max are {dt_min}, {dt_max}; expected 0 < dt_min <= dt_max")
    keys = jax.random.split(key, 4)
    normal = jax.random.normal
    return {
        "decay": jnp.full((hidden_size,), math.log(0.5), jnp.float32),
        "omega": jnp.pi * jnp.arange(hidden_size, dtype=jnp.float32),
        "dt": jax.random.uniform(keys[0], (hidden_size,), jnp.float32, math.log(dt_min), math.log(dt_max)),
        "kernel": normal(keys[1], (features, 2 * hidden_size), jnp.float32) / (2 * features) ** 0.5,
        "output_kernel": normal(keys[2], (2 * hidden_size, hidden_size), jnp.float32) / (2 * hidden_size) ** 0.5,
        "skip_kernel": normal(keys[3], (features, hidden_size), jnp.float32) / features**0.5,
    }


CELL = rnn.cell(step, init, lambda zero: (zero, zero))
