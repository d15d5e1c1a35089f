"""A cell's step, divided into matrix products and one scalar function: what a kernel is generated from.

A step is ``step(params, carry, x) -> (carry, y)`` in JAX. Its values are of three kinds: those that depend on
parameters alone (P), those that depend on x too (X), and those that depend on the carry (C). P and X are XLA's, X made
for all steps at once. Of the C values only the products with a P matrix join units; they are taken in rounds, a value's
round being the number of products before it. All else on C values is element-wise, or cuts and joins the feature axis
at multiples of the hidden size. So the values of one unit are scalars, and the step is one scalar function of the
unit's carry, its products' results, x and parameters, whose gradient is `jax.vjp` of it. No cell has a name here.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from seqmnist_jax.rnn.cells import products_at
from seqmnist_jax.rnn.division import Block, Division, Product, Raw, blocks, is_row, narrow
from seqmnist_jax.rnn.jaxprs import (
    CUSTOM,
    ELEMENTWISE,
    SAME,
    NotDivisibleError,
    flattened,
    inner_of,
    is_elementwise,
    is_plain,
    name_of,
    needed,
    pulls_linearly,
    where,
)

# A product of x of at most so many features is made inside the stages, from the scalars of x.
MOST_INLINE_FEATURES = 4
# Of a step: more would be no program for a compiler. Sources: as many as a pass of the CPU's kernel has terms.
MOST_PRODUCTS, MOST_SOURCES = 128, 32


class _Found(NamedTuple):
    """A product as it is met: its round, the block that it multiplies, the value that it adds to, and the rest."""

    round: int
    origin: Block
    result: Any
    product: Product


class _Divider:
    """Goes through the equations of a step once; then `division` is known."""

    def __init__(self, closed: Any, n_params: int, n_carry: int, inline: bool, deep: bool):
        jaxpr = closed.jaxpr
        self._deep = deep
        self._closed = closed
        self._params, self._x = jaxpr.invars[:n_params], jaxpr.invars[-1]
        self._carries = jaxpr.invars[n_params : n_params + n_carry]
        self._new, self._y = jaxpr.outvars[:n_carry], jaxpr.outvars[n_carry:]
        self._rows, width = self._x.aval.shape
        self.dtype = self._x.aval.dtype
        self._check_arguments()
        self.hidden = min(v.aval.shape[1] for v in self._carries)
        self._check_results()
        self.features = width if inline and 0 < width <= MOST_INLINE_FEATURES else 0
        self._inside: dict[Any, Any] = {}  # the result of a product of x made inside: its weight
        self._kinds: dict[Any, str] = dict.fromkeys((*jaxpr.constvars, *self._params), "P")
        self._kinds |= dict.fromkeys(self._carries, "C") | {self._x: "X"}
        self._round: dict[Any, int] = {}
        self._equations = equations = needed(jaxpr.eqns, jaxpr.outvars)
        self._made = {v: (e, i) for e in equations for i, v in enumerate(e.outvars)}
        readers = [v for e in equations for v in e.invars if not isinstance(v, jex.Literal)] + list(jaxpr.outvars)
        self._readers = {v: readers.count(v) for v in self._made}
        self._sums: dict[Any, Any] = {}  # a product's result that is only added to another's: their sum
        self._found: list[_Found] = []
        self._read: dict[Raw, None] = {}  # in the order in which they are met

    def division(self) -> Division:
        """Classifies every equation and puts together what was found."""
        for equation in self._equations:
            self._classify(equation)
        # A new carry or an output may need no carry at all.
        for v in (*self._new, *self._y):
            if self._kind(v) != "C":
                self._note("an output", v, self._kind(v))
        found = sorted(self._found, key=lambda f: f.round)
        sources = list(dict.fromkeys((f.round, f.origin) for f in found))
        if len(sources) > MOST_SOURCES:
            raise NotDivisibleError(
                f"products multiply {len(sources)} blocks of {self.hidden} units, the least of the carry"
            )
        results = list(dict.fromkeys(self._result(f) for f in found))
        products = [
            f.product._replace(source=sources.index((f.round, f.origin)), result=results.index(self._result(f)))
            for f in found
        ]
        carries = [(leaf, b) for leaf, v in enumerate(self._carries) for b in blocks(v, self.hidden)]
        outputs = self._y[0].aval.shape[1] // self.hidden
        raws = [Raw("c", Block(self._carries[leaf], b)) for leaf, b in carries]
        raws += [Raw("m", block, round=round) for round, block in results]
        raws += [raw for raw in self._read if raw.kind == "x"]
        raws += [Raw("s", Block(self._x, f)) for f in range(self.features if self._inside else 0)]
        raws += [raw for raw in self._read if raw.kind == "p"]
        wanted = [block for _, block in sources]
        wanted += [Block(self._new[leaf], b) for leaf, b in carries]
        wanted += [Block(self._y[0], b) for b in range(outputs)]
        return Division(
            hidden=self.hidden,
            dtype=self.dtype,
            features=self.features,
            carries=carries,
            outputs=outputs,
            raws=raws,
            products=products,
            sources=sources,
            results=results,
            closed=self._closed,
            params=self._params,
            x=self._x,
            equations=self._equations,
            made=self._made,
            kinds=self._kinds,
            inside=self._inside,
            wanted=wanted,
        )

    def _check_arguments(self) -> None:
        for v in (*self._carries, *self._params, self._x):
            if v.aval.dtype != self.dtype or not jnp.issubdtype(self.dtype, jnp.floating):
                raise NotDivisibleError(f"an array is {v.aval.dtype}, x {self.dtype}; expected one floating dtype")
        for v in self._carries:
            if v.aval.ndim != 2 or v.aval.shape[0] != self._rows or v.aval.shape[1] < 1:
                raise NotDivisibleError(f"a part of the carry is {v.aval.shape}; expected [batch, hidden]")
        if not self._carries:
            raise NotDivisibleError("there is no carry")

    def _check_results(self) -> None:
        for v in (*self._carries, *self._y):
            shape = v.aval.shape
            if shape[0:1] != (self._rows,) or v.aval.ndim != 2 or shape[1] < 1 or shape[1] % self.hidden:
                raise NotDivisibleError(f"a carry or output is {shape}; expected multiples of {self.hidden} units")
        for v in (*self._new, *self._y):
            if v.aval.dtype != self.dtype:
                raise NotDivisibleError(f"a new carry or output is {v.aval.dtype}; expected {self.dtype}, as x")
        if len(self._y) != 1:
            raise NotDivisibleError(f"y has {len(self._y)} arrays; expected one")
        for before, after in zip(self._carries, self._new, strict=True):
            if before.aval.shape != after.aval.shape:
                raise NotDivisibleError(f"a carry of {before.aval.shape} becomes {after.aval.shape}")

    def _result(self, found: _Found) -> tuple[int, Block]:
        return found.round, Block(self._sum(found.result), found.product.columns)

    def _kind(self, v: Any) -> str:
        return "P" if isinstance(v, jex.Literal) else self._kinds[v]

    def _classify(self, e: Any) -> None:
        name, kinds = e.primitive.name, [self._kind(v) for v in e.invars]
        kind = "C" if "C" in kinds else "X" if "X" in kinds else "P"
        if e.params.get("vmap_method", "") is None:  # what depends on x alone is mapped over the steps
            raise NotDivisibleError(f"{name} that vmap can't map ({where(e)})")
        # Made once for all steps, it would be given the sum of what it is given at each.
        if kind == "P" and not pulls_linearly(e):
            raise NotDivisibleError(
                f"{name} of parameters, whose own derivative is not known to be linear ({where(e)})"
            )
        round = max((self._round.get(v, 0) for v in e.invars if not isinstance(v, jex.Literal)), default=0)
        if self._is_inside(e, kinds):
            kind, self._inside[e.outvars[0]] = "C", e.invars[1]
            weight, numbers = e.invars[1], blocks(e.outvars[0], self.hidden)
            self._read |= {Raw("p", Block(weight, b), row=f): None for f in range(self.features) for b in numbers}
        elif kind == "C" or (kind == "X" and self._deep and self._is_of_units(e, name, kinds)):
            kind = "C"
            if name == "add" and self._is_sum(e):
                self._sums |= dict.fromkeys(e.invars, e.outvars[0])
            elif name == "dot_general":
                round += 1
                self._product(e, kinds, round)
            else:
                self._check_layout(e, name)
                for v, k in zip(e.invars, kinds, strict=True):
                    if k != "C" and not isinstance(v, jex.Literal):
                        self._note(f"{name} of the state ({where(e)})", v, k)
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

    def _is_of_units(self, e: Any, name: str, kinds: list[str]) -> bool:
        """Whether an equation on values of x treats every unit alike, as those on the state do."""
        values = [*e.outvars, *(v for v, kind in zip(e.invars, kinds, strict=True) if kind == "X")]
        if any(v.aval.ndim != 2 or v.aval.shape[0] != self._rows or v.aval.shape[1] % self.hidden for v in values):
            return False
        try:
            self._check_layout(e, name)
        except NotDivisibleError:
            return False
        return True

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

    def _product(self, e: Any, kinds: list[str], round: int) -> None:
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
        count = len(self._found) + len(blocks(result, self.hidden)) * len(blocks(source, self.hidden))
        if count > MOST_PRODUCTS:
            raise NotDivisibleError(
                f"{count:,} products between blocks of {self.hidden} units, the least that the carry has ({where(e)})"
            )
        turned = tuple(e.params["dimension_numbers"][0][1]) == (1,)
        for columns in blocks(result, self.hidden):
            for rows in blocks(source, self.hidden):
                product = Product(-1, -1, weight, turned, rows, columns)
                self._found.append(_Found(round, self._origin(Block(source, rows)), result, product))

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
            elif name != "copy":  # behind a stop_gradient is another source: what it multiplies has no cotangent
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
        others = [v.aval.dtype for v in (*e.invars, *e.outvars) if v.aval.dtype not in (self.dtype, jnp.bool_)]
        if others:
            raise NotDivisibleError(f"{name_of(e) if name in CUSTOM else name} in {others[0]} ({where(e)})")
        if name not in SAME and e.outvars[0].aval.ndim != 2:
            raise NotDivisibleError(f"{name} makes {e.outvars[0].aval.shape} of the state ({where(e)})")

    def _note(self, what: str, v: Any, kind: str) -> None:
        """Notes the blocks of a P or X value that the stages read."""
        v = narrow(v, self._made, self._kinds)
        if isinstance(v, jex.Literal):
            return
        shape = v.aval.shape
        columns = shape[-1] if shape else 1
        if kind == "P" and len(shape) == 2 and not is_row(v, self._made, self._kinds):
            kind = "X"  # A mask, say: a value for each sequence, the same in all steps.
        rows = shape[0] if len(shape) == 2 and kind == "X" else 1
        # A truth value is handed to the stages as a number.
        if v.aval.dtype not in (self.dtype, jnp.bool_) or len(shape) > 2 or rows not in (1, self._rows):
            raise NotDivisibleError(f"{what} with {v.aval}")
        if columns != 1 and columns % self.hidden:
            raise NotDivisibleError(f"{what} with {columns} columns")
        numbers: Any = [None] if columns == 1 and self.hidden != 1 else range(columns // self.hidden)
        self._read |= {Raw(kind.lower(), Block(v, b)): None for b in numbers}


def laid_flat(step: Callable[..., Any], params: Any, carry: Any, x: Any, precision: str) -> Any:
    """A step's jaxpr, its calls laid flat: of the leaves of params, carry and x, to those of the new carry and y.

    Products that say nothing of their precision are in full float32 where `precision` is 'float32', on GPUs too.

    Raises:
      NotDivisibleError: the carry becomes another tree, or the step uses an array of a transformation around it.
    """
    leaves, tree = jax.tree.flatten((params, carry, x))
    axes = jax.sharding.get_abstract_mesh().manual_axes

    def flat(*leaves: Any) -> list[Any]:
        params, carry, x = jax.tree.unflatten(tree, leaves)
        end, y = step(params, carry, x)
        before, after = str(jax.tree.structure(carry)), str(jax.tree.structure(end))
        if after != before:
            raise NotDivisibleError(f"the carry {before} becomes {after}")
        return [*jax.tree.leaves(end), *jax.tree.leaves(y)]

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    with products_at(precision):
        closed = flattened(flat, shapes)
    if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
        raise NotDivisibleError("the step uses an array of a transformation around it, which is none of its parameters")
    # A kernel has no place for them, and what no result needs is left out. The name of a device's axis is none; that of
    # a vmap is not known where what depends on x alone is mapped over the steps.
    effects = [str(effect) for effect in closed.effects if getattr(effect, "name", None) not in axes]
    if effects:
        raise NotDivisibleError(f"the step has side effects: {', '.join(effects)}")
    return closed


def divide(
    step: Callable[..., Any],
    params: Any,
    carry: Any,
    x: Any,
    *,
    inline: bool = True,
    deep: bool = False,
    precision: str = "float32",
) -> Division:
    """Divides a step.

    Args:
      step: ``step(params, carry, x) -> (carry, y)``.
      params, carry, x: arrays or their shapes, as the step takes them.
      inline: whether a product of x of few features is made inside the stages.
      deep: whether, in a step without products of the state, so is all that is element-wise in x: there memory alone
        takes time, and a value that is made outside is written and read once more.
      precision: of products of x outside the loop that say nothing of theirs.

    Raises:
      NotDivisibleError: the step has something that a kernel can't be made of.
    """
    closed = laid_flat(step, params, carry, x, precision)
    n_params, n_carry = len(jax.tree.leaves(params)), len(jax.tree.leaves(carry))
    try:
        division = _Divider(closed, n_params, n_carry, inline, False).division()
    except NotDivisibleError:
        if not inline:
            raise
        inline = False  # outside anything may be done with a product of x, as normalising it
        division = _Divider(closed, n_params, n_carry, inline, False).division()
    if deep and not division.products:
        with contextlib.suppress(NotDivisibleError):
            return _Divider(closed, n_params, n_carry, inline, True).division()
    return division
