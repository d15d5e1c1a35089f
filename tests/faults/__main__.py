"""Injects faults and prints what came of them.

    python -m tests.faults [--full] [--only=NAME[,NAME]] [--seed=0]

Exits with 1 if anything was lost. Without --full each kind has a few tries only.
"""

import argparse
import importlib
import sys
import time

from tests.faults.outcome import as_table

# The module of each campaign: its tries, and with --full.
CAMPAIGNS = {
    "kills": (4, 120),
    "processes": (1, 10),
    "sweeps": (3, 30),
    "disk": (2, 20),
    "checkpoints": (20, 300),
    "data": (100, 2000),
    "config_values": (25, 400),
    "native": (10, 500),
}


def main() -> None:
    """Runs the campaigns that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Injects faults.")
    parser.add_argument("--full", action="store_true", help="many tries of each: about an hour on two cores")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CAMPAIGNS)
    unknown = set(names) - set(CAMPAIGNS)
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}; expected some of {', '.join(CAMPAIGNS)}")
    outcomes = []
    for name in names:
        start = time.monotonic()
        module = importlib.import_module(f"tests.faults.{name}")
        found = module.campaign(CAMPAIGNS[name][arguments.full], arguments.seed)
        outcomes += found
        print(f"{name}: {time.monotonic() - start:.0f} s\n{as_table(found)}", file=sys.stderr, flush=True)
    print(as_table(outcomes))
    sys.exit(any(one.lost for one in outcomes))


if __name__ == "__main__":
    main()
