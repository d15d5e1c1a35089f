"""Variational dropout: the masks themselves, where a stack applies them, and the model's use of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from seqmnist_jax import rnn
from seqmnist_jax.models import build

BATCH, TIME, FEATURES, HIDDEN, CLASSES = 3, 5, 7, 6, 10
# Small graphs, many of them: compiling is what costs here.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CELLS = {"lstm": rnn.LSTM, "gru": rnn.GRU}


def draw(seed=0, keep=(0.5, 0.5, 0.5), batch=BATCH, features=FEATURES, hidden=HIDDEN, dtype=jnp.float32):
    return rnn.draw_masks(jax.random.key(seed), keep, batch, features, hidden, dtype)


# The masks.


def test_masks_are_zero_or_the_inverse_probability_with_mean_one():
    keep = (0.9, 0.5, 0.25)
    masks = draw(keep=keep, batch=200, features=500, hidden=400)
    assert [mask.shape for mask in masks] == [(200, 500), (200, 400), (200, 400)]
    for mask, p in zip(masks, keep, strict=True):
        assert mask.dtype == jnp.float32
        assert set(np.unique(mask).tolist()) == {0.0, float(np.float32(1.0) / np.float32(p))}
        error = np.sqrt((1 / p - 1) / mask.size)  # one standard deviation of the mean
        assert abs(float(mask.mean()) - 1.0) < 5 * error


def test_every_sequence_and_unit_has_its_own_number():
    for mask in draw(batch=40, features=300, hidden=300):
        rows, columns = np.asarray(mask), np.asarray(mask).T
        assert len(np.unique(rows, axis=0)) == 40
        assert len(np.unique(columns, axis=0)) == 300


def test_padding_reaches_no_gradient_of_a_mask():
    params = rnn.init_stack(jax.random.key(0), rnn.GRU, 3, 4, num_layers=1, bidirectional=False)

    def total(keep, padding):
        x = jnp.ones((2, 5, 3)).at[1, 3:].set(padding)
        masks = {"layer_0": {"forward": rnn.Masks(inputs=jnp.ones((2, 3)) / keep)}}
        return rnn.stack(rnn.GRU, params, x, lengths=jnp.array([5, 3]), masks=masks).sum()

    assert jax.grad(total)(0.9, jnp.nan) == jax.grad(total)(0.9, 0.0)


def test_masks_of_a_direction_that_there_is_none():
    params = rnn.init_stack(jax.random.key(0), rnn.GRU, 3, 4, num_layers=1, bidirectional=True)
    masks = {"layer_0": {"forward": rnn.Masks(), "backwards": rnn.Masks()}}
    with pytest.raises(ValueError, match=r"expected .*backward"):
        rnn.stack(rnn.GRU, params, jnp.ones((2, 5, 3)), masks=masks)


def test_the_three_masks_are_independent():
    masks = [np.asarray(mask) for mask in draw(batch=50, features=300, hidden=300)]
    for a, b in itertools.combinations(masks, 2):
        assert 0.45 < (a == b).mean() < 0.55


def test_nothing_is_drawn_where_nothing_is_dropped():
    masks = draw(keep=(None, 0.5, None))
    assert (masks.inputs, masks.state) == (None, None)
    assert masks.outputs.shape == (BATCH, HIDDEN)
    assert draw(keep=(None, None, None)) == rnn.Masks(None, None, None)


def test_one_places_draw_does_not_depend_on_the_others():
    np.testing.assert_array_equal(draw(keep=(None, 0.5, None)).outputs, draw(keep=(0.1, 0.5, 0.9)).outputs)


def test_keeping_all_gives_exactly_ones():
    for mask in draw(keep=(1.0, 1.0, jnp.float32(1.0)), batch=50, features=200, hidden=200):
        np.testing.assert_array_equal(mask, np.ones(mask.shape, np.float32))


def test_probabilities_may_be_traced():
    traced = jax.jit(lambda p: draw(keep=(p, None, p)))(jnp.float32(0.5))
    jax.tree.map(np.testing.assert_array_equal, traced, draw(keep=(0.5, None, 0.5)))


# The stack.


def stack_case(cell, num_layers, bidirectional, keep):
    rng = np.random.default_rng(0)
    params = rnn.init_stack(
        jax.random.key(0), CELLS[cell], FEATURES, HIDDEN, num_layers=num_layers, bidirectional=bidirectional
    )
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    x = jnp.asarray(rng.standard_normal((BATCH, TIME, FEATURES)), jnp.float32)
    seeds = itertools.count(10)
    masks = {
        name: {direction: draw(next(seeds), keep, features=p["kernel"].shape[0]) for direction, p in directions.items()}
        for name, directions in params.items()
    }
    return params, x, masks


def by_hand(cell, params, x, masks, lengths, sequences):
    """What dropout is meant to be, a step at a time."""
    ends = np.full(len(x), x.shape[1]) if lengths is None else np.asarray(lengths)
    for index in range(len(params)):
        name = f"layer_{index}"
        halves = []
        # Forward first, in whatever order the dict happens to be.
        for direction in sorted(params[name], reverse=True):
            p, mask = params[name][direction], masks[name][direction]
            c = h = last = jnp.zeros((len(x), HIDDEN))
            outputs = [None] * x.shape[1]
            order = range(x.shape[1]) if direction == "forward" else range(x.shape[1] - 1, -1, -1)
            for t in order:
                x_t = x[:, t] if mask.inputs is None else x[:, t] * mask.inputs
                if cell == "lstm":
                    (new_c, y), _ = rnn.lstm_step(p, (c, h), x_t)
                else:
                    new_c, y = c, rnn.gru_step(p, h, x_t)[0]
                seen = y if mask.state is None else y * mask.state
                handed_on = y if mask.outputs is None else y * mask.outputs
                running = (t < ends)[:, None]
                c, h = jnp.where(running, new_c, c), jnp.where(running, seen, h)
                last = jnp.where(running, handed_on, last)
                outputs[t] = jnp.where(running, handed_on, 0.0)
            whole = sequences or index < len(params) - 1
            halves.append(jnp.stack(outputs, 1) if whole else last)
        x = jnp.concatenate(halves, -1)
    return x


ONE = {"inputs": (0.5, None, None), "outputs": (None, 0.5, None), "state": (None, None, 0.5), "all": (0.5, 0.6, 0.7)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("cell", "num_layers", "bidirectional", "lengths", "sequences", "unroll", "place"),
    [
        ("lstm", 1, False, None, True, 1, "inputs"),
        ("gru", 1, False, None, True, 1, "outputs"),
        ("lstm", 1, False, None, True, 1, "state"),
        ("gru", 1, False, None, True, 1, "state"),
        ("lstm", 1, False, None, False, TIME, "outputs"),
        ("lstm", 1, False, (2, 5, 0), False, 1, "state"),
        ("gru", 1, False, (2, 5, 0), False, 1, "state"),
        ("lstm", 2, True, (2, 5, 0), True, 2, "all"),
        ("gru", 2, True, (4, 1, 5), False, 1, "all"),
    ],
)
def test_masks_act_where_they_should(cell, num_layers, bidirectional, lengths, sequences, unroll, place):
    params, x, masks = stack_case(cell, num_layers, bidirectional, ONE[place])
    ends = None if lengths is None else jnp.asarray(lengths)

    def ours(params, x):
        return rnn.stack(
            CELLS[cell],
            params,
            x,
            lengths=ends,
            masks=masks,
            engine=rnn.Engine("fused" if unroll == 1 else "scan", unroll=unroll),
            return_sequences=sequences,
        )

    expected = quick_jit(lambda params, x: by_hand(cell, params, x, masks, lengths, sequences))(params, x)
    assert expected.shape == ((BATCH, TIME) if sequences else (BATCH,)) + (HIDDEN * (1 + bidirectional),)
    found = quick_jit(ours)(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    plain = rnn.stack(CELLS[cell], params, x, lengths=ends, return_sequences=sequences)
    assert np.abs(np.asarray(found) - np.asarray(plain)).max() > 1e-2, "the masks did something"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "backend"), [("lstm", "native"), ("gru", "native"), ("gru", "fused"), ("lstm", "scan")]
)
def test_gradients_go_through_the_masks(need_native, cell, backend):
    need_native(backend)
    params, x, masks = stack_case(cell, 1, True, ONE["all"])

    def of_stack(params, x):
        return jnp.sum(jnp.sin(rnn.stack(CELLS[cell], params, x, masks=masks, engine=rnn.Engine(backend))))

    def of_loop(params, x):
        return jnp.sum(jnp.sin(by_hand(cell, params, x, masks, None, False)))

    found, expected = (quick_jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (of_stack, of_loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_mask_is_the_same_at_every_step(cell):
    """A dropped unit is zero in all outputs; a dropped feature reaches none of them."""
    params, x, masks = stack_case(cell, 1, False, (0.5, 0.5, None))
    mask = masks["layer_0"]["forward"]
    outputs = np.asarray(rnn.stack(CELLS[cell], params, x, masks=masks, return_sequences=True))
    dropped = np.broadcast_to(np.asarray(mask.outputs)[:, None] == 0, outputs.shape)
    assert dropped.any()
    assert (outputs[dropped] == 0).all()
    assert (outputs[~dropped] != 0).all()
    noise = np.where(np.asarray(mask.inputs)[:, None] == 0, 7.0, 0.0)
    assert noise.any()
    again = rnn.stack(CELLS[cell], params, x + noise, masks=masks, return_sequences=True)
    np.testing.assert_array_equal(again, outputs)


def test_the_state_mask_leaves_the_cell_state_of_an_lstm_alone():
    """With all of h dropped an LSTM still remembers through c, and a GRU remembers nothing."""
    for cell in CELLS:
        params, x, _ = stack_case(cell, 1, False, (None, None, None))
        nothing = rnn.Masks(state=jnp.zeros((BATCH, HIDDEN)))
        changed = x.at[:, 0].add(1.0)
        a, b = (rnn.stack(CELLS[cell], params, v, masks={"layer_0": {"forward": nothing}}) for v in (x, changed))
        assert np.allclose(a, b, atol=1e-6) == (cell == "gru")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_masks_of_ones_change_nothing(cell):
    params, x, masks = stack_case(cell, 2, True, (1.0, 1.0, 1.0))
    plain = rnn.stack(CELLS[cell], params, x, return_sequences=True)
    found = rnn.stack(CELLS[cell], params, x, masks=masks, return_sequences=True)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


# The model.


def model_case(cell="lstm", num_layers=2, bidirectional=True, norm="none"):
    config = default.get_config()
    config.model.cell, config.model.hidden_size, config.model.norm = cell, HIDDEN, norm
    config.model.num_layers, config.model.bidirectional = num_layers, bidirectional
    model = build.build_model(config, TIME, CLASSES)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, TIME, FEATURES)), jnp.float32)
    return model, model.init(jax.random.key(0), x), x


KEEP = (0.5, 0.5, 0.5)


def test_layers_and_directions_have_masks_of_their_own(monkeypatch):
    drawn = []
    original = rnn.draw_masks

    def watched(*args, **options):
        drawn.append(original(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(build.rnn, "draw_masks", watched)
    model, variables, x = model_case()
    model.apply(variables, x, train=True, keep=KEEP, rngs={"dropout": jax.random.key(1)})
    assert len(drawn) == 4
    assert [masks.inputs.shape for masks in drawn] == [(BATCH, FEATURES)] * 2 + [(BATCH, 2 * HIDDEN)] * 2
    by_shape = {}
    for mask in itertools.chain(*drawn):
        by_shape.setdefault(mask.shape, []).append(np.asarray(mask))
    for masks in by_shape.values():
        assert all((a != b).any() for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_nothing_is_dropped_outside_training(cell):
    model, variables, x = model_case(cell)
    plain = model.apply(variables, x)
    np.testing.assert_array_equal(model.apply(variables, x, train=False, keep=KEEP), plain)
    found = model.apply(variables, x, train=False, keep=KEEP, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("keep", [None, (None, None, None)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_no_probability_is_no_dropout_bit_for_bit(cell, keep):
    model, variables, x = model_case(cell)
    plain = model.apply(variables, x, train=True)
    np.testing.assert_array_equal(model.apply(variables, x, train=True, keep=keep), plain)
    found = model.apply(variables, x, train=True, keep=keep, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(found, plain)


def test_jit_and_eager_drop_the_same_units():
    """A transformation of JAX sorts dicts by key; the masks must not depend on their order."""
    model, variables, x = model_case()

    def logits(variables, x):
        return model.apply(variables, x, train=True, keep=KEEP, rngs={"dropout": jax.random.key(1)})

    np.testing.assert_allclose(jax.jit(logits)(variables, x), logits(variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", list(ONE))
def test_the_rng_decides_what_is_dropped(place):
    model, variables, x = model_case(num_layers=1, bidirectional=False)

    def logits(seed):
        return np.asarray(
            model.apply(variables, x, train=True, keep=ONE[place], rngs={"dropout": jax.random.key(seed)})
        )

    np.testing.assert_array_equal(logits(1), logits(1))
    assert (logits(1) != logits(2)).any()
    assert (logits(1) != np.asarray(model.apply(variables, x))).any()


def test_the_mean_over_masks_is_the_undropped_result_where_it_is_linear():
    """Logits are linear in the last layer's output mask, and a masked input in its mask."""
    model, variables, x = model_case(num_layers=1, bidirectional=True)
    keys = jax.random.split(jax.random.key(3), 1000)

    def logits(key):
        return model.apply(variables, x, train=True, keep=(None, 0.6, None), rngs={"dropout": key})

    samples = np.asarray(jax.jit(jax.vmap(logits))(keys), np.float64)
    error = samples.std(0) / np.sqrt(len(keys))
    assert (error > 0).all()
    assert (np.abs(samples.mean(0) - np.asarray(model.apply(variables, x))) < 5 * error).all()

    masks = jax.vmap(lambda key: rnn.draw_masks(key, (0.6, None, None), BATCH, FEATURES, 1, jnp.float32).inputs)(keys)
    masked = np.asarray(masks, np.float64)[:, :, None] * np.asarray(x)
    error = masked.std(0) / np.sqrt(len(keys))
    assert (np.abs(masked.mean(0) - np.asarray(x)) < 5 * error).all()
