"""Trees of arrays: their names, several stacked as replicas, on which device they lie."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding


def tensor_names(tree: Any) -> list[str]:
    """The path of each tensor, as in 'rnn/layer_0/forward/bias', in the order of ``jax.tree.leaves``."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def stack(trees: Sequence[Any]) -> Any:
    """The trees as one, each leaf with a leading axis of replicas; a single tree as it is."""
    return trees[0] if len(trees) == 1 else _stacked(trees)


def unstack(tree: Any, count: int) -> list[Any]:
    """The trees that `stack` made one, on one device of this process, wherever the whole is."""
    tree = here(tree)
    return [tree] if count == 1 else _parts(tree, count)


# One program each: of every leaf by itself there would be dozens to compile.
@jax.jit
def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def _parts(tree: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def here(tree: Any) -> Any:
    """The tree on this process's first device."""
    sharding = jax.tree.leaves(tree)[0].sharding
    if len(sharding.device_set) == 1:
        return tree
    if jax.process_count() == 1:
        return jax.device_put(tree, jax.local_devices()[0])
    # What other processes have must come here first.
    whole = move_to(NamedSharding(sharding.mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


@functools.cache
def move_to(sharding: NamedSharding) -> Callable[[Any], Any]:
    """Moves a tree on the mesh to another sharding of it, between processes too."""
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def on_one_device(tree: Any) -> Any:
    """Shapes that restore to this process's first device, whatever device saved them."""
    here = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
