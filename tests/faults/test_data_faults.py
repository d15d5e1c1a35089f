"""Damaged data, a share of what `make faults` does; caches made by several processes at once; pickles."""

import subprocess
import sys

import numpy as np
import pytest

from seqmnist_jax.data import idx
from seqmnist_jax.data.sources import Request, load_idx
from tests.faults import data

START = """
import sys
from pathlib import Path
from seqmnist_jax.data.sources import Request, load_idx
print(load_idx(Request(data_dir=Path(sys.argv[1]))).content_hash)
"""


def test_damaged_data_give_an_error_or_are_right():
    for outcome in data.campaign(tries=240, seed=1):
        assert outcome.lost == 0, f"{outcome.fault}: {outcome.note}"


def test_first_starts_at_once_make_one_good_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    data._write(folder, ".gz")
    starts = [
        subprocess.Popen([sys.executable, "-c", START, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    hashes = {process.communicate(timeout=120)[0].strip() for process in starts}
    assert hashes == {load_idx(Request(data_dir=folder)).content_hash}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"], "nothing half-written is left"


def test_a_file_that_inflates_without_end_is_refused_by_its_promise(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "MOST_VALUES", 1000)
    path = tmp_path / "bomb.gz"
    idx.write_idx(path, np.zeros((11, 10, 10), np.uint8))
    with pytest.raises(idx.DataError, match="promises 1,100 values; expected at most 1,000"):
        idx.read_idx(path, 3)


def test_a_pickle_in_a_cache_entry_is_not_run(tmp_path, monkeypatch):
    """An entry that asks for code to be run is damaged, and is made anew."""
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    folder = tmp_path / "data"
    folder.mkdir()
    data._write(folder, ".gz")
    right = load_idx(Request(data_dir=folder))
    (entry,) = (tmp_path / "cache").glob("*.npz")
    with np.load(entry) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(entry, **{**arrays, "train_images": np.array(Evil(), dtype=object)})
    assert load_idx(Request(data_dir=folder)).content_hash == right.content_hash
    assert not ran.exists()
