"""The kernel on shapes chosen by hypothesis, its results held against NumPy's: a process without JAX.

``python -m tests.faults.sanitized_kernel KERNEL CALLER --shapes=500 --seed=0`` takes a library of the
kernel and one of ``caller.cc``. Where both are built with a sanitizer and its runtime is loaded
first (``sanitizers.py`` does that), what it finds stands on stderr after the shape.
"""

import argparse
import ctypes
import sys
from typing import NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st

from tests.rnn import reference

FLOAT32, INT32 = 11, 4  # XLA_FFI_DataType
# Of the largest number in a tensor, or of one where that is larger; of a sum over all sequences and steps (the
# weights' gradients) at least of what as many random numbers add up to.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


class Call(NamedTuple):
    """What a call of either direction is made of, numbers apart."""

    cell: str
    batch: int
    time: int
    features: int
    hidden: int
    replicas: int
    shared: bool  # one set of weights for all replicas
    ragged: bool
    reverse: bool
    precision: str
    backward: bool
    save_gates: bool
    return_sequences: bool
    wants_dx: bool
    threads: int
    late: bool
    seed: int


def large(draw):
    """Sizes of which the kernel takes its results past the caches (more than 2^21 numbers)."""
    hidden = draw(st.integers(1, 33))
    time = draw(st.integers(200, 600))
    return -(-(2**21) // (hidden * time)) + draw(st.integers(0, 5)), time, draw(st.integers(1, 5)), hidden


@st.composite
def calls(draw):
    """Every size from 0 or 1 to a few tiles of the kernel, and now and then a large one."""
    if draw(st.integers(0, 39)) == 0:
        sizes, replicas = large(draw), 1
    else:
        sizes = [draw(st.integers(0, most)) for most in (140, 9, 40)]
        sizes.append(draw(st.integers(0 if sizes[2] else 1, 70)))
        replicas = draw(st.integers(1, 3))
    flags = [draw(st.booleans()) for _ in range(3)]
    return Call(
        draw(st.sampled_from(["lstm", "gru"])),
        *sizes,
        replicas,
        *flags,
        draw(st.sampled_from(["float32", "bfloat16"])),
        *[draw(st.booleans()) for _ in range(4)],
        draw(st.integers(1, 8)),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


# ---- One call through the library ----------------------------------------------------------


class Buffer(ctypes.Structure):
    """XLA_FFI_Buffer."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


def buffer(array):
    assert array.flags.c_contiguous
    return Buffer(
        ctypes.sizeof(Buffer),
        None,
        INT32 if array.dtype == np.int32 else FLOAT32,
        array.ctypes.data,
        array.ndim,
        (ctypes.c_int64 * array.ndim)(*array.shape),
    )


class Library:
    """The kernel, called through `caller.cc`."""

    def __init__(self, kernel, caller):
        self._kernel, self._caller = ctypes.CDLL(kernel), ctypes.CDLL(caller)

    def __call__(self, direction, call, arguments, shapes):
        """The results, of these shapes and for each replica."""
        # Whatever is not written stays NaN.
        results = [np.full((call.replicas, *shape), np.nan, np.float32) for shape in shapes]
        message = ctypes.create_string_buffer(1000)
        arrays = [(Buffer * len(group))(*map(buffer, group)) for group in (arguments, results)]
        failed = self._caller.seqmnist_call(
            ctypes.cast(getattr(self._kernel, f"seqmnist_{direction}"), ctypes.c_void_p),
            ctypes.c_int64(call.threads),
            ctypes.c_bool(call.late),
            ctypes.c_int64(len(arguments)),
            arrays[0],
            ctypes.c_int64(len(results)),
            arrays[1],
            ctypes.c_bool(call.cell == "lstm"),
            ctypes.c_bool(call.reverse),
            ctypes.c_bool(call.precision == "bfloat16"),
            message,
            ctypes.c_size_t(len(message)),
        )
        assert not failed, message.value.decode()
        return results


# ---- Values ----------------------------------------------------------------------------------


def draw_cases(call):
    """A case for each replica; lengths lie beyond both ends too, which the kernel must not trust."""
    cases = []
    for replica in range(call.replicas):
        case = reference.draw_case(call.cell, call.batch, call.time, call.features, call.hidden, call.seed + replica)
        if call.ragged:
            lengths = np.random.default_rng(call.seed).integers(-2, call.time + 3, call.batch)
            case = case._replace(lengths=lengths)
        if call.shared and cases:
            case = case._replace(params=cases[0].params)
        cases.append(case)
    return cases


def run(library, call, cases):
    """Results of the kernel, by the reference's names, for each replica in front."""
    lstm = call.cell == "lstm"
    batch, time, features, hidden = call[1:5]
    columns = reference.GATES[call.cell] * hidden
    saves = call.backward

    def stacked(*arrays, dtype=np.float32):
        return np.ascontiguousarray(np.stack(arrays), dtype)

    def nothing(*shape):
        return np.zeros((1, *shape), np.float32)

    params = {name: stacked(*[case.params[name] for case in cases]) for name in cases[0].params}
    if call.shared:
        params = {name: value[:1] for name, value in params.items()}
    layer = [
        stacked(*[case.x for case in cases]),
        params["kernel"],
        params["recurrent_kernel"],
        params["bias"],
        nothing(0) if lstm else params["recurrent_bias"],
        stacked(*[case.carry["h"] for case in cases]),
        stacked(*[case.carry["c"] for case in cases]) if lstm else nothing(0, hidden),
    ]
    full = np.full(batch, time)
    lengths = stacked(*[full if case.lengths is None else case.lengths for case in cases], dtype=np.int32)
    h, c, *saved = library(
        "forward",
        call,
        [*layer, lengths],
        [
            (batch, hidden),
            (batch if lstm else 0, hidden),
            (batch, time if saves or call.return_sequences else 0, hidden),
            (time if saves and call.save_gates else 0, batch, 4 * hidden),
            (time if saves and lstm else 0, batch, hidden),
        ],
    )
    got = {"h": h} | ({"c": c} if lstm else {})
    if saves or call.return_sequences:
        got["outputs"] = saved[0]
    if not saves:
        return got
    bars = [
        stacked(*[case.carry_bar["h"] for case in cases]),
        stacked(*[case.carry_bar["c"] for case in cases]) if lstm else nothing(0, hidden),
        stacked(*[case.outputs_bar for case in cases]) if call.return_sequences else nothing(batch, 0, hidden),
    ]
    dh0, dc0, dx, kernel, recurrent_kernel, bias, recurrent_bias = library(
        "backward",
        call,
        [*layer, *saved, *bars, lengths],
        [
            (batch, hidden),
            (batch if lstm else 0, hidden),
            (batch if call.wants_dx else 0, time, features),
            (features, columns),
            (hidden, columns),
            (columns,),
            (0 if lstm else columns,),
        ],
    )
    got |= {"d h0": dh0, "d kernel": kernel, "d recurrent_kernel": recurrent_kernel, "d bias": bias}
    got |= {"d c0": dc0} if lstm else {"d recurrent_bias": recurrent_bias}
    return got | ({"d x": dx} if call.wants_dx else {})


def check(library, call):
    """Runs a call and compares it."""
    cases = draw_cases(call)
    got = run(library, call, cases)
    of = ("outputs", "carry") if call.return_sequences else ("carry",)
    sums = {f"d {name}" for name in cases[0].params}
    for replica, case in enumerate(cases):
        want = reference.reference(call.cell, case, call.reverse, of=of)
        for name, values in got.items():
            least = np.sqrt(call.batch * call.time) if name in sums else 1.0
            allowed = TOLERANCES[call.precision] * max(1.0, least, np.abs(want[name]).max(initial=0.0))
            np.testing.assert_allclose(values[replica], want[name], rtol=0, atol=allowed, err_msg=f"{name} of {call}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel")
    parser.add_argument("caller")
    parser.add_argument("--shapes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    library = Library(arguments.kernel, arguments.caller)
    done = 0

    @hypothesis.seed(arguments.seed)
    @hypothesis.settings(
        max_examples=arguments.shapes,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate,),
    )
    @hypothesis.given(calls())
    def every_shape(call):
        nonlocal done
        print(call, file=sys.stderr, flush=True)
        check(library, call)
        done += 1

    try:
        every_shape()
    finally:
        print(f"{done} shapes")


if __name__ == "__main__":
    main()
