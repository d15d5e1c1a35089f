"""A cell of one's own over whole sequences: `scan`, and what would run it."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.cells import PRECISIONS, products_at
from seqmnist_jax.rnn.checks import (
    as_array,
    as_carry_of_a_step,
    check_rows,
    check_sequences,
    check_x,
    choice,
    diagnose,
    flag,
    whole,
)
from seqmnist_jax.rnn.eager import at_precision, compiled, identified
from seqmnist_jax.rnn.gaps import Resets, pressed, spread, with_resets
from seqmnist_jax.rnn.recurrence import BACKENDS, Given, Options
from seqmnist_jax.rnn.scan import Step, where_some_run, with_frames_of_its_own

Array = jax.Array
Carry = TypeVar("Carry")


def scan(
    step: Step[Carry],
    params: Any,
    x: Array,
    carry: Carry,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    zero_output_for_mask: bool = False,
    unroll: int = 1,
    precision: str = "float32",
    backend: str = "auto",
) -> tuple[Carry, Array]:
    """Runs a pure cell over time: by a kernel made of its step where there can be one, else by `lax.scan`.

    Args:
      step: ``step(params, carry, x_t) -> (carry, y_t)``, pure; x_t is [batch, features]. A function is compiled
        once, also inside `jit`. A method is compiled at each call, for its object may have changed; so is an object
        that can be called, whose class has no hash of its own, and a partial that holds a method, such an object, a
        list, a dict or a NumPy array.
      params: the cell's parameters, any pytree.
      x: [batch, time, features].
      carry: the state before the first step, a pytree of [batch, ...].
      lengths: integers [batch]; sequence b ends after lengths[b] steps. Past its end
        its carry is left as it was, its outputs are zero, and what x holds there plays no
        part. 0 is an empty sequence, as are all where there are no steps. Where values are not known (under `jit`),
        those beyond the time axis mean the whole sequence and negative ones an empty one.
      mask: bool [batch, time], in place of lengths: steps where it is false don't run, wherever they are. They keep
        the state, their outputs are those of the step that ran before, or zero before the first, and what x holds
        there plays no part.
      resets: bool [batch, time], steps before which the state starts anew, from the carry that was given; at those that
        don't run it plays no part.
      zero_output_for_mask: outputs of masked steps are zero.
      reverse: run from each sequence's last step to its first. The output of
        step t stands at index t either way.
      return_sequences: whether to keep the outputs of all steps.
      unroll: how many steps are laid out in one pass of the loop: 1 is a loop (TF1's
        dynamic_rnn), the number of steps none at all (static_rnn).
      precision: how exact the step's products need to be, as in `lstm`. 'bfloat16' and 'tensorfloat32' let the GPU's
        kernel run. `lax.scan` computes the products as the step says, which is given it where it has such an argument,
        in full float32 where it is 'float32'.
      backend: 'scan' is `lax.scan`; 'fused' the same with a backward of its own, made of the step; 'native' the kernel
        of the process's device, made of the step at its first use, which takes some seconds; 'auto' takes 'native'
        where it can, else 'fused', else 'scan'. `explain_step` tells which, and what of the step a kernel has no place
        for. Only 'scan' differentiates forwards or twice, and takes any step.

    Returns:
      (carry, outputs): the carry after each sequence's last step, and [batch, time, ...],
      or the last step's [batch, ...] (zero for an empty sequence).

    Raises:
      ValueError: x or lengths has the wrong shape or dtype, lengths are known and outside
        [0, time], x holds a known NaN, an option is none, with lengths carry or output lack a batch axis, the step
        does not give (carry, y) with a carry of the same shapes and dtypes, or the backend was named and can't run
        the step.
    """
    x, lengths, mask, resets = check_sequences(x, lengths, mask, resets)
    outputs = "all" if flag("return_sequences", return_sequences) else "last"
    options = Options(outputs, flag("reverse", reverse), choice("precision", precision, PRECISIONS))
    unroll, backend = whole("unroll", unroll, 1), choice("backend", backend, BACKENDS)
    zero = flag("zero_output_for_mask", zero_output_for_mask)
    carry = as_carry_of_a_step(carry)
    for name, marks in {"lengths": lengths, "mask": mask, "resets": resets}.items():
        if marks is not None:
            check_rows("carry", carry, x.shape[0], name)
    anew = None if resets is None else (resets, carry)
    return compiled(run, step, (params, x, carry, lengths, mask, anew), (options, unroll, backend, zero))


def run(
    step: Any,
    params: Any,
    x: Array,
    carry: Any,
    lengths: Any,
    mask: Any,
    resets: Resets,
    options: Options,
    unroll: int,
    backend: str,
    zero: bool,
) -> tuple[Any, Any]:
    """A step over sequences, all checked: the carry, and outputs, those of steps that were masked among them."""
    as_given = step, params, x, carry
    x, lengths, anew = pressed(x, lengths, mask, resets and resets[0])
    resets = resets and (anew, resets[1])
    if unroll > 1 and backend in ("fused", "native"):
        raise ValueError(f"backend is {backend!r}, but steps are unrolled; expected 'auto' or 'scan'")
    backend = "scan" if unroll > 1 else backend
    # All else than `lax.scan` rounds what it multiplies by itself.
    exact, given, columns = with_resets(at_precision(step, "float32"), params, x, resets)
    all_given, platform = Given(given, columns, carry, lengths), jax.default_backend()
    found, call, _ = recurrence.choose(exact, options, all_given, backend, platform)
    columns, lengths = with_frames_of_its_own(columns, lengths, options.reverse)
    if found != "scan":
        given, columns, carry = jax.tree.map(jnp.asarray, (where_some_run(given, lengths), columns, carry))
        end, outputs = recurrence.run(call, Given(given, columns, carry, lengths))
    else:
        with products_at(options.precision):
            try:
                by_loop, *_ = with_resets(at_precision(step, options.precision), params, x, resets)
                call = call._replace(step=by_loop)
                end, outputs = recurrence.plain(call, Given(given, columns, carry, lengths), unroll)
            except (TypeError, ValueError) as error:
                diagnose(error, *as_given)
                raise
    return end, spread(outputs, mask if options.outputs == "all" else None, options.reverse, zero)


def explain_step(
    step: Step[Carry],
    params: Any,
    x: Any,
    carry: Carry,
    *,
    return_sequences: bool = True,
    precision: str = "float32",
    backend: str = "auto",
    source: bool = False,
) -> str:
    """Which backend `scan` would take in this process without lengths, mask and resets, and why.

    Args:
      step, params, x, carry, return_sequences, precision, backend: as in `scan`; arrays or their shapes.
      source: give the kernel's source, as it is compiled.

    Raises:
      ValueError: the backend was named and can't; or the source is asked for, and no kernel runs.
    """
    x = as_array("x", x)
    check_x(x)
    outputs = "all" if flag("return_sequences", return_sequences) else "last"
    options, given = Options(outputs, False, choice("precision", precision, PRECISIONS)), Given(params, x, carry, None)
    backend, platform = choice("backend", backend, BACKENDS), jax.default_backend()
    found, call, why = recurrence.choose(identified(at_precision(step, "float32")), options, given, backend, platform)
    if not source:
        return f"{found}: {why}"
    if found != "native":
        raise ValueError(f"there is no source, for {found!r} runs: {why}")
    params, x, carry = recurrence.shapes((params, x, carry))
    return str(recurrence.KERNELS[call.platform].text(recurrence.stages_of(call, params, x, carry), precision))
