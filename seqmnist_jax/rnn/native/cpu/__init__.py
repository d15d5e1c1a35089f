"""Kernels for CPUs, generated from a step's division and built by the machine's own compiler."""
