"""The recurrence on NVIDIA GPUs: a kernel in CUDA, made of a cell's stages, compiled by NVRTC at first use."""

from seqmnist_jax.rnn.native.gpu.calls import BACK_AS_FORTH, KEEPS_SOURCES, MULTIPLIES_X, backward, forward, text, unfit
from seqmnist_jax.rnn.native.gpu.load import describe, problem

__all__ = [
    "BACK_AS_FORTH",
    "KEEPS_SOURCES",
    "MULTIPLIES_X",
    "backward",
    "describe",
    "forward",
    "problem",
    "text",
    "unfit",
]
