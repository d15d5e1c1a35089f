"""What decides which numbers a step sees: protocols, sequence views, the stream of examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.data.protocols import PROTOCOLS, SCALINGS, partition, permutation
from seqmnist_jax.data.views import SequenceView
from seqmnist_jax.errors import UsageError

# Protocols.


def test_permutation_is_that_of_numpys_legacy_generator():
    np.random.seed(100)
    expected = np.random.permutation(784)
    order = permutation("numpy:100", 784)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, expected)
    assert order[:10].tolist() == [73, 529, 19, 222, 770, 310, 341, 418, 345, 627]


def test_permutation_leaves_numpys_global_generator_alone():
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    permutation("numpy:100", 784)
    np.testing.assert_array_equal(np.random.random(3), expected)


@pytest.mark.parametrize("seed", [0, 92916, 2**32 - 1])
def test_every_seed_of_that_generator_gives_its_own_permutation(seed):
    order = permutation(f"numpy:{seed}", 30)
    assert sorted(order) == list(range(30))
    np.testing.assert_array_equal(order, permutation(f"numpy:{seed}", 30))
    assert order.tolist() != permutation("numpy:100", 30).tolist()


def test_no_permutation_is_none():
    assert permutation("none", 784) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "None",
        "numpy",
        "numpy:",
        "numpy:-1",
        "numpy:+1",
        "numpy:1.5",
        "numpy:1e3",
        "numpy: 1",
        "numpy:1:2",
        "numpy:²",
        "numpy:१",
        f"numpy:{2**32}",
        pytest.param("numpy:" + "9" * 5000, id="too many digits"),
        "NUMPY:1",
        "none:1",
        "jax:1",
        "100",
        "torch",
        "torch:",
        f"torch:{2**32}",
        "torch:1:2",
        "numpy_randint",
        "numpy_randint:-1",
        "bit_reversal:1",
        "bit-reversal",
    ],
)
def test_bad_permutation_is_refused(name):
    with pytest.raises(UsageError, match=r"data\.permutation"):
        permutation(name, 784)


@pytest.mark.parametrize(
    ("split", "train", "validation"),
    [
        ("first:0", range(9), []),
        ("first:1", range(1, 9), [0]),
        ("first:8", [8], range(8)),
        ("first:007", range(7, 9), range(7)),
        ("last:0", range(9), []),
        ("last:1", range(8), [8]),
        ("last:8", [0], range(1, 9)),
    ],
)
def test_first_or_last_images_validate(split, train, validation):
    images = np.arange(9)
    for rows, expected in zip(partition(split, 9), (train, validation), strict=True):
        assert isinstance(rows, slice)  # nothing is copied
        assert images[rows].tolist() == list(expected)


@pytest.mark.parametrize("size", [0, 1, 4, 8])
def test_random_split_takes_each_image_once_in_ascending_order(size):
    train, validation = partition(f"torch:{size}:5", 9)
    assert (len(train), len(validation)) == (9 - size, size)
    assert sorted([*train, *validation]) == list(range(9))
    assert sorted(train) == list(train)
    assert sorted(validation) == list(validation)
    assert not train.flags.writeable
    assert not validation.flags.writeable


def test_random_split_follows_its_seed():
    splits = {tuple(partition(f"torch:4:{seed}", 20)[1].tolist()) for seed in range(10)}
    assert len(splits) > 5
    np.testing.assert_array_equal(partition("torch:4:3", 20)[1], partition("torch:04:3", 20)[1])


@pytest.mark.parametrize("rule", ["first:9", "last:9", "torch:9:0", "first:10", "last:5000", "torch:9999999999:1"])
def test_split_that_leaves_nothing_to_train_on_is_refused(rule):
    with pytest.raises(UsageError, match=rf"data\.split is '{rule}'.* 9 training images"):
        partition(rule, 9)


@pytest.mark.parametrize(
    "split",
    [
        "",
        "first",
        "first:",
        "first:-5",
        "first:5.0",
        "first:5_000",
        "first: 5",
        "first:5\n",
        "first:5:1",
        "first:१",
        "last",
        "last:-1",
        "torch:5",
        "torch:5:",
        "torch:5:-1",
        f"torch:5:{2**32}",
        "torch:5:1:",
        "torch:5:1:123456789",
        "torch:5:1:2:3",
        "first:5:3:4",
        "middle:5",
        "5000",
        "none",
        pytest.param("first:" + "9" * 5000, id="too many digits"),
    ],
)
def test_bad_split_is_refused(split):
    with pytest.raises(UsageError, match=r"data\.split is"):
        partition(split, 10**6)


@pytest.mark.parametrize("field", ["split", "scaling", "selection"])
def test_protocol_refuses_bad_parts_when_it_is_made(field):
    with pytest.raises(UsageError, match=rf"data\.{field}"):
        dataclasses.replace(PROTOCOLS["seqmnist"], **{field: "nonsense"})


# Views.

SHAPES = [(28, 28), (3, 5), (5, 3)]


def some_images(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["row", "pixel"])
def test_view_gives_the_sequences_that_it_promises(name, shape):
    view = SequenceView(name, shape, "unit")
    height, width = shape
    assert (view.sequence_length, view.features) == ((height, width) if name == "row" else (height * width, 1))
    sequences = view(jnp.asarray(some_images(4, shape)))
    assert sequences.shape == (4, view.sequence_length, view.features)
    assert sequences.dtype == jnp.float32


REFERENCES = {
    "unit": lambda x: x / 255,
    "standard": lambda x: (x / 255 - 0.1307) / 0.3081,
    "symmetric": lambda x: (x / 255 - 0.5) / 0.5,
    "signed": lambda x: (x / 256 - 0.5) * 2,
}
ENDS = {"unit": (0.0, 1.0), "standard": (-0.424213, 2.821487), "symmetric": (-1.0, 1.0), "signed": (-1.0, 0.9921875)}


def test_every_scaling_has_a_reference():
    assert REFERENCES.keys() == ENDS.keys() == SCALINGS.keys()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("jitted", [False, True])
def test_scaling_is_exact_for_every_pixel_value(jitted, name):
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    view = SequenceView("pixel", (16, 16), name)
    scaled = np.asarray((jax.jit(view) if jitted else view)(jnp.asarray(values))).reshape(-1)
    assert scaled.dtype == np.float32
    exact = name in ("unit", "signed")
    np.testing.assert_allclose(scaled[[0, 255]], ENDS[name], rtol=0 if exact else 1e-6)
    # Where something is subtracted, what counts is the rounding of the values before.
    atol = 0 if exact else 2.5e-7
    np.testing.assert_allclose(scaled, REFERENCES[name](np.arange(256)), rtol=1.2e-7, atol=atol)
    assert np.all(np.diff(scaled) > 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", ["row", "pixel"])
def test_view_agrees_with_a_plain_computation(name, permuted, shape):
    height, width = shape
    images = some_images(3, shape)
    order = np.random.default_rng(2).permutation(height * width).astype(np.int32) if permuted else None
    view = SequenceView(name, shape, "unit", order)
    got = np.asarray(jax.jit(lambda batch: view(batch))(jnp.asarray(images)))
    source = range(height * width) if order is None else order
    for n in range(3):
        flat = [float(images[n, p // width, p % width]) / 255 for p in source]
        if name == "row":
            expected = [flat[row * width : (row + 1) * width] for row in range(height)]
        else:
            expected = [[value] for value in flat]
        np.testing.assert_allclose(got[n], expected, rtol=1.2e-7, atol=0)


def test_permuted_view_can_be_jitted_as_it_is():
    view = SequenceView("pixel", (2, 3), "unit", np.array([3, 0, 2, 4, 1, 5], np.int32))
    images = jnp.asarray(some_images(2, (2, 3)))
    np.testing.assert_allclose(jax.jit(view)(images), view(images), rtol=1e-6)


def test_permutation_moves_the_named_pixel_to_each_place():
    # Place 0 reads pixel 3, place 1 pixel 0 and so on: a gather, not a scatter.
    order = np.array([3, 0, 2, 4, 1, 5], np.int32)
    images = np.array([[[0, 51, 102], [153, 204, 255]]], np.uint8)
    row = SequenceView("row", (2, 3), "unit", order)(jnp.asarray(images))
    np.testing.assert_allclose(row, [[[0.6, 0.0, 0.4], [0.8, 0.2, 1.0]]], rtol=1e-6)


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
        [-1, 0, 1, 2, 3, 4],
        [[0, 1, 2, 3, 4, 5]],
        [],
    ],
)
def test_wrong_permutation_is_refused(order):
    with pytest.raises(ValueError, match="permutation"):
        SequenceView("row", (2, 3), "unit", np.array(order, np.int32))


def test_order_may_repeat_pixels_and_leave_others_out():
    images = np.array([[[0, 51, 102], [153, 204, 255]]], np.uint8)
    view = SequenceView("pixel", (2, 3), "unit", np.array([5, 5, 0, 2, 5, 1], np.int32))
    np.testing.assert_allclose(view(jnp.asarray(images))[0, :, 0], [1.0, 1.0, 0.0, 0.4, 1.0, 0.2], rtol=1e-6)


def test_unknown_view_is_refused():
    with pytest.raises(UsageError, match=r"data\.view.*pixel, row"):
        SequenceView("column", (2, 3), "unit")


# The stream of examples.

KEY = jax.random.key(11)


def batch_at(stream, step, batch_size):
    orders, offset, steps = stream.window(step)
    assert steps >= 1
    assert offset >= 0
    batch = np.asarray(orders)[offset : offset + batch_size]
    assert len(batch) == batch_size
    return batch


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 3), (9, 5), (5, 5), (8, 4), (6, 1), (1, 1), (11, 10)])
def test_epochs_are_permutations_laid_end_to_end(size, batch_size):
    stream = ExampleStream(KEY, size, batch_size)
    steps = -(-3 * size // batch_size)
    examples = np.concatenate([batch_at(stream, step, batch_size) for step in range(steps)])
    for epoch in range(3):
        assert sorted(examples[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_batches_span_epochs():
    # 10 examples in fours: the third batch is the last two of one epoch and the first two of the next.
    stream = ExampleStream(KEY, 10, 4)
    examples = np.concatenate([batch_at(stream, step, 4) for step in range(5)])
    orders, offset, _ = stream.window(2)
    assert offset == 8
    np.testing.assert_array_equal(np.asarray(orders)[8:12], examples[8:12])
    assert sorted(examples[10:20]) == list(range(10))
    assert examples[:10].tolist() != examples[10:].tolist()


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 3), (5, 5), (11, 10), (1, 1)])
def test_as_many_steps_as_a_window_offers_can_be_cut_from_it(size, batch_size):
    stream = ExampleStream(KEY, size, batch_size)
    step = 0
    while step * batch_size < 6 * size:
        orders, offset, steps = stream.window(step)
        orders = np.asarray(orders)
        assert orders.dtype == np.int32
        assert steps >= 1
        assert offset + steps * batch_size <= len(orders)
        for i in range(steps):
            batch = orders[offset + i * batch_size :][:batch_size]
            np.testing.assert_array_equal(batch, batch_at(ExampleStream(KEY, size, batch_size), step + i, batch_size))
        step += steps


# Few sizes, because each is compiled once.
@settings(max_examples=120, deadline=None, database=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 7, 10]))
def test_batch_follows_from_key_and_step_alone(data, size):
    batch_size = data.draw(st.integers(1, size))
    visited = data.draw(st.lists(st.integers(0, 100_000), max_size=4))
    step = data.draw(st.integers(0, 100_000))
    travelled = ExampleStream(KEY, size, batch_size)
    for earlier in visited:
        travelled.window(earlier)
    fresh = batch_at(ExampleStream(KEY, size, batch_size), step, batch_size)
    np.testing.assert_array_equal(batch_at(travelled, step, batch_size), fresh)
    # Within an epoch the same whether it is reached as the first or the second of a window.
    first, last = step * batch_size, (step + 1) * batch_size - 1
    if first // size == last // size:
        assert len(set(fresh.tolist())) == batch_size


def test_epochs_differ_and_so_do_keys():
    size = 50
    orders = [batch_at(ExampleStream(KEY, size, size), epoch, size).tolist() for epoch in range(20)]
    orders += [
        batch_at(ExampleStream(jax.random.key(seed), size, size), epoch, size).tolist()
        for seed in range(5)
        for epoch in range(4)
    ]
    assert len({tuple(order) for order in orders}) == 40
    assert list(range(size)) not in orders


def test_places_of_an_epoch_are_spread_evenly():
    # Over many epochs each example comes first about equally often: mean 40, deviation 6.
    stream = ExampleStream(KEY, 10, 10)
    counts = np.bincount([batch_at(stream, epoch, 10)[0] for epoch in range(400)], minlength=10)
    assert counts.min() > 15
    assert counts.max() < 75
