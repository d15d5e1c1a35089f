"""Kernels for CPUs, generated from a step's division and built by the machine's own compiler."""

from seqmnist_jax.rnn.native.cpu.calls import (
    BACK_AS_FORTH,
    MULTIPLIES_X,
    backward,
    describe,
    forward,
    problem,
    text,
    unfit,
    warn_once,
)

__all__ = [
    "BACK_AS_FORTH",
    "MULTIPLIES_X",
    "backward",
    "describe",
    "forward",
    "problem",
    "text",
    "unfit",
    "warn_once",
]
