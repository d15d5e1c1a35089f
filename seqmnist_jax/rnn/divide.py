"""A cell's step, divided into matrix products and one scalar function: what a kernel is generated from.

A step is ``step(params, carry, x) -> (carry, y)`` in JAX. Its values are of three kinds: those that depend on
parameters alone (P), those that depend on x too (X), and those that depend on the carry (C). P and X are XLA's, made
for all steps at once. Of the C values only the products with a P matrix join units; they are taken in rounds, a value's
round being the number of products before it. All else on C values is element-wise, or cuts and joins the feature axis
at multiples of the hidden size. So the values of one unit are scalars, and the step is one scalar function of the unit's
carry, its products' results, x and parameters, whose gradient is `jax.vjp` of it. No cell has a name here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util

from seqmnist_jax.rnn import cells

Array = jax.Array

# A product of x of at most so many features is made inside the stages, from the scalars of x.
MOST_INLINE_FEATURES = 4

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
# Calls with a derivative of their own, which stays theirs.
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
ELEMENTWISE = frozenset(
    "add sub mul div neg abs sign max min square integer_pow sqrt rsqrt exp log log1p expm1 tanh logistic sin cos "
    "select_n gt lt ge le eq ne and or not convert_element_type copy copy_p stop_gradient add_any".split()
)
# Their results are kept for the way back, which needs nothing else of them.
KEPT = ("tanh", "logistic", "exp")
_SAME = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "pvary"})


class NotDivisibleError(ValueError):
    """Why a step stays with `lax.scan`: a primitive, and where the step has it."""


def _where(equation: Any) -> str:
    return source_info_util.summarize(equation.source_info)


def _inner(equation: Any) -> Any:
    """The jaxpr that a call calls, closed."""
    inner = equation.params[_CALLS.get(equation.primitive.name, "call_jaxpr")]
    return inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())


def apply(equation: Any, arguments: Sequence[Any]) -> list[Any]:
    """One equation, on arrays of its own shapes."""
    if equation.primitive.name in _CUSTOM:
        info = _inner(equation).jaxpr.debug_info
        alone = jex.Jaxpr((), equation.invars, equation.outvars, [equation], debug_info=info)
        return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*arguments))
    out = equation.primitive.bind(*arguments, **equation.params)
    return list(out) if equation.primitive.multiple_results else [out]


def evaluate(closed: Any, arguments: Sequence[Any], *, custom: bool = False) -> list[Any]:
    """A jaxpr with its calls laid flat; those with a derivative of their own too if `custom`.

    A product of values side by side becomes the sum of their products: `concatenate([x, h]) @ W` is common.
    """
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, arguments, strict=True))
    joined: dict[Any, list[Any]] = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else values[v]

    for equation in closed.jaxpr.eqns:
        name, given = equation.primitive.name, [read(v) for v in equation.invars]
        with source_info_util.user_context(equation.source_info.traceback):
            if name in _CALLS or (custom and name in _CUSTOM):
                inner = _inner(equation)
                out = evaluate(inner, given, custom=custom)
            elif name == "dot_general" and equation.invars[0] in joined and _is_plain(equation):
                (_, (axis,)), _ = equation.params["dimension_numbers"]
                sizes = [part.shape[1] for part in joined[equation.invars[0]]]
                starts = [sum(sizes[:i]) for i in range(len(sizes))]
                rows = [jax.lax.slice_in_dim(given[1], s, s + n, axis=axis) for s, n in zip(starts, sizes, strict=True)]
                terms = [
                    equation.primitive.bind(part, row, **equation.params)
                    for part, row in zip(joined[equation.invars[0]], rows, strict=True)
                ]
                out = [functools.reduce(jnp.add, terms)]
            else:
                out = apply(equation, given)
        if name == "concatenate" and equation.params["dimension"] == 1:
            joined[equation.outvars[0]] = given
        values.update(zip(equation.outvars, out, strict=True))
    return [read(v) for v in closed.jaxpr.outvars]


def _is_plain(equation: Any) -> bool:
    """Whether a product is [rows, n] times a matrix, as it stands or transposed."""
    (left, right), batch = equation.params["dimension_numbers"]
    return tuple(left) == (1,) and len(right) == 1 and batch == ((), ()) and equation.invars[1].aval.ndim == 2


def _elementwise(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    """A jaxpr of element-wise equations on arrays, evaluated for one element."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> Any:
        return jnp.asarray(v.val if isinstance(v, jex.Literal) else values[v], v.aval.dtype)

    for equation in closed.jaxpr.eqns:
        name, given = equation.primitive.name, [read(v) for v in equation.invars]
        if name in _CALLS or name in _CUSTOM:
            out = _elementwise(_inner(equation), given)
        elif name in _SAME:
            out = given[:1]
        else:
            params = dict(equation.params)
            if "sharding" in params:
                params["sharding"] = None
            out = [equation.primitive.bind(*given, **params)]
        values.update(zip(equation.outvars, out, strict=True))
    return [read(v) for v in closed.jaxpr.outvars]


def _is_elementwise(jaxpr: Any) -> bool:
    return all(
        _is_elementwise(_inner(e).jaxpr)
        if e.primitive.name in _CALLS or e.primitive.name in _CUSTOM
        else e.primitive.name in ELEMENTWISE
        or (
            e.primitive.name in _SAME
            and (e.invars[0].aval.ndim == 0 or e.invars[0].aval.shape == e.outvars[0].aval.shape)
        )
        for e in jaxpr.eqns
    ) and all(jnp.ndim(c) == 0 for c in getattr(jaxpr, "consts", ()))


def _custom(equation: Any) -> Callable[..., Any]:
    """A call with a derivative of its own, as a function of scalars with that derivative."""

    def on_arrays(*arguments: Any) -> Any:
        return apply(equation, arguments)[0]

    avals = [v.aval for v in equation.invars]
    primal = _inner(equation)
    pull = jax.make_jaxpr(lambda bar, *arguments: jax.vjp(on_arrays, *arguments)[1](bar))(
        equation.outvars[0].aval, *avals
    )
    if not _is_elementwise(pull.jaxpr):
        raise NotDivisibleError(f"the derivative of {_name(equation)} is not element-wise ({_where(equation)})")

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return _elementwise(primal, arguments)[0]

    call.defvjp(
        lambda *arguments: (call(*arguments), arguments),
        lambda arguments, bar: tuple(_elementwise(pull, [bar, *arguments])),
    )
    return call


def _name(equation: Any) -> str:
    return str(getattr(_inner(equation).jaxpr.debug_info, "func_name", equation.primitive.name))


@functools.cache
def _sigmoid_primitives() -> list[str]:
    return [e.primitive.name for e in _inner(jax.make_jaxpr(cells.sigmoid)(jnp.zeros(())).jaxpr.eqns[0]).jaxpr.eqns]


def _is_sigmoid(equation: Any) -> bool:
    """Whether it is `cells.sigmoid`, which is a logistic that keeps its last bits."""
    return (
        equation.primitive.name == "custom_jvp_call"
        and [e.primitive.name for e in _inner(equation).jaxpr.eqns] == _sigmoid_primitives()
    )


def _kept(gradient: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """(x, f(x)) -> f(x), with f's gradient made of f(x) alone."""

    @jax.custom_vjp
    def f(x: Array, result: Array) -> Array:
        return result

    f.defvjp(lambda x, result: (result, result), lambda result, bar: (gradient(result, bar), jnp.zeros_like(bar)))
    return f


_FROM_RESULT = {
    "tanh": _kept(lambda y, bar: bar * (1.0 - y * y)),
    "logistic": _kept(lambda y, bar: bar * (y * (1.0 - y))),
    "exp": _kept(lambda y, bar: bar * y),
}


def _alive(jaxpr: Any) -> list[Any]:
    """The equations that a result needs."""
    needed, alive = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}, []
    for e in reversed(jaxpr.eqns):
        if needed.intersection(e.outvars):
            alive.append(e)
            needed.update(v for v in e.invars if not isinstance(v, jex.Literal))
    return alive[::-1]


class Block(NamedTuple):
    """Columns index * hidden to (index + 1) * hidden of a value; index None: one column or number for all units."""

    var: Any
    index: int | None


class Raw(NamedTuple):
    """An argument of the scalar function.

    Attributes:
      kind: 'c' a carry, 'm' a product's result, 'x' a value of x, 's' a feature of x, 'p' a parameter.
      block: where it is from; of 's' the feature, of 'p' within a product with x the feature in `row`.
      row: of a matrix [features, n], which row.
      round: after which round it is known.
    """

    kind: str
    block: Block
    row: int | None = None
    round: int = 0


class Product(NamedTuple):
    """``result += source @ weight`` for blocks of [hidden, hidden].

    Attributes:
      round: 1, 2, ...
      source, result: places in `Division.sources` and `Division.results`.
      weight: the matrix; turned: whether it is taken transposed; rows, columns: the blocks of it, as turned.
    """

    round: int
    source: int
    result: int
    weight: Any
    turned: bool
    rows: int
    columns: int


class Hoisted(NamedTuple):
    """What stands outside the loop.

    Attributes:
      weights: [products, hidden, hidden], from source (rows) to result (columns).
      vectors: the 'p' values, [number, hidden].
      inputs: the 'x' values, [rows, number * hidden].
    """

    weights: Array
    vectors: Array
    inputs: Array


class Division:
    """A step divided; made by `divide`.

    Attributes:
      hidden: units.
      dtype: of all arrays, float32 or float64.
      features: of x, if its products are made inside the stages, else 0.
      carries: (leaf, block) of each carry scalar; outputs: blocks of y.
      raws: the scalar function's arguments; its results are the sources, then the new carry, then y.
      products, sources, results: the products, what they multiply (with its round) and what they make.
      rounds: how many rounds.
    """

    def __init__(self, closed: Any, n_params: int, n_carry: int, inline: bool):
        jaxpr = closed.jaxpr
        self._closed = closed
        self._params, self._x = jaxpr.invars[:n_params], jaxpr.invars[-1]
        carries = jaxpr.invars[n_params : n_params + n_carry]
        new, y = jaxpr.outvars[:n_carry], jaxpr.outvars[n_carry:]
        self._rows, width = self._x.aval.shape
        self.dtype = self._x.aval.dtype
        for v in (*carries, *jaxpr.invars[:n_params], self._x):
            if v.aval.dtype != self.dtype or self.dtype not in (jnp.float32, jnp.float64):
                raise NotDivisibleError(f"an array is {v.aval.dtype}, x {self.dtype}; expected float32, or float64")
        for v in carries:
            if v.aval.ndim != 2 or v.aval.shape[0] != self._rows or v.aval.shape[1] < 1:
                raise NotDivisibleError(f"a part of the carry is {v.aval.shape}; expected [batch, hidden]")
        if not carries:
            raise NotDivisibleError("there is no carry")
        self.hidden = min(v.aval.shape[1] for v in carries)
        for v in (*carries, *y):
            if v.aval.shape[0:1] != (self._rows,) or v.aval.ndim != 2 or v.aval.shape[1] % self.hidden:
                raise NotDivisibleError(
                    f"a carry or output is {v.aval.shape}; expected multiples of {self.hidden} units"
                )
        if len(y) != 1:
            raise NotDivisibleError(f"y has {len(y)} arrays; expected one")
        self.features = width if inline and 0 < width <= MOST_INLINE_FEATURES else 0
        self._inside: dict[Any, Any] = {}  # the result of a product of x made inside: its weight
        self._kinds: dict[Any, str] = dict.fromkeys((*jaxpr.constvars, *self._params), "P")
        self._kinds |= dict.fromkeys(carries, "C") | {self._x: "X"}
        self._round: dict[Any, int] = {}
        self._equations = equations = _alive(jaxpr)
        self._made = {v: (e, i) for e in equations for i, v in enumerate(e.outvars)}
        readers = [v for e in equations for v in e.invars if not isinstance(v, jex.Literal)] + list(jaxpr.outvars)
        self._readers = {v: readers.count(v) for v in self._made}
        self._sums: dict[Any, Any] = {}  # a product's result that is only added to another's: their sum
        found: list[tuple[int, Block, Any, Product]] = []
        read: dict[Raw, None] = {}
        for equation in equations:
            self._classify(equation, found, read)
        # A new carry or an output may need no carry at all.
        for v in (*new, *y):
            if self._kind(v) != "C":
                self._read("an output", v, self._kind(v), read)
        found.sort(key=lambda f: f[0])
        self.sources = list(dict.fromkeys((round, origin) for round, origin, *_ in found))
        self.results = list(dict.fromkeys((round, Block(self._sum(v), p.columns)) for round, _, v, p in found))
        self.products = [
            p._replace(
                source=self.sources.index((round, origin)),
                result=self.results.index((round, Block(self._sum(v), p.columns))),
            )
            for round, origin, v, p in found
        ]
        self.rounds = max((p.round for p in self.products), default=0)
        self.carries = [(leaf, b) for leaf, v in enumerate(carries) for b in range(v.aval.shape[1] // self.hidden)]
        self.outputs = y[0].aval.shape[1] // self.hidden
        self.raws = [Raw("c", Block(carries[leaf], b)) for leaf, b in self.carries]
        self.raws += [Raw("m", block, round=round) for round, block in self.results]
        self.raws += [raw for raw in read if raw.kind == "x"]
        self.raws += [Raw("s", Block(self._x, f)) for f in range(self.features if self._inside else 0)]
        self.raws += [raw for raw in read if raw.kind == "p"]
        self._wanted = [block for _, block in self.sources]
        self._wanted += [Block(new[leaf], b) for leaf, b in self.carries]
        self._wanted += [Block(y[0], b) for b in range(self.outputs)]
        for leaf, v in enumerate(new):
            if v.aval.shape != carries[leaf].aval.shape:
                raise NotDivisibleError(f"a carry of {carries[leaf].aval.shape} becomes {v.aval.shape}")

    def count(self, kind: str) -> int:
        """How many raw scalars are of a kind."""
        return sum(raw.kind == kind for raw in self.raws)

    # ---- Classifying the equations ----

    def _kind(self, v: Any) -> str:
        return "P" if isinstance(v, jex.Literal) else self._kinds[v]

    def _classify(self, e: Any, found: list[tuple[int, Block, Any, Product]], read: dict[Raw, None]) -> None:
        name, kinds = e.primitive.name, [self._kind(v) for v in e.invars]
        kind = "C" if "C" in kinds else "X" if "X" in kinds else "P"
        round = max((self._round.get(v, 0) for v in e.invars if not isinstance(v, jex.Literal)), default=0)
        if self._is_inside(e, kinds):
            kind, self._inside[e.outvars[0]] = "C", e.invars[1]
            read.update(
                {
                    Raw("p", Block(e.invars[1], b), row=f): None
                    for f in range(self.features)
                    for b in self._blocks(e.outvars[0])
                }
            )
        elif kind == "C":
            if name == "add" and self._is_sum(e):
                self._sums |= dict.fromkeys(e.invars, e.outvars[0])
            elif name == "dot_general":
                round += 1
                self._product(e, kinds, round, found)
            else:
                self._check_layout(e, name)
                for v, k in zip(e.invars, kinds, strict=True):
                    if k != "C" and not isinstance(v, jex.Literal):
                        self._read(f"{name} of the state ({_where(e)})", v, k, read)
        for v in e.outvars:
            self._kinds[v], self._round[v] = kind, round

    def _is_inside(self, e: Any, kinds: list[str]) -> bool:
        return (
            self.features > 0
            and e.primitive.name == "dot_general"
            and e.invars[0] is self._x
            and kinds == ["X", "P"]
            and _is_plain(e)
            and tuple(e.params["dimension_numbers"][0][1]) == (0,)
            and e.outvars[0].aval.shape[1] % self.hidden == 0
        )

    def _is_sum(self, e: Any) -> bool:
        """Whether it adds two products of one round that nobody else reads: one sum, then, from the start."""
        return all(
            not isinstance(v, jex.Literal)
            and v in self._made
            and (self._made[v][0].primitive.name == "dot_general" or v in self._sums.values())
            and self._kinds[v] == "C"
            and v not in self._inside
            and self._readers[v] == 1
            and self._round[v] == self._round[e.invars[0]]
            for v in e.invars
        )

    def _sum(self, v: Any) -> Any:
        while v in self._sums:
            v = self._sums[v]
        return v

    def _blocks(self, v: Any) -> range:
        return range(v.aval.shape[1] // self.hidden)

    def _product(self, e: Any, kinds: list[str], round: int, found: list[tuple[int, Block, Any, Product]]) -> None:
        if kinds != ["C", "P"] or not _is_plain(e):
            raise NotDivisibleError(f"dot_general of the state with what is no matrix of parameters ({_where(e)})")
        (source, weight), (result,) = e.invars, e.outvars
        if e.params["preferred_element_type"] not in (None, self.dtype) or weight.aval.dtype != self.dtype:
            raise NotDivisibleError(f"dot_general of {weight.aval.dtype} ({_where(e)})")
        if source.aval.shape[1] % self.hidden or result.aval.shape[1] % self.hidden:
            raise NotDivisibleError(
                f"dot_general from {source.aval.shape[1]} to {result.aval.shape[1]} columns, "
                f"no multiples of {self.hidden} units ({_where(e)})"
            )
        turned = tuple(e.params["dimension_numbers"][0][1]) == (1,)
        for columns in self._blocks(result):
            for rows in self._blocks(source):
                product = Product(round, -1, -1, weight, turned, rows, columns)
                found.append((round, self._origin(Block(source, rows)), result, product))

    def _origin(self, block: Block) -> Block:
        """The block that a block is a copy of, so that two views of one state are one source."""
        v, b = block
        while not isinstance(v, jex.Literal) and v in self._made:
            e, i = self._made[v]
            name = e.primitive.name
            if name == "split":
                b += sum(e.params["sizes"][:i]) // self.hidden
            elif name == "slice":
                b += e.params["start_indices"][1] // self.hidden
            elif name not in ("copy", "copy_p", "stop_gradient"):
                break
            v = e.invars[0]
        return Block(v, b)

    def _check_layout(self, e: Any, name: str) -> None:
        """Whether an equation on the state treats every unit alike."""
        widths = [v.aval.shape[1] if v.aval.ndim == 2 else 0 for v in (*e.invars, *e.outvars)]
        if name in ("split", "slice", "concatenate"):
            start = e.params["start_indices"][1] if name == "slice" else 0
            whole = name != "slice" or (
                e.params["strides"] in (None, (1, 1)) and e.outvars[0].aval.shape[0] == self._rows
            )
            axis = e.params.get("axis", e.params.get("dimension", 1))
            if axis != 1 or not whole or any(w % self.hidden for w in (*widths, start)):
                raise NotDivisibleError(f"{name} at columns that are no multiples of {self.hidden} units ({_where(e)})")
        elif name in _SAME:
            if e.invars[0].aval.shape != e.outvars[0].aval.shape:
                raise NotDivisibleError(f"{name} of the state ({_where(e)})")
        elif name in _CUSTOM:
            if len(e.outvars) != 1 or not _is_elementwise(_inner(e).jaxpr):
                raise NotDivisibleError(f"{_name(e)} has a derivative of its own and is not element-wise ({_where(e)})")
        elif name not in ELEMENTWISE:
            raise NotDivisibleError(f"{name} of the state ({_where(e)})")
        if any(v.aval.dtype not in (self.dtype, jnp.bool_) for v in (*e.invars, *e.outvars)):
            raise NotDivisibleError(f"{name} in {e.outvars[0].aval.dtype} ({_where(e)})")
        if name not in _SAME and e.outvars[0].aval.ndim != 2:
            raise NotDivisibleError(f"{name} makes {e.outvars[0].aval.shape} of the state ({_where(e)})")

    def _read(self, what: str, v: Any, kind: str, read: dict[Raw, None]) -> None:
        """Notes the blocks of a P or X value that the stages read."""
        v = self._narrow(v)
        if isinstance(v, jex.Literal):
            return
        shape = v.aval.shape
        columns = shape[-1] if shape else 1
        rows = shape[0] if len(shape) == 2 else 1
        if v.aval.dtype != self.dtype or len(shape) > 2 or rows not in (1, self._rows if kind == "X" else 1):
            raise NotDivisibleError(f"{what} with {v.aval}")
        if columns != 1 and columns % self.hidden:
            raise NotDivisibleError(f"{what} with {columns} columns")
        blocks: Any = [None] if columns == 1 and self.hidden != 1 else range(columns // self.hidden)
        read.update({Raw(kind.lower(), Block(v, b)): None for b in blocks})

    def _narrow(self, v: Any) -> Any:
        """A parameter before it was repeated for every row."""
        while not isinstance(v, jex.Literal) and v in self._made and self._kinds[v] == "P":
            e = self._made[v][0]
            last = e.invars[0].aval.shape[-1:] if e.invars else ()
            if e.primitive.name not in ("broadcast_in_dim", "reshape") or last not in ((), (1,), v.aval.shape[-1:]):
                break
            if (
                e.primitive.name == "broadcast_in_dim"
                and last
                and e.params["broadcast_dimensions"][-1] != v.aval.ndim - 1
            ):
                break
            v = e.invars[0]
        return v

    # ---- The scalar function ----

    def scalars(
        self, raws: Sequence[Any], kept: Sequence[Any] | None = None, sigmoid: Callable[[Any], Any] = cells.sigmoid
    ) -> tuple[list[Any], list[tuple[str, Any]]]:
        """The step for one unit.

        Args:
          raws: one scalar for each of `self.raws`.
          kept: results of tanh, logistic and exp, in the order in which they are made; taken in place of being
            made where given, and their gradients from them.
          sigmoid: what `cells.sigmoid` becomes.

        Returns:
          (results, made): sources, carry and y, and the name and result of each tanh, logistic and exp.
        """
        given: dict[Any, Any] = {}
        for raw, value in zip(self.raws, raws, strict=True):
            given[raw.block, raw.row, raw.kind] = value
        memo: dict[Block, Any] = {}
        made: list[tuple[str, Any]] = []

        def outside(block: Block, kind: str) -> Any:
            v = self._narrow(block.var)
            if isinstance(v, jex.Literal):
                return v.val
            for index in (block.index, None, 0):
                if (Block(v, index), None, kind) in given:
                    return given[Block(v, index), None, kind]
            raise AssertionError(block)

        def value(block: Block) -> Any:
            v, b = block
            if isinstance(v, jex.Literal):
                return v.val
            if (block, None, "c") in given:
                return given[block, None, "c"]
            if (block, None, "m") in given:
                return given[block, None, "m"]
            if self._kinds[v] != "C":
                return outside(block, self._kinds[v].lower())
            if block not in memo:
                memo[block] = compute(*self._made[v], b)
            return memo[block]

        def compute(e: Any, i: int, b: int) -> Any:
            name = e.primitive.name
            if e.outvars[i] in self._inside:
                weight = self._inside[e.outvars[i]]
                terms = [
                    given[Block(self._x, f), None, "s"] * given[Block(weight, b), f, "p"] for f in range(self.features)
                ]
                return functools.reduce(lambda a, c: a + c, terms)
            if name == "split":
                return value(Block(e.invars[0], sum(e.params["sizes"][:i]) // self.hidden + b))
            if name == "slice":
                return value(Block(e.invars[0], e.params["start_indices"][1] // self.hidden + b))
            if name == "concatenate":
                for v in e.invars:
                    if b < len(self._blocks(v)):
                        return value(Block(v, b))
                    b -= len(self._blocks(v))
            if name in _SAME:
                return value(Block(e.invars[0], b))
            arguments = [jnp.asarray(value(Block(v, b)), v.aval.dtype) for v in e.invars]
            kind = "logistic" if _is_sigmoid(e) else name
            if kind in KEPT:
                if kept is not None:
                    out = _FROM_RESULT[kind](arguments[0], kept[len(made)])
                else:
                    out = sigmoid(arguments[0]) if kind != name else e.primitive.bind(*arguments, **e.params)
                made.append((kind, out))
                return out
            if name in _CUSTOM:
                return _custom(e)(*arguments)
            params = dict(e.params)
            if "sharding" in params:
                params["sharding"] = None
            return e.primitive.bind(*arguments, **params)

        return [value(block) for block in self._wanted], made

    # ---- Outside the loop ----

    def hoist(self, params: Any, x: Array) -> Hoisted:
        """P and X values, by the step's own equations; differentiable.

        Args:
          params: as the step takes them.
          x: [rows, features], with the number of rows of the division.
        """
        values: dict[Any, Any] = dict(zip(self._closed.jaxpr.constvars, self._closed.consts, strict=True))
        values |= dict(zip(self._params, jax.tree.leaves(params), strict=True)) | {self._x: x}
        for e in self._equations:
            if all(self._kinds[v] != "C" for v in e.outvars):
                given = [v.val if isinstance(v, jex.Literal) else values[v] for v in e.invars]
                values.update(zip(e.outvars, apply(e, given), strict=True))
        hidden = self.hidden

        def cut(array: Array, index: int | None) -> Array:
            array = array.reshape(1, -1) if array.ndim < 2 else array
            if index is None:
                return jnp.broadcast_to(array, (array.shape[0], hidden))
            return array[:, index * hidden : (index + 1) * hidden]

        def weight(p: Product) -> Array:
            matrix = values[p.weight].T if p.turned else values[p.weight]
            return matrix[p.rows * hidden : (p.rows + 1) * hidden, p.columns * hidden : (p.columns + 1) * hidden]

        def joined(arrays: list[Array], empty: tuple[int, ...], axis: int) -> Array:
            return jnp.concatenate(arrays, axis=axis) if arrays else jnp.zeros(empty, x.dtype)

        vectors = [
            cut(values[raw.block.var] if raw.row is None else values[raw.block.var][raw.row], raw.block.index)
            for raw in self.raws
            if raw.kind == "p"
        ]
        inputs = [
            jnp.broadcast_to(cut(values[raw.block.var], raw.block.index), (self._rows, hidden))
            for raw in self.raws
            if raw.kind == "x"
        ]
        weights = [weight(p)[None] for p in self.products]
        return Hoisted(
            joined(weights, (0, hidden, hidden), 0),
            joined(vectors, (0, hidden), 0),
            joined(inputs, (self._rows, 0), 1),
        )


def divide(step: Callable[..., Any], params: Any, carry: Any, x: Any, *, inline: bool = True) -> Division:
    """Divides a step.

    Args:
      step: ``step(params, carry, x) -> (carry, y)``.
      params, carry, x: arrays or their shapes, each carry and x with as many rows as `Division.hoist` will be
        given: all steps of all sequences.
      inline: whether a product of x of few features is made inside the stages.

    Raises:
      NotDivisibleError: the step has something that a kernel can't be made of.
    """
    leaves, tree = jax.tree.flatten((params, carry, x))

    def flat(*leaves: Any) -> list[Any]:
        params, carry, x = jax.tree.unflatten(tree, leaves)
        end, y = step(params, carry, x)
        if jax.tree.structure(end) != jax.tree.structure(carry):
            raise NotDivisibleError(f"the carry {jax.tree.structure(carry)} becomes {jax.tree.structure(end)}")
        return [*jax.tree.leaves(end), *jax.tree.leaves(y)]

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    closed = jax.make_jaxpr(flat)(*shapes)
    closed = jax.make_jaxpr(lambda *arguments: evaluate(closed, arguments))(*shapes)
    if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
        raise NotDivisibleError("the step uses an array of a transformation around it, which is none of its parameters")
    n_params, n_carry = len(jax.tree.leaves(params)), len(jax.tree.leaves(carry))
    return Division(closed, n_params, n_carry, inline)
