import dataclasses

import numpy as np
import pytest

from seqmnist_jax.data import cache
from seqmnist_jax.data.idx import write_idx
from seqmnist_jax.data.sources import FILES


@dataclasses.dataclass
class SmallData:
    """Four small arrays, as a folder of IDX files would hold them."""

    arrays: dict

    def write(self, folder, suffix=".gz"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (stem, _) in FILES.items():
            write_idx(folder / f"{stem}{suffix}", self.arrays[name])
        return folder


@pytest.fixture
def small_data():
    """Makes small data sets; keyword arguments replace one of the four arrays."""

    def make(seed=0, **replaced):
        rng = np.random.default_rng(seed)
        arrays = {
            "train_images": rng.integers(0, 256, (12, 4, 6), dtype=np.uint8),
            "train_labels": rng.integers(0, 10, 12, dtype=np.uint8),
            "test_images": rng.integers(0, 256, (5, 4, 6), dtype=np.uint8),
            "test_labels": rng.integers(0, 10, 5, dtype=np.uint8),
        }
        return SmallData({**arrays, **replaced})

    return make


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder, not yet made, that no other test has touched."""
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path / "cache"))
    assert cache.folder() == tmp_path / "cache"
    return cache.folder()
