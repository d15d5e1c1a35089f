"""Each paper's protocol by its name: its numbers, and what a task makes of it."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from configs import row_lstm
from configs.tutorial2018 import permuted_gru, pixel_gru
from seqmnist_jax.cli import describe, text
from seqmnist_jax.data import task
from seqmnist_jax.data.protocols import FIELDS, PROTOCOLS, SEEDED_ORDERS, partition, permutation, selection_size
from seqmnist_jax.data.sources import Images, load_embedded
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.run import build_run

# The first ten of each permutation, and the SHA-256 of all 784 as little-endian int32.
ORDERS = {
    "numpy:92916": (
        [319, 576, 323, 107, 355, 716, 197, 20, 625, 60],
        "8028ff1eba5833e7273ccfd96ea9211bd6d9ec929ddf612a958cc874807b2a3b",
    ),
    "numpy:100": (
        [73, 529, 19, 222, 770, 310, 341, 418, 345, 627],
        "c9e4007f3b07f16b5f1e1155e2ac8cc53baf2d5920bbd4d4881e923e7330fbd0",
    ),
    "numpy:0": (
        [693, 85, 647, 392, 765, 14, 299, 711, 55, 31],
        "d3fd1bb9662071eba85754c13a6997c1380c4d9254f7bef467276654217bcca8",
    ),
    "torch:5544": (
        [327, 72, 48, 129, 109, 101, 69, 569, 79, 263],
        "44b845ec682ec4d0c1926d0efce7a2403ce37613bffcc2a4f339b9366d2c9bdd",
    ),
    "torch:12008": (
        [91, 97, 471, 426, 157, 451, 312, 198, 117, 454],
        "2035d69749290721d9d878decb1618affd5240bef668cb9b366d37fd787bb7d4",
    ),
    "bit_reversal": (
        [0, 512, 256, 768, 128, 640, 384, 64, 576, 320],
        "603ce0307a3e869ba1d4f56adbb046417267d7b6b8a6075328679e2f00979a80",
    ),
    "numpy_randint:1": (
        [37, 235, 72, 767, 715, 645, 144, 129, 583, 749],
        "a525215fd330e794895f698c45533d38ba1d9e79f05119f072680463810be987",
    ),
}

# permutation, training and validation images of 60,000, scaling, selection.
EXPECTED = {
    "seqmnist": ("numpy:92916", 55_000, 5_000, "unit", "validation"),
    "tutorial2018": ("numpy:100", 55_000, 5_000, "unit", "test:128"),
    "s4": ("bit_reversal", 54_000, 6_000, "unit", "validation"),
    "exprnn": ("numpy:92916", 60_000, 0, "unit", "test:10000"),
    "lem": ("torch:5544", 57_000, 3_000, "unit", "validation"),
    "cornn": ("torch:12008", 57_000, 3_000, "unit", "validation"),
    "tcn": ("numpy:0", 60_000, 0, "standard", "last"),
    "ccnn": ("numpy:0", 55_000, 5_000, "standard", "validation"),
    "lmu": ("numpy:0", 50_000, 10_000, "unit", "validation"),
    "indrnn": ("numpy:0", 57_000, 3_000, "signed", "validation"),
    "annotated_s4": ("none", 60_000, 0, "symmetric", "test:10000"),
    "rbn": ("numpy_randint:1", 50_000, 10_000, "unit", "validation"),
}


# The table.


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_is_what_its_repository_does(name):
    protocol = PROTOCOLS[name]
    images = np.arange(60_000)
    train, validation = (images[rows] for rows in partition(protocol.split, 60_000))
    assert not set(train) & set(validation)
    found = (protocol.permutation, len(train), len(validation), protocol.scaling, protocol.selection)
    assert found == EXPECTED[name]


def test_each_protocol_stands_under_its_own_name_with_its_source():
    assert PROTOCOLS.keys() == EXPECTED.keys()
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.source
        assert protocol.flaws.keys() <= set(FIELDS)
        assert protocol.overrides == ()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_selection_on_the_test_set_is_told_of_what_does_that_and_of_no_other(name):
    protocol = PROTOCOLS[name]
    on_test = selection_size(protocol.selection) is not None
    assert ("selects on the test set" in protocol.flaws.get("selection", "")) == on_test
    assert on_test or protocol.flaws.get("selection", "theirs").startswith("theirs")  # and how it differs from ours


def test_permutations_that_are_not_on_record_say_so():
    for name in ("tcn", "indrnn"):
        assert "unseeded" in PROTOCOLS[name].flaws["permutation"]
    assert "the images ours" in PROTOCOLS["indrnn"].flaws["split"]


# The permutations.


@pytest.mark.parametrize("name", ORDERS)
def test_permutation_is_for_ever_these_numbers(name):
    order = permutation(name, 784)
    assert order.dtype == np.int32
    assert order[:10].tolist() == ORDERS[name][0]
    assert hashlib.sha256(order.astype("<i4").tobytes()).hexdigest() == ORDERS[name][1]


def test_every_permutation_of_a_protocol_is_pinned():
    assert {protocol.permutation for protocol in PROTOCOLS.values()} - {"none"} == ORDERS.keys()


@pytest.mark.parametrize("kind", [*SEEDED_ORDERS, "bit_reversal"])
@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 15, 16, 17, 784])
def test_any_number_of_pixels_can_be_ordered(kind, pixels):
    order = permutation(kind if kind == "bit_reversal" else f"{kind}:7", pixels)
    assert order.shape == (pixels,)
    assert order.dtype == np.int32
    if kind == "numpy_randint":
        assert order.min() >= 0
        assert order.max() < pixels
    else:
        assert sorted(order) == list(range(pixels))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 623, 624, 625, 784, 5_000])
def test_torch_order_is_that_of_torch(count):
    torch = pytest.importorskip("torch")
    seeds = np.random.default_rng(count).integers(0, 2**32, 40).tolist()
    for seed in [0, 1, 42, 5544, 12008, 2**31, 2**32 - 1, *seeds]:
        torch.manual_seed(seed)
        np.testing.assert_array_equal(permutation(f"torch:{seed}", count), torch.randperm(count).numpy())


@pytest.mark.parametrize(("size", "seed", "count"), [(6_000, 42, 60_000), (3_000, 5544, 60_000), (3, 0, 10)])
def test_random_split_is_that_of_torch(size, seed, count):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    parts = torch.utils.data.random_split(range(count), [count - size, size], generator=generator)
    for rows, part in zip(partition(f"torch:{size}:{seed}", count), parts, strict=True):
        np.testing.assert_array_equal(rows, sorted(part.indices))


def _lem(torch):
    layers = [torch.nn.Linear(1, 512), torch.nn.Linear(128, 384), torch.nn.Linear(128, 128)]
    for layer in layers:
        layer.reset_parameters()
    torch.nn.init.kaiming_normal_(torch.nn.Linear(128, 10).weight)


def _cornn(torch):
    torch.nn.Linear(1 + 256 + 256, 256)
    torch.nn.Linear(256, 10)


def _ccnn(torch):
    def convolution(features, channels):  # whose kernel is a network of three layers, of Gabor functions
        linear = [torch.nn.Conv1d(32, 32, 1) for _ in range(3)] + [torch.nn.Conv1d(32, features, 1)]
        for layer in range(4):
            torch.rand(32, 1)
            torch.distributions.Gamma(6.0 / (layer + 1), 1.0).sample((32, 1))
            torch.nn.Conv1d(1, 32, 1)
        for one in linear:
            torch.nn.init.kaiming_uniform_(one.weight, nonlinearity="linear")
        pointwise(features, channels)

    def pointwise(features, channels):
        torch.nn.init.kaiming_normal_(torch.nn.Conv1d(features, channels, 1).weight)

    torch.utils.data.random_split(range(60_000), [55_000, 5_000])
    convolution(1, 140)
    for _ in range(4):
        convolution(140, 140)
        pointwise(140, 140)
    pointwise(140, 10)


@pytest.mark.parametrize(
    ("name", "seed", "size", "model"),
    [("lem", 5544, 3_000, _lem), ("cornn", 12008, 3_000, _cornn), ("ccnn", 0, 5_000, _ccnn)],
)
def test_split_after_a_model_is_that_of_torch(name, seed, size, model):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    if name != "ccnn":  # whose permutation is NumPy's
        np.testing.assert_array_equal(permutation(PROTOCOLS[name].permutation, 784), torch.randperm(784).numpy())
    model(torch)
    parts = torch.utils.data.random_split(range(60_000), [60_000 - size, size])
    for rows, part in zip(partition(PROTOCOLS[name].split, 60_000), parts, strict=True):
        np.testing.assert_array_equal(rows, sorted(part.indices))


def test_random_split_without_torch_is_for_ever_these_images():
    _, validation = partition("torch:6000:42", 60_000)
    assert validation[:10].tolist() == [19, 36, 42, 62, 71, 97, 118, 122, 125, 143]
    _, validation = partition(PROTOCOLS["lem"].split, 60_000)
    assert validation[:10].tolist() == [4, 21, 64, 134, 137, 147, 159, 173, 180, 193]


def test_bit_reversal_mirrors_the_bits_of_each_place():
    mirrored = [int(f"{place:010b}"[::-1], 2) for place in range(1024)]
    assert permutation("bit_reversal", 784).tolist() == [number for number in mirrored if number < 784]
    assert permutation("bit_reversal", 8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


def test_the_order_of_rbn_reads_501_pixels():
    np.random.seed(1)
    order = np.random.randint(0, 784, size=(784,))
    np.testing.assert_array_equal(permutation("numpy_randint:1", 784), order)
    assert len(set(order.tolist())) == 501
    assert "501 distinct of 784" in PROTOCOLS["rbn"].flaws["permutation"]


# Images by rows.


def test_images_are_cut_by_slice_or_by_row_numbers():
    images = Images(np.arange(24, dtype=np.uint8).reshape(6, 2, 2), np.arange(6, dtype=np.uint8))
    assert images[2:4].labels.tolist() == [2, 3]
    assert np.shares_memory(images[2:4].images, images.images)
    some = images[np.array([1, 4, 5])]
    assert len(some) == 3
    assert some.labels.tolist() == [1, 4, 5]
    np.testing.assert_array_equal(some.images, images.images[[1, 4, 5]])


# A protocol in force.


def config_of(**fields):
    config = row_lstm.get_config()
    config.data.source = "embedded"
    config.update_from_flattened_dict({f"data.{name}": value for name, value in fields.items()})
    return config


def in_force(**fields):
    return task.build_protocol(config_of(**fields), full_size())


def full_size():
    """A data set with as many images as MNIST, of one pixel."""

    def images(count):
        return Images(np.zeros((count, 1, 1), np.uint8), np.zeros(count, np.uint8))

    digits = load_embedded()
    return dataclasses.replace(digits, train=images(60_000), test=images(10_000), split=None, source="idx")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_s_own_values_are_in_force(name):
    permuted = PROTOCOLS[name].permutation != "none"
    protocol = in_force(protocol=name, permuted=permuted)
    assert protocol == PROTOCOLS[name]
    plain = in_force(protocol=name)
    assert plain.permutation == "none"
    assert "permutation" not in plain.flaws, "a flaw of what is not used"
    assert plain.overrides == ()


@pytest.mark.parametrize(
    ("permuted", "explicit", "expected", "overrides"),
    [
        (False, None, "none", ()),
        (True, None, "bit_reversal", ()),
        (False, "numpy:3", "numpy:3", ("permutation",)),
        (True, "numpy:3", "numpy:3", ("permutation",)),
        (True, "none", "none", ("permutation",)),
        (False, "none", "none", ()),
        (False, "bit_reversal", "bit_reversal", ()),
    ],
)
def test_an_explicit_permutation_goes_before_the_protocol_s(permuted, explicit, expected, overrides):
    protocol = in_force(protocol="s4", permuted=permuted, permutation=explicit)
    assert protocol.permutation == expected
    assert protocol.overrides == overrides
    assert ("permutation" in protocol.flaws) == (expected == "bit_reversal")


def test_a_protocol_without_a_permutation_cannot_permute():
    with pytest.raises(UsageError, match=r"data\.permuted is True.*annotated_s4.*data\.permutation"):
        in_force(protocol="annotated_s4", permuted=True)
    assert in_force(protocol="annotated_s4", permuted=True, permutation="numpy:1").permutation == "numpy:1"


def test_what_a_config_overrides_is_named_and_its_flaw_is_gone():
    protocol = in_force(protocol="tcn", permuted=True, selection="validation", split="first:7", scaling="standard")
    assert protocol.overrides == ("selection", "split")
    assert protocol.flaws.keys() == {"permutation"}
    assert (protocol.split, protocol.selection, protocol.scaling) == ("first:7", "validation", "standard")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_task_of_the_embedded_digits_can_follow_any_protocol(name):
    permuted = PROTOCOLS[name].permutation != "none"
    built = task.build_task(config_of(protocol=name, permuted=permuted, view="pixel"))
    facts = json.loads(json.dumps(built.facts()))
    assert facts["protocol"] == name
    assert facts["overrides"] == []
    assert facts["permutation"] == PROTOCOLS[name].permutation
    assert facts["split"] == "first:500", "the digits' own"
    assert facts["sizes"] == {"train": 4000, "validation": 500, "test": 500}
    # The split that has the flaw is not used here.
    assert facts["caveats"] == [flaw for field, flaw in PROTOCOLS[name].flaws.items() if field != "split"]
    expected = {"test:10000": "test:500"}.get(PROTOCOLS[name].selection, PROTOCOLS[name].selection)
    assert facts["selection"] == expected, "all test images that there are"
    assert len(built.part(built.measured_split)) > 0


def test_a_selection_of_more_test_images_than_there_are_is_refused_where_it_is_asked_for():
    with pytest.raises(UsageError, match=r"data\.selection is 'test:501'.*500 test images"):
        task.build_task(config_of(selection="test:501"))


@pytest.mark.parametrize(("rule", "first"), [("last:4", [0, 1, 2]), ("torch:4:1", None)])
def test_parts_of_a_task_follow_the_split(rule, first):
    built = task.build_task(config_of(split=rule))
    train, validation = (np.arange(4500)[rows] for rows in partition(rule, 4500))
    everything = load_embedded().train
    np.testing.assert_array_equal(built.part("validation").images, everything.images[validation])
    np.testing.assert_array_equal(built.part("train").labels, everything.labels[train])
    np.testing.assert_array_equal(task.split_part(load_embedded(), rule, "train").labels, everything.labels[train])
    assert built.facts()["sizes"] == {"train": 4496, "validation": 4, "test": 500}
    assert first is None or train[:3].tolist() == first


@pytest.mark.parametrize(("config", "order"), [(pixel_gru, "none"), (permuted_gru, "numpy:100")])
def test_the_tutorial_s_configs_follow_its_protocol(config, order):
    config = config.get_config()
    config.data.source = "embedded"
    facts = task.build_task(config).facts()
    assert (facts["protocol"], facts["permutation"], facts["selection"]) == ("tutorial2018", order, "test:128")
    assert facts["overrides"] == []
    assert len(facts["caveats"]) == 1
    assert "selects on the test set" in facts["caveats"][0]


# What describe says of it.


def test_describe_names_the_protocol_its_caveats_and_what_is_overridden():
    config = config_of(protocol="s4", permuted=True, scaling="standard")
    config.runtime.backend = "scan"
    run = build_run(config)
    description = describe.describe(run, {})
    assert description["data"]["protocol"] == "s4"
    assert description["data"]["caveats"] == ["bit reversal is not a random permutation"]
    assert description["data"]["overrides"] == ["scaling"]
    (line,) = [line for line in text.description(run, description).splitlines() if line.startswith("Protocol")]
    assert line.startswith("Protocol     s4: github.com/state-spaces/s4")
    assert line.endswith("; overridden: scaling; caveats: bit reversal is not a random permutation")


def test_describe_has_no_caveats_of_a_protocol_without():
    config = config_of()
    config.runtime.backend = "scan"
    run = build_run(config)
    description = describe.describe(run, {})
    assert (description["data"]["protocol"], description["data"]["caveats"]) == ("seqmnist", [])
    words = text.description(run, description)
    assert "Protocol     seqmnist: " in words
    assert "caveats" not in words
    assert "overridden:" not in words.split("Protocol ")[1]
