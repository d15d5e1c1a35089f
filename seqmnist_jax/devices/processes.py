"""Several processes as one program: who they are, and what they must agree on.

All run the same code on the same config. Process 0 alone writes; whatever decides which program
runs next (how many steps, whether to stop) is process 0's word. With one process all of this is nothing.
"""

import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from seqmnist_jax.errors import SeqMnistError, UsageError

ALONE, AUTO = "", "auto"
# Seconds after which a process that does not come, or is heard of no more, is given up.
JOIN_SECONDS = 60
SILENT_SECONDS = 30


def initialize(spec: str) -> None:
    """Joins the other processes; to be called before anything else asks JAX for its devices.

    Args:
      spec: '' for a process alone; 'auto' under a scheduler that JAX knows (Slurm, Open MPI, Kubernetes);
        else 'ADDRESS:PORT,COUNT,INDEX': where process 0 listens, how many there are, which this is.

    Raises:
      UsageError: another form, or no scheduler that JAX knows.
      SeqMnistError: the processes can't be joined. Where one has not come in time, JAX itself ends the others.
    """
    if spec == ALONE:
        return
    given: dict[str, Any] = {}
    if spec != AUTO:
        found = re.fullmatch(r"([^\s,]+:\d+),(\d+),(\d+)", spec)
        if not found or int(found[3]) >= int(found[2]):
            raise UsageError(
                f"runtime.distributed is {spec!r}; expected 'auto', or 'ADDRESS:PORT,COUNT,INDEX' with INDEX from 0 "
                "to COUNT - 1, as '10.0.0.1:1234,2,0'."
            )
        given = {"coordinator_address": found[1], "num_processes": int(found[2]), "process_id": int(found[3])}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Said beforehand, because JAX ends the process where it stands when the time is over.
    print(f"Waiting for all processes ({spec}), at most {JOIN_SECONDS} s.", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=SILENT_SECONDS,
            shutdown_timeout_seconds=SILENT_SECONDS,
        )
    except ValueError as e:
        raise UsageError(
            f"runtime.distributed is {spec!r}, but JAX finds no scheduler that says which process this is ({e}); "
            "expected 'ADDRESS:PORT,COUNT,INDEX'."
        ) from e
    except RuntimeError as e:
        raise SeqMnistError(
            f"runtime.distributed is {spec!r}, but the processes can't be joined: {str(e).strip().splitlines()[0]}"
        ) from e


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """Process 0's value, in all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def wait(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
