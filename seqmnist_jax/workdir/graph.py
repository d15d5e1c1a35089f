"""A traced program as the graph that TensorBoard draws, its operations grouped by their named scopes.

JAX has no graph; it has the program as traced, a jaxpr, in which each operation knows the
``jax.named_scope`` and the Flax module that it was written in. Operations of the backward pass go under
'gradients', as TF1's did.
"""

import functools
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

# They give what they are given in another shape or type: left out, as they would hide the others.
PLUMBING = ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "stop_gradient")
# Where an operation stands that is in no scope.
NO_SCOPE = "bookkeeping"
GRADIENTS = "gradients"
# Where arguments stand: the parameters among the operations that read them.
PLACES = {"state/params/": "", "state/batch_stats/": "", "state/opt_state/": "optimizer/state/"}


@functools.cache
def load_tensorboardx() -> None:
    """Imports tensorboardX as if PyTorch were not installed, which it wants for type hints and which takes seconds."""
    is_hidden = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
    try:
        importlib.import_module("tensorboardX")
    finally:
        if is_hidden:
            del sys.modules["torch"]


def graph_def(traced: Any, names: Sequence[str], root: str) -> Any:
    """The GraphDef of a traced program, for ``Event(graph_def=...)``.

    A loop's body, and what a function calls, stand in a scope of their own, once; loops have no edges back.
    Where operations differ by platform, those are shown that run on any.

    Args:
      traced: as ``jax.jit(f).trace(...)`` gives it.
      names: of f's arguments; what is no array is named by its path below.
      root: a scope to leave out, with all its operations one level higher: the model's class.

    Returns:
      tensorboardX's GraphDef; its nodes' ``_output_shapes`` hold the shapes.
    """
    load_tensorboardx()
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.versions_pb2 import VersionDef

    graph = _Graph(root)
    paths, _ = jax.tree_util.tree_flatten_with_path(traced.args_info[0])
    known = {}
    for (path, _), variable in zip(paths, traced.jaxpr.jaxpr.invars, strict=True):
        below = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        known[variable] = _Source(f"{names[path[0].idx]}/{below}" if below else names[path[0].idx], variable)
    known |= {variable: _Source("constants/array", variable) for variable in traced.jaxpr.jaxpr.constvars}
    graph.add(traced.jaxpr.jaxpr, known, scope="")
    return GraphDef(node=graph.nodes, versions=VersionDef(producer=22))


class _Source:
    """An argument, which becomes a node when something uses it."""

    def __init__(self, path: str, variable: Any):
        for prefix, place in PLACES.items():
            if path.startswith(prefix):
                path = place + path.removeprefix(prefix)
        self.path = path
        self.variable = variable
        self.name: str | None = None


class _Graph:
    """The nodes made so far."""

    def __init__(self, root: str):
        self.nodes: list[Any] = []
        self._root = root
        self._used: set[str] = set()

    def add(self, jaxpr: Any, known: dict[Any, Any], scope: str) -> list[Any]:
        """Adds the operations of a jaxpr.

        Args:
          jaxpr: the jaxpr.
          known: what each of its arguments and constants is: a name, a `_Source`, or None for a literal.
          scope: the one that it stands in.

        Returns:
          What each result is.
        """

        def find(atom: Any) -> Any:
            return None if isinstance(atom, core.Literal) else known.get(atom)

        for equation in jaxpr.eqns:
            inputs = [find(atom) for atom in equation.invars]
            outputs = self._operation(equation, inputs, _below(scope, self._scopes(equation)))
            known.update(zip(equation.outvars, outputs, strict=True))
        return [find(atom) for atom in jaxpr.outvars]

    def _scopes(self, equation: Any) -> str:
        """The scopes that an operation was written in, without JAX's own marks, as 'transpose(jvp(rnn))/scan'."""
        text = str(equation.source_info.name_stack)
        found = [one for one in re.sub(r"\w+\(|\)", "", text).split("/") if one not in ("", self._root)]
        return "/".join([GRADIENTS, *found] if "transpose(" in text else found)

    def _operation(self, equation: Any, inputs: list[Any], scope: str) -> list[Any]:
        """Adds an operation, or what it consists of, and gives what its results are."""
        name = equation.primitive.name
        if name in PLUMBING and len(inputs) == 1:
            return inputs
        if all(one is None for one in inputs) and not list(_inner(equation)):
            return [None] * len(equation.outvars)  # a constant
        for inner, arguments in _inner(equation):
            is_thin = name == "cond" or len(inner.eqns) == 1
            called = "scan" if name == "scan" else inner.debug_info.func_name.strip("_<>")
            below = scope if is_thin or not scope else self._unused(_below(scope, called))
            return self.add(inner, dict(zip(inner.invars, arguments(inputs), strict=True)), below)
        return self._node(scope or NO_SCOPE, name, inputs, equation.outvars)

    def _node(self, scope: str, op: str, inputs: Sequence[Any], results: Sequence[Any]) -> list[str]:
        """Adds a node of some results, and gives their names."""
        from tensorboardX.proto.attr_value_pb2 import AttrValue
        from tensorboardX.proto.node_def_pb2 import NodeDef
        from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

        sources = list(dict.fromkeys(self._named(one) for one in inputs if one is not None))
        name = self._unused(_below(scope, op) if op else scope)
        shapes = [
            TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in result.aval.shape]) for result in results
        ]
        attributes = {
            "_output_shapes": AttrValue(list=AttrValue.ListValue(shape=shapes)),
            "dtype": AttrValue(s=", ".join(str(result.aval.dtype) for result in results).encode()),
        }
        self.nodes.append(NodeDef(name=name, op=op or "Argument", input=sources, attr=attributes))
        return [name if place == 0 else f"{name}:{place}" for place in range(len(results))]

    def _named(self, one: Any) -> str:
        if isinstance(one, _Source):
            if one.name is None:
                (one.name,) = self._node(one.path, "", [], [one.variable])
            return one.name
        return one

    def _unused(self, name: str) -> str:
        """The name, with a number where it is taken."""
        found, count = name, 0
        while found in self._used:
            count += 1
            found = f"{name}_{count}"
        self._used.add(found)
        return found


def _below(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope and name else scope or name


def _inner(equation: Any) -> Iterator[tuple[Any, Any]]:
    """The jaxpr that an operation runs, if any, and how its arguments follow from the operation's."""
    params = equation.params
    if equation.primitive.name == "while":
        # The condition only counts.
        yield params["body_jaxpr"].jaxpr, lambda inputs: inputs[params["cond_nconsts"] :]
    elif equation.primitive.name == "cond":
        yield params["branches"][-1].jaxpr, lambda inputs: inputs[1:]
    else:
        for name in ("jaxpr", "call_jaxpr"):
            if name in params:
                inner = params[name]
                yield getattr(inner, "jaxpr", inner), lambda inputs: inputs
