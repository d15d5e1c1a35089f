"""The door: whatever a caller may give, in any container, is taken as one form or refused by its name."""

import collections
import functools
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn

BATCH, TIME, FEATURES, HIDDEN = 4, 10, 5, 8
LENGTHS = [10, 7, 3, 0]
ZERO_H = np.zeros((BATCH, HIDDEN), np.float32)
X = np.random.default_rng(0).standard_normal((BATCH, TIME, FEATURES)).astype(np.float32)
CARRIES = {"lstm": (ZERO_H, ZERO_H), "gru": ZERO_H}
PARAMS = {
    "lstm": rnn.init_lstm(jax.random.key(0), FEATURES, HIDDEN),
    "gru": rnn.init_gru(jax.random.key(0), FEATURES, HIDDEN),
}


def one_layer(params):
    return {"layer_0": {"forward": params}}


def in_a_stack(engine=rnn.Engine(), masked=False):  # noqa: B008
    masks = {"layer_0": {"forward": rnn.Masks(state=np.ones((BATCH, HIDDEN), np.float32))}} if masked else None

    def run(params, x, carry=None, lengths=None):
        params = type(params)(one_layer(params)) if isinstance(params, flax.core.FrozenDict) else one_layer(params)
        return None, rnn.stack(rnn.GRU, params, x, lengths=lengths, masks=masks, engine=engine, return_sequences=True)

    return run


def by_step(params, x, carry=ZERO_H, lengths=None):
    return rnn.scan(rnn.gru_step, params, x, carry, lengths=lengths)


# Every way in, with the parameters it takes.
WAYS = {
    "lstm": ("lstm", rnn.lstm),
    "lstm fused": ("lstm", functools.partial(rnn.lstm, backend="fused")),
    "gru": ("gru", rnn.gru),
    "gru scan": ("gru", functools.partial(rnn.gru, backend="scan")),
    "gru fused": ("gru", functools.partial(rnn.gru, backend="fused")),
    "scan": ("gru", by_step),
    "remat": ("gru", rnn.remat(rnn.gru, 3)),
    "stack": ("gru", in_a_stack()),
    "stack, remat": ("gru", in_a_stack(rnn.Engine(remat=3))),
    "stack, mask": ("gru", in_a_stack(masked=True)),
}
every_way = pytest.mark.parametrize("way", WAYS)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


# ---- Containers --------------------------------------------------------------------------

CONTAINERS = {
    "FrozenDict": flax.core.freeze,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda params: collections.defaultdict(None, params),
}


@pytest.mark.sampled(3)
@every_way
@pytest.mark.parametrize("container", CONTAINERS)
def test_gradients_come_in_the_container_that_was_given(way, container):
    cell, run = WAYS[way]
    gradient = jax.grad(lambda params: run(params, X, lengths=np.array(LENGTHS))[1].sum())
    given = CONTAINERS[container](PARAMS[cell])
    got = gradient(given)
    assert type(got) is type(given)
    assert_close(dict(got), gradient(PARAMS[cell]))


@pytest.mark.sampled(2)
@every_way
def test_any_mapping_will_do(way):
    cell, run = WAYS[way]
    got = run(types.MappingProxyType(PARAMS[cell]), X) if "scan" in way else run(PARAMS[cell], X)
    assert_close(got[1], run(PARAMS[cell], X)[1])


# ---- Arrays ------------------------------------------------------------------------------


@every_way
def test_lists_are_arrays(way):
    cell, run = WAYS[way]
    want = run(PARAMS[cell], X, lengths=np.array(LENGTHS))
    assert_close(run(PARAMS[cell], X.tolist(), lengths=LENGTHS), want)
    assert_close(run(PARAMS[cell], X.tolist(), lengths=tuple(LENGTHS)), want)


@every_way
def test_tensors_of_torch_are_arrays(way):
    torch = pytest.importorskip("torch")
    cell, run = WAYS[way]
    x, lengths = torch.tensor(X), torch.tensor(LENGTHS)
    assert_close(run(PARAMS[cell], x, lengths=lengths), run(PARAMS[cell], X, lengths=np.array(LENGTHS)))
    with pytest.raises(ValueError, match=r"^x is a Tensor, of which NumPy makes no array: .*detach"):
        run(PARAMS[cell], x.requires_grad_())


def test_params_and_carries_of_torch():
    torch = pytest.importorskip("torch")
    params = {name: torch.tensor(np.asarray(value)) for name, value in PARAMS["gru"].items()}
    assert_close(rnn.gru(params, X, torch.tensor(ZERO_H)), rnn.gru(PARAMS["gru"], X))
    assert_close(by_step(PARAMS["gru"], X, torch.tensor(ZERO_H)), rnn.gru(PARAMS["gru"], X))


@every_way
@pytest.mark.parametrize(
    ("x", "lengths", "name"),
    [
        ("x", None, "x"),
        ({"x": 1}, None, "x"),
        ([[[1.0]], [[1.0], [2.0]]], None, "x"),
        ([[[None]]], None, "x"),
        (X, "four", "lengths"),
        (X, {1}, "lengths"),
        (X, [10, 7, 3, 0.5], "lengths"),
        (X, [[10], [7, 3, 0]], "lengths"),
    ],
)
def test_what_is_no_array_is_named(way, x, lengths, name):
    cell, run = WAYS[way]
    with pytest.raises(ValueError, match=rf"^{name} (is|has) "):
        run(PARAMS[cell], x, lengths=lengths)


@pytest.mark.parametrize("way", ["lstm", "gru", "gru fused", "remat"])
def test_float64_of_numpy_is_what_jax_makes_of_it(way):
    """For the carry as for x and params."""
    cell, run = WAYS[way]
    wide = jax.tree.map(lambda part: np.asarray(part, np.float64), (PARAMS[cell], X, CARRIES[cell]))
    got = run(*wide)
    assert_close(got, run(PARAMS[cell], X))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    turned = jax.tree.map(lambda part: np.asarray(part).astype(">f4"), (PARAMS[cell], X, CARRIES[cell]))
    assert_close(run(*turned), got)


@pytest.mark.sampled(3)
@every_way
@pytest.mark.parametrize("dtype", [np.int32, np.uint64])
def test_lengths_where_types_are_strict(way, dtype):
    """x64 makes JAX's own counts int64, and strict promotion refuses to compare them with anything else."""
    cell, run = WAYS[way]
    params = jax.tree.map(np.asarray, PARAMS[cell])
    want = run(params, X, lengths=np.array(LENGTHS))[1]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert_close(run(params, X, lengths=np.array(LENGTHS, dtype))[1], want)
        gradient = jax.grad(lambda params: run(params, X, lengths=jnp.array(LENGTHS, dtype))[1].sum())(params)
    assert all(np.isfinite(value).all() for value in gradient.values())


def test_lengths_that_int32_cannot_hold_are_out_of_range():
    with pytest.raises(ValueError, match=r"^lengths has values from 0 to 4294967296"):
        rnn.gru(PARAMS["gru"], X, lengths=np.array([2**32, 1, 1, 0]))


# ---- Empty axes --------------------------------------------------------------------------


@pytest.mark.sampled(9)
@every_way
@pytest.mark.parametrize("lengths", [None, []])
def test_a_batch_of_nothing(way, lengths):
    cell, run = WAYS[way]
    run = in_a_stack() if way == "stack, mask" else run  # Its masks have rows.
    carry = jax.tree.map(lambda part: part[:0], CARRIES[cell])
    lengths = None if lengths is None else np.array(lengths, int)
    call = jax.value_and_grad(lambda params: run(params, X[:0], carry, lengths=lengths)[1].sum())
    for program in (call, jax.jit(call)):
        value, gradient = program(PARAMS[cell])
        assert value == 0
        assert not any(np.asarray(part).any() for part in jax.tree.leaves(gradient))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("all_steps", [True, False])
@pytest.mark.parametrize("lengths", [None, np.zeros(BATCH, int)], ids=["whole", "lengths"])
@every_way
def test_no_steps(way, lengths, all_steps):
    """The carry stays, and the last output is an empty sequence's: h, or for `scan`, which knows none, zero."""
    cell, run = WAYS[way]
    if "stack" in way:
        engine = rnn.Engine(remat=3 if "remat" in way else 0)
        outputs = rnn.stack(rnn.GRU, one_layer(PARAMS[cell]), X[:, :0], engine=engine, return_sequences=all_steps)
        assert outputs.shape == (BATCH, *[0] * all_steps, HIDDEN)
        assert not outputs.any()
        return
    carry = jax.tree.map(lambda part: jnp.asarray(part + 0.5), CARRIES[cell])
    options = {"lengths": lengths, "return_sequences": all_steps}
    if way == "scan":
        run = functools.partial(rnn.scan, rnn.gru_step)

    def call(params, carry):
        return run(params, jnp.asarray(X[:, :0]), carry, **options)

    for program in (call, jax.jit(call)):
        (end, outputs), pull = jax.vjp(program, PARAMS[cell], carry)
        jax.tree.map(np.testing.assert_array_equal, end, carry)
        want = np.full((BATCH, HIDDEN), 0.0 if way == "scan" else 0.5)
        np.testing.assert_array_equal(outputs, np.zeros((BATCH, 0, HIDDEN)) if all_steps else want)
        d_params, d_carry = pull((jax.tree.map(jnp.ones_like, end), jnp.zeros_like(outputs)))
        assert not any(part.any() for part in jax.tree.leaves(d_params))
        assert all((part == 1).all() for part in jax.tree.leaves(d_carry))


@pytest.mark.parametrize("backend", ["scan", "fused", "native"])
def test_no_steps_by_the_name_of_a_backend(need_native, backend):
    need_native(backend)
    end, outputs = rnn.gru(PARAMS["gru"], X[:, :0], ZERO_H + 1, backend=backend, reverse=True)
    assert (end == 1).all()
    assert outputs.shape == (BATCH, 0, HIDDEN)
    end, _ = rnn.scan(rnn.gru_step, PARAMS["gru"], X[:, :0], ZERO_H + 1, backend=backend)
    assert (end == 1).all()
    assert rnn.explain(PARAMS["gru"], X[:, :0], backend=backend).backend == "scan"


def test_no_steps_of_a_step_laid_out():
    assert rnn.scan(rnn.gru_step, PARAMS["gru"], X[:, :0], ZERO_H, unroll=4)[1].shape == (BATCH, 0, HIDDEN)


@pytest.mark.parametrize("backend", ["scan", "fused"])
@pytest.mark.parametrize(("features", "hidden"), [(0, 5), (3, 0)])
def test_no_features_and_no_units(backend, features, hidden):
    shapes = {"kernel": (features, 3 * hidden), "recurrent_kernel": (hidden, 3 * hidden), "bias": (3 * hidden,)}
    params = {name: jnp.ones(shape) for name, shape in (shapes | {"recurrent_bias": (3 * hidden,)}).items()}
    gradient = jax.grad(lambda params: rnn.gru(params, X[:, :, :features], backend=backend)[1].sum())(params)
    assert {name: value.shape for name, value in gradient.items()} == {n: v.shape for n, v in params.items()}


# ---- Options -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["scan", "fused", "native"])
def test_what_equals_false_is_false(need_native, backend):
    """0 and False are one key of JAX's caches: a program made of the one must serve the other."""
    need_native(backend)
    x = X[:, :9]  # A shape of this test's own, that nothing has compiled yet.
    for reverse in (0, np.bool_(False), jnp.array(False), 0.0, False):
        got = rnn.gru(PARAMS["gru"], x, reverse=reverse, return_sequences=1, backend=backend)
        assert got[1].shape == (BATCH, 9, HIDDEN)
    assert_close(got, rnn.gru(PARAMS["gru"], x, backend=backend))


@pytest.mark.parametrize("option", ["reverse", "return_sequences"])
@pytest.mark.parametrize("way", ["lstm", "gru", "remat"])
@pytest.mark.parametrize("value", ["no", 2, None, np.zeros(2), []])
def test_what_is_neither_true_nor_false(way, option, value):
    cell, run = WAYS[way]
    with pytest.raises(ValueError, match=rf"^{option} is .*; expected True or False"):
        run(PARAMS[cell], X, **{option: value})


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_options_of_scan_stack_and_gru(value):
    with pytest.raises(ValueError, match=r"^reverse is .*; expected True or False"):
        rnn.scan(rnn.gru_step, PARAMS["gru"], X, ZERO_H, reverse=value)
    with pytest.raises(ValueError, match=r"^return_sequences is .*; expected True or False"):
        rnn.stack(rnn.GRU, one_layer(PARAMS["gru"]), X, return_sequences=value)
    with pytest.raises(ValueError, match=r"^reset_after is .*; expected True or False"):
        rnn.gru(PARAMS["gru"], X, reset_after=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
def test_numbers_of_steps(value):
    with pytest.raises(ValueError, match=r"^unroll is .*; expected a whole number, at least 1"):
        rnn.scan(rnn.gru_step, PARAMS["gru"], X, ZERO_H, unroll=value)
    with pytest.raises(ValueError, match=r"^steps is .*; expected a whole number, at least 1"):
        rnn.remat(rnn.gru, value)


@pytest.mark.parametrize(("cell", "name"), [(rnn.GRU_RESET_BEFORE, "cuda"), (rnn.GRU, "gpu")])
def test_a_stack_refuses_a_backend_that_its_cell_has_not(cell, name):
    params = rnn.init_stack(jax.random.key(0), cell, FEATURES, HIDDEN, num_layers=1, bidirectional=False)
    with pytest.raises(ValueError, match=rf"^backend is '{name}'; .*'auto'"):
        rnn.stack(cell, params, X, engine=rnn.Engine(backend=name))


@pytest.mark.parametrize("precision", ["float16", "highest", "default", None, 32])
@pytest.mark.parametrize("step", ["lstm", "gru"])
def test_steps_refuse_a_precision_that_is_none(step, precision):
    run = {"lstm": rnn.lstm_step, "gru": rnn.gru_step}[step]
    with pytest.raises(ValueError, match=r"^precision is .*; expected one of 'float32', "):
        run(PARAMS[step], CARRIES[step], X[:, 0], precision)


# A stack checks the same whether its layers run whole or, for a mask or unrolling, by single steps.
STEPPING = {
    "whole": {},
    "mask": {"masks": one_layer(rnn.Masks(state=ZERO_H + 1))},
    "unroll": {"engine": rnn.Engine(unroll=2)},
    "mask, remat": {"masks": one_layer(rnn.Masks(state=ZERO_H + 1)), "engine": rnn.Engine(remat=3)},
}


@pytest.mark.parametrize("way", STEPPING)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"bias": np.ones(1, np.float32)}}, r"^params\['bias'\] has shape \(1,\)"),
        ({"params": {"peephole": np.ones(1, np.float32)}}, r"^params has .*'peephole'"),
        ({"x": np.full_like(X, np.nan)}, r"^x .* holds NaN"),
        ({"x": X[0]}, r"^x has shape"),
        ({"engine": {"remat": -3}}, r"^remat is -3; expected a whole number"),
        ({"engine": {"unroll": 0}}, r"^unroll is 0; expected a whole number"),
        ({"engine": {"precision": "float16"}}, r"^precision is 'float16'"),
        ({"engine": {"backend": "cuda"}}, r"^backend is 'cuda'"),
    ],
    ids=["short bias", "surplus", "NaN", "no time", "remat", "unroll", "precision", "backend"],
)
def test_a_stack_refuses_the_same_by_single_steps(way, change, message):
    options = dict(STEPPING[way])
    options["engine"] = options.get("engine", rnn.Engine())._replace(**change.get("engine", {}))
    params = one_layer(PARAMS["gru"] | change.get("params", {}))
    with pytest.raises(ValueError, match=message):
        rnn.stack(rnn.GRU, params, change.get("x", X), **options)


@pytest.mark.parametrize("backend", ["fused", "native"])
def test_a_backend_that_has_no_single_steps(backend):
    with pytest.raises(
        ValueError, match=rf"^backend is '{backend}', but steps are unrolled; expected 'auto' or 'scan'"
    ):
        rnn.stack(rnn.GRU, one_layer(PARAMS["gru"]), X, engine=rnn.Engine(backend, unroll=2))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_remat_and_a_mask_of_the_state_go_together(steps):
    mask = np.random.default_rng(1).integers(0, 2, (BATCH, HIDDEN)).astype(np.float32) * 2

    def total(params, **engine):
        masks = one_layer(rnn.Masks(state=mask))
        engine = rnn.Engine(**engine)
        return rnn.stack(rnn.GRU, one_layer(params), X, lengths=LENGTHS, masks=masks, engine=engine).sum()

    want = jax.value_and_grad(total)(PARAMS["gru"])
    assert_close(jax.value_and_grad(functools.partial(total, remat=steps))(PARAMS["gru"]), want)


@pytest.mark.slow
def test_masks_are_not_stretched():
    for name, good in {"inputs": (BATCH, FEATURES), "outputs": (BATCH, HIDDEN), "state": (BATCH, HIDDEN)}.items():
        for bad in ((good[1],), (good[0], 1), (2, good[1]), (*good, 1), ()):
            masks = one_layer(rnn.Masks(**{name: jnp.ones(bad)}))
            with pytest.raises(ValueError, match=rf"^masks\.{name} has shape"):
                rnn.stack(rnn.GRU, one_layer(PARAMS["gru"]), X, masks=masks)
        # One row for the whole batch, as TF1 draws them.
        masks = one_layer(rnn.Masks(**{name: jnp.ones((1, good[1]))}))
        assert_close(
            rnn.stack(rnn.GRU, one_layer(PARAMS["gru"]), X, masks=masks),
            rnn.stack(rnn.GRU, one_layer(PARAMS["gru"]), X),
        )


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "keep", [0.0, 1.5, -0.2, float("nan"), 0, 2, np.float32(0), jnp.float32(1.1), "half", [0.5, 0.0]]
)
def test_probabilities_outside_their_range(keep, place):
    with pytest.raises(ValueError, match=r"^keep is "):
        rnn.draw_masks(jax.random.key(0), tuple(keep if i == place else None for i in range(3)), 2, 3, 4, jnp.float32)


@pytest.mark.parametrize("keep", [0.5, (0.5,), None])
def test_probabilities_are_three(keep):
    with pytest.raises(
        ValueError, match=r"^keep is .*; expected a probability or None for each of inputs, outputs, state"
    ):
        rnn.draw_masks(jax.random.key(0), keep, 2, 3, 4, jnp.float32)


def test_the_whole_number_one_keeps_all():
    for mask in rnn.draw_masks(jax.random.key(0), (1, np.int64(1), 1.0), 2, 3, 4, jnp.float32):
        np.testing.assert_array_equal(mask, np.ones(mask.shape))
