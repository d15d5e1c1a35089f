"""The command that makes a run, for the record and for people, and the folder of a run that names none."""

import datetime
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from seqmnist_jax.errors import UsageError
from seqmnist_jax.workdir.config import OF_SWEEPS, of_one_run


def of_this_run(changes: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The command that makes this run anywhere, without this machine's paths; of a sweep the run with these values."""
    config = flags.FLAGS["config"]
    fields = {**config_flags.get_override_values(config), **changes}
    kept = of_one_run(fields)
    # Where the file itself is that of a sweep, one run of it must say that it is none.
    file = ConfigFileFlagParser("config").parse(config_flags.get_config_filename(config))
    kept |= {field: nothing for field, nothing in OF_SWEEPS.items() if file.get(field, nothing) != nothing}
    given = [f"--config.{field}={value}" for field, value in kept.items()]
    return shlex.join(["python", "launch.py", "--config", config_flags.get_config_filename(config), *given])


def _launch() -> list[str]:
    """How this program is started from the current folder."""
    python = Path(sys.executable)
    return [str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"), sys.argv[0]]


def to_go_on(workdir: Path) -> str:
    """The very command that goes on with what this one has begun, in words that end a message."""
    given, arguments = list[str](), iter(sys.argv[1:])
    for argument in arguments:
        if re.fullmatch("--?workdir", argument):
            next(arguments)
        elif not re.match("--?workdir=", argument):
            given.append(argument)
    return f"\nTo go on:\n  {shlex.join([*_launch(), *given, f'--workdir={workdir}'])}"


def to_look_at(workdir: Path, is_sweep: bool) -> str:
    """The commands by which one looks at a run, or a sweep, that is done."""
    launch, where = shlex.join(_launch()), shlex.quote(str(workdir))
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
