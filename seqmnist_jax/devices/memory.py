"""How much memory a compiled program needs, and how much there is."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from seqmnist_jax.devices import processes
from seqmnist_jax.errors import UsageError

MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of a control group, of the second version and of the first: the limit, what counts, and the files' cache in that,
# which is given back at need.
OF_A_GROUP = {
    "": ("max", "current", "inactive_file"),
    "memory": ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
}


class TooLarge(UsageError):
    """What is asked for needs more memory than the device has."""


def needed_bytes(compiled: Any) -> int:
    """Bytes of a compiled program's arguments, results and temporary buffers on one device, by XLA's analysis.

    Args:
      compiled: as ``jax.jit(...).lower(...).compile()`` gives it.
    """
    found = compiled.memory_analysis()
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return sizes - found.alias_size_in_bytes  # donated arguments are results too


def available_bytes() -> int | None:
    """Bytes that programs may still take on the first device: its own memory, or for a CPU the machine's.

    Of that, where control groups limit it, what they leave.

    None where the system does not say.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu" or not MEMINFO.exists():
        return None
    found = [line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")]
    return min([*(int(line.split()[1]) * 1024 for line in found), *_left_in_groups()], default=None)


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group that this process is in, as a container's or a job's, may still take."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, controllers, place = line.split(":", 2)
        if controllers in OF_A_GROUP:
            root, names = GROUPS / controllers, OF_A_GROUP[controllers]
            own = root / place.lstrip("/")
            for folder in (own, *own.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # not to be seen from here, or "max"
                    most, taken = (int((folder / f"memory.{name}").read_text()) for name in names[:2])
                    counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield max(0, most - taken + int(counted[names[2]]))


def check_state(template: Any) -> None:
    """Checks that a training state of these shapes has room, before one is made.

    Raises:
      TooLarge: it has none.
    """
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(template))
    available = available_bytes()
    if available is not None and needed > available:
        raise TooLarge(
            f"The parameters and what training keeps of them need {needed / 2**20:,.0f} MiB of "
            f"{available / 2**20:,.0f} MiB available. Lower model.hidden_size, model.num_layers, model.kernel_size "
            "(of a TCN) or train.eval_every (of so many steps the gradient norms are kept)."
        )


def plan(compiled: Any) -> str:
    """One line: what a program needs and what there is.

    Raises:
      TooLarge: it needs more than there is.
    """
    needed, available = needed_bytes(compiled), available_bytes()
    text = f"the training step needs {needed / 2**20:,.0f} MiB"
    if available is not None:
        text += f" of {available / 2**20:,.0f} MiB available"
    if processes.any_of(available is not None and needed > available):
        raise TooLarge(f"Out of memory before it begins: {text}. Lower train.batch_size, or set model.remat.")
    return f"Memory: {text}."
