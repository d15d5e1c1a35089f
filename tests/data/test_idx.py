"""IDX files: what goes in comes out, and whatever is damaged is refused by name."""

import gzip
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmnist_jax.data import idx
from seqmnist_jax.data.idx import DataError, find_file, read_idx, write_idx
from seqmnist_jax.errors import SeqMnistError

IMAGES = np.random.default_rng(7).integers(0, 256, (3, 2, 5), dtype=np.uint8)
LABELS = np.array([7, 0, 9], np.uint8)
MAX = 2**32 - 1


def header(*shape, type_code=8, zeros=b"\0\0"):
    return zeros + bytes([type_code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


PLAIN = header(3, 2, 5) + IMAGES.tobytes()


@pytest.fixture
def refused(tmp_path):
    """Checks that these bytes are refused with a message that names the file; gives the message."""

    def check(content, dimensions=3, name="some-file"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_idx(path, dimensions)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return check


@pytest.mark.parametrize("name", ["x-idx3-ubyte", "x-idx3-ubyte.gz"])
@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 1, 1), (2, 28, 28), (0, 4, 4)])
def test_images_come_back_as_they_were_written(tmp_path, name, shape):
    values = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / name, values)
    back = read_idx(tmp_path / name, 3)
    assert back.dtype == np.uint8
    assert back.shape == shape
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("name", ["labels", "labels.gz"])
def test_labels_come_back_as_they_were_written(tmp_path, name):
    values = np.arange(256, dtype=np.uint8)
    write_idx(tmp_path / name, values)
    np.testing.assert_array_equal(read_idx(tmp_path / name, 1), values)


def test_written_bytes_are_those_of_the_format(tmp_path):
    write_idx(tmp_path / "x", IMAGES)
    assert (tmp_path / "x").read_bytes() == PLAIN
    assert PLAIN[:4] == bytes([0, 0, 8, 3])
    assert PLAIN[4:16] == bytes([0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 5])


def test_values_are_written_in_c_order_whatever_their_strides(tmp_path):
    transposed = IMAGES.transpose(2, 0, 1)
    write_idx(tmp_path / "x", transposed)
    np.testing.assert_array_equal(read_idx(tmp_path / "x", 3), transposed)


def test_gzip_is_recognised_by_content_not_by_name(tmp_path):
    (tmp_path / "no-suffix").write_bytes(gzip.compress(PLAIN))
    (tmp_path / "plain.gz").write_bytes(PLAIN)
    np.testing.assert_array_equal(read_idx(tmp_path / "no-suffix", 3), IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / "plain.gz", 3), IMAGES)


def test_equal_arrays_give_equal_files(tmp_path, monkeypatch):
    write_idx(tmp_path / "first.gz", IMAGES)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write_idx(tmp_path / "second.gz", IMAGES.copy())
    assert (tmp_path / "first.gz").read_bytes() == (tmp_path / "second.gz").read_bytes()


def test_writing_replaces_and_leaves_nothing_beside_the_file(tmp_path):
    write_idx(tmp_path / "x.gz", LABELS)
    write_idx(tmp_path / "x.gz", IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / "x.gz", 3), IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gz"]


def test_failed_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    write_idx(tmp_path / "x", LABELS)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(idx.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_idx(tmp_path / "x", IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / "x", 1), LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_writers_of_one_file_at_once_leave_one_whole_file(tmp_path):
    """Each has a file of its own until it is whole, so that nobody moves another's half into place."""
    path = tmp_path / "x"
    with idx.replacing(path) as one:
        one.write(PLAIN[:10])
        with idx.replacing(path) as other:
            other.write(b"other")
        assert path.read_bytes() == b"other"
        one.write(PLAIN[10:])
    assert path.read_bytes() == PLAIN
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, np.bool_])
def test_only_unsigned_bytes_are_written(tmp_path, dtype):
    with pytest.raises(ValueError, match="uint8"):
        write_idx(tmp_path / "x", IMAGES.astype(dtype))
    assert list(tmp_path.iterdir()) == []


def test_data_error_is_a_failure_that_the_user_can_mend():
    assert issubclass(DataError, SeqMnistError)
    assert DataError.exit_code == 1


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="absent") as caught:
        read_idx(tmp_path / "absent", 3)
    assert "No such file" in str(caught.value)


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="directory"):
        read_idx(tmp_path, 3)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ["not an IDX file", "nothing", "expected 00000803"]),
        (b"\0\0\x08", ["not an IDX file", "000008", "expected 00000803"]),
        (b"<!DOCTYPE html><html>404</html>", ["not an IDX file", "3c21444f", "expected 00000803"]),
        (header(3, 2, 5, zeros=b"\1\0") + IMAGES.tobytes(), ["not an IDX file", "expected 00000803"]),
        (header(3, 2, 5, zeros=b"\0\1") + IMAGES.tobytes(), ["not an IDX file", "expected 00000803"]),
        (header(3, 2, 5, type_code=0x0D) + bytes(120), ["unsigned bytes", "00000d03", "expected 00000803"]),
        (header(3, 2, 5, type_code=0x09) + IMAGES.tobytes(), ["unsigned bytes", "expected 00000803"]),
        (header(3) + LABELS.tobytes(), ["has 1 dimensions", "expected 3", "swapped"]),
        (header(3, 2, 5, 1) + IMAGES.tobytes(), ["has 4 dimensions", "expected 3"]),
        (header() + b"\5", ["has 0 dimensions", "expected 3"]),
        (PLAIN[:4], ["header"]),
        (PLAIN[:15], ["header"]),
        (PLAIN[:16], ["30 values", "(3, 2, 5)", "only 0"]),
        (PLAIN[:-1], ["30 values", "(3, 2, 5)", "only 29"]),
        (PLAIN + b"\0", ["30 values", "(3, 2, 5)", "more"]),
        (header(0, 2, 5) + b"\0", ["0 values", "more"]),
    ],
    ids=[
        "empty",
        "three bytes",
        "a web page",
        "first byte",
        "second byte",
        "float32",
        "int8",
        "labels",
        "four dimensions",
        "no dimensions",
        "no sizes",
        "sizes cut short",
        "no values",
        "one value short",
        "one value more",
        "values of no image",
    ],
)
def test_damage_is_named_with_what_was_expected(refused, content, expected, zipped):
    message = refused(gzip.compress(content) if zipped else content)
    for words in expected:
        assert words in message


def test_images_where_labels_belong_are_refused(refused):
    message = refused(PLAIN, dimensions=1)
    assert "has 3 dimensions; expected 1 (labels)" in message
    assert "swapped" in message


def test_every_truncation_is_refused_plain_and_gzipped(refused):
    zipped = gzip.compress(PLAIN)
    for content in (PLAIN, zipped):
        for length in range(len(content)):
            refused(content[:length])


def test_truncated_gzip_is_called_that(refused):
    assert "damaged gzip" in refused(gzip.compress(PLAIN)[:-9])
    assert "damaged gzip" in refused(gzip.compress(PLAIN)[:-1])


def test_gzip_with_a_wrong_checksum_is_refused(refused):
    # Stored without compression, so that the flipped bit changes one pixel and nothing else.
    zipped = bytearray(gzip.compress(PLAIN, compresslevel=0))
    place = bytes(zipped).index(IMAGES.tobytes()) + 11
    zipped[place] ^= 0x10
    assert "damaged gzip" in refused(bytes(zipped))


def test_gzip_with_garbage_behind_it_is_refused(refused):
    refused(gzip.compress(PLAIN) + b"garbage")


def test_any_flipped_bit_of_a_gzip_file_is_refused_or_harmless(tmp_path):
    zipped = gzip.compress(PLAIN, mtime=0)
    path = tmp_path / "x.gz"
    refusals = 0
    for bit in range(8 * len(zipped)):
        damaged = bytearray(zipped)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_idx(path, 3), IMAGES)
        except DataError:
            refusals += 1
    # Harmless are the ten bytes of time stamp, operating system and the like, and bits that fill up the last byte.
    assert refusals >= 8 * (len(zipped) - 11)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (MAX, MAX, MAX),
        (2**31, 2**31, 1),
        (2**21, 2**21, 2**21 - 1),
        (2**16, 2**16, 2**8),
        (2**10, 2**10, 2**10),
        (60_000, 2**12, 28),
    ],
)
def test_no_memory_is_taken_on_the_word_of_a_header(refused, shape, zipped):
    content = header(*shape) + b"abc"
    content = gzip.compress(content) if zipped else content
    start = time.perf_counter()
    tracemalloc.start()
    try:
        refused(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("shape", [(0, MAX, MAX), (MAX, 0, MAX), (MAX, MAX, 0)])
def test_no_values_in_an_enormous_shape_are_refused(refused, shape):
    refused(header(*shape))


def is_refused_or_read(folder, content, dimensions):
    path = folder / "content"
    path.write_bytes(content)
    try:
        values = read_idx(path, dimensions)
    except DataError as e:
        return str(path) in str(e)
    return values.dtype == np.uint8 and values.ndim == dimensions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("idx")


@settings(max_examples=200, deadline=None, database=None)
@given(content=st.binary(max_size=80), prefix=st.sampled_from([b"", b"\0\0\x08\x03", b"\x1f\x8b", b"\x1f\x8b\x08\0"]))
def test_arbitrary_bytes_raise_nothing_but_data_error(folder, content, prefix):
    assert is_refused_or_read(folder, prefix + content, 3)
    assert is_refused_or_read(folder, prefix + content, 1)


SIZES = st.sampled_from([0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, MAX])


@settings(max_examples=200, deadline=None, database=None)
@given(sizes=st.lists(SIZES, max_size=5), body=st.binary(max_size=20), zipped=st.booleans())
def test_arbitrary_headers_raise_nothing_but_data_error(folder, sizes, body, zipped):
    content = header(*sizes) + body
    assert is_refused_or_read(folder, gzip.compress(content, compresslevel=1) if zipped else content, 3)


def test_find_file_takes_either_name(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b.gz").touch()
    assert find_file(tmp_path, "a") == tmp_path / "a"
    assert find_file(tmp_path, "b") == tmp_path / "b.gz"
