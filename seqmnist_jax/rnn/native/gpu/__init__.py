"""The recurrence on NVIDIA GPUs: a kernel in CUDA, made of a cell's stages, compiled by NVRTC at first use."""

from seqmnist_jax.rnn.native.gpu.calls import backward, forward

__all__ = ["backward", "forward"]
