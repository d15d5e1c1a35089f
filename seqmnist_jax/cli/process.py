"""Settings of a whole process, which only who starts it may choose."""

import contextlib
import os
import threading

import jax

# XLA then takes no operation whose result depends on the order in which threads arrive, and
# chooses kernels without timing them. A CPU's programs have none of either.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def be_deterministic() -> None:
    """Asks XLA for the same bits from the same program, on a GPU too; before anything asks JAX for its devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC not in flags.split():
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def start_device() -> None:
    """Has JAX look for its devices in a thread: a GPU takes seconds to start, as long as the imports that follow."""

    def start() -> None:
        with contextlib.suppress(Exception):  # who asks next is told
            jax.devices()

    # Not a daemon, which an early end of the process would cut off amid the driver's work.
    threading.Thread(target=start, name="start device").start()


def device_problem() -> str:
    """Why JAX has no device to run on; '' where it has one."""
    try:
        jax.devices()
        return ""
    except Exception as e:  # JAX has several, one without a word
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(e).partition(". (set JAX_PLATFORMS")[0] or "there is none of these"
        return (
            f"JAX finds no device: JAX_PLATFORMS is {asked!r} ({reason}). Unset it to take what is there; an NVIDIA "
            "GPU needs the package installed with '.[cuda]'."
        )
