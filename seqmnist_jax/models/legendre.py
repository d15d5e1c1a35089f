"""The Legendre memory: each value's last `window` steps, as the coefficients of Legendre polynomials.

Voelker, Kajic & Eliasmith 2019, "Legendre Memory Units: Continuous-Time Representation in Recurrent Neural Networks",
without the paths from the hidden state, and from the memory itself, to what the memory reads, as in Chilkuri &
Eliasmith 2021: m' = A m + B x is then a fixed linear function of the sequence, and all steps are one convolution
before the recurrence. Any cell reads (x, m).

  A_ij = (2 i + 1) / window * (-1 if i < j else (-1)^(i - j + 1));  B_i = (2 i + 1) (-1)^i / window,

made discrete for steps of length one by zero-order hold.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.lru_cache(maxsize=8)
def _response(order: int, time: int) -> np.ndarray:
    """The spectrum of what one value leaves in the memory after 0, 1, ... steps, complex64 [1 + time, order].

    At twice the length, so that the convolution is no circular one.
    """
    from scipy import linalg  # at first use: imported by nothing else in training

    i, j = np.arange(order)[:, None], np.arange(order)
    scale = (2 * i + 1) / time
    a = scale * np.where(i < j, -1.0, np.where((i - j) % 2 == 0, -1.0, 1.0))
    b = scale[:, 0] * np.where(j % 2 == 0, 1.0, -1.0)
    # The exponential of [[A, B], [0, 0]] holds both the step and its input.
    whole = linalg.expm(np.block([[a, b[:, None]], [np.zeros((1, order + 1))]]))
    step, state, rows = whole[:-1, :-1], whole[:-1, -1], []
    for _ in range(time):
        rows.append(state)
        state = step @ state
    return np.fft.rfft(rows, 2 * time, axis=0).astype(np.complex64)


def with_memory(x: Array, order: int) -> Array:
    """X [batch, time, features] with the memory of each feature beside it, [batch, time, features * (1 + order)].

    Args:
      x: sequences; what stands past an end must be finite. The memory depends on earlier steps alone but for rounding,
        which is relative to the largest value of all.
      order: coefficients for each feature; the window is the whole sequence.
    """
    time, x = x.shape[1], x.astype(jnp.promote_types(x.dtype, jnp.float32))
    spectrum = jnp.fft.rfft(x, 2 * time, axis=1)[..., None] * _response(order, time)[:, None]
    memory = jnp.fft.irfft(spectrum, 2 * time, axis=1)[:, :time]
    return jnp.concatenate([x, memory.reshape(*x.shape[:2], x.shape[2] * order)], axis=-1)
