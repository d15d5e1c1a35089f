"""What a stack needs of a kind of cell, and how it is made of a step and an initialiser alone."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import any_cell, cells, layers, recurrence
from seqmnist_jax.rnn.checks import as_array, check_x
from seqmnist_jax.rnn.eager import SCANNED, takes

Array = jax.Array

# Sizes at which an initialiser is asked for shapes, evenly apart; whole numbers of blocks, where a cell has such.
_SIZES = (192, 384, 576)


def _one_state(zero: Array) -> Any:
    return zero


def _two_states(zero: Array) -> Any:
    return zero, zero


class Cell(NamedTuple):
    """A kind of recurrent layer, in the parts that a stack needs. `cell` makes one of a step and an initialiser.

    Attributes:
      layer: the layer over a whole sequence, with the arguments of `lstm`.
      step: one step of it, ``step(params, carry, x) -> (carry, h)``; where it takes a `precision`, it is given that.
      init: ``init(key, features, hidden_size, **options)`` makes its parameters; all options have defaults.
      zero_carry: the carry of a new sequence, from a zero h [batch, hidden], and from `params` where it takes them.
      backends: the names that `layer` takes for its backend.
      explain: ``explain(params, x, backend=, precision=)``, in words, what would run the layer; asked where
        there is more than one backend.
    """

    layer: Callable[..., Any]
    step: Callable[..., Any]
    init: Callable[..., dict[str, Array]]
    zero_carry: Callable[..., Any] = _one_state
    backends: tuple[str, ...] = ("auto",)
    explain: Callable[..., Any] | None = None


def cell(
    step: Callable[..., Any], init: Callable[..., dict[str, Array]], zero_carry: Callable[..., Any] = _one_state
) -> Cell:
    """A cell whose layer is its step, run by `scan`: by a kernel made of it where there can be one.

    Args:
      step: ``step(params, carry, x) -> (carry, y)``, pure, for x [batch, features]; y is [batch, hidden]. Where it has
        an argument `precision` it is given one of `PRECISIONS`, for `product`.
      init: ``init(key, features, hidden_size)`` makes params, a dict of arrays. It may have other arguments, with
        defaults, as `init_lstm` has. A layer that is given no carry asks it for shapes, traced, at other sizes too:
        so it learns how many units params have.
      zero_carry: the carry of a new sequence, from a zero h [batch, hidden]; where it isn't given, the carry is one h.
        An LSTM's is ``lambda zero: (zero, zero)``. With an argument `params` it is given those too, for a carry that
        is not as wide as h.

    Raises:
      ValueError: step or init can't be called so.
    """
    _check_arguments("step", step, ("params", "carry", "x"), ("precision",))
    _check_arguments("init", init, ("key", "features", "hidden_size"))

    def layer(params: Any, x: Any, carry: Any = None, **options: Any) -> tuple[Any, Array]:
        x = as_array("x", x)
        check_x(x)
        return any_cell.scan(step, params, x, zeros(made, params, x) if carry is None else carry, **options)

    def explain(params: Any, x: Any, *, backend: str, precision: str) -> str:
        carry = jax.eval_shape(functools.partial(zeros, made), params, x)
        return any_cell.explain_step(step, params, x, carry, precision=precision, backend=backend)

    setattr(layer, SCANNED, step)
    made = Cell(layer, step, init, zero_carry, recurrence.BACKENDS, explain)
    return made


def scans_its_step(cell: Cell) -> bool:
    """Whether the cell's layer is made of its step, and not one of its own."""
    # What `functools.wraps` made of such a layer has its attributes too.
    return hasattr(cell.layer, SCANNED) and not hasattr(cell.layer, "__wrapped__")


def _check_arguments(name: str, function: Any, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
    """Checks that a function can be called with so many arguments by place, and others by name, and no more."""
    try:
        signature = inspect.signature(function)
        given = {other: None for other in others if other in signature.parameters}
        signature.bind(*needed, **given)
    except TypeError as error:
        raise ValueError(f"{name} is {function!r}; expected {name}({', '.join(needed)}): {error}") from None


Shapes = dict[str, tuple[int, ...]]


def _shapes(params: Any) -> Shapes:
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@functools.lru_cache(maxsize=256)
def _initial_shapes(init: Callable[..., Any], features: int, hidden_size: int) -> Shapes:
    return _shapes(jax.eval_shape(lambda: init(jax.random.key(0), features, hidden_size)))


def hidden_size(cell: Cell, params: Any, features: int) -> int:
    """The number of units of h, told by an axis of the parameters that grows evenly with it.

    Raises:
      ValueError: params are not what the cell's initialiser makes, or none of them depends on it.
    """
    shapes = _shapes(params)
    try:
        few, more, most = (_initial_shapes(cell.init, features, size) for size in _SIZES)
    except Exception as error:
        why = f"to tell how many units params have, the cell's init is asked for its shapes with {_SIZES}, and fails"
        raise ValueError(f"{why}: {error} (a layer that is given a carry does not ask)") from error
    if {name: len(shape) for name, shape in shapes.items()} != {name: len(shape) for name, shape in few.items()}:
        raise ValueError(f"params has shapes {shapes}; expected those of the cell's init, {few} for {_SIZES[0]} units")
    told = []
    for name, shape in shapes.items():
        for size, small, middle, large in zip(shape, few[name], more[name], most[name], strict=True):
            if large - middle == middle - small != 0:
                told.append(_SIZES[0] + (size - small) * (_SIZES[1] - _SIZES[0]) // (middle - small))
    if not told:
        raise ValueError(f"params has shapes {shapes}, of which none grows evenly with hidden_size")

    def fits(size: int) -> bool:
        try:
            made = _initial_shapes(cell.init, features, size)
        except (TypeError, ValueError):
            return False
        axes = [axis for name in few for axis in zip(shapes[name], made[name], few[name], more[name], strict=True)]
        return all(there == here for there, here, small, large in axes if small != large)

    # One that grows by a part of it, as by half, tells no odd size.
    return next((size for size in dict.fromkeys(told) if size > 0 and fits(size)), told[0])


def zeros(cell: Cell, params: Any, x: Any) -> Any:
    """The carry of new sequences x [batch, time, features]."""
    dtype = jnp.result_type(x, *jax.tree.leaves(params))
    return first_carry(cell, params, jnp.zeros((x.shape[0], hidden_size(cell, params, x.shape[-1])), dtype))


def first_carry(cell: Cell, params: Any, zero: Array) -> Any:
    """The carry of new sequences, from a zero h [batch, hidden]."""
    return cell.zero_carry(zero, params) if takes(cell.zero_carry, "params") else cell.zero_carry(zero)


LSTM = Cell(
    layers.lstm,
    cells.lstm_step,
    cells.init_lstm,
    zero_carry=_two_states,
    backends=recurrence.BACKENDS,
    explain=layers.explain,
)
GRU = Cell(layers.gru, cells.gru_step, cells.init_gru, backends=recurrence.BACKENDS, explain=layers.explain)
GRU_RESET_BEFORE = Cell(
    functools.partial(layers.gru, reset_after=False),
    cells.gru_step,
    functools.partial(cells.init_gru, reset_after=False),
    backends=recurrence.BACKENDS,
    explain=functools.partial(layers.explain, reset_after=False),
)
