"""Kernels for CPUs, generated from a step's division and built by the machine's own compiler."""

from seqmnist_jax.rnn.native.cpu.calls import PRECISIONS, backward, describe, forward, problem, text, unfit

__all__ = ["PRECISIONS", "backward", "describe", "forward", "problem", "text", "unfit"]
