"""The flags of a command line, and what is wrong with them in one line, before JAX is imported."""

import re
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from seqmnist_jax.cli.output import show_error
from seqmnist_jax.errors import UsageError, did_you_mean
from seqmnist_jax.workdir.config import flatten

FLAGS = flags.FLAGS


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them ends in one line and exit code 2."""
    try:
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise UsageError(f"Unexpected argument {rest[1]!r}; flags look like --config.train.steps=100.")
        path = _config_file(argv)
        if path is not None and not Path(path.split(":")[0]).is_file():
            raise UsageError(_no_such_file(path))
        return rest
    except Exception as e:  # a config file is code, and may fail in any way
        if {"--debug", "-debug", "--debug=true", "--debug=True"} & set(argv):
            traceback.print_exc()
        show_error(_explain(argv, e))
        sys.exit(UsageError.exit_code)


def refuse_unused(read: Mapping[str, Collection[str]]) -> None:
    """Refuses a flag that this mode would ignore.

    Args:
      read: of each mode the flags that it reads, beside --mode, --debug and absl's own.

    Raises:
      UsageError: there is one.
    """
    for name in set().union(*read.values()) - set(read[FLAGS.mode]):
        if FLAGS[name].present:
            hint = " For the data of a run set --config.runtime.data_dir." if name == "data_dir" else ""
            raise UsageError(f"--mode={FLAGS.mode} does not read --{name}.{hint}")


def given_config() -> ml_collections.ConfigDict:
    """The config.

    Raises:
      UsageError: none is given.
    """
    return given("config", "as in --config configs/row_lstm.py")


def given(name: str, what: str) -> Any:
    """The value of a flag that the mode can't do without.

    Args:
      name: of the flag.
      what: it is, for the message.

    Raises:
      UsageError: it is not given.
    """
    if FLAGS[name].value in (None, "", []):
        raise UsageError(f"--mode={FLAGS.mode} needs --{name}, {what}.")
    return FLAGS[name].value


def _explain(argv: list[str], error: Exception) -> str:
    """Why the flags could not be parsed: the config file, a key of it, or what absl says."""
    path = _config_file(argv)
    if path is None or isinstance(error, UsageError):
        return str(error)
    if not Path(path.split(":")[0]).is_file():
        return _no_such_file(path)
    try:
        known = list(flatten(ConfigFileFlagParser("config").parse(path).to_dict()))
    except Exception as broken:
        return f"--config: {path} can't be loaded: {(str(broken).strip().splitlines() or [type(broken).__name__])[-1]}"
    for argument in argv:
        field = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if field and field[1] not in known:
            return f"--config.{field[1]}: no such field in {path}.{did_you_mean(field[1], known)}"
    return str(error)


def _no_such_file(path: str) -> str:
    return f"--config: there is no file {path!r}.{did_you_mean(path, map(str, Path(path).parent.glob('*.py')))}"


def _config_file(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument in ("--config", "-config"):
            return following
        if argument.startswith(("--config=", "-config=")):
            return argument.partition("=")[2]
    return None
