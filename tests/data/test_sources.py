"""Where images come from: folders of IDX files, the embedded digits, and the cache between."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from configs import row_lstm
from seqmnist_jax.data import cache, embedded, sources, task
from seqmnist_jax.data.idx import DataError, write_idx
from seqmnist_jax.data.sources import FILES, KNOWN_CONTENT, Request, build_request, load_dataset, load_embedded


def load_idx(folder):
    return sources.load_idx(Request(data_dir=folder))


def data_dir_of(config):
    return build_request(config).data_dir


def load_auto(folder):
    return sources.load_auto(Request(data_dir=folder))


@contextlib.contextmanager
def as_nobody():
    """A user who may not enter what is closed to others, as root may."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


EMBEDDED_HASH = "84d19920fb05d526563283865dbf1ad032dbee660a3fc45feb2fb0b8ab121bea"


def assert_holds(dataset, data):
    for name, images in (("train", dataset.train), ("test", dataset.test)):
        np.testing.assert_array_equal(images.images, data.arrays[f"{name}_images"])
        np.testing.assert_array_equal(images.labels, data.arrays[f"{name}_labels"])
        assert images.images.dtype == images.labels.dtype == np.uint8


# Folders of IDX files.


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_folder_gives_what_its_files_hold(tmp_path, small_data, suffix):
    data = small_data()
    dataset = load_idx(data.write(tmp_path / "d", suffix))
    assert_holds(dataset, data)
    assert dataset.name == "unknown"
    assert dataset.source == "idx"
    assert dataset.image_shape == (4, 6)
    assert (len(dataset.train), len(dataset.test)) == (12, 5)
    assert dataset.split is None
    assert dataset.warning is None


def test_names_may_mix_gzipped_and_plain(tmp_path, small_data):
    data = small_data()
    folder = data.write(tmp_path / "d", ".gz")
    stem = FILES["train_labels"][0]
    (folder / f"{stem}.gz").unlink()
    write_idx(folder / stem, data.arrays["train_labels"])
    assert_holds(load_idx(folder), data)


def test_content_hash_tells_contents_apart_and_not_their_packing(tmp_path, small_data):
    original = small_data()
    reference = load_idx(original.write(tmp_path / "plain", "")).content_hash
    assert load_idx(original.write(tmp_path / "zipped", ".gz")).content_hash == reference

    pixel = original.arrays["test_images"].copy()
    pixel[4, 3, 5] ^= 1
    label = original.arrays["train_labels"].copy()
    label[0] = (label[0] + 1) % 10
    variants = [
        small_data(test_images=pixel),
        small_data(train_labels=label),
        small_data(
            train_images=original.arrays["train_images"].reshape(12, 6, 4),
            test_images=original.arrays["test_images"].reshape(5, 6, 4),
        ),
        small_data(
            train_images=original.arrays["train_images"][::-1], train_labels=original.arrays["train_labels"][::-1]
        ),
        small_data(
            **{
                name: original.arrays[name.replace("train", "x").replace("test", "train").replace("x", "test")]
                for name in original.arrays
            }
        ),
    ]
    hashes = [load_idx(data.write(tmp_path / str(n), "")).content_hash for n, data in enumerate(variants)]
    assert len({reference, *hashes}) == 1 + len(variants)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (np.zeros((4, 4, 6), np.uint8), np.zeros(3, np.uint8), ["4 {part} images", "3 labels"]),
        (np.zeros((3, 4, 6), np.uint8), np.zeros(4, np.uint8), ["3 {part} images", "4 labels"]),
        (np.zeros((3, 4, 6), np.uint8), np.array([0, 9, 10], np.uint8), ["{part} label is 10", "0 to 9"]),
        (np.zeros((3, 4, 6), np.uint8), np.array([255, 0, 0], np.uint8), ["{part} label is 255", "0 to 9"]),
        (np.zeros((0, 4, 6), np.uint8), np.zeros(0, np.uint8), ["{part} images", "at least one image"]),
        (np.zeros((3, 0, 6), np.uint8), np.zeros(3, np.uint8), ["{part} images", "(3, 0, 6)"]),
        (np.zeros((3, 6, 4), np.uint8), np.zeros(3, np.uint8), ["(6, 4)", "(4, 6)", "same size"]),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, small_data, own_cache, suffix, part, images, labels, expected):
    folder = small_data(**{f"{part}_images": images, f"{part}_labels": labels}).write(tmp_path / "d", suffix)
    for _ in range(2):  # a refusal must not depend on what the first attempt left in the cache
        with pytest.raises(DataError) as caught:
            load_idx(folder)
        assert str(folder) in str(caught.value)
        for words in expected:
            assert words.format(part=part) in str(caught.value)
    assert not own_cache.exists()


@pytest.mark.parametrize("missing", FILES)
def test_missing_file_is_named_with_what_is_there(tmp_path, small_data, missing):
    folder = small_data().write(tmp_path / "d")
    stem = FILES[missing][0]
    (folder / f"{stem}.gz").unlink()
    with pytest.raises(DataError) as caught:
        load_idx(folder)
    message = str(caught.value)
    assert f"neither {stem} nor {stem}.gz" in message
    for name, (other, _) in FILES.items():
        if name != missing:
            assert f"{other}.gz" in message
    assert "SEQMNIST_DATA_DIR" in message


@pytest.mark.parametrize(
    "spelled", [str.upper, lambda name: name.replace("-idx", ".idx"), lambda name: f"{name}/{name}"]
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_names_may_be_spelled_as_others_do(tmp_path, small_data, spelled, suffix):
    """In capitals, with Kaggle's dot, and as Kaggle's archive has them, below folders of their own names."""
    data = small_data()
    source = data.write(tmp_path / "source", suffix)
    for path in source.iterdir():
        place = tmp_path / "d" / spelled(path.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    # One file goes by its usual name, and comes before any other spelling of it.
    usual = FILES["train_images"][0] + suffix
    shutil.rmtree(tmp_path / "d" / usual, ignore_errors=True)
    shutil.copy(source / usual, tmp_path / "d")
    assert_holds(load_idx(tmp_path / "d"), data)


def test_folders_are_told_from_files(tmp_path):
    (tmp_path / FILES["train_images"][0]).mkdir()
    with pytest.raises(DataError) as caught:
        load_idx(tmp_path)
    assert f"(it holds: {FILES['train_images'][0]}/)" in str(caught.value)


def test_folder_that_can_not_be_entered_is_named(tmp_path, small_data):
    folder = small_data().write(tmp_path / "d")
    folder.chmod(0)
    try:
        with as_nobody(), pytest.raises(DataError) as caught:
            load_idx(folder)
    finally:
        folder.chmod(0o700)
    assert str(caught.value).startswith(f"{folder} can't be read: Permission denied; point --config.runtime.data_dir")


def test_folder_that_can_not_be_listed_is_read(tmp_path, small_data, monkeypatch):
    data = small_data()
    folder = data.write(tmp_path / "d")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    assert_holds(load_idx(folder), data)


def test_folder_without_files_says_so(tmp_path):
    with pytest.raises(DataError, match="it holds: nothing"):
        load_idx(tmp_path)


def test_long_folder_is_not_listed_whole(tmp_path):
    for n in range(500):
        (tmp_path / f"unrelated-{n}").touch()
    with pytest.raises(DataError) as caught:
        load_idx(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_what_is_no_folder_is_refused(tmp_path, kind):
    path = tmp_path / kind
    if kind == "file":
        path.touch()
    with pytest.raises(DataError, match="is not a folder") as caught:
        load_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_swapped_images_and_labels_are_recognised(tmp_path, small_data, suffix):
    folder = small_data().write(tmp_path / "d", suffix)
    a, b = (folder / f"{FILES[name][0]}{suffix}" for name in ("train_images", "train_labels"))
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)
    with pytest.raises(DataError, match="swapped"):
        load_idx(folder)


def test_damaged_file_of_a_folder_is_named(tmp_path, small_data):
    folder = small_data().write(tmp_path / "d")
    path = folder / f"{FILES['test_images'][0]}.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError) as caught:
        load_idx(folder)
    assert str(path) in str(caught.value)


def test_idx_without_a_folder_says_how_to_name_one():
    with pytest.raises(DataError) as caught:
        load_idx(None)
    for words in ("data.source", "runtime.data_dir", "SEQMNIST_DATA_DIR"):
        assert words in str(caught.value)


# Folders of several data sets, and folders of another than the one asked for.


def test_sub_folder_of_the_data_set_s_name_is_read(tmp_path, small_data):
    clothes, digits = small_data(seed=1), small_data(seed=2)
    clothes.write(tmp_path / "fashion_mnist")
    digits.write(tmp_path / "emnist" / "digits", "")
    assert_holds(sources.load_idx(Request("fashion_mnist", tmp_path)), clothes)
    assert_holds(sources.load_auto(Request("emnist/digits", tmp_path)), digits)
    with pytest.raises(DataError, match="fashion_mnist"):  # the message lists what is there
        sources.load_idx(Request("kmnist", tmp_path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_of_the_folder_itself_go_before_a_sub_folder(tmp_path, small_data, suffix):
    mine = small_data(seed=1)
    mine.write(tmp_path, suffix)
    small_data(seed=2).write(tmp_path / "mnist")
    assert_holds(load_idx(tmp_path), mine)
    # A folder with a file missing is damaged, which a sub-folder must not hide.
    (tmp_path / f"{FILES['test_labels'][0]}{suffix}").unlink()
    with pytest.raises(DataError, match=FILES["test_labels"][0]):
        load_idx(tmp_path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "raw"),
        ("mnist", "MNIST"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("emnist/digits", "emnist/digits/raw"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_folders_as_torchvision_lays_them_out(tmp_path, small_data, name, place, suffix):
    data = small_data(seed=1)
    data.write(tmp_path / place, suffix)
    small_data(seed=2).write(tmp_path / "KMNIST" / "raw")  # another's, which is passed over
    assert_holds(sources.load_auto(Request(name, tmp_path)), data)


def test_a_file_that_torchvision_has_not_fetched_is_named_by_its_folder(tmp_path, small_data):
    raw = small_data().write(tmp_path / "MNIST" / "raw", "")
    (raw / FILES["test_labels"][0]).unlink()
    with pytest.raises(DataError) as caught:
        load_idx(tmp_path)
    assert str(caught.value).startswith(f"{raw} holds neither {FILES['test_labels'][0]} nor ")


@pytest.fixture
def known_folder(tmp_path, small_data, monkeypatch):
    """A folder whose content is known to be fashion_mnist."""
    folder = small_data().write(tmp_path / "clothes")
    monkeypatch.setitem(sources.KNOWN_CONTENT, load_idx(folder).content_hash, "fashion_mnist")
    return folder


def test_another_well_known_data_set_than_asked_for_is_refused(known_folder):
    config = row_lstm.get_config()
    config.runtime.data_dir = str(known_folder)
    config.data.split = "first:2"
    config.train.batch_size = 2
    with pytest.raises(DataError) as caught:
        task.build_task(config)
    for words in (str(known_folder), "holds fashion_mnist", "asks for mnist", "--config.data.name=fashion_mnist"):
        assert words in str(caught.value)
    config.data.name = "fashion_mnist"
    assert task.build_task(config).dataset.name == "fashion_mnist"


def test_data_of_no_known_content_go_by_any_name(tmp_path, small_data):
    folder = small_data().write(tmp_path / "d")
    request = Request("kmnist", folder)
    sources.check_name(sources.load_idx(request), request)


# The choice between sources.


def test_auto_takes_the_folder_where_one_is_named(tmp_path, small_data):
    data = small_data()
    dataset = load_auto(data.write(tmp_path / "d"))
    assert_holds(dataset, data)
    assert dataset.warning is None


def test_auto_without_a_folder_takes_the_embedded_digits_and_warns():
    dataset = load_auto(None)
    assert dataset.source == "embedded"
    assert dataset.content_hash == EMBEDDED_HASH
    for words in ("5,000", "NOT on MNIST", "SEQMNIST_DATA_DIR", "runtime.data_dir"):
        assert words in dataset.warning


def test_auto_never_falls_back_where_a_named_folder_is_bad(tmp_path):
    with pytest.raises(DataError):
        load_auto(tmp_path / "absent")


def test_config_names_the_folder_before_the_environment(tmp_path, monkeypatch, small_data):
    in_config, in_environment = small_data(seed=1), small_data(seed=2)
    monkeypatch.setenv("SEQMNIST_DATA_DIR", str(in_environment.write(tmp_path / "environment")))
    config = row_lstm.get_config()
    assert_holds(load_dataset(config.data.source, build_request(config)), in_environment)
    config.runtime.data_dir = str(in_config.write(tmp_path / "config"))
    assert_holds(load_dataset(config.data.source, build_request(config)), in_config)
    config.data.source = "embedded"
    assert load_dataset(config.data.source, build_request(config)).content_hash == EMBEDDED_HASH


def test_empty_environment_variable_names_no_folder(monkeypatch):
    monkeypatch.setenv("SEQMNIST_DATA_DIR", "")
    assert data_dir_of(row_lstm.get_config()) is None


def test_folder_is_made_absolute_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.delenv("SEQMNIST_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = row_lstm.get_config()
    config.runtime.data_dir = "relative/d"
    assert data_dir_of(config) == tmp_path / "relative" / "d"
    config.runtime.data_dir = "~/d"
    assert data_dir_of(config) == tmp_path / "home" / "d"


# The embedded digits.


@pytest.fixture(scope="module")
def digits():
    return load_embedded()


@pytest.fixture(scope="module")
def embedded_task():
    config = row_lstm.get_config()
    config.data.source = "embedded"
    return task.build_task(config)


def test_embedded_digits_are_these_and_no_others(digits):
    assert digits.content_hash == EMBEDDED_HASH
    assert digits.name == "mnist-5k"
    assert digits.train.images.shape == (4500, 28, 28)
    assert digits.test.images.shape == (500, 28, 28)
    assert digits.warning


@pytest.mark.parametrize(("part", "per_class"), [("train", 400), ("validation", 50), ("test", 50)])
def test_embedded_parts_hold_each_digit_equally_often(embedded_task, part, per_class):
    assert embedded_task.protocol.split == "first:500"
    images = embedded_task.part(part)
    assert np.bincount(images.labels, minlength=10).tolist() == [per_class] * 10
    assert len(images.images) == len(images) == 10 * per_class


def test_embedded_parts_are_shuffled(embedded_task):
    for part in ("train", "validation", "test"):
        labels = embedded_task.part(part).labels.astype(int)
        # Sorted by class, as the digits once came, neighbours would almost never differ.
        assert 0.8 < np.mean(labels[1:] != labels[:-1]) < 0.97


def test_no_embedded_image_is_there_twice(digits):
    everything = np.concatenate([digits.train.images, digits.test.images]).reshape(5000, -1)
    assert len(np.unique(everything, axis=0)) == 5000
    assert everything.max() == 255
    assert everything.min() == 0


def test_embedded_folder_is_small():
    files = [path for path in embedded.FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_a_split_in_the_config_goes_before_that_of_the_embedded_digits():
    config = row_lstm.get_config()
    config.data.source = "embedded"
    config.data.split = "first:0"
    whole = task.build_task(config)
    assert len(whole.part("validation")) == 0
    assert len(whole.part("train")) == 4500


def test_embedded_digits_come_from_mnist_training_images(digits, mnist_dir):
    mnist = load_idx(mnist_dir)
    if mnist.name != "mnist":
        pytest.skip(f"SEQMNIST_DATA_DIR holds {mnist.name}, not MNIST")
    label_of = {image.tobytes(): label for image, label in zip(mnist.train.images, mnist.train.labels, strict=True)}
    for part in (digits.train, digits.test):
        assert [label_of.get(image.tobytes()) for image in part.images] == part.labels.tolist()


# The cache.


@pytest.fixture
def folder(tmp_path, small_data, own_cache):
    return small_data().write(tmp_path / "d")


def entry_of(own_cache):
    (entry,) = own_cache.iterdir()
    return entry


def forbid_decoding(monkeypatch):
    def fail(path, dimensions):
        raise AssertionError(f"{path} was decoded again")

    monkeypatch.setattr(sources, "read_idx", fail)


def test_second_load_decodes_nothing(folder, own_cache, small_data, monkeypatch):
    first = load_idx(folder)
    entry_of(own_cache)
    forbid_decoding(monkeypatch)
    second = load_idx(folder)
    assert_holds(second, small_data())
    assert second.content_hash == first.content_hash


def test_cache_follows_content_not_place(folder, tmp_path, own_cache, small_data, monkeypatch):
    load_idx(folder)
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        shutil.copytree(folder, tmp_path / "copy")
        assert_holds(load_idx(tmp_path / "copy"), small_data())
    other = small_data(seed=3)
    other.write(folder)  # same names, other content
    assert_holds(load_idx(folder), other)


def test_plain_files_need_no_cache(tmp_path, own_cache, small_data):
    load_idx(small_data().write(tmp_path / "d", ""))
    assert not own_cache.exists()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def with_changed_pixel(content):
    arrays = dict(np.load(io.BytesIO(content)))
    arrays["train_images"][0, 0, 0] ^= 1
    return npz(**arrays)


def without_labels(content):
    arrays = dict(np.load(io.BytesIO(content)))
    del arrays["test_labels"]
    return npz(**arrays)


def as_npy(content):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


def changed_central_directory(offset):
    def change(content):
        damaged = bytearray(content)
        damaged[content.index(b"PK\x01\x02") + offset] ^= 1
        return bytes(damaged)

    return change


DAMAGES = {
    "empty": lambda content: b"",
    "garbage": lambda content: b"garbage" * 100,
    "zeros": lambda content: bytes(len(content)),
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "only the first bytes": lambda content: content[:40],
    "a changed pixel": with_changed_pixel,
    "an array missing": without_labels,
    "other arrays": lambda content: npz(x=np.arange(3)),
    "no arrays": lambda content: npz(),
    "an npy file": as_npy,
    "marked as encrypted": changed_central_directory(8),
    "an unknown compression": changed_central_directory(10),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_made_anew(folder, own_cache, small_data, monkeypatch, damage):
    load_idx(folder)
    entry = entry_of(own_cache)
    entry.write_bytes(DAMAGES[damage](entry.read_bytes()))
    assert_holds(load_idx(folder), small_data())
    assert entry_of(own_cache) == entry
    forbid_decoding(monkeypatch)
    assert_holds(load_idx(folder), small_data())


def test_any_flipped_bit_of_an_entry_does_no_harm(folder, own_cache, small_data):
    load_idx(folder)
    entry = entry_of(own_cache)
    content = entry.read_bytes()
    rng = np.random.default_rng(0)
    raised = {}
    for place in rng.choice(len(content), 250, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        entry.write_bytes(damaged)
        try:
            assert_holds(load_idx(folder), small_data())
        except AssertionError:
            raise
        except Exception as e:
            raised[int(place)] = repr(e)
    assert raised == {}


def test_whole_entry_of_another_data_set_is_not_taken(folder, tmp_path, own_cache, small_data):
    load_idx(folder)
    mine = entry_of(own_cache)
    load_idx(small_data(seed=9).write(tmp_path / "other"))
    (other,) = set(own_cache.iterdir()) - {mine}
    shutil.copy(other, mine)
    assert_holds(load_idx(folder), small_data())


def test_labels_in_the_cache_are_held_against_the_classes_that_are_asked_for(tmp_path, small_data, own_cache):
    """Files that were good for a set of 47 classes are still refused as one of ten."""
    data = small_data(train_labels=np.full(12, 46, np.uint8))
    folder = data.write(tmp_path / "d")
    paths = {name: folder / f"{stem}.gz" for name, (stem, _) in FILES.items()}
    np.testing.assert_array_equal(sources._read_files(paths, "emnist", 47)["train_labels"], data.arrays["train_labels"])
    entry_of(own_cache)
    for _ in range(2):
        with pytest.raises(DataError, match="label is 46; expected 0 to 9"):
            load_idx(folder)


def test_files_replaced_while_they_are_read_spoil_no_entry(folder, tmp_path, own_cache, small_data, monkeypatch):
    """What was decoded then is not what the key was made of."""
    shutil.copytree(folder, tmp_path / "before")
    read = sources.read_idx

    def replace_then_read(path, dimensions):
        small_data(seed=3).write(folder)
        return read(path, dimensions)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_idx", replace_then_read)
        assert_holds(load_idx(folder), small_data(seed=3))
    assert_holds(load_idx(tmp_path / "before"), small_data())


def test_the_same_bytes_in_other_files_are_other_content(folder, own_cache, small_data):
    """One file moved to the end of another: they are not a data set any more, whatever the cache has of their bytes."""
    load_idx(folder)
    images, labels = (folder / f"{FILES[name][0]}.gz" for name in ("train_images", "train_labels"))
    images.write_bytes(images.read_bytes() + labels.read_bytes())
    labels.write_bytes(b"")
    with pytest.raises(DataError, match=images.name):
        load_idx(folder)


def test_cache_folder_that_cannot_be_made_costs_nothing(tmp_path, small_data, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "file" / "below"))
    folder = small_data().write(tmp_path / "d")
    for _ in range(2):
        assert_holds(load_idx(folder), small_data())
    assert (tmp_path / "file").is_file()


def test_entry_in_whose_place_is_a_folder_costs_nothing(folder, own_cache, small_data):
    load_idx(folder)
    entry = entry_of(own_cache)
    entry.unlink()
    (entry / "in the way").mkdir(parents=True)
    assert_holds(load_idx(folder), small_data())
    assert list(own_cache.iterdir()) == [entry]


def test_full_disk_leaves_no_half_written_entry(folder, own_cache, small_data, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", fail)
    assert_holds(load_idx(folder), small_data())
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_threads_that_start_together_get_the_same_arrays(folder, own_cache, small_data, before):
    if before == "damaged":
        load_idx(folder)
        entry_of(own_cache).write_bytes(b"garbage")
    count = 6
    barrier = threading.Barrier(count)
    results = []

    def load():
        barrier.wait()
        results.append(load_idx(folder))

    threads = [threading.Thread(target=load) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    for dataset in results:
        assert_holds(dataset, small_data())
    entry_of(own_cache)


LOAD = """
import sys
from pathlib import Path
from seqmnist_jax.data.sources import Request, load_idx
sys.stdin.readline()
dataset = load_idx(Request(data_dir=Path(sys.argv[1])))
print(dataset.content_hash, int(dataset.train.images.sum()), int(dataset.test.labels.sum()))
"""


def test_processes_that_start_together_get_the_same_arrays(folder, own_cache, small_data):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    arrays = small_data().arrays
    sums = [str(int(arrays["train_images"].sum())), str(int(arrays["test_labels"].sum()))]
    expected = [load_idx(folder).content_hash, *sums]
    assert outputs == [expected, expected]
    entry_of(own_cache)


# Full MNIST, where it is at hand.


def test_full_mnist_is_recognised_and_soon_loaded_again(mnist_dir, own_cache):
    first = load_idx(mnist_dir)
    if first.name != "mnist":
        pytest.skip(f"SEQMNIST_DATA_DIR holds {first.name}, not MNIST")
    assert KNOWN_CONTENT[first.content_hash] == "mnist"
    assert first.train.images.shape == (60_000, 28, 28)
    assert first.test.images.shape == (10_000, 28, 28)
    assert first.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert first.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        second = load_idx(mnist_dir)
        seconds.append(time.perf_counter() - start)
    np.testing.assert_array_equal(second.train.images, first.train.images)
    assert min(seconds) < 1.0
