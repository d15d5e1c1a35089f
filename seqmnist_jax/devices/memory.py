"""How much memory a compiled program needs, and how much there is."""

import math
from pathlib import Path
from typing import Any

import jax

from seqmnist_jax.errors import UsageError


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
    """Bytes that programs may still take on the first device: its own memory, or the machine's for a CPU.

    None where the system does not say.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


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
    if available is None:
        return f"Memory: {text}."
    text += f" of {available / 2**20:,.0f} MiB available"
    if needed > available:
        raise TooLarge(f"Out of memory before it begins: {text}. Lower train.batch_size, or set model.remat.")
    return f"Memory: {text}."
