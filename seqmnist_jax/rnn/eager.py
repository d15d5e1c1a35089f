"""What is made of a caller's function, as one program that lives as long as that function.

`lax.scan` knows a program by its body; a body made anew in each call is compiled in each call outside `jit`.
"""

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from seqmnist_jax.rnn.cells import PRECISIONS
from seqmnist_jax.rnn.checks import choice, in_own_order
from seqmnist_jax.rnn.per_device import per_device

# Of a function: a number that anneals has a program for each value.
MOST_PROGRAMS = 64
# What a cell's layer has, where it is nothing but the cell's step: that.
SCANNED = "scanned_step"
# By function, then by all else that a program depends on. Neither the function nor what it closes over is kept; steps
# that were divided are, the last 256 (`recurrence`).
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@functools.lru_cache(maxsize=256, typed=True)
def _bound(function: Any, names: tuple[str, ...], texts: tuple[str, ...], *values: Any) -> Any:
    """One object for all partials that are equal; the last of the values have the names. `texts` tells zeros apart."""
    count = len(values) - len(names)
    return functools.partial(function, *values[:count], **dict(zip(names, values[count:], strict=True)))


def can_change(function: Any) -> bool:
    """Whether a function may be another the next time, though it is equal.

    So is a method, whose object may have changed in between, and an object that can be called; a partial that has one
    of these, or a list; and a cell's layer whose step is one of these.
    """
    return not _is_constant(getattr(function, SCANNED, function))


def is_key(function: Any) -> bool:
    """Whether what was made of a function may be found again by it."""
    return isinstance(function, Hashable) and not can_change(function)


def identified(function: Any) -> Any:
    """The function, by which programs go; of one that can change a new one for each call."""
    return functools.partial(function) if can_change(function) else function


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in inspect.signature(function).parameters


def at_precision(step: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """The step at a precision, if it has such an argument that is not bound yet.

    For the same function the same object, by which programs go.
    """
    choice("precision", precision, PRECISIONS)
    if not takes(step, "precision") or "precision" in getattr(step, "keywords", ()):
        return step
    if inspect.signature(step).parameters["precision"].default == precision:
        return step  # also where a transformation of JAX is around it, which takes no texts
    bound = _bound if is_key(step) else _bound.__wrapped__
    return bound(step, ("precision",), (), precision)


def _is_constant(value: Any) -> bool:
    """Whether what equals it is as it: an object that is equal to itself alone may have changed in between."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    if isinstance(value, types.MethodType):
        return False
    if isinstance(value, functools.partial):
        return all(map(_is_constant, (value.func, *value.args, *value.keywords.values())))
    is_named = hasattr(value, "__name__")  # a function, a type
    is_frozen = isinstance(value, jax.Array) or type(value).__hash__ not in (None, object.__hash__)
    return value is None or is_named or is_frozen


def is_array(leaf: Any) -> bool:
    """Whether a program takes it: JAX's arrays, and NumPy's but of objects, text and dates."""
    return isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "OUSMm")


def compiled(run: Callable[..., Any], function: Any, arguments: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """``run(function, *arguments, *options)``: a program for each set of options and of numbers that are no arrays.

    In it each device has its own sequences where they are explicitly sharded: see `per_device`.
    """
    run, function = per_device(run), identified(function)
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [in_own_order(leaf) if is_array(leaf) else None for leaf in leaves]
    others = [None if array is not None else leaf for leaf, array in zip(leaves, arrays, strict=True)]
    parts = [part for option in options for part in (option if isinstance(option, tuple) else (option,))]
    are_keys = all(other is None or isinstance(other, str | int | float | np.generic) for other in others)
    if not are_keys or any(map(can_change, parts)):
        return run(function, *arguments, *options)
    try:
        values = (*function.args, *function.keywords.values()) if isinstance(function, functools.partial) else ()
        is_open = getattr(getattr(function, "func", None), "__closure__", None) is not None
        if values and not is_open and all(map(_is_constant, (function.func, *values))):
            texts = tuple(repr(value) for value in values if not hasattr(value, "__name__"))
            function = _bound(function.func, tuple(function.keywords), texts, *values)
        # As text: 0.0 equals -0.0, and NaN not even itself.
        numbers = tuple((type(other), repr(other)) for other in others)
        key = (run, tree, numbers, tuple((type(option), option) for option in options))
        alive = weakref.ref(function)

        def program(arrays: list[Any]) -> Any:
            leaves = [other if array is None else array for array, other in zip(arrays, others, strict=True)]
            return run(alive(), *jax.tree.unflatten(tree, leaves), *options)

        with _LOCK:
            programs = _PROGRAMS.setdefault(function, {})
            # Not inlined: the derivatives of a program are known by it, those of its parts are made anew.
            known = programs.pop(key, None) or jax.jit(program)
            if len(programs) >= MOST_PROGRAMS:
                del programs[next(iter(programs))]
            programs[key] = known  # the last that goes
    except TypeError:  # Something can't be a key.
        return run(function, *arguments, *options)
    return known(arrays)
