"""Calls of cells' kernels that another process has drawn (`kernel_cases.py`), made here without JAX.

``python -m tests.faults.sanitized_kernel CALLER LAUNCHER CASES CELL ...`` takes libraries: of ``caller.cc``, of what
all cells share, and of each cell. Where they are built with a sanitizer and its runtime is loaded first, as
``sanitizers.py`` does, what it finds stands on stderr after the case.
"""

import argparse
import ctypes
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FLOAT32, INT32 = 11, 4  # XLA_FFI_DataType
# Of the largest number in a tensor, or of one where that is larger; of a sum over all sequences and steps (the
# weights' gradients) at least of what as many random numbers add up to.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# A NaN that no arithmetic makes: what has not been written.
NOTHING = np.uint32(0x7FC5EED1).view(np.float32)


class Case(NamedTuple):
    """A forward call, and one of the way back where `backward` says so.

    Attributes:
      said: it in words.
      cell: the number of its library.
      outputs, reverse: attributes of the calls.
      threads, late: of the pool; whether its tasks begin only after the call has returned.
      replicas: the size of the leading axis of results; each argument has it, or 1.
      wants_dx: whether x's gradient is wanted.
      kept, output_shape, sums, precision: shapes without replicas, the number of sums, and the products' precision.
      arguments, cotangents: arrays by name, in the kernel's order.
      wanted: each replica's results by name; empty where it can only be checked that they are written.
    """

    said: str
    cell: int
    outputs: int
    reverse: bool
    threads: int
    late: bool
    replicas: int
    backward: bool
    wants_dx: bool
    kept: tuple[int, ...]
    output_shape: tuple[int, ...]
    sums: int
    precision: str
    arguments: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]
    wanted: list[dict[str, np.ndarray]]


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


def buffer(array: np.ndarray) -> Buffer:
    """The array as XLA describes it."""
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
    """The kernels, called through `caller.cc`."""

    def __init__(self, caller: str, launcher: str, cells: list[str]):
        self._caller, self._launcher = ctypes.CDLL(caller), ctypes.CDLL(launcher)
        self._launcher.seqmnist_add.argtypes = [ctypes.c_int64, ctypes.c_void_p]
        self._cells = [ctypes.CDLL(cell) for cell in cells]
        for number, cell in enumerate(self._cells):
            cell.seqmnist_kernel.restype = ctypes.c_void_p
            self._launcher.seqmnist_add(number, cell.seqmnist_kernel())

    def __call__(
        self, direction: str, case: Case, arguments: list[np.ndarray], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """The results, of these shapes and for each replica."""
        results = [np.full((case.replicas, *shape), NOTHING) for shape in shapes.values()]
        message = ctypes.create_string_buffer(1000)
        arrays = [(Buffer * len(group))(*map(buffer, group)) for group in (arguments, results)]
        failed = self._caller.seqmnist_call(
            ctypes.cast(getattr(self._launcher, f"seqmnist_{direction}"), ctypes.c_void_p),
            ctypes.c_int64(case.threads),
            ctypes.c_bool(case.late),
            ctypes.c_int64(len(arguments)),
            arrays[0],
            ctypes.c_int64(len(results)),
            arrays[1],
            ctypes.c_int64(case.cell),
            ctypes.c_int64(case.outputs),
            ctypes.c_bool(case.reverse),
            message,
            ctypes.c_size_t(len(message)),
        )
        assert not failed, message.value.decode()
        return dict(zip(shapes, results, strict=True))


def run(library: Library, case: Case) -> dict[str, np.ndarray]:
    """Results of the kernel by name, with replicas in front."""
    arguments = case.arguments
    carry, x = (arguments[name].shape[1:] for name in ("carry", "x"))
    kept = case.kept if case.backward else (0, *case.kept[1:])
    got = library("forward", case, list(arguments.values()), {"end": carry, "outputs": case.output_shape, "kept": kept})
    values = got.pop("kept")
    if case.backward:
        after = arguments | {"carry": got["end"]}
        shapes = {
            "d_carry": carry,
            "d_inputs": arguments["inputs"].shape[1:],
            "d_weights": arguments["weights"].shape[1:],
            "sums": (case.sums, carry[2]),
            "d_x": x if case.wants_dx else (0, *x[1:]),
        }
        got |= library("backward", case, [*after.values(), values, *case.cotangents.values()], shapes)
    return got if case.wants_dx else {name: array for name, array in got.items() if name != "d_x"}


def check(library: Library, case: Case) -> None:
    """Runs a case and compares it."""
    got = run(library, case)
    for name, values in got.items():
        assert not (values.view(np.uint32) == NOTHING.view(np.uint32)).any(), f"{name} is not written"
    _, batch, time, *_ = case.arguments["x"].shape
    sums = {"d_weights", "sums"} | ({"d_inputs"} if case.arguments["inputs"].ndim == 4 else set())
    for replica, wanted in enumerate(case.wanted):
        for name, values in got.items():
            least = np.sqrt(batch * time) if name in sums else 1.0
            allowed = TOLERANCES[case.precision] * max(1.0, least, np.abs(wanted[name]).max(initial=0.0))
            np.testing.assert_allclose(values[replica], wanted[name], rtol=0, atol=allowed, err_msg=name)


def cases(path: Path) -> Iterator[Any]:
    """The cases of a file."""
    with path.open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)


def main() -> None:
    """Runs all cases; the first one that goes wrong ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("caller")
    parser.add_argument("launcher")
    parser.add_argument("cases", type=Path)
    parser.add_argument("cells", nargs="+")
    arguments = parser.parse_args()
    library = Library(arguments.caller, arguments.launcher, arguments.cells)
    done = 0
    try:
        for case in cases(arguments.cases):
            print(f"Case {case.said}", file=sys.stderr, flush=True)
            check(library, case)
            done += 1
    finally:
        print(f"{done} shapes")


if __name__ == "__main__":
    main()
