"""That `runtime.deterministic` reaches XLA before it starts."""

import os
import subprocess
import sys

CODE = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
from seqmnist_jax.cli import process
process.be_deterministic()
process.be_deterministic()
import jax
print(len(jax.devices()), os.environ["XLA_FLAGS"])
"""


def test_the_flag_is_added_once_and_xla_knows_it():
    """XLA ends a process that gives it a flag which it does not know."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}
    )
    assert done.stdout.split() == [
        "2",
        "--xla_force_host_platform_device_count=2",
        "--xla_gpu_deterministic_ops=true",
    ], done.stderr
