"""Equations of a step, as `divide` needs them: calls laid flat, element-wise ones on scalars, their derivatives."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from seqmnist_jax.rnn import cells

Array = jax.Array

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr"}
# Calls with a derivative of their own, which stays theirs.
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
_ELEMENTWISE = """
    add add_any sub mul div neg abs sign max min square integer_pow sqrt rsqrt exp log log1p expm1 tanh logistic sin cos
    select_n gt lt ge le eq ne and or not convert_element_type copy stop_gradient
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# Their results are kept for the way back, which needs nothing else of them.
KEPT = ("tanh", "logistic", "exp")
SAME = frozenset({"broadcast_in_dim", "reshape", "squeeze", "pvary"})
# Linear in all of their arguments together.
_LINEAR = SAME | {"add", "add_any", "sub", "neg", "copy", "convert_element_type", "reduce_sum", "transpose", "slice"}
_LINEAR |= {"concatenate", "split", "pad", "rev", "cumsum"}


class NotDivisibleError(ValueError):
    """Why a step stays with `lax.scan`: a primitive, and where the step has it."""


def where(equation: Any) -> str:
    """The line of the user's source that an equation is from."""
    return source_info_util.summarize(equation.source_info)


def _from(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """What is made inside is of this equation's line; inside JAX's own functions the line that calls them stays."""
    if not where(equation):
        return contextlib.nullcontext()
    return source_info_util.user_context(equation.source_info.traceback)


def inner_of(equation: Any) -> Any:
    """The jaxpr that a call calls, closed."""
    inner = equation.params[_CALLS.get(equation.primitive.name, "call_jaxpr")]
    return inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())


def apply(equation: Any, arguments: Sequence[Any]) -> list[Any]:
    """One equation, on arrays of its own shapes."""
    if equation.primitive.name in CUSTOM:
        given = {v: a for v, a in zip(equation.invars, arguments, strict=True) if not isinstance(v, jex.Literal)}
        info = inner_of(equation).jaxpr.debug_info
        alone = jex.Jaxpr((), [*given], equation.outvars, [equation], debug_info=info)
        return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*given.values()))
    out = equation.primitive.bind(*arguments, **equation.params)
    return list(out) if equation.primitive.multiple_results else [out]


def read(values: Mapping[Any, Any], v: Any) -> Any:
    """A value that is known, or a literal's own."""
    return v.val if isinstance(v, jex.Literal) else values[v]


def known(closed: Any, arguments: Sequence[Any]) -> dict[Any, Any]:
    """The values that a jaxpr begins with."""
    jaxpr = closed.jaxpr
    return dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))


def follow(equations: Sequence[Any], values: dict[Any, Any]) -> None:
    """Adds what equations make, in their order, to the values that are known."""
    for equation in equations:
        with _from(equation):
            made = apply(equation, [read(values, v) for v in equation.invars])
        values.update(zip(equation.outvars, made, strict=True))


def evaluate(closed: Any, arguments: Sequence[Any], *, custom: bool = False) -> list[Any]:
    """A jaxpr with its calls laid flat; those with a derivative of their own too if `custom`.

    A product of values side by side becomes the sum of their products: `concatenate([x, h]) @ W` is common.
    """
    values = known(closed, arguments)
    joined: dict[Any, list[Any]] = {}
    for equation in closed.jaxpr.eqns:
        name, operands = equation.primitive.name, [read(values, v) for v in equation.invars]
        with _from(equation):
            if name in _CALLS or (custom and name in CUSTOM):
                inner = inner_of(equation)
                out = evaluate(inner, operands, custom=custom)
            elif name == "dot_general" and equation.invars[0] in joined and is_plain(equation):
                (_, (axis,)), _ = equation.params["dimension_numbers"]
                sizes = [part.shape[1] for part in joined[equation.invars[0]]]
                starts = [sum(sizes[:i]) for i in range(len(sizes))]
                rows = [
                    jax.lax.slice_in_dim(operands[1], s, s + n, axis=axis) for s, n in zip(starts, sizes, strict=True)
                ]
                terms = [
                    equation.primitive.bind(part, row, **equation.params)
                    for part, row in zip(joined[equation.invars[0]], rows, strict=True)
                ]
                out = [functools.reduce(jnp.add, terms)]
            elif name == "reshape" and equation.params["dimensions"] is not None:  # which transposes first
                turned = jax.lax.transpose(operands[0], equation.params["dimensions"])
                out = [jax.lax.reshape(turned, equation.params["new_sizes"])]
            else:
                out = apply(equation, operands)
        if name == "concatenate" and equation.params["dimension"] == 1:
            joined[equation.outvars[0]] = operands
        values.update(zip(equation.outvars, out, strict=True))
    return [read(values, v) for v in closed.jaxpr.outvars]


def without_mesh() -> Any:
    """Where a step is traced alike in whatever mesh is set; without it arrays of two meshes meet in an operation."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def flattened(function: Callable[..., Any], shapes: Sequence[Any], *, custom: bool = False) -> Any:
    """The jaxpr of a function, its calls laid flat as by `evaluate`; the same in whatever mesh is set."""
    with without_mesh():
        closed = jax.make_jaxpr(function)(*shapes)
        return jax.make_jaxpr(lambda *arguments: evaluate(closed, arguments, custom=custom))(*shapes)


def is_plain(equation: Any) -> bool:
    """Whether a product is [rows, n] times a matrix, as it stands or transposed."""
    (left, right), batch = equation.params["dimension_numbers"]
    return tuple(left) == (1,) and len(right) == 1 and batch == ((), ()) and equation.invars[1].aval.ndim == 2


def elementwise(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    """A jaxpr of element-wise equations on arrays, evaluated for one element."""
    values = known(closed, arguments)

    def typed(v: Any) -> Any:
        return jnp.asarray(read(values, v), v.aval.dtype)

    for equation in closed.jaxpr.eqns:
        name, operands = equation.primitive.name, [typed(v) for v in equation.invars]
        if name in _CALLS or name in CUSTOM:
            out = elementwise(inner_of(equation), operands)
        elif name in SAME:
            out = operands[:1]
        else:
            out = [equation.primitive.bind(*operands, **unsharded(equation))]
        values.update(zip(equation.outvars, out, strict=True))
    return [typed(v) for v in closed.jaxpr.outvars]


def unsharded(equation: Any) -> dict[str, Any]:
    """The parameters of an equation, for arrays of other shapes than those that it was traced with."""
    return {name: None if name == "sharding" else value for name, value in equation.params.items()}


def is_elementwise(jaxpr: Any) -> bool:
    """Whether each element of a jaxpr's results depends on the same element of its arguments alone."""
    return all(map(keeps_places, jaxpr.eqns))


def keeps_places(equation: Any) -> bool:
    """`is_elementwise` of one equation."""
    name = equation.primitive.name
    if name in _CALLS or name in CUSTOM:
        return is_elementwise(inner_of(equation).jaxpr)
    if name in SAME and equation.params.get("dimensions") is None:
        before, after = equation.invars[0].aval, equation.outvars[0].aval
        return before.ndim == 0 or before.shape == after.shape
    return name in ELEMENTWISE


def custom_call(equation: Any) -> Callable[..., Any]:
    """A call with a derivative of its own, as a function of scalars with that derivative."""

    def on_arrays(*arguments: Any) -> Any:
        return apply(equation, arguments)[0]

    avals = [v.aval for v in equation.invars]
    primal = inner_of(equation)
    pull = jax.make_jaxpr(lambda bar, *arguments: jax.vjp(on_arrays, *arguments)[1](bar))(
        equation.outvars[0].aval, *avals
    )
    if not is_elementwise(pull.jaxpr):
        raise NotDivisibleError(f"the derivative of {name_of(equation)} is not element-wise ({where(equation)})")

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return elementwise(primal, arguments)[0]

    call.defvjp(
        lambda *arguments: (call(*arguments), arguments),
        lambda arguments, bar: tuple(elementwise(pull, [bar, *arguments])),
    )
    return call


def pulls_linearly(equation: Any) -> bool:
    """Whether the derivative of a call, and of all that it calls, is linear in the cotangents that it is given.

    Then one of a sum of cotangents is the sum of one for each. Who writes a derivative may clip or normalise in it.
    """
    if equation.primitive.name == "custom_vjp_call":
        return _is_linear_pull(equation)
    values = [v for given in equation.params.values() for v in (given if isinstance(given, tuple | list) else (given,))]
    inner = [getattr(getattr(value, "jaxpr", value), "eqns", ()) for value in values]
    return all(pulls_linearly(e) for equations in inner for e in equations)


def _is_linear_pull(equation: Any) -> bool:
    def is_float(v: Any) -> bool:
        return bool(jnp.issubdtype(v.aval.dtype, jnp.floating))

    count, floats = len(equation.outvars), [i for i, v in enumerate(equation.invars) if is_float(v)]
    if not floats or not all(map(is_float, equation.outvars)):
        return not floats

    def pull(*arguments: Any) -> Any:
        bars, given = [*arguments[:count]], [*arguments[count:]]

        def of_floats(*some: Any) -> Any:
            operands = dict(enumerate(given)) | dict(zip(floats, some, strict=True))
            return apply(equation, [*operands.values()])

        return jax.vjp(of_floats, *[given[i] for i in floats])[1](bars)

    jaxpr = flattened(pull, [v.aval for v in (*equation.outvars, *equation.invars)]).jaxpr
    linear, zeros = set(jaxpr.invars[:count]), set[Any]()

    def is_zero(v: Any) -> bool:
        return not np.any(v.val) if isinstance(v, jex.Literal) else v in zeros

    for e in needed(jaxpr.eqns, jaxpr.outvars):
        name, depends = e.primitive.name, [not isinstance(v, jex.Literal) and v in linear for v in e.invars]
        alike = [is_linear or is_zero(v) for is_linear, v in zip(depends, e.invars, strict=True)]
        if not any(depends):
            zeros.update(e.outvars if name in SAME and all(alike) else ())
            continue
        passes = name in _LINEAR and all(alike) and is_float(e.outvars[0])  # to whole numbers it would round
        passes |= name in ("mul", "dot_general") and depends.count(True) == 1
        passes |= name == "div" and depends == [True, False]
        passes |= name == "select_n" and not depends[0] and all(alike[1:])
        if not passes:
            return False
        linear.update(e.outvars)
    return all(is_zero(v) or v in linear for v in jaxpr.outvars)


def name_of(equation: Any) -> str:
    """The name of the function that a call calls."""
    return str(getattr(inner_of(equation).jaxpr.debug_info, "func_name", equation.primitive.name))


def _origin(equation: Any) -> Any:
    """The function that a call calls, and its place: "name at file:line"."""
    return inner_of(equation).jaxpr.debug_info.func_src_info


@functools.cache
def _origin_of_sigmoid() -> Any:
    return _origin(jax.make_jaxpr(cells.sigmoid)(jnp.zeros(())).jaxpr.eqns[0])


def is_sigmoid(equation: Any) -> bool:
    """Whether it is `cells.sigmoid`, which is a logistic that keeps its last bits."""
    return equation.primitive.name == "custom_jvp_call" and _origin(equation) == _origin_of_sigmoid()


def _kept(gradient: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """(x, f(x)) -> f(x), with f's gradient made of f(x) alone."""

    @jax.custom_vjp
    def f(x: Array, result: Array) -> Array:
        return result

    f.defvjp(lambda x, result: (result, result), lambda result, bar: (gradient(result, bar), jnp.zeros_like(bar)))
    return f


FROM_RESULT = {
    "tanh": _kept(lambda y, bar: bar * (1.0 - y * y)),
    "logistic": _kept(lambda y, bar: bar * (y * (1.0 - y))),
    "exp": _kept(lambda y, bar: bar * y),
}


def needed(equations: Sequence[Any], wanted: Iterable[Any], given: Collection[Any] = ()) -> list[Any]:
    """The equations that make the wanted values, of those given."""
    left, out = {v for v in wanted if not isinstance(v, jex.Literal) and v not in given}, []
    for e in reversed(equations):
        if left.intersection(e.outvars):
            out.append(e)
            left.update(v for v in e.invars if not isinstance(v, jex.Literal) and v not in given)
    return out[::-1]
