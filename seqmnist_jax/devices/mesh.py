"""How runs spread over devices: one mesh with an axis of replicas and one of data.

Replicas never communicate. A batch that is divided among devices is made whole again by the mean of
the gradients.
"""

import re

import jax
import numpy as np
from jax.sharding import Mesh

from seqmnist_jax.errors import UsageError

REPLICA, DATA = "replica", "data"
AUTO = "auto"


def shards(axis: str | None) -> int:
    """Among how many devices a batch is divided: those of the axis of a ``shard_map``; 1 where it is None."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def own_share(whole: jax.Array, axis: str | None) -> jax.Array:
    """This device's share of what all devices have of a batch, [batch, ...]; the whole where the axis is None."""
    if axis is None:
        return whole
    size = whole.shape[0] // shards(axis)
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * size, size)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)


def make_mesh(spec: str, replicas: int, batch_size: int) -> Mesh | None:
    """The mesh that a config's runtime.mesh means for so many replicas.

    Args:
      spec: 'auto', or 'replica:R,data:D'.
      replicas: how many runs train together.
      batch_size: of each.

    Returns:
      The mesh, over the first R * D devices; None for a single device.

    Raises:
      UsageError: another form, more devices than there are, R or D that does not divide replicas or batch, or a
        process that would have nothing to do.
    """
    devices = jax.devices()
    if spec == AUTO:
        groups = largest_divisor(replicas, len(devices))
        shards = largest_divisor(batch_size, len(devices) // groups)
    else:
        found = re.fullmatch(r"replica:(\d+),data:(\d+)", spec)
        if not found or not all(map(int, found.groups())):
            raise UsageError(f"runtime.mesh is {spec!r}; expected 'auto' or 'replica:R,data:D', as 'replica:2,data:4'.")
        groups, shards = map(int, found.groups())
        if groups * shards > len(devices):
            raise UsageError(f"runtime.mesh is {spec!r}, {groups * shards} devices, but there are {len(devices)}.")
        if replicas % groups:
            raise UsageError(f"runtime.mesh is {spec!r}, but {replicas} replicas are no multiple of {groups}.")
        if batch_size % shards:
            raise UsageError(
                f"runtime.mesh is {spec!r}, but batches of {batch_size} (train.batch_size) are no multiple of {shards}."
            )
    if groups * shards == 1 == jax.process_count():
        return None
    used = {device.process_index for device in devices[: groups * shards]}
    if len(used) < jax.process_count():
        raise UsageError(
            f"runtime.mesh is {spec!r}: {replicas} replicas, batches of {batch_size} (train.batch_size) are divided "
            f"among {groups * shards} devices, which {len(used)} of the {jax.process_count()} processes have; expected "
            f"numbers that reach more of the {len(devices)} devices, or fewer processes."
        )
    return Mesh(np.asarray(devices[: groups * shards]).reshape(groups, shards), (REPLICA, DATA))
