"""A step divided: the products between its units, the scalar function of one unit, and what stands outside the loop."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.jaxprs import (
    CUSTOM,
    FROM_RESULT,
    KEPT,
    SAME,
    custom_call,
    follow,
    is_plain,
    is_sigmoid,
    read,
    unsharded,
)

Array = jax.Array


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
      source, result: places in `Division.sources` and `Division.results`.
      weight: the matrix; turned: whether it is taken transposed; rows, columns: the blocks of it, as turned.
    """

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
      inputs: the 'x' values, [batch, time, number, hidden], or a matrix that makes them of x.
    """

    weights: Array
    vectors: Array
    inputs: Array


def narrow(v: Any, made: Mapping[Any, tuple[Any, int]], kinds: Mapping[Any, str]) -> Any:
    """A parameter before it was repeated for every row."""
    while not isinstance(v, jex.Literal) and v in made and kinds[v] == "P":
        e = made[v][0]
        last = e.invars[0].aval.shape[-1:] if e.invars else ()
        if e.primitive.name not in ("broadcast_in_dim", "reshape") or last not in ((), (1,), v.aval.shape[-1:]):
            break
        if e.primitive.name == "reshape" and last == (1,) and e.invars[0].aval.size != 1:
            break  # a column that became a row
        if e.primitive.name == "broadcast_in_dim" and last and e.params["broadcast_dimensions"][-1] != v.aval.ndim - 1:
            break
        v = e.invars[0]
    return v


def blocks(v: Any, hidden: int) -> range:
    """The numbers of a value's blocks."""
    return range(v.aval.shape[1] // hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class Division:
    """A step divided; made by `divide`.

    Attributes:
      hidden: units.
      dtype: of all arrays, floating.
      features: of x, if its products are made inside the stages, else 0.
      carries: (leaf, block) of each carry scalar; outputs: blocks of y.
      raws: the scalar function's arguments; its results are the sources, then the new carry, then y.
      products, sources, results: the products, what they multiply (with its round) and what they make.
      closed, params, x: the step's jaxpr, and which of its arguments are parameters and which is x.
      equations: those that count; made: the equation that makes a value, and the place among its results.
      kinds: of each value 'P', 'X' or 'C'; inside: the weight of each product of x made inside.
      wanted: the scalar function's results.
    """

    hidden: int
    dtype: Any
    features: int
    carries: list[tuple[int, int]]
    outputs: int
    raws: list[Raw]
    products: list[Product]
    sources: list[tuple[int, Block]]
    results: list[tuple[int, Block]]
    closed: Any
    params: list[Any]
    x: Any
    equations: list[Any]
    made: Mapping[Any, tuple[Any, int]]
    kinds: Mapping[Any, str]
    inside: Mapping[Any, Any]
    wanted: list[Block]

    @property
    def rounds(self) -> int:
        """How many rounds of products there are."""
        return max((round for round, _ in self.sources), default=0)

    def count(self, kind: str) -> int:
        """How many raw scalars are of a kind."""
        return sum(raw.kind == kind for raw in self.raws)

    # ---- The scalar function ----

    def scalars(
        self, raws: Sequence[Any], kept: Sequence[Any] | None = None, sigmoid: Callable[[Any], Any] = cells.sigmoid
    ) -> tuple[list[Any], list[Any]]:
        """The step for one unit.

        Args:
          raws: one scalar for each of `self.raws`.
          kept: results of tanh, logistic and exp, in the order in which they are made; taken in place of being
            made where given, and their gradients from them.
          sigmoid: what `cells.sigmoid` becomes.

        Returns:
          (results, made): sources, carry and y, and the result of each tanh, logistic and exp.
        """
        given: dict[Any, Any] = {}
        for raw, scalar in zip(self.raws, raws, strict=True):
            given[raw.block, raw.row, raw.kind] = scalar
        memo: dict[Block, Any] = {}
        made: list[Any] = []

        def outside(block: Block, kind: str) -> Any:
            v = narrow(block.var, self.made, self.kinds)
            if isinstance(v, jex.Literal):
                return v.val
            for place in itertools.product((block.number, None, 0), (kind, "x")):
                if (Block(v, place[0]), None, place[1]) in given:
                    number = given[Block(v, place[0]), None, place[1]]
                    return number != 0 if v.aval.dtype == jnp.bool_ else number
            raise AssertionError(block)

        def value(block: Block) -> Any:
            v, b = block
            if isinstance(v, jex.Literal):
                return v.val
            if (block, None, "c") in given:
                return given[block, None, "c"]
            if (block, None, "m") in given:
                return given[block, None, "m"]
            if self.kinds[v] != "C":
                return outside(block, self.kinds[v].lower())
            if block not in memo:
                memo[block] = compute(*self.made[v], b)
            return memo[block]

        def compute(e: Any, i: int, b: Any) -> Any:
            name = e.primitive.name
            if e.outvars[i] in self.inside:
                weight = self.inside[e.outvars[i]]
                terms = [
                    given[Block(self.x, f), None, "s"] * given[Block(weight, b), f, "p"] for f in range(self.features)
                ]
                return functools.reduce(lambda a, c: a + c, terms)
            if name == "split":
                return value(Block(e.invars[0], sum(e.params["sizes"][:i]) // self.hidden + b))
            if name == "slice":
                return value(Block(e.invars[0], e.params["start_indices"][1] // self.hidden + b))
            if name == "concatenate":
                for v in e.invars:
                    if b < len(blocks(v, self.hidden)):
                        return value(Block(v, b))
                    b -= len(blocks(v, self.hidden))
            if name in SAME:
                return value(Block(e.invars[0], b))
            arguments = [jnp.asarray(value(Block(v, b)), v.aval.dtype) for v in e.invars]
            kind = "logistic" if is_sigmoid(e) else name
            if kind in KEPT:
                if kept is not None:
                    out = FROM_RESULT[kind](arguments[0], kept[len(made)])
                else:
                    out = sigmoid(arguments[0]) if kind != name else e.primitive.bind(*arguments, **e.params)
                made.append(out)
                return out
            if name in CUSTOM:
                return custom_call(e)(*arguments)
            return e.primitive.bind(*arguments, **unsharded(e))

        return [jnp.asarray(value(block), self.dtype) for block in self.wanted], made

    # ---- Outside the loop ----

    def hoist(self, params: Any, x: Array) -> Hoisted:
        """P and X values, by the step's own equations, those of x for all steps at once; differentiable.

        Args:
          params: as the step takes them.
          x: [batch, time, features].
        """
        values = self._parameters(params)

        def of_step(x: Array) -> list[Array]:
            now = values | {self.x: x}
            follow([e for e in self.equations if all(self.kinds[v] == "X" for v in e.outvars)], now)
            return [self._cut(now[raw.block.var], raw.block.number, x.shape[0]) for raw in self.raws if raw.kind == "x"]

        read = [raw.block for raw in self.raws if raw.kind == "x"]
        if read and read == [Block(self.x, b) for b in blocks(self.x, self.hidden)]:
            return self._hoisted(values, [], x.reshape(*x.shape[:2], len(read), self.hidden))
        inputs = jax.vmap(of_step, in_axes=1, out_axes=1)(x) if read else []
        empty = jnp.zeros((*x.shape[:2], 0, self.hidden), x.dtype)
        return self._hoisted(values, [], jnp.stack(inputs, axis=2) if inputs else empty)

    def multiplies_x(self) -> bool:
        """Whether the 'x' values are linear in x, each row by itself, and products of x are among them."""
        products = 0
        for e in self.equations:
            if any(self.kinds[v] != "X" for v in e.outvars):
                continue
            name, kinds = e.primitive.name, ["P" if isinstance(v, jex.Literal) else self.kinds[v] for v in e.invars]
            if name == "dot_general":
                products += 1
                linear = kinds == ["X", "P"] and is_plain(e)
            elif name in ("split", "slice", "concatenate"):
                linear = all(v.aval.shape[0] == self.x.aval.shape[0] for v in (*e.invars, *e.outvars))
                linear = linear and all(kind == "X" for kind in kinds)
            else:
                linear = name in ("add", "sub", "neg") or (name in SAME and e.invars[0].aval.shape == _shape(e))
                linear = linear or (
                    name in ("mul", "div") and kinds.count("X") == 1 and (name, kinds[0]) != ("div", "P")
                )
                rows = [v for v, kind in zip(e.invars, kinds, strict=True) if kind == "P"]
                linear = linear and all(is_row(v, self.made, self.kinds) for v in rows)
            if not linear:
                return False
        return products > 0 and all(self.kinds[r.block.var] == "X" for r in self.raws if r.kind == "x")

    def hoist_linear(self, params: Any) -> Hoisted:
        """The same where `multiplies_x`, without x: its matrix [features, number, hidden] in place of the 'x' values.

        What is added to x's product with it stands behind the 'p' values in `vectors`.
        """
        values = self._parameters(params)
        features = self.x.aval.shape[1]
        # What is added to the product, and below it the matrix: [1 + features, n].
        linear = {self.x: jnp.eye(1 + features, features, -1, dtype=self.dtype)}

        def row(v: Any) -> Array:
            array = jnp.asarray(read(values, v))
            return array[:1] if array.ndim == 2 else array

        def part(e: Any, v: Any) -> Array:
            """An argument of an element-wise equation: a parameter's row scales the matrix too, but is added once."""
            if not isinstance(v, jex.Literal) and v in linear:
                return linear[v]
            whole = jnp.broadcast_to(row(v), (1 + features, _shape(e)[1]))
            return whole if e.primitive.name in ("mul", "div") else whole.at[1:].set(0)

        for e in self.equations:
            if any(self.kinds[v] != "X" for v in e.outvars):
                continue
            name = e.primitive.name
            if name == "dot_general":
                matrix = values[e.invars[1]]
                matrix = matrix.T if tuple(e.params["dimension_numbers"][0][1]) == (1,) else matrix
                made = [jnp.matmul(linear[e.invars[0]], matrix, precision=jax.lax.Precision.HIGHEST)]
            elif name == "split":
                made = jnp.split(linear[e.invars[0]], list(itertools.accumulate(e.params["sizes"]))[:-1], axis=1)
            elif name == "slice":
                start, limit = e.params["start_indices"][1], e.params["limit_indices"][1]
                made = [linear[e.invars[0]][:, start : limit : (e.params["strides"] or (1, 1))[1]]]
            elif name == "concatenate":
                made = [jnp.concatenate([linear[v] for v in e.invars], axis=1)]
            elif name in SAME:
                made = [linear[e.invars[0]]]
            else:
                made = [e.primitive.bind(*(part(e, v) for v in e.invars), **e.params)]
            linear |= dict(zip(e.outvars, made, strict=True))
        blocks = [self._cut(linear[r.block.var], r.block.number, 1 + features) for r in self.raws if r.kind == "x"]
        return self._hoisted(values, [block[:1] for block in blocks], jnp.stack([b[1:] for b in blocks], axis=1))

    def _parameters(self, params: Any) -> dict[Any, Any]:
        """The P values."""
        values = dict(zip(self.closed.jaxpr.constvars, self.closed.consts, strict=True))
        values |= dict(zip(self.params, jax.tree.leaves(params), strict=True))
        follow([e for e in self.equations if all(self.kinds[v] == "P" for v in e.outvars)], values)
        return values

    def _cut(self, array: Array, number: int | None, rows: Any) -> Array:
        """A block of a value, [rows, hidden]."""
        array = array.reshape(1, -1).astype(self.dtype) if array.ndim < 2 else array.astype(self.dtype)
        if number is not None:
            array = array[:, number * self.hidden : (number + 1) * self.hidden]
        return jnp.broadcast_to(array, (rows, self.hidden))

    def _hoisted(self, values: dict[Any, Any], others: list[Array], inputs: Array) -> Hoisted:
        hidden = self.hidden

        def weight(p: Product) -> Array:
            matrix = values[p.weight].T if p.turned else values[p.weight]
            return matrix[p.rows * hidden : (p.rows + 1) * hidden, p.columns * hidden : (p.columns + 1) * hidden]

        def vector(raw: Raw) -> Array:
            array = values[raw.block.var]
            array = array[:1] if raw.row is None and array.ndim == 2 else array
            return self._cut(array if raw.row is None else array[raw.row], raw.block.number, 1)

        vectors = [vector(raw) for raw in self.raws if raw.kind == "p"] + others
        weights = [weight(p) for p in self.products]
        return Hoisted(
            jnp.stack(weights) if weights else jnp.zeros((0, hidden, hidden), inputs.dtype),
            jnp.concatenate(vectors) if vectors else jnp.zeros((0, hidden), inputs.dtype),
            inputs,
        )


def _shape(e: Any) -> Any:
    return e.outvars[0].aval.shape


def is_row(v: Any, made: Mapping[Any, tuple[Any, int]], kinds: Mapping[Any, str]) -> bool:
    """Whether a parameter's value has the same for every row of a batch."""
    v = narrow(v, made, kinds)
    if isinstance(v, jex.Literal) or v.aval.ndim < 2 or v.aval.shape[0] == 1:
        return True
    # One row, repeated and then made of another dtype.
    e = made[v][0] if v in made else None
    return e is not None and e.primitive.name == "convert_element_type" and is_row(e.invars[0], made, kinds)
