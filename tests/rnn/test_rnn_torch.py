"""nn.LSTM and nn.GRU with the same weights: values and all gradients."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the independent implementation to compare with")

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
TORCH_NAMES = {
    "kernel": "weight_ih_l0",
    "recurrent_kernel": "weight_hh_l0",
    "bias": "bias_ih_l0",
    "recurrent_bias": "bias_hh_l0",
}


def run_torch(name, params, x, carry, lengths, reverse, out_bar, carry_bar):
    """Values and gradients as a flat dict in our layout; `*_bar` are the functional's coefficients."""
    _, time, features = x.shape
    hidden = params["recurrent_kernel"].shape[0]
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[name](
        features, hidden, batch_first=True, bidirectional=reverse, dtype=torch.from_numpy(x).dtype
    )
    weights = dict(module.named_parameters())
    # A reversed layer is the backward half of a bidirectional one; its forward half stays unused.
    weights = {ours: weights[theirs + ("_reverse" if reverse else "")] for ours, theirs in TORCH_NAMES.items()}
    with torch.no_grad():
        for key, weight in weights.items():
            if key in params:
                weight.copy_(torch.from_numpy(params[key].T))
            else:
                weight.zero_()

    # PyTorch orders an LSTM's state (h, c), ours is (c, h).
    state = [torch.from_numpy(part).requires_grad_() for part in (carry[::-1] if name == "lstm" else [carry])]
    state_in = [torch.stack([torch.zeros_like(s), s]) if reverse else s[None] for s in state]
    x_t = torch.from_numpy(x).requires_grad_()
    x_in = x_t
    if lengths is not None:
        x_in = torch.nn.utils.rnn.pack_padded_sequence(
            x_t, torch.from_numpy(lengths), batch_first=True, enforce_sorted=False
        )
    outputs, final = module(x_in, tuple(state_in) if name == "lstm" else state_in[0])
    if lengths is not None:
        outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=time)
    outputs = outputs[..., -hidden:]
    final = [part[-1] for part in (final if name == "lstm" else [final])]

    named = {"x": x_t, **{key: weights[key] for key in params}}
    labels = ["h", "c"] if name == "lstm" else ["h"]
    named |= {f"carry {label}": part for label, part in zip(labels, state, strict=True)}
    bars = [torch.from_numpy(bar) for bar in (carry_bar[::-1] if name == "lstm" else [carry_bar])]
    gradients = torch.autograd.grad([outputs, *final], list(named.values()), [torch.from_numpy(out_bar), *bars])

    result = {"outputs": outputs} | {f"final {label}": part for label, part in zip(labels, final, strict=True)}
    result |= {
        f"gradient of {key}": g.mT if key.endswith("kernel") else g for key, g in zip(named, gradients, strict=True)
    }
    return {key: value.detach().numpy() for key, value in result.items()}


def run_ours(layer, params, x, carry, lengths, reverse, out_bar, carry_bar):
    def run(params, x, carry):
        return layer.run(params, x, carry, lengths=lengths, reverse=reverse)

    params, x, carry, out_bar, carry_bar = jax.tree.map(jnp.asarray, (params, x, carry, out_bar, carry_bar))
    lengths = None if lengths is None else jnp.asarray(lengths)

    @jax.jit
    def all_of_it(params, x, carry):
        (final, outputs), pull_back = jax.vjp(run, params, x, carry)
        return final, outputs, pull_back((carry_bar, out_bar))

    final, outputs, (params_bar, x_bar, initial_bar) = all_of_it(params, x, carry)
    result = {"outputs": outputs, "gradient of x": x_bar}
    result |= {f"gradient of {key}": value for key, value in params_bar.items()}
    for label, i in {"c": 0, "h": 1}.items() if layer.name == "lstm" else [("h", ...)]:
        result[f"final {label}"] = final[i]
        result[f"gradient of carry {label}"] = initial_bar[i]
    return {key: np.asarray(value) for key, value in result.items()}


def check_parity(layer, params, x, carry, lengths, reverse, dtype):
    rng = np.random.default_rng(1)
    hidden = params["recurrent_kernel"].shape[0]
    out_bar = rng.standard_normal((*x.shape[:2], hidden)).astype(dtype)
    carry_bar = jax.tree.map(lambda part: rng.standard_normal(part.shape).astype(dtype), carry)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        ours = run_ours(layer, params, x, carry, lengths, reverse, out_bar, carry_bar)
    theirs = run_torch(layer.name, params, x, carry, lengths, reverse, out_bar, carry_bar)

    assert ours.keys() == theirs.keys()
    assert {value.dtype for value in ours.values()} == {np.dtype(dtype)}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    errors = {key: float(np.abs(ours[key] - b).max() / np.abs(b).max()) for key, b in theirs.items()}
    print(f"worst error {dtype}: {max(errors.values()):.1e}")  # shown by pytest -rP
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("lengths", "reverse"),
    [(None, False), ([4, 7, 1], False), ([4, 7, 1], True)],
    ids=["whole", "ragged", "ragged reverse"],
)
def test_values_and_gradients_agree(layer, draw, lengths, reverse, dtype):
    lengths = None if lengths is None else np.array(lengths)
    check_parity(layer, *draw(dtype=dtype), lengths, reverse, dtype)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_agree_on_rows_at_initial_scale(layer, draw, dtype):
    _, x, carry = draw(seed=3, batch=8, time=28, features=28, hidden=64, dtype=dtype)
    x = np.clip(x, 0, 1)  # as pixels: many zeros, nothing above one
    with jax.enable_x64(dtype == "float64"):
        params = layer.init(jax.random.key(5), 28, 64, dtype=dtype)
        params = {key: np.array(value) for key, value in params.items()}
    check_parity(layer, params, x, carry, None, False, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_is_the_default_initial_carry(layer, draw, dtype):
    params, x, carry = draw(dtype=dtype)
    zeros = jax.tree.map(np.zeros_like, carry)
    out_bar = np.zeros((*x.shape[:2], 6), dtype)
    theirs = run_torch(layer.name, params, x, zeros, None, False, out_bar, zeros)
    with jax.enable_x64(dtype == "float64"):
        _, outputs = layer.run(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    assert outputs.dtype == dtype
    np.testing.assert_allclose(outputs, theirs["outputs"], atol=TOLERANCE[dtype])
