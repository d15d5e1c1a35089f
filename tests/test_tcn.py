"""The temporal convolutional network: what its outputs depend on, ragged batches and dropout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax.models.tcn import TCN, causal_convolution

BATCH, TIME, FEATURES, CLASSES = 5, 21, 2, 3
MODEL = TCN(num_classes=CLASSES, channels=6, levels=3, kernel_size=3)
LENGTHS = [TIME, 0, 1, 8, 13]
ENDS = jnp.array(LENGTHS)

apply = jax.jit(MODEL.apply, static_argnames=("train", "every_step"))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (BATCH, TIME, FEATURES))


@pytest.fixture(scope="module")
def variables(x):
    """Parameters whose biases are large, so that a step that should be empty shows."""
    variables = jax.jit(MODEL.init)(jax.random.key(0), x)
    return jax.tree.map(lambda p: p + 0.3 if p.ndim == 1 else p, variables)


@pytest.mark.parametrize("t", [0, 7, TIME - 2])
def test_a_step_depends_on_no_later_one(variables, x, t):
    before = apply(variables, x, every_step=True)
    after = apply(variables, x.at[:, t + 1 :].add(1.0), every_step=True)
    np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
    assert np.all(np.any(before[:, t + 1] != after[:, t + 1], axis=-1))


@pytest.mark.parametrize("every_step", [False, True])
def test_the_last_step_depends_on_its_receptive_field(every_step):
    model = TCN(num_classes=1, channels=2, levels=2, kernel_size=3)
    x = jnp.ones((1, TIME, 1))
    # All weights positive, and the input too, so that no ReLU hides a path.
    variables = jax.tree.map(jnp.abs, jax.jit(model.init)(jax.random.key(0), x))

    def last(x):
        logits = model.apply(variables, x, every_step=every_step)
        return (logits[:, -1] if every_step else logits).sum()

    reached = jax.jit(jax.grad(last))(x)[0, :, 0] != 0.0
    assert reached.tolist() == [False] * (TIME - 13) + [True] * 13


@pytest.mark.parametrize("time", [1, 16, TIME])
def test_last_of_every_step_is_the_plain_call(variables, x, time):
    every = apply(variables, x[:, :time], every_step=True)
    assert every.shape == (BATCH, time, CLASSES)
    np.testing.assert_allclose(apply(variables, x[:, :time]), every[:, -1], atol=1e-5)


@pytest.mark.parametrize(("padding", "length_dtype"), [(0.0, jnp.int32), (7.0, jnp.uint8), (np.nan, jnp.int32)])
def test_ragged_sequences_read_as_whole_ones_up_to_their_end(variables, x, padding, length_dtype):
    padded = jnp.where((jnp.arange(TIME) < ENDS[:, None])[..., None], x, padding)
    whole = apply(variables, x, every_step=True)
    plain = apply(variables, padded, lengths=ENDS.astype(length_dtype))
    every = apply(variables, padded, lengths=ENDS.astype(length_dtype), every_step=True)
    bias = variables["params"]["dense"]["bias"]
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(every[b, :length], whole[b, :length], atol=1e-5)
        np.testing.assert_array_equal(every[b, length:], jnp.broadcast_to(bias, (TIME - length, CLASSES)))
        np.testing.assert_allclose(plain[b], whole[b, length - 1] if length else bias, atol=1e-5)


@pytest.mark.parametrize("every_step", [False, True])
def test_padding_reaches_no_gradient(variables, x, every_step):
    @jax.jit
    def gradients(x):
        def loss(variables, x):
            return (MODEL.apply(variables, x, lengths=ENDS, every_step=every_step) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(variables, x)

    past = (jnp.arange(TIME) >= ENDS[:, None])[..., None]
    clean, dirty = gradients(jnp.where(past, 0.0, x)), gradients(jnp.where(past, jnp.nan, x))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not np.any(np.where(past, clean[1], 0.0))
    assert np.any(clean[1])


def test_lengths_outside_the_time_axis_are_clipped(variables, x):
    outside, inside = jnp.array([-1, TIME + 5, 3, 4, 2**31 - 1]), jnp.array([0, TIME, 3, 4, TIME])
    np.testing.assert_array_equal(apply(variables, x, lengths=outside), apply(variables, x, lengths=inside))
    beyond = jnp.where(inside == TIME, jnp.uint32(2**32 - 1), inside.astype(jnp.uint32))  # an int32 would be negative
    np.testing.assert_array_equal(apply(variables, x, lengths=beyond), apply(variables, x, lengths=inside))


@pytest.mark.parametrize(
    "options", [{"keep": (0.5, 0.5, 0.5)}, {"train": True}, {"train": True, "keep": (0.5, None, 0.5)}]
)
def test_nothing_is_dropped_outside_training_or_at_other_places(variables, x, options):
    # No rng is given: a draw would fail.
    np.testing.assert_array_equal(apply(variables, x, **options), apply(variables, x))


def test_dropout_keeps_the_mean_and_draws_each_step_anew():
    # One block whose convolutions pass their positive input on, so that both dropouts show and nothing is bent.
    model = TCN(num_classes=1, channels=1, levels=1, kernel_size=1)
    ones, zero = jnp.ones((1, 1)), jnp.zeros(1)
    level = {f"conv_{i}": {"kernel": ones[None], "bias": zero} for i in (0, 1)}
    level |= {f"norm_{i}": {f"conv_{i}/kernel/scale": ones[0]} for i in (0, 1)}
    params = {"tcn": {"level_0": level}, "dense": {"kernel": ones, "bias": zero}}
    keep, x = 0.8, jnp.ones((64, 500, 1))

    @jax.jit
    def run(keep):
        rngs = {"dropout": jax.random.key(0)}
        options = {"train": True, "keep": (None, keep, None), "every_step": True, "rngs": rngs}
        return model.apply({"params": params}, x, **options)

    branch = np.asarray(run(keep))[..., 0] - 1.0  # less the residual
    values, counts = np.unique(branch.round(4), return_counts=True)
    np.testing.assert_allclose(values, [0.0, keep**-2], atol=1e-3)
    # Five standard errors of so many draws.
    np.testing.assert_allclose(counts[1] / branch.size, keep**2, atol=0.0135)
    np.testing.assert_allclose(branch.mean(), 1.0, atol=0.021)
    # Neither a sequence nor a step shares its mask with the others.
    assert branch.std(axis=0).min() > 0.0
    assert branch.std(axis=1).min() > 0.0


def test_dropout_draws_follow_the_rng(variables, x):
    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(variables, x, train=True, keep=(None, 0.7, None), rngs=rngs)

    np.testing.assert_array_equal(run(0), run(0))
    assert np.any(run(0) != run(1))


def convolution_tap_by_tap(x, kernel, stride, dilation):
    """One matrix product a tap, differentiated by JAX."""
    size, time = len(kernel), x.shape[1]
    padded = jnp.pad(x, ((0, 0), ((size - 1) * dilation, 0), (0, 0)))
    every = sum(padded[:, k * dilation : k * dilation + time] @ kernel[k] for k in range(size))
    return every[:, (time - 1) % stride :: stride]


@pytest.mark.parametrize(
    ("size", "time", "stride", "dilation"),
    [
        (3, 20, 1, 1),
        (3, 20, 2, 1),
        (3, 20, 3, 2),
        (7, 3, 1, 4),
        (7, 3, 2, 1),
        (3, 1, 2, 1),
        (1, 6, 2, 3),
        (2, 21, 2, 4),
    ],
)
def test_the_convolution_and_its_gradients_are_those_of_a_sum_over_taps(size, time, stride, dilation):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, time, 3)), random.normal(size=(size, 3, 5))
    weights = random.normal(size=(2, -(-time // stride), 5))

    def values_and_gradients(convolution):
        def run(x, kernel, weights):
            y, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, stride, dilation), x, kernel)
            return y, *pull(weights)

        return jax.jit(run)(*(jnp.float32(array) for array in (x, kernel, weights)))

    for ours, theirs in zip(*map(values_and_gradients, (causal_convolution, convolution_tap_by_tap)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers order axes as they please")
def test_in_a_loop_every_convolution_has_the_order_that_is_fast_on_a_cpu(variables, x):
    def step(_, variables):
        gradients = jax.grad(lambda variables: MODEL.apply(variables, x).sum())(variables)
        return jax.tree.map(jnp.subtract, variables, gradients)

    program = jax.jit(lambda variables: jax.lax.fori_loop(0, 3, step, variables)).lower(variables).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=([^,\s]*)", program)
    # Two convolutions a level and their two gradients, of which the input itself needs none.
    assert orders == ["b0f_0io->b0f"] * (3 * 2 * MODEL.levels - 1)
