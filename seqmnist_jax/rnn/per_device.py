"""A batch that is explicitly sharded: each device runs the layer on its own sequences."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmnist_jax.rnn.checks import check_rows


def _explicit(mesh: Any) -> frozenset[str]:
    """A mesh's axes over which arrays' types say how they are divided."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)


def _divided(named: list[tuple[str, Any]]) -> tuple[Any, Any]:
    """The mesh, and its axes over which sequences are divided; (None, None) where nothing is.

    Raises:
      ValueError: something else is divided, or the sequences in two ways.
    """
    mesh, axes, of = None, None, ""
    for name, array in named:
        sharding = jax.typeof(array).sharding
        spec = sharding.spec
        if not any(spec):
            continue
        if name == "params":
            raise ValueError(f"params has arrays sharded as {spec}; expected them whole: use jax.sharding.reshard")
        if any(spec[1:]):
            raise ValueError(f"{name} is sharded as {spec}; expected axis 0 alone, the batch: use jax.sharding.reshard")
        if axes not in (None, spec[0]):
            raise ValueError(f"{name} is sharded over {spec[0]!r}, but {of} over {axes!r}; expected one way for all")
        mesh, axes, of = sharding.mesh, spec[0], name
    return mesh, axes


@functools.cache
def per_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(function, params, x, ...)``, with arguments of these names, in a `jax.shard_map` over explicit axes.

    So a kernel sees its device's sequences alone. What has a row for each sequence is divided as x is, or as what else
    is sharded, and so are results; all else is whole on each device, and its gradients are summed.
    """
    names = list(inspect.signature(run).parameters)[1:]

    @functools.wraps(run)
    def enter(function: Any, *arguments: Any) -> Any:
        paths, tree = jax.tree.flatten_with_path(arguments)
        named = [(names[path[0].idx], leaf) for path, leaf in paths]
        mesh, axes = _divided([(name, leaf) for name, leaf in named if isinstance(leaf, jax.Array)])
        if mesh is None:
            return run(function, *arguments)
        batch = arguments[names.index("x")].shape[0]
        check_rows("carry", [leaf for name, leaf in named if name == "carry"], batch, "an explicitly sharded batch")

        def one(arrays: dict[int, Any]) -> Any:
            leaves = [arrays.get(place, leaf) for place, (_, leaf) in enumerate(named)]
            return run(function, *jax.tree.unflatten(tree, leaves))

        arrays = {place: leaf for place, (_, leaf) in enumerate(named) if isinstance(leaf, jax.Array | np.ndarray)}
        specs = {
            place: P(axes) if named[place][0] != "params" and leaf.shape[:1] == (batch,) else P()
            for place, leaf in arrays.items()
        }
        arrays = {
            place: jax.sharding.reshard(leaf, NamedSharding(mesh, specs[place])) for place, leaf in arrays.items()
        }
        given = {"mesh": mesh, "axis_names": _explicit(mesh), "check_vma": False}
        return jax.shard_map(one, in_specs=(specs,), out_specs=P(axes), **given)(arrays)

    return enter
