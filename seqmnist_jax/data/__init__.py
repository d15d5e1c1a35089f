"""Data sets, the field's conventions about them, sequence views and batches. Knows no network.

Above `errors`; beside `rnn` and `devices`, and none of the three knows another.
"""
