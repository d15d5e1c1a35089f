"""The recurrence as one kernel, made of a cell's step: in C++ for CPUs, in CUDA for NVIDIA's GPUs."""
