"""A cell's step, divided into matrix products and one scalar function: what a kernel is generated from.

A step is ``step(params, carry, x) -> (carry, y)`` in JAX. Its values are of three kinds: those that depend on
parameters alone (P), those that depend on x too (X), and those that depend on the carry (C). P and X are XLA's, made
for all steps at once. Of the C values only the products with a P matrix join units; they are taken in rounds, a value's
round being the number of products before it. All else on C values is element-wise, or cuts and joins the feature axis
at multiples of the hidden size. So the values of one unit are scalars, and the step is one scalar function of the
unit's carry, its products' results, x and parameters, whose gradient is `jax.vjp` of it. No cell has a name here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.jaxprs import (
    CUSTOM,
    ELEMENTWISE,
    FROM_RESULT,
    KEPT,
    SAME,
    NotDivisibleError,
    alive,
    apply,
    custom_call,
    evaluate,
    inner_of,
    is_elementwise,
    is_plain,
    is_sigmoid,
    name_of,
    where,
)

Array = jax.Array

# A product of x of at most so many features is made inside the stages, from the scalars of x.
MOST_INLINE_FEATURES = 4


class Block(NamedTuple):
    """Columns number * hidden to (number + 1) * hidden of a value; None: one column or scalar for all units."""

    var: Any
    number: int | None


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
        self._equations = equations = alive(jaxpr)
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
                        self._read(f"{name} of the state ({where(e)})", v, k, read)
        for v in e.outvars:
            self._kinds[v], self._round[v] = kind, round

    def _is_inside(self, e: Any, kinds: list[str]) -> bool:
        return (
            self.features > 0
            and e.primitive.name == "dot_general"
            and e.invars[0] is self._x
            and kinds == ["X", "P"]
            and is_plain(e)
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
        if kinds != ["C", "P"] or not is_plain(e):
            raise NotDivisibleError(f"dot_general of the state with what is no matrix of parameters ({where(e)})")
        (source, weight), (result,) = e.invars, e.outvars
        if e.params["preferred_element_type"] not in (None, self.dtype) or weight.aval.dtype != self.dtype:
            raise NotDivisibleError(f"dot_general of {weight.aval.dtype} ({where(e)})")
        if source.aval.shape[1] % self.hidden or result.aval.shape[1] % self.hidden:
            raise NotDivisibleError(
                f"dot_general from {source.aval.shape[1]} to {result.aval.shape[1]} columns, "
                f"no multiples of {self.hidden} units ({where(e)})"
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
                raise NotDivisibleError(f"{name} at columns that are no multiples of {self.hidden} units ({where(e)})")
        elif name in SAME:
            if e.invars[0].aval.shape != e.outvars[0].aval.shape:
                raise NotDivisibleError(f"{name} of the state ({where(e)})")
        elif name in CUSTOM:
            if len(e.outvars) != 1 or not is_elementwise(inner_of(e).jaxpr):
                raise NotDivisibleError(
                    f"{name_of(e)} has a derivative of its own and is not element-wise ({where(e)})"
                )
        elif name not in ELEMENTWISE:
            raise NotDivisibleError(f"{name} of the state ({where(e)})")
        if any(v.aval.dtype not in (self.dtype, jnp.bool_) for v in (*e.invars, *e.outvars)):
            raise NotDivisibleError(f"{name} in {e.outvars[0].aval.dtype} ({where(e)})")
        if name not in SAME and e.outvars[0].aval.ndim != 2:
            raise NotDivisibleError(f"{name} makes {e.outvars[0].aval.shape} of the state ({where(e)})")

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
        for raw, scalar in zip(self.raws, raws, strict=True):
            given[raw.block, raw.row, raw.kind] = scalar
        memo: dict[Block, Any] = {}
        made: list[tuple[str, Any]] = []

        def outside(block: Block, kind: str) -> Any:
            v = self._narrow(block.var)
            if isinstance(v, jex.Literal):
                return v.val
            for number in (block.number, None, 0):
                if (Block(v, number), None, kind) in given:
                    return given[Block(v, number), None, kind]
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

        def compute(e: Any, i: int, b: Any) -> Any:
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
            if name in SAME:
                return value(Block(e.invars[0], b))
            arguments = [jnp.asarray(value(Block(v, b)), v.aval.dtype) for v in e.invars]
            kind = "logistic" if is_sigmoid(e) else name
            if kind in KEPT:
                if kept is not None:
                    out = FROM_RESULT[kind](arguments[0], kept[len(made)])
                else:
                    out = sigmoid(arguments[0]) if kind != name else e.primitive.bind(*arguments, **e.params)
                made.append((kind, out))
                return out
            if name in CUSTOM:
                return custom_call(e)(*arguments)
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
            cut(values[raw.block.var] if raw.row is None else values[raw.block.var][raw.row], raw.block.number)
            for raw in self.raws
            if raw.kind == "p"
        ]
        inputs = [
            jnp.broadcast_to(cut(values[raw.block.var], raw.block.number), (self._rows, hidden))
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
        before, after = str(jax.tree.structure(carry)), str(jax.tree.structure(end))
        if after != before:
            raise NotDivisibleError(f"the carry {before} becomes {after}")
        return [*jax.tree.leaves(end), *jax.tree.leaves(y)]

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    closed = jax.make_jaxpr(flat)(*shapes)
    closed = jax.make_jaxpr(lambda *arguments: evaluate(closed, arguments))(*shapes)
    if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
        raise NotDivisibleError("the step uses an array of a transformation around it, which is none of its parameters")
    n_params, n_carry = len(jax.tree.leaves(params)), len(jax.tree.leaves(carry))
    return Division(closed, n_params, n_carry, inline)
