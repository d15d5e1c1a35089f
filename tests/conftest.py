import os
from pathlib import Path

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_dir(tmp_path_factory):
    """Decoded and fetched data go into folders of this test run, not into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMNIST_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    """Tests that train the same small network compile it once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def mnist_dir():
    """The folder of full MNIST, where the environment names one."""
    named = os.environ.get("SEQMNIST_DATA_DIR")
    if not named:
        pytest.skip("full MNIST is not at hand: SEQMNIST_DATA_DIR is not set")
    return Path(named)
