"""The recurrence as one C++ kernel for CPUs: built at first use, called through `jax.ffi`."""

from seqmnist_jax.rnn.native.build import describe, is_loaded, problem, warn_once
from seqmnist_jax.rnn.native.calls import backward, forward

__all__ = ["backward", "describe", "forward", "is_loaded", "problem", "warn_once"]
