"""The same bits from the same program, on a GPU too."""

import os

# XLA then takes no operation whose result depends on the order in which threads arrive, and
# chooses kernels without timing them. A CPU's programs have none of either.
FLAG = "--xla_gpu_deterministic_ops=true"


def enable() -> None:
    """Sets XLA's flag; to be called before anything asks JAX for its devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags.split():
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
