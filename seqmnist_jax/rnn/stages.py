"""A division's scalar function and its gradient, as statements of C: what a kernel does between two products.

A stage is what can be computed once the products of its round are known. The way back needs no division of its own:
it is `jax.vjp` of the scalar function, its equations sorted by the same rule, waiting here for the sources'
cotangents. What
the forward pass keeps for it: the results of tanh, logistic and exp, from which their gradients are made, and those
raw values that are left in it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from seqmnist_jax.rnn.division import Division
from seqmnist_jax.rnn.jaxprs import KEPT, NotDivisibleError, flattened, needed

# In C, of arguments {0}, {1}, ...; what is no operator is a function that each kernel's header has.
OPERATIONS = {
    "add": "{} + {}",
    "add_any": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "abs": "abs_({})",
    "sign": "sign_({})",
    "max": "max_({}, {})",
    "min": "min_({}, {})",
    "square": "{0} * {0}",
    "sqrt": "sqrt_({})",
    "rsqrt": "1.f / sqrt_({})",
    "exp": "exp_({})",
    "log": "log_({})",
    "log1p": "log1p_({})",
    "expm1": "expm1_({})",
    "tanh": "tanh_({})",
    "logistic": "logistic_({})",
    "sin": "sin_({})",
    "cos": "cos_({})",
    "select_n": "{0} ? {2} : {1}",
    "gt": "{} > {}",
    "lt": "{} < {}",
    "ge": "{} >= {}",
    "le": "{} <= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} && {}",
    "or": "{} || {}",
    "not": "!{}",
}
_TRUTH = ("false", "true")
_COMPARISONS = frozenset({"gt", "lt", "ge", "le", "eq", "ne"})
_SAME = frozenset({"broadcast_in_dim", "reshape", "pvary", "copy", "stop_gradient", "convert_element_type"})
# What a value near 0 or 1 that multiplies the state is carried through to.
_LINEAR = frozenset({"add", "add_any", "sub", "mul", "neg", "square", "integer_pow", "select_n", "copy", "div"})


Array = jax.Array


class Options(NamedTuple):
    """What is static about a kernel's call.

    Attributes:
      outputs: of which steps they are wanted: 'all', 'last' (of the last step that runs), 'none'.
      reverse: from the last step to the first.
      precision: as in `cells`.
    """

    outputs: str
    reverse: bool
    precision: str


# In the order in which kernels number them.
OUTPUTS = ("none", "all", "last")


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """A result of a kernel's call."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Operands(NamedTuple):
    """The arrays of a kernel's call, or their gradients; outputs stand as [batch, time, number, hidden].

    Attributes:
      weights: [products, hidden, hidden], from source (rows) to result (columns).
      vectors: the 'p' values, [number, hidden].
      inputs: the 'x' values, [batch, time, number, hidden]; the matrix that makes them, [features, number, hidden],
        where a kernel does that itself (`Stages.front`).
      x: for the 's' values or that matrix, [batch, time, features]; no features where there are none. A kernel has a
        gradient of it with the matrix alone.
      carry: [carries, batch, hidden].
      lengths: int32 [batch] in 0 to time, or None.
    """

    weights: Array
    vectors: Array
    inputs: Array
    x: Array
    carry: Array
    lengths: Array | None

    def ends(self) -> Array:
        """Lengths, int32 [batch], also of whole sequences."""
        batch, time, _ = self.x.shape
        return jnp.full((batch,), time, jnp.int32) if self.lengths is None else self.lengths


class Kept(NamedTuple):
    """What the way back needs of the forward pass.

    Attributes:
      carry: after the last step, [carries, batch, hidden]; of a GPU's kernel in whole tiles of units.
      values: the rest, in an order that is the kernel's own business.
    """

    carry: Array
    values: Any


class Statement(NamedTuple):
    """``name = text``, of a stage; kind 'float' or 'bool'."""

    stage: int
    kind: str
    name: str
    text: str


class Output(NamedTuple):
    """A result: a name or number, and the stage in which it is known."""

    text: str
    stage: int


def _literal(value: Any) -> str:
    value = np.asarray(value)
    if value.dtype == bool:
        return "true" if value else "false"
    number = float(value)
    if np.isnan(number):
        raise NotDivisibleError(f"the constant {number} in a step")
    if np.isinf(number):  # in C++ and CUDA alike, without a header
        return "(1e38f * 10.0f)" if number > 0 else "(-1e38f * 10.0f)"
    return f"({number!r}f)" if np.signbit(number) else f"{number!r}f"


def _chosen(condition: str, other: str, value: str) -> str:
    """One of two truth values: a vector of a CPU has no choice between a literal and a vector."""
    if value in _TRUTH:
        return f"{condition} || {other}" if value == "true" else f"!{condition} && {other}"
    if other in _TRUTH:
        return f"{condition} && {value}" if other == "false" else f"!{condition} || {value}"
    return f"({condition} && {value}) || (!{condition} && {other})"


def _trace(function: Callable[..., Any], count: int, dtype: Any) -> Any:
    """The jaxpr of a function of so many scalars, its calls laid flat."""
    return flattened(function, [jax.ShapeDtypeStruct((), dtype)] * count, custom=True)


def _statements(
    closed: Any, names: Sequence[str], stages: Sequence[int], memory: frozenset[int] = frozenset()
) -> tuple[list[Statement], list[Output]]:
    """A jaxpr of scalars in C.

    Args:
      closed: the jaxpr.
      names, stages: of each argument.
      memory: which of the logistics, counted with tanh and exp, hold the state.

    Raises:
      NotDivisibleError: a primitive that has no text here, or numbers of another dtype than the arguments.
    """
    dtypes = {v.aval.dtype for v in closed.jaxpr.invars} | {np.dtype(bool)}
    known: dict[Any, Output] = {v: Output(n, s) for v, n, s in zip(closed.jaxpr.invars, names, stages, strict=True)}
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    statements: list[Statement] = []
    # Two equations of the same text are one; autodiff writes many twice.
    same: dict[tuple[int, str], str] = {}
    made = 0

    def number(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else constants.get(v)

    def read(v: Any) -> Output:
        value = number(v)
        return known[v] if value is None else Output(_literal(value), 0)

    for e in needed(closed.jaxpr.eqns, closed.jaxpr.outvars):
        name, numbers = e.primitive.name, [number(v) for v in e.invars]
        for v in (*e.invars, *e.outvars):
            if v.aval.dtype not in dtypes:  # within a derivative of its own, say: `divide` has seen the others
                raise NotDivisibleError(f"{name} of {v.aval.dtype} in a step")
        (result,) = e.outvars
        if all(value is not None for value in numbers):  # the stages' functions take vectors, not numbers alone
            with jax.ensure_compile_time_eval():
                constants[result] = e.primitive.bind(*numbers, **e.params)
            made += name in KEPT
            continue
        if name == "select_n" and numbers[0] is not None:
            chosen = 1 + bool(numbers[0])
            if numbers[chosen] is None:
                known[result] = known[e.invars[chosen]]
            else:
                constants[result] = numbers[chosen]
            continue
        given = [read(v) for v in e.invars]
        stage = max((g.stage for g in given), default=0)
        texts = [g.text for g in given]
        is_bool = e.invars[0].aval.dtype == bool, result.aval.dtype == bool
        if name in _SAME and is_bool[0] == is_bool[1]:
            known[result] = Output(texts[0], stage)
            continue
        if is_bool[0] and name in ("max", "min"):
            name = "or" if name == "max" else "and"
        if is_bool[0] and name in _COMPARISONS:  # in a vector of a CPU true is -1
            texts = [f"({text} ? 1.0f : 0.0f)" for text in texts]
        if name in _SAME:
            text = f"{texts[0]} ? 1.0f : 0.0f" if is_bool[0] else f"{texts[0]} != 0.0f"
        elif name == "select_n" and is_bool[1]:
            text = _chosen(*texts)
        elif name == "integer_pow":
            power = abs(e.params["y"])
            text = " * ".join(texts * power) if power else "1.f"
            text = text if e.params["y"] >= 0 else f"1.f / ({text})"
        elif name in OPERATIONS:
            text = OPERATIONS[name].format(*texts)
        else:
            raise NotDivisibleError(f"{name} in a step")
        if name in KEPT:
            if made in memory:
                statements.append(Statement(stage, "float", f"k{made}", f"signed_logistic_({texts[0]})"))
                text = f"opened_(k{made})"
            made += 1
        if (stage, text) not in same:
            same[stage, text] = f"v{len(statements)}"
            kind = "bool" if result.aval.dtype == bool else "float"
            statements.append(Statement(stage, kind, same[stage, text], text))
        known[result] = Output(same[stage, text], stage)
    return statements, [read(v) for v in closed.jaxpr.outvars]


def _memories(closed: Any, carries: int, made: Sequence[Any]) -> frozenset[int]:
    """Which of the logistics multiply the state.

    They decide over hundreds of steps, so their distance from 0 and from 1 must keep its last bits.
    """
    place = {v: i for i, v in enumerate(made)}
    gates: dict[Any, frozenset[int]] = {}
    state: dict[Any, bool] = dict.fromkeys(closed.jaxpr.invars[:carries], True)
    found: frozenset[int] = frozenset()
    for e in closed.jaxpr.eqns:
        given = [v for v in e.invars if not isinstance(v, jex.Literal)]
        through = e.primitive.name in _LINEAR
        if e.primitive.name == "mul" and len(given) == 2:
            for a, b in (given, given[::-1]):
                if state.get(b):
                    found |= gates.get(a, frozenset())
        for v in e.outvars:
            gates[v] = frozenset().union(*(gates.get(g, frozenset()) for g in given)) if through else frozenset()
            state[v] = through and any(state.get(g, False) for g in given)
            if v in place and e.primitive.name == "logistic":
                gates[v] = frozenset({place[v]})
    return found


class Stages:
    """The stages of a division, forward and backward.

    Attributes:
      front: whether a kernel makes the 'x' values of x itself, by a matrix; what is added to its product stands behind
        the 'p' values then, and has its sums there too.
      forward, backward: statements; in them the raw scalars are ``u.c[0]``, ``u.m[0]``, ...
      sources, carry, outputs: results forward.
      kept: what the forward pass keeps, ('c', i) a carry before the step, ('t', i) the result number i of a tanh,
        logistic or exp, ('m', i) a product's result; `texts` has each one's name.
      after: results that are a new carry, which is not kept twice: result -> carry.
      d_carry, d_results, d_inputs, sums: results backward: cotangents of the carry before, of the products'
        results, of the 'x' values; `sums` the cotangents of parameters that differ, and `sum_of` which of them each
        parameter has (None: zero).
      spared: results of tanh that need not be kept, and how they are made of the rest of what is kept.
      memory: the logistics that hold the state, kept as the smaller one of s and 1 - s, negative where it is that.
      sources_again: the sources, made again of what is kept; none unless `with_sources`.
    """

    def __init__(self, division: Division, with_sources: bool = False, front: bool = False):
        self.division = d = division
        self.front = front
        n, n_sources, n_carries = len(d.raws), len(d.sources), len(d.carries)
        names, stages, counts = [], [], dict.fromkeys("cmxsp", 0)
        for raw in d.raws:
            names.append(f"u.{raw.kind}[{counts[raw.kind]}]")
            stages.append(raw.round)
            counts[raw.kind] += 1

        def forward(*raws: Any) -> Any:
            results, made = d.scalars(raws, sigmoid=jax.lax.logistic)
            return [*results, *made]

        closed = _trace(forward, n, d.dtype)
        cuts = (n_sources, n_sources + n_carries, n_sources + n_carries + d.outputs)
        made = closed.jaxpr.outvars[cuts[2] :]
        alive = needed(closed.jaxpr.eqns, closed.jaxpr.outvars)
        order = [e.outvars[0] for e in alive if e.primitive.name in KEPT]
        memory = _memories(closed, n_carries, made)
        self.forward, results = _statements(closed, names, stages, frozenset(order.index(made[i]) for i in memory))
        self.sources, self.carry = results[: cuts[0]], results[cuts[0] : cuts[1]]
        self.outputs, kept = results[cuts[1] : cuts[2]], results[cuts[2] :]
        by_carry = {out.text: i for i, out in reversed(list(enumerate(self.carry)))}
        self.after = {i: by_carry[out.text] for i, out in enumerate(kept) if out.text in by_carry}
        variables = {s.name for s in self.forward}  # what has none of these is a number
        self.memory = frozenset(i for i in memory if i not in self.after and kept[i].text in variables)

        def backward(*given: Any) -> Any:
            raws, results, bars = given[:n], given[n : n + len(kept)], given[n + len(kept) :]
            values, pull = jax.vjp(lambda *r: tuple(d.scalars(r, results)[0]), *raws)
            sources = values[:n_sources] if with_sources else ()
            return [*(b for raw, b in zip(d.raws, pull(tuple(bars)), strict=True) if raw.kind != "s"), *sources]

        back_names = [*names, *(f"t{i}" for i in range(len(kept)))]
        back_names += [f"u.ds[{i}]" for i in range(n_sources)]
        back_names += [f"u.dn[{i}]" for i in range(n_carries)] + [f"u.dy[{i}]" for i in range(d.outputs)]
        waits = [d.rounds - round + 1 for round, _ in d.sources]
        back_stages = [0] * (n + len(kept)) + waits + [0] * (n_carries + d.outputs)
        self.backward, bars = _statements(_trace(backward, len(back_names), d.dtype), back_names, back_stages)
        read = " ".join([*(s.text for s in self.backward), *(bar.text for bar in bars)])
        bars, self.sources_again = bars[: n - counts["s"]], bars[n - counts["s"] :]
        used = {name for name in back_names if name in words(read)}
        recalled = [i for i in range(len(kept)) if f"t{i}" in used]
        self.after = {i: carry for i, carry in self.after.items() if i in recalled}
        carries = [i for i in range(n_carries) if f"u.c[{i}]" in used or i in self.after.values()]
        order_of = {v: i for i, v in enumerate(order)}
        self.kept = [("c", i) for i in carries]
        self.kept += [("t", i) for i in recalled if i not in self.after]
        self.kept += [("m", i) for i in range(len(d.results)) if f"u.m[{i}]" in used]
        self.texts = [
            names[[r.kind for r in d.raws].index(kind) + i]
            if kind != "t"
            else f"k{order_of[made[i]]}"
            if i in self.memory
            else kept[i].text
            for kind, i in self.kept
        ]
        self.spared = self._find_spared(kept, recalled)
        by_kind: dict[str, list[Output]] = {kind: [] for kind in "cmxsp"}
        for raw, bar in zip((raw for raw in d.raws if raw.kind != "s"), bars, strict=True):
            by_kind[raw.kind].append(bar)
        self.d_carry, self.d_results, self.d_inputs = by_kind["c"], by_kind["m"], by_kind["x"]
        summed = by_kind["p"] + (by_kind["x"] if front else [])
        self.sums = [bar for bar in dict.fromkeys(summed) if bar.text != "0.0f"]
        self.sum_of = [self.sums.index(bar) if bar in self.sums else None for bar in summed]

    def gradients(
        self, given: Operands, weights: Array, sums: Array, d_inputs: Array, d_carry: Array, dx: Array | None = None
    ) -> Operands:
        """Puts together what a kernel's way back gives; `sums` are the cotangents [sums, hidden] of `self.sums`."""
        none = jnp.zeros(self.division.hidden, self.division.dtype)
        vectors = [none if place is None else sums[place] for place in self.sum_of]
        d_vectors = jnp.stack(vectors) if vectors else given.vectors
        return Operands(weights, d_vectors, d_inputs, jnp.zeros_like(given.x) if dx is None else dx, d_carry, None)

    def _find_spared(self, results: Sequence[Output], recalled: Sequence[int]) -> dict[int, list[Statement]]:
        """See `spared`: a tanh of what is kept too costs the way back less than its two bytes cost the memory."""
        made = {s.name: s for s in self.forward}
        raws = {f"u.{kind}[{i}]" for kind, i in self.kept if kind != "t"}
        found: dict[int, list[Statement]] = {}
        shared: set[str] = set()  # inner values that an earlier one of them has made
        for i in [i for kind, i in self.kept if kind == "t" and i not in self.memory]:
            known = {results[j].text: f"t{j}" for j in recalled if j < i and j not in found}
            known |= {name: f"f{name}" for name in shared}
            statements: dict[str, Statement] = {}

            def translated(text: str, known: dict[str, str], statements: dict[str, Statement]) -> str | None:
                for word in sorted(words(text) & (made.keys() | known.keys())):
                    if word not in known:
                        inner = made[word]
                        its = None if any(f"{kept}_(" in inner.text for kept in KEPT) else inner.text
                        its = its and translated(its, known, statements)
                        if its is None:
                            return None
                        known[word] = f"f{word}"
                        statements[word] = Statement(0, inner.kind, f"f{word}", its)
                text = renamed(text, known)
                read = {w for w in words(text) if w.startswith("u.") and not w.startswith(("u.s[", "u.p["))}
                return text if read <= raws else None

            own = made.get(results[i].text)
            text = translated(own.text, known, statements) if own and own.text.startswith("tanh_(") else None
            if text is not None:
                shared |= statements.keys()
                found[i] = [*statements.values(), Statement(0, "float", f"t{i}", text)]
        return found

    def recall(self, apart: Sequence[int], spare: bool = False) -> list[Statement]:
        """What the way back reads: those of `kept` that stand in ``u.k``, by place, and the carries after the step.

        Args:
          apart: the places.
          spare: whether the others are made of them (`spared`).
        """
        out = [Statement(0, "float", f"t{i}", f"u.after[{carry}]") for i, carry in self.after.items()]
        for i, place in enumerate(apart):
            kind, which = self.kept[place]
            if kind == "t":
                text = f"u.k[{i}]"
                out.append(Statement(0, "float", f"t{which}", f"opened_({text})" if which in self.memory else text))
            else:
                out.append(Statement(0, "float", f"u.{kind}[{which}]", f"u.k[{i}]"))
        return out + ([s for statements in self.spared.values() for s in statements] if spare else [])


_WORD = re.compile(r"[\w.\[\]]+")


def words(text: str) -> frozenset[str]:
    """The names in a text of C."""
    return frozenset(_WORD.findall(text))


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A text of C with other names for some of its names."""
    return _WORD.sub(lambda word: names.get(word[0], word[0]), text)


def crossing(statements: Sequence[Statement], outputs: Sequence[tuple[Output, int]]) -> dict[str, str]:
    """The names that are used in a later stage than they are made in, with their kinds.

    Args:
      statements: all of them.
      outputs: results, and the stage in which each is written.
    """
    made = {s.name: s for s in statements}
    used = [(name, s.stage) for s in statements for name in sorted(words(s.text))]
    used += [(out.text, stage) for out, stage in outputs]
    return {n: made[n].kind for n, stage in used if n in made and made[n].stage < stage and not n.startswith("u.")}
