"""Where a result comes from: versions, device, commit."""

import functools
import importlib.metadata
import itertools
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jax

import seqmnist_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "clu", "numpy")
# Environment variables that change what JAX or the kernel does begin so.
VARIABLES = ("JAX_", "XLA_", "NVIDIA_", "CUDA_", "TF_CUDNN", "SEQMNIST_", "CXX", "OMP_")


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that a result depends on."""
    # Of this package, which a checkout runs without being installed, the version that it says itself.
    found: dict[str, str | None] = {"python": platform.python_version(), "seqmnist_jax": seqmnist_jax.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device() -> str:
    """The device that JAX runs on, in words: how many, of what kind; for a CPU its model and cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU core{'' if cores == 1 else 's'}, {model}"


def origin() -> dict[str, Any]:
    """What a result says of where it comes from."""
    return {"versions": versions(), "device": device(), "git_commit": git_commit()}


def environment() -> dict[str, Any]:
    """All that a rerun needs to know of what a run ran in, beside its config and data."""
    return {
        **origin(),
        "platform": platform.platform(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "packages": _packages(),
    }


def config_title(command: str | None) -> str | None:
    """What a command trains, for people and without the seed: 'best/pixel_gru, output_keep=0.8'."""
    words = shlex.split(command or "")
    path = next((word for before, word in itertools.pairwise(words) if before == "--config"), None)
    if path is None:
        return None
    fields = [
        word.removeprefix("--config.")
        for word in words
        if re.match(r"--config\.(?!(seed|sweep|choose|choose_steps)=)", word)
    ]
    changes = [re.sub(r"^[\w.]+\.(?=\w+=)", "", field) for field in fields]
    return ", ".join([path.partition(".py")[0].rpartition("configs/")[2], *changes])


@functools.cache
def _packages() -> dict[str, str]:
    """All that is installed, by name: a tenth of a second's reading."""
    packages = {found.name: found.version for found in importlib.metadata.distributions()}
    return dict(sorted(packages.items(), key=lambda item: item[0].lower()))


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, '+changes' where files differ; None outside one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # Another project's checkout that merely contains this package, say in a virtual
    # environment, does not track this file.
    if not git("ls-files", Path(__file__).name):
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
