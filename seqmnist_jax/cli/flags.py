"""The flags of a command line, and what is wrong with them in one line, before JAX is imported."""

import re
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from seqmnist_jax.cli.output import show_error
from seqmnist_jax.errors import UsageError, did_you_mean
from seqmnist_jax.workdir.config import check, defaults, flatten
from seqmnist_jax.workdir.files import matching

FLAGS = flags.FLAGS
# What users of other programs call a field.
USUAL = {"lr": "optimizer.learning_rate", "epochs": "train.steps", "hidden": "model.hidden_size"}
USUAL |= {"units": "model.hidden_size", "layers": "model.num_layers", "batch": "train.batch_size"}
# What Python and absl say of a value of the wrong kind, and what was expected.
KINDS = {
    "invalid literal for int()": "a whole number, in digits",
    "could not convert string to float": "a number",
    "('Non-boolean argument": "True or False",
}


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them ends in one line and exit code 2."""
    try:
        argv = [re.sub("(?<=^--config=)~.*", lambda found: str(Path(found[0]).expanduser()), one) for one in argv]
        rest = FLAGS(argv)
        _refuse_bare_booleans(argv)
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


def _refuse_bare_booleans(argv: list[str]) -> None:
    """Refuses '--config.data.permuted', which to absl is true: it is as likely a question, and starts a long run."""
    for argument in argv[1:]:
        name = re.fullmatch(r"--?(config\.[^=]+)", argument)
        if name and name[1] in FLAGS and FLAGS[name[1]].boolean:
            raise UsageError(f"{argument} has no value; expected {argument}=true or {argument}=false.")


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
      UsageError: none is given, or one with a field that is none.
    """
    config, known = given("config", "as in --config configs/row_lstm.py"), defaults()
    check(config)
    for field in ("compilation_cache", "data_dir"):
        checked_path(config.runtime[field] or ".", f"runtime.{field}")
    # As text says it, and the command of a sweep's run.
    nothing = [field for field, value in named_fields().items() if value == "None" and known.get(field, "") is None]
    config.update_from_flattened_dict(dict.fromkeys(nothing))
    return config


def given_path(name: str) -> Path | None:
    """The path that a flag gives; None where it is not given. Errors as in `checked_path`."""
    flag = FLAGS[name]
    return checked_path(flag.value or "", f"--{name}") if flag.present or flag.value else None


def given_folders() -> list[str]:
    """What --workdirs names, one or several; a folder's own name may have commas, as those of a sweep's runs have.

    Raises:
      UsageError: the flag is given several times, of which the last alone would count.
    """
    if FLAGS["workdirs"].present > 1:
        raise UsageError("--workdirs is given several times; expected once, with commas between the folders.")
    parts, names = list(FLAGS.workdirs), []
    while parts:
        # A space after a comma is not in the parts.
        longer = [(end, comma.join(parts[:end])) for end in range(len(parts), 1, -1) for comma in (",", ", ")]
        end, name = next(((end, name) for end, name in longer if matching(name)), (1, parts[0]))
        names.append(str(checked_path(name, "--workdirs")))
        del parts[:end]
    return names


def checked_path(text: str, where: str) -> Path:
    """A path that a user gives; a tilde is the home folder.

    Raises:
      UsageError: it is empty, no text, or its user is unknown.
    """
    try:
        if not text:
            raise UsageError(f"{where} is empty; expected a path.")
        path = Path(text).expanduser()
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where} is {text!r}, which is no UTF-8; expected a path that is, from its root.") from None
    except RuntimeError as e:
        raise UsageError(f"{where} is {text!r}: {e}") from None
    return path


def named_fields() -> dict[str, Any]:
    """The fields of the config that the command line sets, with their values."""
    return config_flags.get_override_values(FLAGS["config"])


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
    if isinstance(error, UsageError):
        return str(error)
    if path is not None and not Path(path.split(":")[0]).is_file():
        return _no_such_file(path)
    if isinstance(error, flags.UnrecognizedFlagError) and not error.flagname.startswith(("config.", "noconfig.")):
        return _no_such_flag(error.flagname)
    if mode := re.match(r"flag --mode=(\w*): .*<(.*)>", str(error)):
        return f"{error}.{did_you_mean(mode[1], mode[2].split('|'))}"
    if path is None:
        return str(error)
    try:
        known = list(flatten(ConfigFileFlagParser("config").parse(path).to_dict()))
    except Exception as broken:
        return f"--config: {path} can't be loaded: {(str(broken).strip().splitlines() or [type(broken).__name__])[-1]}"
    for argument in argv:
        field = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if field and field[1] not in known:
            near = _fields_named(field[1], known)
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else did_you_mean(field[1], known)
            return f"--config.{field[1]}: no such field in {path}.{hint}"
    for said, kind in KINDS.items():
        if said in str(error):
            return f"{str(error).partition(said)[0]}expected {kind}."
    return str(error)


def _fields_named(name: str, known: Collection[str]) -> list[str]:
    """The fields of the config that a user calls so: by the end of their name, or as is usual elsewhere."""
    last = name.rpartition(".")[2]
    found = [field for field in known if f".{field}".endswith(f".{name}")]
    found = found or [field for field in known if field.rpartition(".")[2] == last]
    return found or [field for field in known if field == USUAL.get(last)]


def _no_such_flag(name: str) -> str:
    """What a user may have meant by a flag that is none: a field of the config, or another flag."""
    fields = [f"--config.{field}" for field in _fields_named(name, list(defaults()))]
    near = f" Did you mean {', '.join(map(repr, fields))}?" if fields else ""
    return f"--{name}: no such flag.{near or did_you_mean(f'--{name}', [f'--{flag}' for flag in FLAGS])}"


def _no_such_file(path: str) -> str:
    return f"--config: there is no file {path!r}.{did_you_mean(path, map(str, Path(path).parent.glob('*.py')))}"


def _config_file(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument in ("--config", "-config"):
            return following
        if argument.startswith(("--config=", "-config=")):
            return argument.partition("=")[2]
    return None
