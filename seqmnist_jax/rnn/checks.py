"""The door: what a caller gives is brought to one form and checked once; messages begin with the argument's name."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_known(array: Any) -> bool:
    """Whether the array's numbers can be looked at now, which under `jit` or `grad` they can't."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def is_real(dtype: Any) -> bool:
    """Whether the dtype is one of real numbers, floating or whole."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def as_array(name: str, value: Any) -> Any:
    """JAX's arrays, and their shapes, as they are; of all else NumPy's, whose numbers stay known under `jit`."""
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return value
    try:
        array = jnp.asarray(value) if hasattr(value, "__jax_array__") else np.asarray(value)
    except Exception as error:
        raise ValueError(f"{name} is a {type(value).__name__}, of which NumPy makes no array: {error}") from error
    array = in_own_order(array)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype)) if array.dtype.kind == "f" else array


def in_own_order(array: Any) -> Any:
    """NumPy's array in this machine's order of bytes; a program that `jit` has made misreads the other one."""
    is_other = isinstance(array, np.ndarray) and not array.dtype.isnative
    return array.astype(array.dtype.newbyteorder("=")) if is_other else array


def as_carry(value: Any) -> Any:
    """`as_array` of a leaf of the carry.

    Raises:
      ValueError: it is an object.
    """
    array = as_array("carry", value)
    if isinstance(array, np.ndarray) and array.dtype.kind == "O" and not isinstance(value, np.ndarray | int):
        how = "register its class as a pytree, as by jax.tree_util.register_dataclass"
        raise ValueError(f"carry is a {type(value).__name__}, which is no array; {how}")
    return array


def as_carry_of_a_step(carry: Any) -> Any:
    """A carry whose leaves are made arrays by `as_carry`, but for plain numbers, whose type a step may change."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, int | float) else as_carry(leaf), carry)


def _check_static(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        how = f'jax.jit(..., static_argnames="{name}")'
        raise ValueError(f"{name} is traced; expected a value that is known before the trace, as by {how}")


def flag(name: str, value: Any) -> bool:
    """True or False, for what equals it: as a key of a cache 0 is False, as an attribute of a program it is not."""
    _check_static(name, value)
    try:
        if bool(value) == value:
            return bool(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} is {value!r}; expected True or False")


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least so much."""
    _check_static(name, value)
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")
    return operator.index(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The one of the choices that the value names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
    return choices[choices.index(value)]


def check_x(x: Any) -> None:
    """Checks the shape and dtype of x, which may be a `jax.ShapeDtypeStruct`."""
    if x.dtype == object and x.ndim == 0:
        given = type(x.item()).__name__
        raise ValueError(f"x is a {given}; expected an array [batch, time, features], and params before it")
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; expected [batch, time, features]")
    if not is_real(x.dtype):
        raise ValueError(f"x has dtype {x.dtype}; expected real numbers")


def check_sequences(x: Any, lengths: Any = None, mask: Any = None, resets: Any = None) -> tuple[Any, Any, Any, Any]:
    """x, lengths, mask and resets as arrays, and all that is known of them checked.

    mask and resets are bool [batch, time], or None; None too where there are no steps. A NaN makes a sequence's whole
    result NaN, so it is an error; past a sequence's end, or masked, anything may stand.
    """
    x = as_array("x", x)
    check_x(x)
    marks = [None if mark is None else as_array(name, mark) for name, mark in (("mask", mask), ("resets", resets))]
    for name, mark in zip(("mask", "resets"), marks, strict=True):
        if mark is None:
            continue
        if mark.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {mark.shape}; expected [batch, time] = {x.shape[:2]}, as x {x.shape}")
        if mark.dtype != jnp.bool_:
            raise ValueError(f"{name} has dtype {mark.dtype}; expected bool")
    if mask is not None and lengths is not None:
        raise ValueError("mask and lengths are both given; expected one of them")
    mask, resets = (None, None) if 0 in x.shape[:2] else marks
    read: Any = True
    if lengths is not None:
        lengths = as_array("lengths", lengths)
        if lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths has shape {lengths.shape}; expected [batch] = {x.shape[:1]}, as x {x.shape}")
        if 0 in x.shape[:2]:
            return x, None, mask, resets
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths has dtype {lengths.dtype}; expected integers")
        if is_known(lengths):
            # NumPy's, because under `jit` JAX's would be traced even here.
            ends = np.asarray(lengths)
            low, high = int(ends.min()), int(ends.max())
            if low < 0 or high > x.shape[1]:
                raise ValueError(f"lengths has values from {low} to {high}; expected 0 to {x.shape[1]}, as x {x.shape}")
            read = np.arange(x.shape[1]) < ends[:, None]
    if is_known(x) and is_known(lengths) and is_known(mask) and jnp.issubdtype(x.dtype, jnp.floating):
        read = read if mask is None else np.asarray(mask)
        if (np.isnan(np.asarray(x)).any(axis=2) & read).any():
            raise ValueError(f"x {x.shape} holds NaN; expected numbers (past a sequence's end anything may stand)")
    return x, lengths, mask, resets


def check_params(params: Any, names: tuple[str, ...], gates: int, x: Any, hint: str = "") -> tuple[Any, int]:
    """Checks that params, any mapping, and x fit together; gives params as a plain dict, and the hidden size.

    Plain, because a rule's gradients must stand in the container that the rule was given.
    """
    if not hasattr(params, "keys"):
        raise ValueError(f"params is a {type(params).__name__}; expected a mapping of {sorted(names)}{hint}")
    if set(params) != set(names):
        raise ValueError(f"params has {sorted(map(str, params))}; expected {sorted(names)}{hint}")
    params = {name: as_array(f"params[{name!r}]", params[name]) for name in names}
    shape = params["recurrent_kernel"].shape
    hidden = shape[0] if len(shape) == 2 else 0
    rows = {"kernel": (x.shape[-1],), "recurrent_kernel": (hidden,)}
    for name in ("recurrent_kernel", *names):
        if not is_real(params[name].dtype):
            raise ValueError(f"params[{name!r}] has dtype {params[name].dtype}; expected real numbers")
        expected = (*rows.get(name, ()), gates * hidden)
        if params[name].shape != expected or len(shape) != 2:
            fit = f"{expected} for x {x.shape} and {hidden} hidden units" if len(shape) == 2 else "two axes"
            raise ValueError(f"params[{name!r}] has shape {params[name].shape}; expected {fit}")
    return params, hidden


def common_dtype(params: dict[str, Any], x: Any) -> Any:
    """The floating dtype in which params and x meet."""
    dtype = jnp.result_type(x, *params.values())
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def check_carry(carry: Any, parts: int, shape: tuple[int, int], dtype: Any, zeros: Any = jnp.zeros) -> Any:
    """Checks a carry of so many arrays of this shape; gives it, zeros where it is None."""
    if carry is None:
        return (zeros(shape, dtype),) * parts if parts > 1 else zeros(shape, dtype)
    found: Any = jax.tree.structure(carry)
    if found != jax.tree.structure((0,) * parts if parts > 1 else 0):
        form = "a tuple (c, h)" if parts > 1 else "one array h"
        raise ValueError(f"carry is {found}; expected {form} of [batch, hidden]")
    carry = jax.tree.map(as_carry, carry)
    for part in jax.tree.leaves(carry):
        if part.shape != shape:
            raise ValueError(f"carry has shape {part.shape}; expected [batch, hidden] = {shape}")
        if not is_real(part.dtype) or jnp.result_type(part, dtype) != part.dtype:
            raise ValueError(f"carry has dtype {part.dtype}; x and params would make it {dtype} in the first step")
    return carry


def check_rows(name: str, tree: Any, batch: int, why: str = "lengths or a mask") -> None:
    """Checks that each array has a place for each sequence, as it must where these end one by one or are divided."""
    for part in jax.tree.leaves(tree):
        if jnp.shape(part)[:1] != (batch,):
            raise ValueError(f"{name} has shape {jnp.shape(part)}; with {why} expected [batch, ...], batch {batch}")


def _shown(name: str, tree: Any) -> str:
    """The arrays of a tree, as "carry['h'] float32[4,8]"."""
    leaves = [
        (jax.tree_util.keystr(path), jax.typeof(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    told = [f"{name}{path} {leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves]
    return ", ".join(told).strip() or f"{name} {tree}"


def diagnose(error: Exception, step: Any, params: Any, x: Any, carry: Any) -> None:
    """Says in our words why ``step(params, carry, x_t)`` can't be looped, where it breaks the form that a step has.

    To any other error it adds a note of the shapes that the step is called with.

    Raises:
      ValueError: the step does not give (carry, y), or not with a carry of the same tree, shapes and dtypes.
    """
    try:
        frame = jax.eval_shape(lambda x: x[:, 0], x)
        error.add_note(f"The step was called with {_shown('carry', carry)} and {_shown('x_t', frame)}.")
        result = jax.eval_shape(lambda carry, x_t: step(params, carry, x_t), carry, frame)
    except Exception:
        return
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(f"step gives {_shown('', result)}; expected two results, (carry, y)") from None
    trees: list[Any] = [jax.tree.structure(tree) for tree in (carry, result[0])]
    if trees[0] != trees[1]:
        told = [_shown("carry", tree) for tree in (carry, result[0])]
        old, new = told if told[0] != told[1] else trees  # a tuple and a list are shown alike
        raise ValueError(f"step turns {old} into {new}; expected the same tree") from None
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(carry), jax.tree.leaves(result[0]), strict=True):
        kind = jax.typeof(old)
        # A Python number, whose type is weak, takes the type that the step gives it if that can hold it.
        taken = kind.weak_type and jnp.result_type(old, new) == new.dtype
        if kind.shape != new.shape or (kind.dtype != new.dtype and not taken):
            turned = f"{_shown('carry' + jax.tree_util.keystr(path), old)} into {_shown('', new)}"
            raise ValueError(f"step turns {turned}; expected the same shape and dtype") from None
