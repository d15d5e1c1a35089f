"""Data sets through tensorflow_datasets: its download manager, answered by a server on this machine."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import re
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from configs import default
from seqmnist_jax.data import registry, sources
from seqmnist_jax.data.embedded import FOLDER
from seqmnist_jax.data.idx import DataError, write_idx
from seqmnist_jax.data.sources import Request
from seqmnist_jax.errors import UsageError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `cut` files end early, `asked` counts requests."""

    cut: set[str]
    asked: list[str]

    def log_message(self, *unused):
        pass

    def do_GET(self):
        name = self.path.lstrip("/")
        self.asked.append(name)
        if name in self.cut:
            content = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()


class Host:
    def __init__(self, folder, monkeypatch):
        self.handler = type("Own", (Handler,), {"cut": set(), "asked": []})
        self.folder = folder
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(self.handler, directory=str(folder))
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.monkeypatch = monkeypatch

    def stands_for(self, name, url=None):
        """Lets TFDS's builder of a data set know this host, and the checksums of its files."""
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import checksums

        kind = type(tfds.builder(name))
        infos = {
            self.url + path.name: checksums.UrlInfo(
                size=path.stat().st_size, checksum=hashlib.sha256(path.read_bytes()).hexdigest(), filename=path.name
            )
            for path in self.folder.iterdir()
        }
        self.monkeypatch.setattr(kind, "URL", url or self.url)
        self.monkeypatch.setattr(kind, "url_infos", infos)
        return self


@pytest.fixture(autouse=True)
def tfds_folder(tmp_path, monkeypatch):
    """What TFDS makes of TFDS_DATA_DIR when it is imported."""
    constants = pytest.importorskip("tensorflow_datasets.core.constants")
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with the embedded digits, in MNIST's form and names."""
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    for path in FOLDER.glob("*.gz"):
        (folder / path.name).write_bytes(path.read_bytes())
    host = Host(folder, monkeypatch)
    yield host
    host.server.shutdown()
    host.server.server_close()


def same(dataset, reference):
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(dataset, part).images, getattr(reference, part).images)
        np.testing.assert_array_equal(getattr(dataset, part).labels, getattr(reference, part).labels)


def test_fetched_arrays_are_those_of_the_files_in_their_order(host, tmp_path):
    host.stands_for("mnist")
    request = Request("mnist")
    dataset = sources.load_tfds(request)
    reference = sources.load_idx(Request(data_dir=host.folder))
    same(dataset, reference)
    assert dataset.content_hash == reference.content_hash
    assert (dataset.name, dataset.source, dataset.order, dataset.num_classes) == ("mnist", "tfds", "original", 10)
    assert "tensorflow" not in sys.modules


def test_what_was_fetched_is_not_fetched_again(host, tmp_path):
    host.stands_for("mnist")
    request = Request("mnist")
    first = sources.load_auto(request)
    assert first.source == "tfds"
    asked = list(host.handler.asked)
    assert sorted(asked) == sorted(path.name for path in host.folder.iterdir())
    same(sources.load_auto(request), first)
    same(sources.load_tfds(request), first)
    assert host.handler.asked == asked


def test_a_run_finds_the_copy_that_it_was_trained_on_before_a_folder(host, tmp_path, monkeypatch):
    host.stands_for("mnist")
    trained = sources.load_tfds(Request("mnist"))
    monkeypatch.setenv("SEQMNIST_DATA_DIR", str(tmp_path))  # which has no data
    config = default.get_config()
    same(sources.build_dataset_of_run(config, "tfds", trained.content_hash), trained)
    for source, content_hash in (("tfds", "another"), ("idx", trained.content_hash)):
        with pytest.raises(DataError, match=re.escape(str(tmp_path))):
            sources.build_dataset_of_run(config, source, content_hash)


def test_a_run_on_a_source_of_ones_own_finds_it_again(monkeypatch):
    own = sources.load_embedded()
    monkeypatch.setitem(sources.SOURCES, "own", lambda request: own)
    assert sources.build_dataset_of_run(default.get_config(), "own", own.content_hash) is own


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_other_data_sets_by_name(host, tmp_path, name):
    host.stands_for(name)
    assert sources.load_tfds(Request(name)).name == name


def test_a_download_cut_in_the_middle_leaves_nothing_that_is_read(host, tmp_path):
    host.stands_for("mnist").handler.cut.add("train-images-idx3-ubyte.gz")
    request = Request("mnist")
    with pytest.raises(DataError, match="mnist could not be fetched"):
        sources.load_tfds(request)
    host.handler.cut.clear()
    same(sources.load_tfds(request), sources.load_embedded())


def test_a_wrong_checksum_is_refused(host, tmp_path):
    host.stands_for("mnist")
    path = host.folder / "t10k-labels-idx1-ubyte.gz"
    good = path.read_bytes()
    write_idx(path, np.zeros(500, np.uint8))
    request = Request("mnist")
    with pytest.raises(DataError, match="NonMatchingChecksum"):
        sources.load_tfds(request)
    path.write_bytes(good)
    same(sources.load_tfds(request), sources.load_embedded())


def test_a_missing_file_is_one_message(host, tmp_path):
    host.stands_for("mnist")
    (host.folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"could not be fetched.*runtime\.data_dir"):
        sources.load_tfds(Request("mnist"))


@pytest.fixture
def emnist(host, tmp_path):
    """A host with an archive in EMNIST's form: the request for it, and its arrays."""
    rng = np.random.default_rng(0)
    for path in host.folder.iterdir():
        path.unlink()
    arrays = {
        "train-images-idx3": rng.integers(0, 256, (60, 28, 28), np.uint8),
        "train-labels-idx1": rng.integers(0, 47, 60).astype(np.uint8),
        "test-images-idx3": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "test-labels-idx1": np.full(20, 46, np.uint8),
    }
    with zipfile.ZipFile(host.folder / "gzip.zip", "w") as archive:
        for name, values in arrays.items():
            write_idx(tmp_path / "member.gz", values)
            archive.write(tmp_path / "member.gz", f"gzip/emnist-balanced-{name}-ubyte.gz")
        archive.writestr("../outside", "an archive can't write outside its folder")
    host.stands_for("emnist/balanced", url=host.url + "gzip.zip")
    return Request("emnist/balanced"), arrays


def test_emnist_is_read_from_its_archive(emnist, tmp_path):
    request, arrays = emnist
    dataset = sources.load_tfds(request)
    np.testing.assert_array_equal(dataset.train.images, arrays["train-images-idx3"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["test-labels-idx1"])
    assert dataset.num_classes == 47
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-20], lambda content: content[:40] + b"?" + content[41:], lambda content: b""],
    ids=["cut", "a byte changed", "empty"],
)
def test_a_damaged_file_out_of_an_archive_is_taken_out_again(emnist, damage, tfds_folder):
    request, arrays = emnist
    sources.load_tfds(request)
    (path,) = tfds_folder.rglob("emnist-balanced-train-images*")
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(sources.load_tfds(request).train.images, arrays["train-images-idx3"])


def test_an_archive_with_a_damaged_member_is_one_message(emnist, tfds_folder):
    request, _ = emnist
    sources.load_tfds(request)
    (archive,) = (path for path in tfds_folder.rglob("*zip*") if path.is_file() and path.suffix == ".zip")
    (member,) = tfds_folder.rglob("emnist-balanced-train-images*")
    content = bytearray(archive.read_bytes())
    content[content.index(member.read_bytes()) + 100] ^= 1
    archive.write_bytes(content)
    member.unlink()
    with pytest.raises(DataError, match=r"emnist/balanced could not be fetched: BadZipFile.*runtime\.data_dir"):
        sources.load_tfds(request)
    assert not list(tfds_folder.rglob("emnist-balanced-train-images*"))


def test_a_failure_without_a_text_is_one_message(host, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    host.stands_for("mnist")

    def fail(self, manager):
        raise TimeoutError

    monkeypatch.setattr(type(tfds.builder("mnist")), "_split_generators", fail)
    with pytest.raises(DataError, match="could not be fetched: TimeoutError"):
        sources.load_tfds(Request("mnist"))


def test_unknown_name():
    with pytest.raises(UsageError, match=r"data\.name is 'fashon_mnist'.*Did you mean 'fashion_mnist'"):
        sources.load_tfds(Request("fashon_mnist"))


def test_auto_offline_takes_the_embedded_digits_for_mnist_only(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "is_reachable", lambda name: False)
    assert sources.load_auto(Request("mnist")).source == "embedded"
    with pytest.raises(DataError, match="fashion_mnist is not at hand"):
        sources.load_auto(Request("fashion_mnist"))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_tfds_offline_is_one_message_at_once(name, monkeypatch):
    """Without asking the host, as its own retries and a resolver that is silent take minutes."""
    monkeypatch.setattr(registry, "is_reachable", lambda name: False)
    monkeypatch.setattr(registry.socket, "getaddrinfo", lambda *unused: pytest.fail("the host was asked"))
    with pytest.raises(DataError, match=f"{name} is not at hand and its host can't be reached; name a folder"):
        sources.load_tfds(Request(name))


def test_looking_for_a_copy_writes_nothing(tmp_path, monkeypatch):
    """So a machine whose home can't be written still starts, on the embedded digits."""
    monkeypatch.setattr(registry, "is_reachable", lambda name: False)
    assert sources.load_auto(Request("mnist")).source == "embedded"
    assert not (tmp_path / "absent").exists()


def test_a_host_is_tried_for_three_seconds_at_most(host, monkeypatch):
    host.stands_for("mnist")
    assert registry.is_reachable("mnist")
    monkeypatch.setattr(registry, "PROBE_SECONDS", 0.2)

    def hang(*unused):
        threading.Event().wait(2)
        raise TimeoutError

    monkeypatch.setattr(registry.socket, "create_connection", hang)
    assert not registry.is_reachable("mnist")


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, ("storage.example", 443)),
        ({"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128)),
        ({"https_proxy": "proxy.example:3128"}, ("proxy.example", 3128)),
        ({"https_proxy": "http://proxy.example:3128", "no_proxy": ".example"}, ("storage.example", 443)),
    ],
)
def test_a_host_behind_a_proxy_is_asked_there(monkeypatch, variables, asked):
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    builder = types.SimpleNamespace(URL="https://storage.example/mnist/")
    monkeypatch.setattr(registry, "_builder", lambda name: builder)
    connected = []

    def connect(address, timeout):
        connected.append(address)
        return contextlib.nullcontext()

    monkeypatch.setattr(registry.socket, "create_connection", connect)
    assert registry.is_reachable("mnist")
    assert connected == [asked]


def prepare(folder, images, labels, test_size):
    """Writes what TFDS's preparation leaves: shuffled examples as PNG in array_record files, and its notes."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import naming, splits
    from tensorflow_datasets.proto import tf_example_pb2

    records = pytest.importorskip("array_record.python.array_record_module", reason="array_record is for Linux only")
    builder = tfds.builder("mnist", data_dir=str(folder), file_format="array_record")
    Path(builder.data_path).mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(labels))
    infos = []
    for split, indices in (("train", order[test_size:]), ("test", order[:test_size])):
        template = naming.ShardedFileTemplate(
            dataset_name="mnist", data_dir=builder.data_path, split=split, filetype_suffix="array_record"
        )
        writer = records.ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for index in indices:
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(int(labels[index]))
            writer.write(example.SerializeToString())
        writer.close()
        infos.append(
            splits.SplitInfo(name=split, shard_lengths=[len(indices)], num_bytes=0, filename_template=template)
        )
    builder.info.set_splits(splits.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)
    return order


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A prepared copy of 60 digits: the request for it, the digits, and TFDS's order of them."""
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    part = sources.load_embedded().train[:60]
    return Request("mnist"), part, prepare(tmp_path / "tfds", part.images, part.labels, 20)


def test_a_prepared_copy_is_read_in_its_order_and_marked(prepared):
    request, part, order = prepared
    dataset = sources.load_auto(request)
    assert (dataset.source, dataset.order, dataset.num_classes) == ("tfds", "tfds", 10)
    np.testing.assert_array_equal(dataset.train.images, part.images[order[20:]])
    np.testing.assert_array_equal(dataset.test.labels, part.labels[order[:20]])
    assert "tensorflow" not in sys.modules


def test_a_prepared_copy_is_decoded_once(prepared, monkeypatch):
    request, _, _ = prepared
    first = sources.load_tfds(request)
    monkeypatch.setattr(registry.PreparedCopy, "read", lambda self: pytest.fail("decoded again"))
    same(sources.load_tfds(request), first)


def test_another_prepared_copy_of_the_same_size_and_time_is_no_cached_one(prepared, tfds_folder):
    request, _, _ = prepared
    sources.load_tfds(request)
    (path,) = tfds_folder.rglob("*train.array_record*")
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="prepared copy"):
        sources.load_tfds(request)


def test_a_damaged_prepared_copy_is_one_message(prepared, tfds_folder):
    request, _, _ = prepared
    (path,) = tfds_folder.rglob("*train.array_record*")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="prepared copy"):
        sources.load_tfds(request)


def test_a_prepared_copy_that_needs_tensorflow_is_passed_over(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    def refuse(self, split):
        raise NotImplementedError("tfrecord")

    monkeypatch.setattr(type(tfds.builder("mnist")), "as_data_source", refuse)
    assert registry.find_prepared("mnist") is None


@pytest.mark.slow
def test_full_mnist_through_the_download_manager(tmp_path, monkeypatch, mnist_dir):
    """The arrays that the download manager brings are those of the folder."""
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    if not (mnist_dir / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("SEQMNIST_DATA_DIR holds no gzipped files to serve")
    host = Host(mnist_dir, monkeypatch).stands_for("mnist")
    request = Request("mnist")
    dataset = sources.load_tfds(request)
    host.server.shutdown()
    host.server.server_close()
    same(dataset, sources.load_idx(Request(data_dir=mnist_dir)))
    assert len(dataset.train) == 60000
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        again = sources.load_auto(request)
        seconds.append(time.perf_counter() - start)
    same(again, dataset)
    assert min(seconds) < 1.0, f"the second start has its data in under a second, not {seconds}"
