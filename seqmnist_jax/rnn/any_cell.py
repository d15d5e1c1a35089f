"""A cell of one's own over whole sequences: `scan`, and what would run it."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.cells import PRECISIONS
from seqmnist_jax.rnn.checks import as_array, check_inputs, check_rows, choice, flag, whole
from seqmnist_jax.rnn.eager import compiled
from seqmnist_jax.rnn.recurrence import Call, Given, Options
from seqmnist_jax.rnn.scan import Step, run, with_frames_of_its_own

Array = jax.Array
Carry = TypeVar("Carry")

BACKENDS = ("auto", "scan", "native")


def scan(
    step: Step[Carry],
    params: Any,
    x: Array,
    carry: Carry,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    unroll: int = 1,
    precision: str = "float32",
    backend: str = "auto",
) -> tuple[Carry, Array]:
    """Runs a pure cell over time: by a kernel made of its step where there can be one, else by `lax.scan`.

    Args:
      step: ``step(params, carry, x_t) -> (carry, y_t)``, pure; x_t is [batch, features].
      params: the cell's parameters, any pytree.
      x: [batch, time, features].
      carry: the state before the first step, a pytree of [batch, ...].
      lengths: integers [batch]; sequence b ends after lengths[b] steps. Past its end
        its carry is left as it was, its outputs are zero, and what x holds there plays no
        part. 0 is an empty sequence. Where values are not known (under `jit`), those beyond
        the time axis mean the whole sequence and negative ones an empty one.
      reverse: run from each sequence's last step to its first. The output of
        step t stands at index t either way.
      return_sequences: whether to keep the outputs of all steps.
      unroll: how many steps are laid out in one pass of the loop: 1 is a loop (TF1's
        dynamic_rnn), the number of steps none at all (static_rnn).
      precision: how exact the step's products need to be, as in `lstm`. 'bfloat16' and 'tensorfloat32' let the GPU's
        kernel run; `lax.scan` computes the products as the step says, in full float32 where precision is 'float32'.
      backend: 'scan' is `lax.scan`; 'native' the kernel of the process's device, made of the step at its first use;
        'auto' takes the kernel of a GPU where it can, and on a CPU `lax.scan`, which can be differentiated
        forwards and twice and needs no compiler. `explain_step` tells which, and what of the step a kernel has no
        place for.

    Returns:
      (carry, outputs): the carry after each sequence's last step, and [batch, time, ...],
      or the last step's [batch, ...] (zero for an empty sequence).

    Raises:
      ValueError: x or lengths has the wrong shape or dtype, lengths are known and outside
        [0, time], x holds a known NaN, an option is none, with lengths carry or output lack a batch axis, or
        backend is 'native' and there is no kernel.
    """
    x, lengths = check_inputs(x, lengths)
    options = (
        flag("reverse", reverse),
        flag("return_sequences", return_sequences),
        whole("unroll", unroll, 1),
        choice("precision", precision, PRECISIONS),
        choice("backend", backend, BACKENDS),
    )
    carry = jax.tree.map(lambda leaf: leaf if isinstance(leaf, int | float) else as_array("carry", leaf), carry)
    if lengths is not None:
        check_rows("carry", carry, x.shape[0])
    return compiled(_run, step, (params, x, carry, lengths), options)


def _shapes(*trees: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), trees)


def _problem(call: Call, params: Any, x: Any, carry: Any, unroll: int) -> str | None:
    """Why no kernel runs the step, or None; arrays, or their shapes."""
    if call.platform not in recurrence.KERNELS:
        return f"there is no kernel for {jax.default_backend()}"
    if unroll > 1:
        return "steps are unrolled"
    return recurrence.problem(call, *_shapes(params, x, carry))


def _run(
    step: Any,
    params: Any,
    x: Array,
    carry: Any,
    lengths: Any,
    reverse: bool,
    return_sequences: bool,
    unroll: int,
    precision: str,
    backend: str,
) -> tuple[Any, Any]:
    options = Options("all" if return_sequences else "last", reverse, precision)
    call = Call(step, options, recurrence.PLATFORMS.get(jax.default_backend(), ""))
    if backend == "native" or (backend == "auto" and call.platform != "cpu"):
        trouble = _problem(call, params, x, carry, unroll)
        if trouble is None:
            x, lengths = with_frames_of_its_own(x, lengths, reverse)
            params, x, carry = jax.tree.map(jnp.asarray, (params, x, carry))
            return recurrence.recurrence(call, Given(params, x, carry, lengths))
        if backend == "native":
            raise ValueError(f"backend is 'native', but {trouble}; 'scan' runs everywhere")
    with jax.default_matmul_precision("highest" if precision == "float32" else None):
        return run(step, params, x, carry, lengths, reverse, return_sequences, unroll)


def explain_step(
    step: Step[Carry], params: Any, x: Any, carry: Carry, *, precision: str = "float32", source: bool = False
) -> str:
    """What ``scan(..., backend="native")`` would run in this process, or why it can't; arrays or their shapes.

    Args:
      step, params, x, carry, precision: as in `scan`.
      source: give the kernel's source, as it is compiled.
    """
    options = Options("all", False, choice("precision", precision, PRECISIONS))
    call = Call(step, options, recurrence.PLATFORMS.get(jax.default_backend(), ""))
    trouble = _problem(call, params, x, carry, 1)
    if trouble is not None:
        return f"scan: {trouble}"
    kernel = recurrence.KERNELS[call.platform]
    if not source:
        return f"native: {kernel.describe()}"
    params, x, carry = _shapes(params, x, carry)
    return str(kernel.text(recurrence.stages_of(call, params, x, carry), precision))
