"""Kernels for CPUs, generated from a step's division and built by the machine's own compiler."""

from seqmnist_jax.rnn.native.cpu.calls import backward, forward

__all__ = ["backward", "forward"]
