"""Stacks against nn.LSTM and nn.GRU of two layers: values and all gradients; and the unrolled loop against the loop."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn

torch = pytest.importorskip("torch", reason="PyTorch is the independent implementation to compare with")

BATCH, TIME, FEATURES, HIDDEN, LAYERS = 4, 5, 4, 6, 2
UNSORTED = (3, 5, 1, 4)
# Small graphs, many of them: compiling is what costs here.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
CELLS = {"lstm": rnn.LSTM, "gru": rnn.GRU}
SUFFIXES = {"forward": "", "backward": "_reverse"}
TORCH_NAMES = {
    "kernel": "weight_ih",
    "recurrent_kernel": "weight_hh",
    "bias": "bias_ih",
    "recurrent_bias": "bias_hh",
}


def draw_case(cell, bidirectional, sequences, dtype, seed=0, num_layers=LAYERS):
    """Parameters as `init_stack` makes them, with biases moved off zero; inputs; coefficients of the output."""
    rng = np.random.default_rng(seed)
    params = rnn.init_stack(
        jax.random.key(seed), CELLS[cell], FEATURES, HIDDEN, num_layers=num_layers, bidirectional=bidirectional
    )

    def as_numpy(path, leaf):
        noise = 0.5 * rng.standard_normal(leaf.shape) if path[-1].key.endswith("bias") else 0.0
        return (np.asarray(leaf) + noise).astype(dtype)

    width = HIDDEN * (2 if bidirectional else 1)
    return SimpleNamespace(
        params=jax.tree_util.tree_map_with_path(as_numpy, params),
        x=rng.standard_normal((BATCH, TIME, FEATURES)).astype(dtype),
        bar=rng.standard_normal((BATCH, TIME, width) if sequences else (BATCH, width)).astype(dtype),
    )


def run_ours(cell, case, lengths, sequences, unroll=1):
    """Outputs and gradients, flat, by name."""

    @quick_jit
    def all_of_it(params, x, bar):
        def run(params, x):
            ends = None if lengths is None else jnp.asarray(lengths)
            return rnn.stack(
                CELLS[cell], params, x, lengths=ends, engine=rnn.Engine(unroll=unroll), return_sequences=sequences
            )

        outputs, pull_back = jax.vjp(run, params, x)
        return outputs, pull_back(bar)

    outputs, (params_bar, x_bar) = all_of_it(case.params, case.x, case.bar)
    leaves = jax.tree_util.tree_flatten_with_path(params_bar)[0]
    gradients = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {key: np.asarray(value) for key, value in {"outputs": outputs, "x": x_bar, **gradients}.items()}


def run_torch(cell, case, lengths, sequences):
    """The same by torch."""
    bidirectional = "backward" in case.params["layer_0"]
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](
        FEATURES,
        HIDDEN,
        num_layers=LAYERS,
        bidirectional=bidirectional,
        batch_first=True,
        dtype=torch.from_numpy(case.x).dtype,
    )
    theirs = dict(module.named_parameters())
    weights = {}
    with torch.no_grad():
        for layer in range(LAYERS):
            for direction, params in case.params[f"layer_{layer}"].items():
                for name, stem in TORCH_NAMES.items():
                    weight = theirs[f"{stem}_l{layer}{SUFFIXES[direction]}"]
                    if name in params:
                        weight.copy_(torch.from_numpy(params[name].T))
                        weights[f"layer_{layer}/{direction}/{name}"] = weight
                    else:
                        weight.zero_()  # the LSTM's second bias
    x = torch.from_numpy(case.x).requires_grad_()
    x_in = x
    if lengths is not None:
        x_in = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    outputs, final = module(x_in)
    if lengths is not None:
        outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=TIME)
    if not sequences:
        h = final[0] if cell == "lstm" else final
        outputs = torch.cat(list(h[-2:] if bidirectional else h[-1:]), dim=-1)
    named = {"x": x, **weights}
    gradients = torch.autograd.grad(outputs, list(named.values()), torch.from_numpy(case.bar))
    result = {"outputs": outputs}
    result |= {key: g.mT if key.endswith("kernel") else g for key, g in zip(named, gradients, strict=True)}
    return {key: value.detach().numpy() for key, value in result.items()}


def errors_between(ours, theirs):
    """max |a - b| / max |b| of each tensor, once keys, shapes and dtypes are found to be the same."""
    assert ours.keys() == theirs.keys()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert all(np.abs(b).max() > 0 for b in theirs.values()), "a comparison with nothing"
    return {key: float(np.abs(ours[key] - b).max() / np.abs(b).max()) for key, b in theirs.items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("bidirectional", "lengths", "sequences", "dtype"),
    [
        # Half of the combinations, each pair of choices among them.
        (False, None, False, "float64"),
        (False, UNSORTED, True, "float64"),
        (True, None, True, "float64"),
        (True, UNSORTED, False, "float64"),
        (False, None, True, "float32"),
        (True, UNSORTED, False, "float32"),
    ],
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stack_agrees_with_torch(cell, bidirectional, lengths, sequences, dtype):
    case = draw_case(cell, bidirectional, sequences, dtype)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        ours = run_ours(cell, case, lengths, sequences)
    theirs = run_torch(cell, case, lengths, sequences)
    errors = errors_between(ours, theirs)
    # Outputs, x, and of each layer and direction three tensors (LSTM) or four (GRU).
    assert len(errors) == 2 + LAYERS * (2 if bidirectional else 1) * (3 if cell == "lstm" else 4)
    print(f"worst error {dtype}: {max(errors.values()):.1e}")  # shown by pytest -rP
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.sampled(1)
@pytest.mark.parametrize("lengths", [None, UNSORTED], ids=["whole", "ragged"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_last_outputs_are_taken_from_the_ends_of_all_outputs(cell, lengths):
    """Forward's at each sequence's last step, backward's at step 0."""
    case = draw_case(cell, True, True, "float32")
    ends = None if lengths is None else jnp.asarray(lengths)
    whole = np.asarray(rnn.stack(CELLS[cell], case.params, jnp.asarray(case.x), lengths=ends, return_sequences=True))
    last = np.asarray(rnn.stack(CELLS[cell], case.params, jnp.asarray(case.x), lengths=ends))
    final = np.full(BATCH, TIME - 1) if lengths is None else np.array(lengths) - 1
    np.testing.assert_allclose(last[:, :HIDDEN], whole[np.arange(BATCH), final, :HIDDEN], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(last[:, HIDDEN:], whole[:, 0, HIDDEN:], rtol=1e-6, atol=1e-7)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("lengths", "sequences", "dtype"),
    [(None, True, "float64"), (UNSORTED, False, "float32")],
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_unrolling_changes_nothing_but_rounding(cell, lengths, sequences, dtype):
    case = draw_case(cell, True, sequences, dtype, seed=1, num_layers=1)
    bound = {"float32": 1e-5, "float64": 1e-13}[dtype]
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        loop = run_ours(cell, case, lengths, sequences, unroll=1)
        for unroll in (3, TIME):  # with a remainder, and no loop at all
            errors = errors_between(run_ours(cell, case, lengths, sequences, unroll=unroll), loop)
            print(f"worst error {dtype}, unroll {unroll}: {max(errors.values()):.1e}")
            assert all(error <= bound for error in errors.values()), (unroll, errors)


def test_unroll_below_one_is_refused():
    case = draw_case("gru", False, False, "float32")
    with pytest.raises(ValueError, match="unroll is 0"):
        rnn.stack(rnn.GRU, case.params, jnp.asarray(case.x), engine=rnn.Engine(unroll=0))
