"""Where programs run: meshes, memory, several processes, the profiler, trees of arrays.

Knows nothing of sequences or models. Above `errors`; beside `rnn` and `data`, and none of the three knows another.
"""
