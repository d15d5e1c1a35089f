"""XLA's compiled programs, kept from one start to the next."""

import os

import jax

from seqmnist_jax.data.cache import folder

OFF = "none"


def enable(directory: str) -> None:
    """Keeps compiled programs in a folder, so that the second start of a run need not compile.

    Args:
      directory: the folder; '' for what JAX_COMPILATION_CACHE_DIR names, else the package's own
        cache folder; 'none' to compile at each start.
    """
    if directory == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if directory or not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", directory or str(folder() / "xla"))
    # JAX's own threshold of one second would leave out most of what a small network compiles.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
