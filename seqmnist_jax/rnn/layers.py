"""LSTM and GRU layers: one pure function each, over the same engine as any other cell (`recurrence`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells, checks, recurrence
from seqmnist_jax.rnn.any_cell import run
from seqmnist_jax.rnn.cells import PRECISIONS
from seqmnist_jax.rnn.checks import choice, flag
from seqmnist_jax.rnn.eager import compiled
from seqmnist_jax.rnn.recurrence import BACKENDS, Given, Options

Array = jax.Array

PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


class _Kind(NamedTuple):
    """What sets a cell apart: names of its parameters, gates, arrays in its carry, and its step."""

    names: tuple[str, ...]
    gates: int
    carries: int
    step: Callable[..., Any]


_NAMES = ("kernel", "recurrent_kernel", "bias")
_KINDS = {
    "lstm": _Kind(_NAMES, cells.LSTM_GATES, 2, cells.lstm_step),
    "gru": _Kind((*_NAMES, "recurrent_bias"), cells.GRU_GATES, 1, cells.gru_step),
    "gru_reset_before": _Kind(_NAMES, cells.GRU_GATES, 1, cells.gru_step),
}


def _checked(
    cell: str, params: Any, x: Any, carry: Any, precision: str, backend: str, zeros: Any = jnp.zeros
) -> tuple[Any, Any, Any]:
    """What a layer makes of its arguments, arrays or their shapes: params, carry, and the dtype of all."""
    kind = _KINDS[cell]
    hint = ""
    if cell == "gru" and hasattr(params, "keys") and set(params) == set(_NAMES):
        shape: Any = getattr(params["recurrent_kernel"], "shape", ())
        is_lstm = len(shape) == 2 and shape[1] == cells.LSTM_GATES * shape[0]
        hint = "; these are an LSTM's" if is_lstm else "; without a recurrent_bias it is a GRU with reset_after=False"
    params, hidden = checks.check_params(params, kind.names, kind.gates, x, hint)
    dtype = checks.common_dtype(params, x)
    carry = checks.check_carry(carry, kind.carries, (x.shape[0], hidden), dtype, zeros)
    dtype = jnp.result_type(dtype, *jax.tree.leaves(carry))
    if precision != "float32" and dtype != jnp.float32:
        raise ValueError(f"precision is {precision!r}, but x, params and carry are {dtype}; expected float32 arrays")
    if backend == "native" and dtype != jnp.float32:
        raise ValueError(f"backend is 'native', but x, params and carry are {dtype}; expected float32 arrays")
    return params, carry, dtype


def _layer(
    cell: str,
    params: Any,
    x: Any,
    carry: Any,
    lengths: Any,
    mask: Any,
    resets: Any,
    reverse: Any,
    sequences: Any,
    zero: Any,
    precision: Any,
    backend: Any,
) -> tuple[Any, Array]:
    """Checks everything, brings it to one dtype and runs it."""
    backend, precision = choice("backend", backend, BACKENDS), choice("precision", precision, PRECISIONS)
    outputs = "all" if flag("return_sequences", sequences) else "none"
    options = Options(outputs, flag("reverse", reverse), precision)
    zero = flag("zero_output_for_mask", zero)
    x, lengths, mask, resets = checks.check_sequences(x, lengths, mask, resets)
    is_given = carry is not None
    params, carry, dtype = _checked(cell, params, x, carry, precision, backend)
    params, x, carry = jax.tree.map(lambda array: jnp.asarray(array, dtype), (params, x, carry))
    anew = None if resets is None else (resets, carry if is_given else None)
    arguments = params, x, carry, lengths, mask, anew
    end, y = compiled(run, _KINDS[cell].step, arguments, (options, 1, backend, zero))
    return end, jax.tree.leaves(end)[-1] if y is None else y


def lstm(
    params: cells.Params,
    x: Array,
    carry: cells.LSTMCarry | None = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    zero_output_for_mask: bool = False,
    precision: str = "float32",
    backend: str = "auto",
) -> tuple[cells.LSTMCarry, Array]:
    """An LSTM layer over a whole sequence.

    Differentiable in params, x and carry. Where x is explicitly sharded over its batch, each device runs its own
    sequences. In `jax.shard_map` give ``check_vma=False``: JAX can't yet follow what varies between devices through
    these rules.

    Args:
      params: as `init_lstm` makes them.
      x: [batch, time, features].
      carry: (c, h), each [batch, hidden]; zeros where None.
      lengths, mask, resets, reverse, return_sequences, zero_output_for_mask: as in `scan`; with
        ``return_sequences=False`` an empty sequence's output is its initial h. Where there is no carry, the state
        starts anew from zero.
      precision: how exact products are, as in `cells`: 'float32', 'tensorfloat32' or 'bfloat16'.
      backend: 'scan' is the reference, a plain `jax.lax.scan`; 'fused' the same with a backward of its own, made of
        the step; 'native' the kernel of the process's device, for float32 arrays: in C++ on CPUs, in CUDA on NVIDIA
        GPUs and there for the two lower precisions; 'auto' takes 'native' where it can, else 'fused'. `explain`
        tells which. Only 'scan' differentiates forwards or twice. `jax.export` refuses programs with 'native' unless
        ``disabled_checks`` names ``DisabledSafetyCheck.custom_call("seqmnist_rnn_forward")`` and, where there are
        gradients, "seqmnist_rnn_backward" (on a GPU "seqmnist_rnn_gpu" alone); such a program runs only in a process
        that has run the same layer.

    Returns:
      ((c, h), outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: an argument's shape, dtype or value does not fit the others or is unknown; where
        values are known (not under `jit` or `grad`), also lengths outside [0, time], or a NaN in x.
    """
    steps = lengths, mask, resets, reverse, return_sequences, zero_output_for_mask
    return _layer("lstm", params, x, carry, *steps, precision, backend)


def gru(
    params: cells.Params,
    x: Array,
    carry: Array | None = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    zero_output_for_mask: bool = False,
    precision: str = "float32",
    backend: str = "auto",
    reset_after: bool = True,
) -> tuple[Array, Array]:
    """A GRU layer over a whole sequence.

    Args:
      params: as `init_gru` makes them.
      x: [batch, time, features].
      carry: h [batch, hidden]; zeros where None.
      lengths, mask, resets, reverse, return_sequences, zero_output_for_mask, precision, backend: as in `lstm`.
      reset_after: the reset gate acts after the product with h, as in cuDNN and PyTorch; False:
        before it, as in Cho et al. 2014 (params then have no recurrent_bias).

    Returns:
      (h, outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: as in `lstm`.
    """
    cell = "gru" if flag("reset_after", reset_after) else "gru_reset_before"
    steps = lengths, mask, resets, reverse, return_sequences, zero_output_for_mask
    return _layer(cell, params, x, carry, *steps, precision, backend)


class Explanation(NamedTuple):
    """What would run, why, and the bytes (of one replica) that the forward pass would keep for the backward pass."""

    backend: str
    why: str
    saved_bytes: int

    def __str__(self) -> str:
        size = self.saved_bytes
        amount = f"{size / 2**20:,.1f} MiB" if isinstance(size, int) else f"{size} bytes"
        return f"{self.backend}: {self.why}; keeps {amount} for the backward pass"


def explain(
    params: Any,
    x: Any,
    carry: Any = None,
    *,
    backend: str = "auto",
    reset_after: bool = True,
    precision: str = "float32",
    platform: str | None = None,
) -> Explanation:
    """Which backend `lstm` or `gru` would take, and why.

    Args:
      params: a layer's parameters, or their shapes (`jax.ShapeDtypeStruct`).
      x: [batch, time, features], or its shape.
      carry, backend, reset_after, precision: as in `gru`; the carry or its shapes.
      platform: 'cpu', 'gpu', 'cuda', 'rocm' or 'tpu'; None for JAX's default.

    Raises:
      ValueError: as in `gru`; also where the backend is not for the platform.
    """
    backend, reset_after = choice("backend", backend, BACKENDS), flag("reset_after", reset_after)
    precision = choice("precision", precision, PRECISIONS)
    platform = jax.default_backend() if platform is None else choice("platform", str(platform).lower(), PLATFORMS)
    x = checks.as_array("x", x)
    checks.check_x(x)
    recurrent_kernel = params.get("recurrent_kernel", ()) if hasattr(params, "keys") else ()
    shape = checks.as_array("params['recurrent_kernel']", recurrent_kernel).shape
    is_lstm = len(shape) == 2 and shape[1] == cells.LSTM_GATES * shape[0] and "recurrent_bias" not in params
    cell = "lstm" if is_lstm else "gru" if reset_after else "gru_reset_before"
    params, carry, dtype = _checked(cell, params, x, carry, precision, backend, jax.ShapeDtypeStruct)
    if jax.tree.leaves(carry)[0].shape[1] < 1:
        raise ValueError(f"params['kernel'] has shape {params['kernel'].shape}; expected hidden units")
    given = Given(*jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, dtype), [params, x, carry, None]))
    options = Options("all", False, precision)
    found, call, why = recurrence.choose(_KINDS[cell].step, options, given, backend, platform)
    if found != "scan":
        return Explanation(found, why, recurrence.kept_bytes(call, given))

    def by_scan(given: Given) -> Any:
        return run(call.step, *given, None, None, options, 1, found, False)

    kept = jax.tree.leaves(jax.eval_shape(lambda given: jax.vjp(by_scan, given)[1], given))
    # Parameters and x are there anyway.
    size = sum(part.size for part in kept) - sum(part.size for part in jax.tree.leaves((given.params, given.x)))
    return Explanation(found, why, size * dtype.itemsize)
