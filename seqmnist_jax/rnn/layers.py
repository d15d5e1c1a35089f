"""LSTM and GRU layers: one pure function each, several backends behind it.

`custom_vjp` is outermost; which backend runs is chosen inside its two rules, for 'auto' when
the program is lowered for a platform. The 'scan' backend has no rules of its own, so it is also the
one that differentiates forwards (jvp) and more than once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from seqmnist_jax.rnn import cells, checks, fused, native, recurrence
from seqmnist_jax.rnn.checks import choice, flag
from seqmnist_jax.rnn.scan import loop, without_padding
from seqmnist_jax.rnn.spec import Inputs, Layer

Array = jax.Array

BACKENDS = ("auto", "scan", "fused", "native")
PRECISIONS = cells.PRECISIONS
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")

# Saved gates may take this many bytes; beyond it they are made anew on the way back, which takes a
# fifth more time and leaves a fifth (LSTM: a third) of the memory.
MOST_SAVED_BYTES = 2 << 30


class _Kind(NamedTuple):
    """What sets a cell apart: names of its parameters, gates, arrays in its carry, one step without and with x W."""

    names: tuple[str, ...]
    gates: int
    carries: int
    recurrence: Callable[..., Any]
    step: Callable[..., Any]


_NAMES = ("kernel", "recurrent_kernel", "bias")
_KINDS = {
    "lstm": _Kind(_NAMES, cells.LSTM_GATES, 2, cells.lstm_recurrence, cells.lstm_step),
    "gru": _Kind((*_NAMES, "recurrent_bias"), cells.GRU_GATES, 1, cells.gru_recurrence, cells.gru_step),
    "gru_reset_before": _Kind(_NAMES, cells.GRU_GATES, 1, cells.gru_reset_before_recurrence, cells.gru_step),
}


def check_dtypes(cell: str, precision: str, backend: str, dtype: Any) -> None:
    """Refuses what a backend or a precision can't do with arrays of this dtype."""
    if precision != "float32" and dtype != jnp.float32:
        raise ValueError(f"precision is {precision!r}, but x, params and carry are {dtype}; expected float32 arrays")
    if backend == "fused" and cell not in fused.RULES:
        raise ValueError("backend is 'fused', but it has no GRU with reset_after=False; expected 'scan' or 'auto'")
    if backend == "native" and dtype != jnp.float32:
        raise ValueError(f"backend is 'native', but x, params and carry are {dtype}; expected float32 arrays")


GPUS = ("gpu", "cuda")


def gpu_call(step: Any, outputs: str, reverse: bool, precision: str) -> recurrence.Call:
    """A call of the GPU's kernel."""
    return recurrence.Call(step, recurrence.Options(outputs, reverse, precision), "cuda")


def _cpu_problem(cell: str, dtype: Any) -> str | None:
    """Why the CPU's kernel can't run a layer, or None."""
    if cell not in fused.RULES:
        return "the kernel has no GRU with reset_after=False"
    if dtype != jnp.float32:
        return f"the kernel computes in float32, and these arrays are {dtype}"
    if jax.default_backend() != "cpu" and not native.is_loaded():
        return f"the kernel is not built for a process that runs on {jax.default_backend()}"
    return native.problem()


def _choose(layer: Layer, backend: str, given: Inputs, platform: str) -> tuple[str, str]:
    """The backend that runs on a platform, and why: 'scan', 'fused', 'native' (the CPU's kernel) or 'gpu'.

    Raises:
      ValueError: the backend was named, and can't.
    """
    if backend in ("scan", "fused"):
        return backend, "named by the caller"
    if platform in GPUS:
        dtype = given.x.dtype
        call = gpu_call(_KINDS[layer.cell].step, "all", layer.reverse, layer.precision)
        trouble = f"the kernel computes in float32, and these arrays are {dtype}" if dtype != jnp.float32 else None
        trouble = trouble or recurrence.problem(call, given.params, given.x, given.carry)
        found, why = "gpu", native.gpu.describe
    else:
        trouble = _cpu_problem(layer.cell, given.x.dtype) if platform == "cpu" else "the kernels are for CPUs and GPUs"
        found, why = "native", native.describe
    if trouble is None:
        return found, why()
    if backend == "native":
        raise ValueError(f"backend is 'native', but {trouble}; expected 'auto' or 'scan'")
    if platform == "cpu" and native.problem() is not None:
        native.warn_once()
    return ("fused" if layer.cell in fused.RULES else "scan"), trouble


def _dispatch(backend: str, function: str, layer: Layer, wants: bool, given: Inputs, *others: Any) -> Any:
    """Calls `function`, 'forward' or 'backward', of the backend; `wants` is its second argument."""

    def call(module: Any) -> Callable[..., Any]:
        return lambda *arrays: getattr(module, function)(layer, wants, *arrays)

    if backend == "auto" and _cpu_problem(layer.cell, given.x.dtype) is None:
        return jax.lax.platform_dependent(given, *others, cpu=call(native), default=call(fused))
    return call(native if backend == "native" else fused)(given, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(layer: Layer, backend: str, given: Inputs) -> tuple[Any, Array | None]:
    """The carry after each sequence's last step, and all outputs (None where only the last is wanted)."""
    carry, outputs, _ = _dispatch(backend, "forward", layer, False, given)
    return carry, outputs


def _for_replicas(run: Callable[..., Any], replicas: int = 1) -> Callable[..., Any]:
    """``run(replicas, ...)``: told how many `vmap` makes of it, also where that comes after all shapes are fixed."""
    call = custom_vmap(functools.partial(run, replicas))

    @call.def_vmap
    def _(size: int, is_mapped: Any, *arrays: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(is_mapped))

        def several(count: int, *arrays: Any) -> Any:
            return jax.vmap(functools.partial(run, count), axes, axis_size=size)(*arrays)

        results = _for_replicas(several, replicas * size)(*arrays)
        return results, jax.tree.map(lambda _: True, results)

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _rule(backend: str, function: str, layer: Layer, wants: bool, *arrays: Any) -> Any:
    """`_dispatch`, where the gates of all replicas are too many without them: zeros that nobody reads."""

    def run(replicas: int, given: Inputs, *others: Any) -> Any:
        now = layer._replace(save_gates=layer.save_gates and _saves_gates(given, replicas))
        if now == layer or function == "backward":
            if now != layer:
                others = (others[0]._replace(gates=others[0].gates[:0]), *others[1:])
            return _dispatch(backend, function, now, wants, given, *others)
        end, outputs, saved = _dispatch(backend, function, now, wants, given)
        gates = jnp.zeros((given.x.shape[1], *saved.gates.shape[1:]), saved.gates.dtype)
        return end, outputs, saved._replace(gates=gates)

    return _for_replicas(run)(*arrays)


@_rule.defjvp
def _rule_jvp(*_: Any) -> Any:
    raise ValueError("backend is not 'scan', the only one that differentiates more than once; expected backend='scan'")


def _recurrence_forward(layer: Layer, backend: str, given: Any) -> Any:
    # Whether x has a gradient must travel as an array's size. The tree's structure won't do: JAX keeps the
    # last one traced, and within one jitted function both kinds can be.
    wants_dx = jnp.zeros((int(given.x.perturbed),), bool)
    given = jax.tree.map(lambda primal: primal.value, given)
    end, outputs, saved = _rule(backend, "forward", layer, True, given)
    return (end, outputs), (given, saved, wants_dx)


def _recurrence_backward(layer: Layer, backend: str, residuals: Any, bars: Any) -> tuple[Inputs]:
    given, saved, wants_dx = residuals

    def number(bar: Any) -> Array:
        return jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar

    d_carry = jax.tree.map(number, bars[0], is_leaf=lambda bar: isinstance(bar, SymbolicZero))
    d_outputs = None if isinstance(bars[1], SymbolicZero) else bars[1]
    d_params, dx, d_carry = _rule(backend, "backward", layer, wants_dx.shape[0] > 0, given, saved, d_carry, d_outputs)
    return (Inputs(d_params, jnp.zeros_like(given.x) if dx is None else dx, d_carry, None),)


_recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(layer: Layer, backend: str, given: Inputs) -> tuple[Any, Array]:
    params, x, carry, lengths = given
    x, lengths = without_padding(x, lengths)
    outputs: Array | None
    if backend == "gpu":
        which = "all" if layer.return_sequences else "none"
        call = gpu_call(_KINDS[layer.cell].step, which, layer.reverse, layer.precision)
        end, outputs = recurrence.recurrence(call, recurrence.Given(params, x, carry, lengths))
    elif backend == "scan":
        inputs = cells.inputs(params, x, layer.precision)
        step = functools.partial(_KINDS[layer.cell].recurrence, precision=layer.precision)
        end, outputs = loop(step, params, inputs, carry, lengths, layer.reverse, layer.return_sequences)
    else:
        end, outputs = _recurrence(layer, backend, Inputs(params, x, carry, lengths))
    return end, jax.tree.leaves(end)[-1] if outputs is None else outputs


def _checked(
    cell: str, params: Any, x: Any, carry: Any, precision: str, backend: str, zeros: Any = jnp.zeros
) -> tuple[Any, Any, Any]:
    """What a layer makes of its arguments, arrays or their shapes: params, carry, and the dtype of all."""
    kind = _KINDS[cell]
    is_other = cell == "gru" and hasattr(params, "keys") and set(params) == set(_NAMES)
    hint = "; without a recurrent_bias it is a GRU with reset_after=False" if is_other else ""
    params, hidden = checks.check_params(params, kind.names, kind.gates, x, hint)
    dtype = checks.common_dtype(params, x)
    carry = checks.check_carry(carry, kind.carries, (x.shape[0], hidden), dtype, zeros)
    dtype = jnp.result_type(dtype, *jax.tree.leaves(carry))
    check_dtypes(cell, precision, backend, dtype)
    return params, carry, dtype


def _layer(
    cell: str, params: Any, x: Any, carry: Any, lengths: Any, reverse: Any, sequences: Any, precision: Any, backend: Any
) -> tuple[Any, Array]:
    """Checks everything, brings it to one dtype and runs it."""
    backend, precision = choice("backend", backend, BACKENDS), choice("precision", precision, PRECISIONS)
    reverse, sequences = flag("reverse", reverse), flag("return_sequences", sequences)
    x, lengths = checks.check_inputs(x, lengths)
    params, carry, dtype = _checked(cell, params, x, carry, precision, backend)
    params, x, carry = jax.tree.map(lambda array: jnp.asarray(array, dtype), (params, x, carry))
    given = Inputs(params, x, carry, lengths)
    layer = Layer(cell, reverse, sequences, precision, _saves_gates(given))
    found, _ = _choose(layer, backend, given, jax.default_backend())
    # What may be lowered for another platform than this process's own decides again there.
    return _run(layer, "auto" if backend == "auto" and found in ("fused", "native") else found, given)


def _gates_bytes(given: Inputs) -> Any:
    """Bytes of the gates of all steps, an expression where a size is symbolic."""
    return 4 * math.prod((*given.x.shape[:2], given.params["recurrent_kernel"].shape[0], given.x.dtype.itemsize))


def _saves_gates(given: Inputs, replicas: int = 1) -> bool:
    """Whether the gates of so many replicas are saved for the way back; where that can't be known, they are."""
    size = _gates_bytes(given) * replicas
    return not isinstance(size, int) or size <= MOST_SAVED_BYTES


def lstm(
    params: cells.Params,
    x: Array,
    carry: cells.LSTMCarry | None = None,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    precision: str = "float32",
    backend: str = "auto",
) -> tuple[cells.LSTMCarry, Array]:
    """An LSTM layer over a whole sequence.

    Differentiable in params, x and carry. In `jax.shard_map` give ``check_vma=False``: JAX can't yet follow
    what varies between devices through these rules.

    Args:
      params: as `init_lstm` makes them.
      x: [batch, time, features].
      carry: (c, h), each [batch, hidden]; zeros where None.
      lengths, reverse, return_sequences: as in `scan`; with ``return_sequences=False``
        an empty sequence's output is its initial h.
      precision: how exact products are, as in `cells`: 'float32', 'tensorfloat32' or 'bfloat16'.
      backend: 'scan' is the reference, a plain `jax.lax.scan`; 'fused' the same with a hand-written
        backward; 'native' the kernel of the process's device, for float32 arrays: in C++ on CPUs, in CUDA on NVIDIA
        GPUs and there for the two lower precisions; 'auto' takes 'native' where it can, else 'fused'. `explain`
        tells which. Only 'scan' differentiates forwards or twice. `jax.export` refuses programs with 'native' unless
        ``disabled_checks`` names ``DisabledSafetyCheck.custom_call("seqmnist_rnn_forward")`` and, where there are
        gradients, "seqmnist_rnn_backward"; such a program runs only after `rnn.native_problem()` has given None.

    Returns:
      ((c, h), outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: an argument's shape, dtype or value does not fit the others or is unknown; where
        values are known (not under `jit` or `grad`), also lengths outside [0, time], or a NaN in x.
    """
    return _layer("lstm", params, x, carry, lengths, reverse, return_sequences, precision, backend)


def gru(
    params: cells.Params,
    x: Array,
    carry: Array | None = None,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    precision: str = "float32",
    backend: str = "auto",
    reset_after: bool = True,
) -> tuple[Array, Array]:
    """A GRU layer over a whole sequence.

    Args:
      params: as `init_gru` makes them.
      x: [batch, time, features].
      carry: h [batch, hidden]; zeros where None.
      lengths, reverse, return_sequences, precision, backend: as in `lstm`.
      reset_after: the reset gate acts after the product with h, as in cuDNN and PyTorch; False:
        before it, as in Cho et al. 2014 (params then have no recurrent_bias, and only 'scan' has it).

    Returns:
      (h, outputs): outputs [batch, time, hidden], or the last one [batch, hidden].

    Raises:
      ValueError: as in `lstm`.
    """
    cell = "gru" if flag("reset_after", reset_after) else "gru_reset_before"
    return _layer(cell, params, x, carry, lengths, reverse, return_sequences, precision, backend)


class Explanation(NamedTuple):
    """What would run, why, and the bytes (of one replica) that the forward pass would save for the way back."""

    backend: str
    why: str
    saved_bytes: int

    def __str__(self) -> str:
        size = self.saved_bytes
        amount = f"{size / 2**20:,.1f} MiB" if isinstance(size, int) else f"{size} bytes"
        return f"{self.backend}: {self.why}; saves {amount} for the way back"


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
    shape = checks.as_array("params['recurrent_kernel']", params.get("recurrent_kernel", ())).shape
    is_lstm = len(shape) == 2 and shape[1] == cells.LSTM_GATES * shape[0] and "recurrent_bias" not in params
    cell = "lstm" if is_lstm else "gru" if reset_after else "gru_reset_before"
    params, carry, dtype = _checked(cell, params, x, carry, precision, backend, jax.ShapeDtypeStruct)
    if shape[0] < 1:
        raise ValueError(f"params['recurrent_kernel'] has shape {shape}; expected hidden units")
    given = Inputs(*jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, dtype), [params, x, carry, None]))
    layer = Layer(cell, False, True, precision)
    found, why = _choose(layer, backend, given, platform)
    if found == "gpu":
        call = gpu_call(_KINDS[cell].step, "all", False, precision)
        return Explanation("native", why, recurrence.kept_bytes(call, given))
    if found != "scan":
        states, gates = _KINDS[cell].carries * _gates_bytes(given) // 4, _gates_bytes(given)
        return Explanation(found, why, states + (gates if _saves_gates(given) else 0))
    run = functools.partial(_run, layer, found)
    kept = jax.tree.leaves(jax.eval_shape(lambda given: jax.vjp(run, given)[1], given))
    # Parameters and x are there anyway.
    size = sum(part.size for part in kept) - sum(part.size for part in jax.tree.leaves((given.params, given.x)))
    return Explanation(found, why, size * dtype.itemsize)
