"""The equations of the field's cells, from their papers, in NumPy and float64: what the cells are compared with.

Each is ``step(p, carry, x) -> (carry, y)`` over p of the cell's own parameters; complex numbers are complex here.
"""

import numpy as np
from scipy import linalg


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def blocks(p, name, count):
    return np.split(p[name], count, axis=-1)


def elman(p, h, x):
    h = np.tanh(x @ p["kernel"] + h @ p["recurrent_kernel"] + p["bias"])
    return h, h


def refined(f, r):
    """Between f^2 where r is 0 and 1 - (1 - f)^2 where it is 1."""
    return (1 - r) * f**2 + r * (1 - (1 - f) ** 2)


def ur_lstm(p, carry, x):
    c, h = carry
    (w, u, b) = (blocks(p, name, 4) for name in ("kernel", "recurrent_kernel", "bias"))
    f, r, n, o = (x @ w[k] + h @ u[k] + b[k] for k in range(4))
    g = refined(sigmoid(f), sigmoid(r))
    c = g * c + (1 - g) * np.tanh(n)
    h = sigmoid(o) * np.tanh(c)
    return (c, h), h


def ur_gru(p, h, x):
    w, b, u, d = (blocks(p, name, 4) for name in ("kernel", "bias", "recurrent_kernel", "recurrent_bias"))
    f, r, s = (sigmoid(x @ w[k] + b[k] + h @ u[k] + d[k]) for k in range(3))
    n = np.tanh(x @ w[3] + b[3] + s * (h @ u[3] + d[3]))
    g = refined(f, r)
    h = g * h + (1 - g) * n
    return h, h


def peephole_lstm(p, carry, x):
    c, h = carry
    (w, u, b), (p_i, p_f, p_o) = (
        (blocks(p, n, 4) for n in ("kernel", "recurrent_kernel", "bias")),
        blocks(p, "peepholes", 3),
    )
    i, f, g, o = (x @ w[k] + h @ u[k] + b[k] for k in range(4))
    new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
    h = sigmoid(o + p_o * new) * np.tanh(new)
    return (new, h), h


def ind_rnn(p, h, x, bound=2 ** (1 / 784)):
    h = np.maximum(x @ p["kernel"] + np.clip(p["recurrent_kernel"], -bound, bound) * h + p["bias"], 0)
    return h, h


def cornn(p, carry, x, dt=0.076, gamma=0.4, epsilon=8.0):
    y, z = carry
    drive = np.tanh(y @ p["recurrent_kernel"] + z @ p["velocity_kernel"] + x @ p["kernel"] + p["bias"])
    z = z + dt * (drive - gamma * y - epsilon * z)
    return (y + dt * z, z), y + dt * z


def lem(p, carry, x, dt=0.31):
    y, z = carry
    w, b, u = blocks(p, "kernel", 4), blocks(p, "bias", 4), blocks(p, "recurrent_kernel", 3)
    of_z, of_y = (dt * sigmoid(x @ w[k] + y @ u[k] + b[k]) for k in range(2))
    z = (1 - of_z) * z + of_z * np.tanh(x @ w[2] + y @ u[2] + b[2])
    y = (1 - of_y) * y + of_y * np.tanh(x @ w[3] + z @ p["memory_kernel"] + b[3])
    return (y, z), y


def min_gru(p, h, x):
    z, n = blocks({"kernel": x @ p["kernel"] + p["bias"]}, "kernel", 2)
    z = sigmoid(z)
    h = (1 - z) * n + z * h
    return h, h


def min_lstm(p, h, x):
    f, i, n = (x @ w + b for w, b in zip(blocks(p, "kernel", 3), blocks(p, "bias", 3), strict=True))
    total = sigmoid(f) + sigmoid(i)
    h = sigmoid(f) / total * h + sigmoid(i) / total * n
    return h, h


def exp_rnn(p, h, x):
    size = h.shape[1]
    skew = np.zeros((size, size))
    skew[np.triu_indices(size, 1)] = p["skew"]
    v = x @ p["kernel"] + h @ linalg.expm(skew - skew.T)
    h = np.sign(v) * np.maximum(np.abs(v) + p["bias"], 0)
    return h, h


def _complex(p):
    """B and C."""
    (b_re, b_im), (c_re, c_im) = blocks(p, "kernel", 2), np.split(p["output_kernel"], 2)
    return b_re + 1j * b_im, c_re + 1j * c_im


def lru(p, carry, x):
    b, c = _complex(p)
    poles = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    s = poles * (carry[0] + 1j * carry[1]) + np.exp(p["gamma"]) * (x @ b)
    return (s.real, s.imag), (s @ c).real + x @ p["skip_kernel"]


def s5(p, carry, x):
    b, c = _complex(p)
    poles, dt = -np.exp(p["decay"]) + 1j * p["omega"], np.exp(p["dt"])
    s = np.exp(poles * dt) * (carry[0] + 1j * carry[1]) + (np.exp(poles * dt) - 1) / poles * (x @ b)
    return (s.real, s.imag), 2 * (s @ c).real + x @ p["skip_kernel"]


def diagonal(p, carry, x):
    b, c = _complex(p)
    poles = np.exp(-np.exp(p["nu"]) + 1j * p["theta"])
    s = poles * (carry[0] + 1j * carry[1]) + np.sqrt(1 - abs(poles) ** 2) * (x @ b)
    return (s.real, s.imag), (s @ c).real
