"""Each backend against a float64 loop in NumPy: values and all gradients, at random shapes and options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import GATES, as_carry, as_parts, draw_case, errors, reference, values

from seqmnist_jax import rnn
from seqmnist_jax.rnn import recurrence

pytestmark = pytest.mark.full_kernels
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
LAYERS = {"lstm": rnn.lstm, "gru": rnn.gru, "gru_reset_before": functools.partial(rnn.gru, reset_after=False)}
BOTH = ("outputs", "carry")
ALL = ("params", "x", "carry")

cells = pytest.mark.parametrize("cell", ["lstm", "gru"])
# Each backend and each cell, yet not each pair: these programs compile for a second.
some_pairs = pytest.mark.parametrize(
    ("backend", "cell"),
    [("scan", "lstm"), ("fused", "gru"), ("native", "lstm"), ("native", "gru")],
    indirect=["backend"],
)
few = functools.partial(
    settings, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def everything(run, cell, of, wants, saves, params, x, carry, outputs_bar, carry_bar, lengths):
    """Values and gradients of `run(params, x, carry, lengths)`, flat; `saves` only names the program for the cache."""
    arguments = {"params": params, "x": x, "carry": carry}

    def results_of(wanted):
        now = arguments | wanted
        end, outputs = run(now["params"], now["x"], now["carry"], lengths)
        results = {"outputs": outputs, "carry": end}
        # Only what has a cotangent is differentiated; all is handed past.
        return {name: results[name] for name in of}, results

    _, pull_back, results = jax.vjp(results_of, {name: arguments[name] for name in wants}, has_aux=True)
    bars = {"outputs": outputs_bar, "carry": carry_bar}
    (gradients,) = pull_back({name: bars[name] for name in of})
    flat = {"outputs": results["outputs"], **as_parts(cell, results["carry"])}
    flat |= {f"d {name}": value for name, value in gradients.get("params", {}).items()}
    if "x" in wants:
        flat["d x"] = gradients["x"]
    if "carry" in wants:
        flat |= {f"d {name}0": value for name, value in as_parts(cell, gradients["carry"]).items()}
    return flat


class Options(dict):
    """Keywords of a layer that can be a static argument."""

    def __hash__(self):
        return hash(tuple(sorted(self.items())))


@functools.cache
def bound_layer(cell, options):
    return lambda params, x, carry, lengths: LAYERS[cell](params, x, carry, lengths=lengths, **options)


def float32(tree):
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), tree)


def arrays(cell, case, return_sequences=True):
    """A case in the layer's form."""
    outputs_bar = case.outputs_bar if return_sequences else case.outputs_bar[:, 0]
    whole = (case.params, case.x, as_carry(cell, case.carry), outputs_bar, as_carry(cell, case.carry_bar))
    return (*float32(whole), None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32))


def ours(cell, case, of=BOTH, wants=ALL, **options):
    run = bound_layer(cell, Options(options))
    arguments = arrays(cell, case, options.get("return_sequences", True))
    return everything(run, cell, of, wants, recurrence.MOST_KEPT_BYTES, *arguments)


def check(cell, case, bound, of=BOTH, wants=ALL, **options):
    theirs = reference(
        cell, case, options.get("reverse", False), options.get("return_sequences", True), of=of, wants=wants
    )
    got = ours(cell, case, of, wants, **options)
    assert {value.dtype for value in got.values()} == {jnp.dtype("float32")}
    found = errors(got, theirs)
    # Shown by pytest -rP.
    print(f"worst error {options}: {max(found.values()):.1e} in {max(found, key=found.get)}")
    assert all(error <= bound for error in found.values()), found


# ---- The reference itself ----------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("cell", GATES)
def test_gradients_of_the_loop_are_its_slopes(cell, ragged, reverse):
    """By complex steps: Im f(x + i e d) / e is the slope along d, exact to rounding."""
    case = draw_case(cell, 3, 4, 5, 3, ragged=ragged)
    gradients = reference(cell, case, reverse)
    rng = np.random.default_rng(1)

    def slope(field, name):
        value = getattr(case, field) if name is None else getattr(case, field)[name]
        direction = rng.standard_normal(value.shape)
        shifted = value + 1e-30j * direction
        moved = case._replace(**{field: shifted if name is None else getattr(case, field) | {name: shifted}})
        results, _ = values(cell, moved, reverse)
        total = (results["outputs"] * case.outputs_bar).sum()
        total += sum((results[part] * bar).sum() for part, bar in case.carry_bar.items())
        return total.imag / 1e-30, direction

    wanted = [("params", name, f"d {name}") for name in case.params]
    wanted += [("x", None, "d x")] + [("carry", part, f"d {part}0") for part in case.carry]
    for field, name, gradient in wanted:
        want, direction = slope(field, name)
        np.testing.assert_allclose((gradients[gradient] * direction).sum(), want, rtol=1e-11, err_msg=gradient)


# ---- Random shapes -----------------------------------------------------------------------

# Around whole vectors and tiles of the kernel, of 4, 8 and 16.
hiddens = st.sampled_from([1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 70])
shapes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 20), hiddens)


# In bfloat16 a tensor's largest element is a fair measure only where it has several; the named cases have one.
some_units = st.tuples(
    st.integers(4, 40), st.integers(1, 12), st.integers(1, 20), hiddens.filter(lambda size: size >= 7)
)


@st.composite
def cases(draw, shapes=shapes):
    return {
        "shape": draw(shapes),
        "seed": draw(st.integers(0, 99)),
        "ragged": draw(st.booleans()),
        "options": {
            "reverse": draw(st.booleans()),
            "return_sequences": draw(st.booleans()),
        },
        "of": draw(st.sampled_from([BOTH, BOTH, ("outputs",), ("carry",)])),
        "wants": draw(st.sampled_from([ALL, ALL, ("params", "carry"), ("params",), ("x",), ("carry",)])),
        "saves": draw(st.booleans()),
    }


def check_drawn(cell, drawn, bound, **options):
    case = draw_case(cell, *drawn["shape"], seed=drawn["seed"], ragged=drawn["ragged"])
    with pytest.MonkeyPatch.context() as patch:
        if not drawn["saves"]:
            patch.setattr(recurrence, "MOST_KEPT_BYTES", 0)
        check(cell, case, bound, drawn["of"], drawn["wants"], **drawn["options"], **options)


@pytest.mark.slow
@cells
@few(max_examples=10)
@given(drawn=cases())
def test_native_at_any_shape(need_native, cell, drawn):
    need_native()
    check_drawn(cell, drawn, BOUNDS["float32"], backend="native")


@pytest.mark.slow
@cells
@few(max_examples=6)
@given(drawn=cases(some_units))
def test_native_at_any_shape_in_bfloat16(need_native, cell, drawn):
    need_native()
    check_drawn(cell, drawn, BOUNDS["bfloat16"], backend="native", precision="bfloat16")


@pytest.mark.slow
@cells
@few(max_examples=5)
@given(drawn=cases())
def test_fused_at_any_shape(cell, drawn):
    check_drawn(cell, drawn, BOUNDS["float32"], backend="fused")


@pytest.mark.parametrize("cell", GATES)
@few(max_examples=2)
@given(drawn=cases())
def test_scan_at_any_shape(cell, drawn):
    check_drawn(cell, drawn, BOUNDS["float32"], backend="scan")


@pytest.mark.slow
@cells
@few(max_examples=2)
@given(drawn=cases(some_units))
def test_fused_at_any_shape_in_bfloat16(cell, drawn):
    check_drawn(cell, drawn, BOUNDS["bfloat16"], backend="fused", precision="bfloat16")


@pytest.mark.parametrize("cell", GATES)
@few(max_examples=1)
@given(drawn=cases(some_units))
def test_scan_at_any_shape_in_bfloat16(cell, drawn):
    check_drawn(cell, drawn, BOUNDS["bfloat16"], backend="scan", precision="bfloat16")


# ---- Named cases -------------------------------------------------------------------------


NAMED = {
    "slices": ((130, 6, 3, 20), True, True),
    "wide": ((5, 100, 28, 128), False, False),
    "one": ((1, 3, 1, 1), False, False),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "precision", "saves"),
    [
        ("slices", "float32", True),
        ("slices", "float32", False),
        ("slices", "bfloat16", False),
        ("wide", "float32", True),
        ("wide", "bfloat16", False),
        ("one", "float32", True),
        ("one", "bfloat16", True),
    ],
)
@cells
def test_native_at_named_shapes(need_native, monkeypatch, cell, name, precision, saves):
    need_native()
    shape, ragged, reverse = NAMED[name]
    if not saves:
        monkeypatch.setattr(recurrence, "MOST_KEPT_BYTES", 0)
    case = draw_case(cell, *shape, ragged=ragged)
    check(cell, case, BOUNDS[precision], reverse=reverse, precision=precision, backend="native")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("backend", "cell", "precision"),
    [
        ("scan", "lstm", "float32"),
        ("scan", "gru", "bfloat16"),
        ("fused", "lstm", "bfloat16"),
        ("fused", "gru", "float32"),
    ],
)
def test_wide_and_long(cell, backend, precision):
    check(cell, draw_case(cell, 5, 100, 28, 128, ragged=True), BOUNDS[precision], precision=precision, backend=backend)


@pytest.mark.sampled(1)
@some_pairs
def test_thousands_of_steps_keep_the_accuracy(backend, cell):
    case = draw_case(cell, 3, 3000, 5, 9)
    check(cell, case, BOUNDS["float32"], backend=backend)


@pytest.mark.sampled(3)
@some_pairs
def test_saturated_gates_stay_finite(backend, cell):
    """Gates driven to their ends, where exponentials would overflow."""
    case = draw_case(cell, 4, 50, 5, 9)
    case = case._replace(x=1e4 * case.x)
    got = ours(cell, case, backend=backend)
    assert all(bool(jnp.isfinite(value).all()) for value in got.values())
    found = errors(got, reference(cell, case))
    assert max(found[name] for name in ("outputs", "h")) <= 1e-4, found


@pytest.mark.sampled(1)
@cells
def test_auto_is_the_native_kernel_on_a_cpu(need_native, cell):
    need_native()
    if jax.default_backend() != "cpu":
        pytest.skip("the kernel is for CPUs")
    case = draw_case(cell, 5, 6, 7, 9, ragged=True)
    jax.tree.map(np.testing.assert_array_equal, ours(cell, case), ours(cell, case, backend="native"))


# ---- Nearly closed gates -----------------------------------------------------------------


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="PyTorch's own error is the measure")


def closed_case(cell, time):
    case = draw_case(cell, 8, time, 1, 32)
    bias = case.params["bias"].copy()
    if cell == "lstm":
        bias[:32] -= 9.0
        bias[32:64] += 8.0
    else:
        bias[32:64] += 9.0
    return case._replace(params=case.params | {"bias": np.float32(bias).astype(np.float64)})


def run_torch(torch, cell, case):
    """Values and gradients by PyTorch in float32."""
    hidden, features = case.params["recurrent_kernel"].shape[0], case.x.shape[-1]
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](features, hidden, batch_first=True)
    names = {
        "kernel": "weight_ih_l0",
        "recurrent_kernel": "weight_hh_l0",
        "bias": "bias_ih_l0",
        "recurrent_bias": "bias_hh_l0",
    }

    def tensor(array):
        return torch.tensor(np.asarray(array, np.float32))

    with torch.no_grad():
        module.bias_hh_l0.zero_()
        for name, value in case.params.items():
            getattr(module, names[name]).copy_(tensor(value.T))
    x = tensor(case.x).requires_grad_()
    state = {part: tensor(value).requires_grad_() for part, value in case.carry.items()}
    initial = tuple(part[None] for part in state.values())
    outputs, final = module(x, initial if cell == "lstm" else initial[0])
    final = dict(zip(state, [part[0] for part in final] if cell == "lstm" else [final[0]], strict=True))
    weights = {name: getattr(module, names[name]) for name in case.params}
    gradients = torch.autograd.grad(
        [outputs, *final.values()],
        [*weights.values(), x, *state.values()],
        [tensor(case.outputs_bar), *(tensor(case.carry_bar[part]) for part in final)],
    )
    labels = [f"d {name}" for name in weights] + ["d x"] + [f"d {part}0" for part in state]
    results = {"outputs": outputs, **final, **dict(zip(labels, gradients, strict=True))}
    return {name: (value.mT if name.endswith("kernel") else value).detach().numpy() for name, value in results.items()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("backend", "cell", "time"),
    [
        ("scan", "lstm", 28),
        ("fused", "gru", 28),
        ("native", "lstm", 784),
        ("native", "gru", 784),
        pytest.param("scan", "lstm", 784, marks=pytest.mark.slow),
        pytest.param("fused", "gru", 784, marks=pytest.mark.slow),
    ],
    indirect=["backend"],
)
def test_nearly_closed_gates_cost_no_more_than_in_torch(torch, backend, cell, time):
    case = closed_case(cell, time)
    theirs = reference(cell, case)
    found = errors(ours(cell, case, backend=backend), theirs)
    of_torch = errors(run_torch(torch, cell, case), theirs)
    print(f"worst error: {max(found.values()):.1e}, PyTorch's {max(of_torch.values()):.1e}")
    assert max(found.values()) <= 2 * max(of_torch.values()), (found, of_torch)


# ---- Replicas ----------------------------------------------------------------------------

REPLICAS = {"params and x": (0, 0), "params": (0, None), "x": (None, 0)}


def stacked(cases):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *cases)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("backend", "cell", "mapped"),
    [
        ("scan", "lstm", "params and x"),  # which is JAX's own to map
        *(("fused", "gru", mapped) for mapped in REPLICAS),
        *(("native", "lstm", mapped) for mapped in REPLICAS),
        ("native", "gru", "params"),
    ],
    indirect=["backend"],
)
def test_replicas_by_vmap(backend, cell, mapped):
    """Each replica has its own cotangents, lengths and carry; a shared argument's gradient is each replica's own."""
    axes = REPLICAS[mapped]
    several = [draw_case(cell, 5, 4, 7, 9, seed=seed, ragged=True) for seed in range(3)]
    shared = several[0]
    several = [
        case._replace(
            params=case.params if axes[0] == 0 else shared.params,
            x=case.x if axes[1] == 0 else shared.x,
        )
        for case in several
    ]
    run = bound_layer(cell, Options(backend=backend, reverse=True))
    several_at_once = jax.vmap(functools.partial(everything, run, cell, BOTH, ALL, 0), in_axes=(*axes, 0, 0, 0, 0))
    arguments = list(arrays(cell, stacked(several)))
    for place, axis in enumerate(axes):
        if axis is None:
            arguments[place] = arrays(cell, shared)[place]
    got = several_at_once(*arguments)
    for i, case in enumerate(several):
        found = errors({name: value[i] for name, value in got.items()}, reference(cell, case, reverse=True))
        assert max(found.values()) <= BOUNDS["float32"], found


@pytest.mark.sampled(2)
@some_pairs
def test_shared_arguments_gather_the_gradients_of_all_replicas(backend, cell):
    several = [draw_case(cell, 5, 4, 3, 9, seed=seed) for seed in range(3)]  # a kernel that makes nothing for dx
    several = [case._replace(params=several[0].params) for case in several]
    params, x, carry, bars, _, _ = arrays(cell, stacked(several))
    params = float32(several[0].params)

    @jax.jit
    def gradient(params):
        def total(params):
            outputs = jax.vmap(lambda x, carry: LAYERS[cell](params, x, carry, backend=backend)[1])(x, carry)
            return jnp.vdot(outputs, bars)

        return jax.grad(total)(params)

    theirs = [reference(cell, case, of=("outputs",)) for case in several]
    got = gradient(params)
    found = errors(got, {name: sum(each[f"d {name}"] for each in theirs) for name in got})
    assert max(found.values()) <= BOUNDS["float32"], found


@pytest.mark.sampled(1)
@some_pairs
def test_replicas_of_replicas(backend, cell):
    """Params along one axis, data along the other."""
    params = [draw_case(cell, 5, 4, 7, 9, seed=seed).params for seed in range(2)]
    data = [draw_case(cell, 5, 4, 7, 9, seed=seed, ragged=True) for seed in range(3)]
    run = bound_layer(cell, Options(backend=backend))
    one = functools.partial(everything, run, cell, BOTH, ALL, 0)
    several = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0, 0, 0)), in_axes=(0, None, None, None, None, None))
    arguments = arrays(cell, stacked(data))
    got = several(float32(jax.tree.map(lambda *leaves: np.stack(leaves), *params)), *arguments[1:])
    for i, own in enumerate(params):
        for j, case in enumerate(data):
            part = {name: value[i, j] for name, value in got.items()}
            found = errors(part, reference(cell, case._replace(params=own)))
            assert max(found.values()) <= BOUNDS["float32"], (i, j, found)


@pytest.mark.sampled(2)
@some_pairs
def test_jacobian_by_rows(backend, cell):
    """jacrev maps the way back over cotangents, whose primals are shared."""
    case = draw_case(cell, 2, 3, 6, 5)
    params, x, carry, *_ = arrays(cell, case)

    def last(x):
        return LAYERS[cell](params, x, carry, return_sequences=False, backend=backend)[1][0]

    jacobian = jax.jit(jax.jacrev(last))(x)
    for unit in range(5):
        bar = np.zeros_like(case.outputs_bar)
        bar[0, 0, unit] = 1.0
        theirs = reference(cell, case._replace(outputs_bar=bar), return_sequences=False, of=("outputs",), wants=("x",))
        np.testing.assert_allclose(jacobian[unit], theirs["d x"], rtol=0, atol=1e-6)
