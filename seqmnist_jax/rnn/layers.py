"""LSTM and GRU layers: one pure function each, several backends behind it.

`custom_vjp` is outermost; which backend runs is chosen inside its two rules, for 'auto' when
the program is lowered for a platform. The 'scan' backend has no rules of its own, so it is also the
one that differentiates forwards (jvp) and more than once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from seqmnist_jax.rnn import cells, fused, native
from seqmnist_jax.rnn.scan import check_inputs, check_x, is_known, is_real, loop
from seqmnist_jax.rnn.spec import Inputs, Layer

Array = jax.Array

BACKENDS = ("auto", "scan", "fused", "native")
PRECISIONS = ("float32", "bfloat16")

# Saved gates may take this many bytes; beyond it they are made anew on the way back, which takes a
# fifth more time and leaves a fifth (LSTM: a third) of the memory.
MOST_SAVED_BYTES = 2 << 30


class _Kind(NamedTuple):
    """What sets a cell apart: names of its parameters, gates, arrays in its carry, one step for `scan`."""

    names: tuple[str, ...]
    gates: int
    carries: int
    recurrence: Callable[..., Any]


_NAMES = ("kernel", "recurrent_kernel", "bias")
_KINDS = {
    "lstm": _Kind(_NAMES, cells.LSTM_GATES, 2, cells.lstm_recurrence),
    "gru": _Kind((*_NAMES, "recurrent_bias"), cells.GRU_GATES, 1, cells.gru_recurrence),
    "gru_reset_before": _Kind(_NAMES, cells.GRU_GATES, 1, cells.gru_reset_before_recurrence),
}


def _check_params(cell: str, params: cells.Params, x: Any) -> int:
    """Checks that params and x fit together; gives the hidden size."""
    kind = _KINDS[cell]
    if set(params) != set(kind.names):
        hint = ""
        if cell == "gru" and set(params) == set(_NAMES):
            hint = "; without a recurrent_bias it is a GRU with reset_after=False"
        raise ValueError(f"params has {sorted(params)}; expected {sorted(kind.names)}{hint}")
    for name in kind.names:
        if not is_real(params[name].dtype):
            raise ValueError(f"params[{name!r}] has dtype {params[name].dtype}; expected real numbers")
    if params["recurrent_kernel"].ndim != 2:
        raise ValueError(
            f"params['recurrent_kernel'] has shape {params['recurrent_kernel'].shape}; "
            f"expected [hidden, {kind.gates} * hidden]"
        )
    hidden = params["recurrent_kernel"].shape[0]
    expected = {
        "recurrent_kernel": (hidden, kind.gates * hidden),
        "kernel": (x.shape[-1], kind.gates * hidden),
        "bias": (kind.gates * hidden,),
        "recurrent_bias": (kind.gates * hidden,),
    }
    for name in ("recurrent_kernel", *kind.names):
        if params[name].shape != expected[name]:
            raise ValueError(
                f"params[{name!r}] has shape {params[name].shape}; expected {expected[name]} "
                f"for x {x.shape} and {hidden} hidden units"
            )
    return hidden


def common_dtype(params: cells.Params, x: Any) -> Any:
    """The floating dtype in which params and x meet."""
    dtype = jnp.result_type(x, *params.values())
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def check_carry(cell: str, carry: Any, shape: tuple[int, int], dtype: Any) -> Any:
    """Checks the carry; gives it, zeros where it is None."""
    parts = _KINDS[cell].carries
    blank = (jnp.zeros(shape, dtype),) * parts if parts > 1 else jnp.zeros(shape, dtype)
    if carry is None:
        return blank
    found: Any = jax.tree.structure(carry)
    if found != jax.tree.structure(blank):
        form = "a tuple (c, h)" if parts > 1 else "one array h"
        raise ValueError(f"carry is {found}; expected {form} of [batch, hidden]")
    for part in jax.tree.leaves(carry):
        if not hasattr(part, "shape"):
            raise ValueError(f"carry holds a {type(part).__name__}; expected arrays [batch, hidden]")
        if part.shape != shape:
            raise ValueError(f"carry has shape {part.shape}; expected [batch, hidden] = {shape}")
        if jnp.result_type(part, dtype) != part.dtype:
            raise ValueError(f"carry has dtype {part.dtype}; x and params would make it {dtype} in the first step")
    return carry


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_dtypes(cell: str, precision: str, backend: str, dtype: Any) -> None:
    """Refuses what a backend or a precision can't do with arrays of this dtype."""
    if precision != "float32" and dtype != jnp.float32:
        raise ValueError(f"precision is {precision!r}, but x, params and carry are {dtype}; expected float32 arrays")
    if backend in ("fused", "native") and cell not in fused.RULES:
        raise ValueError(f"backend is {backend!r}, but it has no GRU with reset_after=False; expected 'scan' or 'auto'")
    if backend == "native":
        if dtype != jnp.float32:
            raise ValueError(f"backend is 'native', but x, params and carry are {dtype}; expected float32 arrays")
        if native.problem() is not None:
            raise ValueError(f"backend is 'native', but {native.problem()}; 'fused' runs everywhere")


def check_finite(x: Array) -> None:
    """A NaN makes a sequence's whole result NaN, so where the numbers are known it is an error."""
    if is_known(x) and jnp.issubdtype(x.dtype, jnp.floating) and np.isnan(np.asarray(x)).any():
        raise ValueError(f"x {x.shape} holds NaN; expected numbers (past a sequence's end anything may stand)")


def _auto(cell: str, dtype: Any, on_cpu: bool) -> tuple[str, str]:
    """What 'auto' takes, and why."""
    if cell not in fused.RULES:
        return "scan", "the only one for a GRU with reset_after=False"
    if not on_cpu:
        return "fused", "the kernel is for CPUs"
    if dtype != jnp.float32:
        return "fused", f"the kernel computes in float32, and these arrays are {dtype}"
    if jax.default_backend() != "cpu" and not native.is_loaded():
        return "fused", f"the kernel is not built for a process that runs on {jax.default_backend()}"
    problem = native.problem()
    if problem is not None:
        native.warn_once()
        return "fused", problem
    return "native", native.describe()


def _dispatch(backend: str, function: str, layer: Layer, wants: bool, given: Inputs, *others: Any) -> Any:
    """Calls `function`, 'forward' or 'backward', of the backend; `wants` is its second argument."""

    def call(module: Any) -> Callable[..., Any]:
        return lambda *arrays: getattr(module, function)(layer, wants, *arrays)

    if backend == "auto" and _auto(layer.cell, given.x.dtype, on_cpu=True)[0] == "native":
        return jax.lax.platform_dependent(given, *others, cpu=call(native), default=call(fused))
    return call(native if backend == "native" else fused)(given, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(layer: Layer, backend: str, given: Inputs) -> tuple[Any, Array | None]:
    """The carry after each sequence's last step, and all outputs (None where only the last is wanted)."""
    carry, outputs, _ = _dispatch(backend, "forward", layer, False, given)
    return carry, outputs


def _recurrence_forward(layer: Layer, backend: str, given: Any) -> Any:
    # Whether x has a gradient must travel as an array's size. The tree's structure won't do: JAX keeps the
    # last one traced, and within one jitted function both kinds can be.
    wants_dx = jnp.zeros((int(given.x.perturbed),), bool)
    given = jax.tree.map(lambda primal: primal.value, given)
    end, outputs, saved = _dispatch(backend, "forward", layer, True, given)
    return (end, outputs), (given, saved, wants_dx)


def _recurrence_backward(layer: Layer, backend: str, residuals: Any, bars: Any) -> tuple[Inputs]:
    given, saved, wants_dx = residuals

    def number(bar: Any) -> Array:
        return jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar

    d_carry = jax.tree.map(number, bars[0], is_leaf=lambda bar: isinstance(bar, SymbolicZero))
    d_outputs = None if isinstance(bars[1], SymbolicZero) else bars[1]
    d_params, dx, d_carry = _dispatch(
        backend, "backward", layer, wants_dx.shape[0] > 0, given, saved, d_carry, d_outputs
    )
    return (Inputs(d_params, jnp.zeros_like(given.x) if dx is None else dx, d_carry, None),)


_recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(layer: Layer, backend: str, given: Inputs) -> tuple[Any, Array]:
    if backend == "scan":
        params, x, carry, lengths = given
        inputs = cells.inputs(params, x, layer.precision)
        step = functools.partial(_KINDS[layer.cell].recurrence, precision=layer.precision)
        end, outputs = loop(step, params, inputs, carry, lengths, layer.reverse, layer.return_sequences)
    else:
        end, outputs = _recurrence(layer, backend, given)
    return end, outputs if layer.return_sequences else jax.tree.leaves(end)[-1]


def _layer(
    cell: str,
    params: cells.Params,
    x: Array,
    carry: Any,
    lengths: Array | None,
    reverse: bool,
    return_sequences: bool,
    precision: str,
    backend: str,
) -> tuple[Any, Array]:
    """Checks everything, brings it to one dtype and runs it."""
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, PRECISIONS)
    x, lengths = check_inputs(x, lengths)
    hidden = _check_params(cell, params, x)
    dtype = common_dtype(params, x)
    carry = check_carry(cell, carry, (x.shape[0], hidden), dtype)
    check_finite(x)
    dtype = jnp.result_type(dtype, *jax.tree.leaves(carry))
    check_dtypes(cell, precision, backend, dtype)
    params, x, carry = jax.tree.map(lambda array: jnp.asarray(array, dtype), (params, x, carry))
    if backend == "auto" and cell not in fused.RULES:
        backend = "scan"
    layer = Layer(cell, reverse, return_sequences, precision, _saved_bytes(x.shape, hidden, dtype) <= MOST_SAVED_BYTES)
    return _run(layer, backend, Inputs(params, x, carry, lengths))


def _saved_bytes(shape: tuple[int, ...], hidden: int, dtype: Any) -> int:
    """Bytes of saved gates for x of this shape."""
    return 4 * shape[0] * shape[1] * hidden * jnp.dtype(dtype).itemsize


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
      precision: 'float32': everything in the arrays' own dtype; 'bfloat16': matrix products of
        operands rounded to bfloat16, all else, sums too, in float32.
      backend: 'scan' is the reference, a plain `jax.lax.scan`; 'fused' the same with a hand-written
        backward; 'native' a C++ kernel for CPUs, float32 arrays; 'auto' takes 'native' where
        the program is lowered for a CPU and it can be built, else 'fused'. `explain` tells which. Only
        'scan' differentiates forwards or twice. `jax.export` refuses programs with 'native' unless
        ``disabled_checks`` names ``DisabledSafetyCheck.custom_call("seqmnist_rnn_forward")``;
        and what is so exported runs only where this package has built its kernel.

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
    cell = "gru" if reset_after else "gru_reset_before"
    return _layer(cell, params, x, carry, lengths, reverse, return_sequences, precision, backend)


class Explanation(NamedTuple):
    """What would run, why, and the bytes that the forward pass would save for the way back."""

    backend: str
    why: str
    saved_bytes: int

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}; saves {self.saved_bytes / 2**20:,.1f} MiB for the way back"


def explain(
    params: cells.Params, x: Any, *, backend: str = "auto", reset_after: bool = True, platform: str | None = None
) -> Explanation:
    """Which backend `lstm` or `gru` would take, and why.

    Args:
      params: a layer's parameters, or their shapes (`jax.ShapeDtypeStruct`).
      x: [batch, time, features], or its shape.
      backend, reset_after: as in `gru`.
      platform: 'cpu', 'gpu', ...; None for JAX's default.

    Raises:
      ValueError: as in `gru`.
    """
    check_choice("backend", backend, BACKENDS)
    check_x(x)
    shape = params["recurrent_kernel"].shape if "recurrent_kernel" in params else ()
    is_lstm = len(shape) == 2 and shape[1] == cells.LSTM_GATES * shape[0] and "recurrent_bias" not in params
    cell = "lstm" if is_lstm else "gru" if reset_after else "gru_reset_before"
    hidden = _check_params(cell, params, x)
    if hidden < 1:
        raise ValueError(f"params['recurrent_kernel'] has shape {shape}; expected hidden units")
    dtype = common_dtype(params, x)
    check_dtypes(cell, "float32", backend, dtype)
    why = "named by the caller"
    if backend == "auto":
        on_cpu = (platform or jax.default_backend()) == "cpu"
        backend, why = _auto(cell, dtype, on_cpu)
    gates_bytes = _saved_bytes(x.shape, hidden, dtype)
    states = _KINDS[cell].carries * gates_bytes // 4
    return Explanation(backend, why, states + (gates_bytes if gates_bytes <= MOST_SAVED_BYTES else 0))


def remat(layer: Callable[..., tuple[Any, Array]], steps: int) -> Callable[..., tuple[Any, Array]]:
    """A layer that remembers its carry every so many steps and computes the rest again on the way back.

    Takes about a third more time; what is saved of a step is then needed for `steps` steps at
    a time only, beside a carry for each segment (Chen et al. 2016, checkpoints over time).

    Args:
      layer: `lstm`, `gru` or another with their arguments.
      steps: in a segment; the square root of the sequence's length saves most.

    Returns:
      A function with the layer's arguments and results.

    Raises:
      ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")

    @functools.wraps(layer)
    def run(
        params: cells.Params,
        x: Array,
        carry: Any = None,
        *,
        lengths: Array | None = None,
        reverse: bool = False,
        return_sequences: bool = True,
        **options: Any,
    ) -> tuple[Any, Array]:
        x, lengths = check_inputs(x, lengths)
        check_finite(x)
        batch, time, features = x.shape
        # Checks all arguments, and gives the carry's form.
        end, _ = jax.eval_shape(lambda params, x: layer(params, x, carry, reverse=reverse, **options), params, x)
        if carry is None:
            carry = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), end)
        count = time // steps
        if count < 2:
            return layer(
                params, x, carry, lengths=lengths, reverse=reverse, return_sequences=return_sequences, **options
            )

        def segment(carry: Any, now: tuple[Array, Array | None]) -> tuple[Any, Array | None]:
            end, outputs = layer(
                params, now[0], carry, lengths=now[1], reverse=reverse, return_sequences=return_sequences, **options
            )
            return end, outputs if return_sequences else None

        def ends(start: Array | int, stop: Array | int) -> Array | None:
            return None if lengths is None else jnp.clip(lengths - start, 0, stop - start)

        # What does not fill a segment stands first and runs by itself.
        rest = time - count * steps
        whole = x[:, rest:].reshape(batch, count, steps, features).swapaxes(0, 1)
        starts = rest + steps * jnp.arange(count)
        segments = (whole, None if lengths is None else jax.vmap(lambda s: ends(s, s + steps))(starts))
        inner = jax.checkpoint(segment)
        first: Array | None = None
        if rest and not reverse:
            carry, first = inner(carry, (x[:, :rest], ends(0, rest)))
        carry, outputs = jax.lax.scan(inner, carry, segments, reverse=reverse)
        if rest and reverse:
            carry, first = inner(carry, (x[:, :rest], ends(0, rest)))
        if not return_sequences:
            return carry, jax.tree.leaves(carry)[-1]
        assert outputs is not None
        outputs = outputs.swapaxes(0, 1).reshape(batch, count * steps, -1)
        return carry, outputs if first is None else jnp.concatenate([first, outputs], axis=1)

    return run
