"""A step divided: the products between its units, the scalar function of one unit, and what stands outside the loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.jaxprs import CUSTOM, FROM_RESULT, KEPT, SAME, apply, custom_call, is_plain, is_sigmoid

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


def narrow(v: Any, made: Mapping[Any, tuple[Any, int]], kinds: Mapping[Any, str]) -> Any:
    """A parameter before it was repeated for every row."""
    while not isinstance(v, jex.Literal) and v in made and kinds[v] == "P":
        e = made[v][0]
        last = e.invars[0].aval.shape[-1:] if e.invars else ()
        if e.primitive.name not in ("broadcast_in_dim", "reshape") or last not in ((), (1,), v.aval.shape[-1:]):
            break
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
        return max((p.round for p in self.products), default=0)

    @property
    def rows(self) -> Any:
        """The rows of x: of all steps of all sequences; perhaps symbolic."""
        return self.x.aval.shape[0]

    def count(self, kind: str) -> int:
        """How many raw scalars are of a kind."""
        return sum(raw.kind == kind for raw in self.raws)

    def multiplies_x(self) -> bool:
        """Whether the 'x' values are linear in x, each row by itself, and products of x are among them."""
        products = 0
        for e in self.equations:
            kinds = ["P" if isinstance(v, jex.Literal) else self.kinds[v] for v in e.invars]
            if any(self.kinds[v] != "X" for v in e.outvars):
                continue
            name, shapes = e.primitive.name, {v.aval.shape for v in (*e.invars, *e.outvars)}
            if name == "dot_general":
                products += 1
                linear = kinds == ["X", "P"] and is_plain(e)
            elif name in ("mul", "div"):
                linear = kinds == ["X", "P"] or (name == "mul" and kinds == ["P", "X"])
            elif name in ("split", "slice", "concatenate"):
                linear = all(v.aval.shape[0] == self.rows for v in (*e.invars, *e.outvars))
            else:
                linear = name in ("add", "sub", "neg") or (name in SAME and len(shapes) == 1)
            if not linear:
                return False
        return products > 0

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
            v = narrow(block.var, self.made, self.kinds)
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
                made.append((kind, out))
                return out
            if name in CUSTOM:
                return custom_call(e)(*arguments)
            params = dict(e.params)
            if "sharding" in params:
                params["sharding"] = None
            return e.primitive.bind(*arguments, **params)

        return [value(block) for block in self.wanted], made

    # ---- Outside the loop ----

    def hoist(self, params: Any, x: Array) -> Hoisted:
        """P and X values, by the step's own equations; differentiable.

        Args:
          params: as the step takes them.
          x: [rows, features], with the number of rows of the division.
        """
        values: dict[Any, Any] = dict(zip(self.closed.jaxpr.constvars, self.closed.consts, strict=True))
        values |= dict(zip(self.params, jax.tree.leaves(params), strict=True)) | {self.x: x}
        for e in self.equations:
            if all(self.kinds[v] != "C" for v in e.outvars):
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
            cut(values[raw.block.var] if raw.row is None else values[raw.block.var][raw.row], raw.block.number)[:1]
            for raw in self.raws
            if raw.kind == "p"
        ]
        inputs = [
            jnp.broadcast_to(cut(values[raw.block.var], raw.block.number), (self.rows, hidden))
            for raw in self.raws
            if raw.kind == "x"
        ]
        weights = [weight(p)[None] for p in self.products]
        return Hoisted(
            joined(weights, (0, hidden, hidden), 0),
            joined(vectors, (0, hidden), 0),
            joined(inputs, (self.rows, 0), 1),
        )
