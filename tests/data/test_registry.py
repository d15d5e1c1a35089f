"""Data sets through tensorflow_datasets: its download manager, answered by a server on this machine."""

import functools
import hashlib
import http.server
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

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
    request = Request("mnist", tfds_dir=tmp_path / "tfds")
    dataset = sources.load_tfds(request)
    reference = sources.load_idx(Request(data_dir=host.folder))
    same(dataset, reference)
    assert dataset.content_hash == reference.content_hash
    assert (dataset.name, dataset.source, dataset.order, dataset.num_classes) == ("mnist", "tfds", "original", 10)
    assert "tensorflow" not in sys.modules


def test_what_was_fetched_is_not_fetched_again(host, tmp_path):
    host.stands_for("mnist")
    request = Request("mnist", tfds_dir=tmp_path / "tfds")
    first = sources.load_auto(request)
    assert first.source == "tfds"
    asked = list(host.handler.asked)
    assert sorted(asked) == sorted(path.name for path in host.folder.iterdir())
    same(sources.load_auto(request), first)
    same(sources.load_tfds(request), first)
    assert host.handler.asked == asked


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_other_data_sets_by_name(host, tmp_path, name):
    host.stands_for(name)
    assert sources.load_tfds(Request(name, tfds_dir=tmp_path / "tfds")).name == name


def test_a_download_cut_in_the_middle_leaves_nothing_that_is_read(host, tmp_path):
    host.stands_for("mnist").handler.cut.add("train-images-idx3-ubyte.gz")
    request = Request("mnist", tfds_dir=tmp_path / "tfds")
    with pytest.raises(DataError, match="mnist could not be fetched"):
        sources.load_tfds(request)
    host.handler.cut.clear()
    same(sources.load_tfds(request), sources.load_embedded())


def test_a_wrong_checksum_is_refused(host, tmp_path):
    host.stands_for("mnist")
    path = host.folder / "t10k-labels-idx1-ubyte.gz"
    good = path.read_bytes()
    write_idx(path, np.zeros(500, np.uint8))
    request = Request("mnist", tfds_dir=tmp_path / "tfds")
    with pytest.raises(DataError, match="NonMatchingChecksum"):
        sources.load_tfds(request)
    path.write_bytes(good)
    same(sources.load_tfds(request), sources.load_embedded())


def test_a_missing_file_is_one_message(host, tmp_path):
    host.stands_for("mnist")
    (host.folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"could not be fetched.*runtime\.data_dir"):
        sources.load_tfds(Request("mnist", tfds_dir=tmp_path / "tfds"))


def test_emnist_is_read_from_its_archive(host, tmp_path):
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
    dataset = sources.load_tfds(Request("emnist/balanced", tfds_dir=tmp_path / "tfds"))
    np.testing.assert_array_equal(dataset.train.images, arrays["train-images-idx3"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["test-labels-idx1"])
    assert dataset.num_classes == 47
    assert not list(tmp_path.rglob("outside"))


def test_unknown_name():
    with pytest.raises(UsageError, match=r"data\.name is 'fashon_mnist'.*Did you mean 'fashion_mnist'"):
        sources.load_tfds(Request("fashon_mnist"))


def test_auto_offline_takes_the_embedded_digits_for_mnist_only(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "is_reachable", lambda name, tfds_dir: False)
    assert sources.load_auto(Request("mnist", tfds_dir=tmp_path)).source == "embedded"
    with pytest.raises(DataError, match="fashion_mnist is not at hand"):
        sources.load_auto(Request("fashion_mnist", tfds_dir=tmp_path))


def test_a_host_is_tried_for_three_seconds_at_most(host, monkeypatch):
    host.stands_for("mnist")
    assert registry.is_reachable("mnist", None)
    monkeypatch.setattr(registry, "PROBE_SECONDS", 0.2)

    def hang(*unused):
        threading.Event().wait(2)
        raise TimeoutError

    monkeypatch.setattr(registry.socket, "create_connection", hang)
    assert not registry.is_reachable("mnist", None)


class Prepared:
    """A builder whose copy is prepared: the embedded digits in another order."""

    info = type("Info", (), {"features": {"label": type("Label", (), {"num_classes": 10})}})

    def is_prepared(self):
        return True

    def as_data_source(self, split):
        part = getattr(sources.load_embedded(), split)
        return [
            {"image": image[..., None], "label": int(label)}
            for image, label in zip(part.images[::-1], part.labels[::-1], strict=True)
        ]


def test_a_prepared_copy_is_marked_as_shuffled(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "fetched_files", lambda *unused, offline: None)
    monkeypatch.setattr(registry, "_builder", lambda *unused: Prepared())
    dataset = sources.load_tfds(Request("mnist", tfds_dir=tmp_path))
    reference = sources.load_embedded()
    assert dataset.order == "tfds"
    np.testing.assert_array_equal(dataset.train.images, reference.train.images[::-1])
    assert dataset.content_hash != reference.content_hash


def test_a_prepared_copy_that_needs_tensorflow_is_passed_over(monkeypatch):
    def refuse(self, split):
        raise NotImplementedError("tfrecord")

    monkeypatch.setattr(Prepared, "as_data_source", refuse)
    monkeypatch.setattr(registry, "_builder", lambda *unused: Prepared())
    assert registry.prepared_arrays("mnist", None) is None


def test_full_mnist_through_the_download_manager(tmp_path, monkeypatch, mnist_dir):
    """The arrays that the download manager brings are those of the folder."""
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    if not (mnist_dir / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("SEQMNIST_DATA_DIR holds no gzipped files to serve")
    host = Host(mnist_dir, monkeypatch).stands_for("mnist")
    request = Request("mnist", tfds_dir=tmp_path / "tfds")
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
