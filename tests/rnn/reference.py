"""The layers and their gradients as loops over time in NumPy's float64, written apart from the package.

Values follow the published equations; gradients are derived by hand and held against complex
steps in test_backends.py. Everything is a flat dict from a name to an array, so that two
implementations can be compared tensor by tensor.
"""

from typing import NamedTuple

import numpy as np

# Gates of a cell and arrays of its carry.
GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3}


class Case(NamedTuple):
    """Arguments of a layer and the cotangents of its results, all float64; a carry is {'h': ..., 'c': ...}."""

    params: dict
    x: np.ndarray
    carry: dict
    outputs_bar: np.ndarray
    carry_bar: dict
    lengths: np.ndarray | None = None


def draw_case(cell, batch, time, features, hidden, seed=0, ragged=False):
    """A case with weights as they are at the start of training (Glorot), biases off zero, x in units of one."""
    rng = np.random.default_rng([seed, batch, time, features, hidden])
    columns = GATES[cell] * hidden

    def float32(array):
        # Numbers that float32 holds, so that only arithmetic is compared.
        return np.asarray(array, np.float32).astype(np.float64)

    limit = np.sqrt(6 / (features + hidden + columns))
    params = {
        "kernel": float32(rng.uniform(-limit, limit, (features, columns))),
        "recurrent_kernel": float32(rng.uniform(-limit, limit, (hidden, columns))),
        "bias": float32(0.3 * rng.standard_normal(columns)),
    }
    if cell == "lstm":
        params["bias"][hidden : 2 * hidden] += 1.0
    if cell == "gru":
        params["recurrent_bias"] = float32(0.3 * rng.standard_normal(columns))

    def normal(*shape):
        return float32(rng.standard_normal(shape))

    parts = ("h", "c") if cell == "lstm" else ("h",)
    lengths = None
    if ragged:
        lengths = rng.integers(0, time + 1, batch)
        lengths[rng.integers(batch)] = time
    return Case(
        params,
        normal(batch, time, features),
        {part: np.tanh(normal(batch, hidden)) for part in parts},
        normal(batch, time, hidden),
        {part: normal(batch, hidden) for part in parts},
        lengths,
    )


def logistic(a):
    return (1 + np.tanh(a / 2)) / 2


def _step(cell, params, x, h, c):
    """One step of a batch: the new h and c, and what its way back needs."""
    n = h.shape[-1]
    kernel, recurrent = params["kernel"], params["recurrent_kernel"]
    from_x = x @ kernel + params["bias"]
    if cell == "lstm":
        a = from_x + h @ recurrent
        i, f, g, o = (
            logistic(a[:, :n]),
            logistic(a[:, n : 2 * n]),
            np.tanh(a[:, 2 * n : 3 * n]),
            logistic(a[:, 3 * n :]),
        )
        new = f * c + i * g
        return o * np.tanh(new), new, (i, f, g, o, c, np.tanh(new))
    if cell == "gru":
        from_h = h @ recurrent + params["recurrent_bias"]
        r, z = logistic(from_x[:, :n] + from_h[:, :n]), logistic(from_x[:, n : 2 * n] + from_h[:, n : 2 * n])
        candidate = np.tanh(from_x[:, 2 * n :] + r * from_h[:, 2 * n :])
        return (1 - z) * candidate + z * h, c, (r, z, candidate, from_h[:, 2 * n :])
    r = logistic(from_x[:, :n] + h @ recurrent[:, :n])
    z = logistic(from_x[:, n : 2 * n] + h @ recurrent[:, n : 2 * n])
    candidate = np.tanh(from_x[:, 2 * n :] + (r * h) @ recurrent[:, 2 * n :])
    return (1 - z) * candidate + z * h, c, (r, z, candidate, None)


def _step_back(cell, params, x, h, tape, dh, dc, gradients):
    """From a step's dh and dc those of the step before and dx; adds the weights' gradients up."""
    recurrent = params["recurrent_kernel"]
    n = h.shape[-1]
    if cell == "lstm":
        i, f, g, o, c, tanh_new = tape
        dnew = dc + dh * o * (1 - tanh_new**2)
        da = np.concatenate(
            [dnew * g * i * (1 - i), dnew * c * f * (1 - f), dnew * i * (1 - g**2), dh * tanh_new * o * (1 - o)], axis=1
        )
        gradients["recurrent_kernel"] += h.T @ da
        dh, dc = da @ recurrent.T, dnew * f
    elif cell == "gru":
        r, z, candidate, h_n = tape
        da_n = dh * (1 - z) * (1 - candidate**2)
        da_z = dh * (h - candidate) * z * (1 - z)
        da_r = da_n * h_n * r * (1 - r)
        da = np.concatenate([da_r, da_z, da_n], axis=1)
        db = np.concatenate([da_r, da_z, da_n * r], axis=1)
        gradients["recurrent_kernel"] += h.T @ db
        gradients["recurrent_bias"] += db.sum(0)
        dh = dh * z + db @ recurrent.T
    else:
        r, z, candidate, _ = tape
        da_n = dh * (1 - z) * (1 - candidate**2)
        da_z = dh * (h - candidate) * z * (1 - z)
        d_rh = da_n @ recurrent[:, 2 * n :].T
        da_r = d_rh * h * r * (1 - r)
        da = np.concatenate([da_r, da_z, da_n], axis=1)
        gradients["recurrent_kernel"] += np.concatenate([h.T @ da_r, h.T @ da_z, (r * h).T @ da_n], axis=1)
        dh = dh * z + d_rh * r + da[:, : 2 * n] @ recurrent[:, : 2 * n].T
    gradients["kernel"] += x.T @ da
    gradients["bias"] += da.sum(0)
    return dh, dc, da @ params["kernel"].T


def values(cell, case, reverse=False):
    """Outputs and the last carry; `tape` too."""
    batch, time, _ = case.x.shape
    lengths = np.full(batch, time) if case.lengths is None else np.clip(case.lengths, 0, time)
    dtype = np.result_type(case.x, *case.carry.values(), *case.params.values())
    h = case.carry["h"].astype(dtype)
    c = case.carry.get("c", np.zeros_like(h)).astype(dtype)
    outputs = np.zeros((batch, time, h.shape[-1]), dtype)
    tape = []
    for t in reversed(range(time)) if reverse else range(time):
        on = np.flatnonzero(t < lengths)
        new_h, new_c = h.copy(), c.copy()
        new_h[on], new_c[on], kept = _step(cell, case.params, case.x[on, t], h[on], c[on])
        outputs[on, t] = new_h[on]
        tape.append((t, on, h, kept))
        h, c = new_h, new_c
    return {"outputs": outputs, "h": h} | ({"c": c} if cell == "lstm" else {}), tape


def reference(
    cell, case, reverse=False, return_sequences=True, of=("outputs", "carry"), wants=("params", "x", "carry")
):
    """Values and gradients of a layer, under the names that `flat` below gives them.

    `of` are the results that have a cotangent, `wants` the arguments whose gradient is asked.
    """
    results, tape = values(cell, case, reverse)
    dh = case.carry_bar["h"] if "carry" in of else np.zeros_like(case.carry_bar["h"])
    dc = case.carry_bar["c"] if "carry" in of and cell == "lstm" else np.zeros_like(dh)
    bars = case.outputs_bar
    if not return_sequences:
        results["outputs"] = results["h"]
        if "outputs" in of:
            dh = dh + bars[:, 0]
    dx = np.zeros_like(case.x)
    gradients = {name: np.zeros_like(value) for name, value in case.params.items()}
    for t, on, h, kept in reversed(tape):
        dh, dc = dh.copy(), dc.copy()
        if return_sequences and "outputs" in of:
            dh[on] += bars[on, t]
        dh[on], dc[on], dx[on, t] = _step_back(cell, case.params, case.x[on, t], h[on], kept, dh[on], dc[on], gradients)
    if "params" in wants:
        results |= {f"d {name}": value for name, value in gradients.items()}
    if "x" in wants:
        results["d x"] = dx
    if "carry" in wants:
        results |= {"d h0": dh} | ({"d c0": dc} if cell == "lstm" else {})
    return results


def as_carry(cell, parts):
    """{'h', 'c'} as the layer takes it."""
    return (parts["c"], parts["h"]) if cell == "lstm" else parts["h"]


def as_parts(cell, carry):
    """The other way."""
    return dict(zip(("c", "h"), carry, strict=True)) if cell == "lstm" else {"h": carry}


def errors(ours, theirs):
    """max |a - b| / max |b| of each tensor, once names and shapes are found to be the same.

    A tensor that is zero by right must be zero.
    """
    assert ours.keys() == theirs.keys()
    assert {k: np.shape(v) for k, v in ours.items()} == {k: np.shape(v) for k, v in theirs.items()}
    found = {}
    for name, b in theirs.items():
        a = np.asarray(ours[name], np.float64)
        scale = np.abs(b).max(initial=0.0)
        difference = np.abs(a - b).max(initial=0.0)
        found[name] = difference / scale if scale > 0 else float(difference > 0 or bool(np.isnan(difference)))
        if np.isnan(difference):
            found[name] = np.inf
    return found
