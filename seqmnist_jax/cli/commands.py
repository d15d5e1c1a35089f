"""The command that makes a run, for the record and for people, and the folder of a run that names none."""

import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from seqmnist_jax.errors import UsageError


def of_this_run(arguments: Sequence[str] = ()) -> str:
    """The command that makes this run anywhere: the config and what it overrides, without this machine's paths."""
    arguments = arguments or sys.argv
    kept = []
    for argument, before in zip(arguments[1:], arguments, strict=False):
        is_config = re.match(r"--?(no)?config\b", argument) and not re.match(r"--?(no)?config\.runtime\.", argument)
        if is_config or before in ("--config", "-config"):
            kept.append(argument)
    return shlex.join(["python", "launch.py", *kept])


def of_one_run(changes: dict[str, Any]) -> str:
    """The command that makes one run of this sweep alone, that with these values of the swept fields."""
    alone = [argument for argument in sys.argv if not re.match(r"--?(seeds|config\.sweep)\b", argument)]
    return of_this_run([*alone, *(f"--config.{field}={value}" for field, value in changes.items())])


def to_look_at(workdir: Path, is_sweep: bool) -> str:
    """The commands by which one looks at a run, or a sweep, that is done."""
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else Path("python")
    launch, where = f"{python} launch.py", shlex.quote(str(workdir))
    look = "--mode=table --workdirs" if is_sweep else "--mode=evaluate --workdir"
    return (
        f"\nNext:\n  {launch} {look} {where}\n  {launch} --mode=report --workdir {where}\n"
        f"  tensorboard --logdir {where}      (pip install tensorboard)"
    )


def new_workdir() -> Path:
    """A folder runs/<config name>/<timestamp> that no other run has.

    Raises:
      UsageError: there is no name left.
    """
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    start = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = Path("runs", name, start + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UsageError(f"runs/{name} already has a thousand folders of this second; name one by --workdir.")
