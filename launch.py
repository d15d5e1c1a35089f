"""The command line: flags and modes, nothing else. Each mode is one call.

python launch.py --config configs/pixel_gru.py [--workdir DIR] [--seeds=1-8] [--config.FIELD=VALUE ...]
python launch.py --mode=evaluate --workdir DIR [--split=test] [--data_dir=DIR]
python launch.py --mode=describe --config configs/pixel_gru.py [--json]
python launch.py --mode=compare --workdirs DIR,DIR [--json]
python launch.py --mode=table --workdirs 'runs/*' [--csv=FILE] [--published=FILE] [--json]
python launch.py --mode=report --workdir DIR | --workdirs DIR,DIR [--out=FILE]
python launch.py --mode=export --workdir DIR [--json]
"""

import datetime
import json
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from seqmnist_jax.errors import SeqMnistError, UsageError, did_you_mean

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "The config file, as in configs/row_lstm.py.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "describe", "compare", "table", "report", "export"],
    "train: train a run, or resume it; evaluate: measure the selected checkpoint of a work directory; "
    "describe: say what a run will do, and do nothing; compare: test whether two runs differ; "
    "table: the results of many runs, over their seeds; report: one page to look at, of a run or of several; "
    "export: write the selected checkpoint for use without this package.",
)
flags.DEFINE_string("workdir", None, "The run's folder. Default: runs/<config name>/<timestamp>.")
flags.DEFINE_string(
    "seeds", "", "train: one run for each seed, together: 1,2,3 or 1-8. For other fields see config.sweep."
)
flags.DEFINE_string("split", "test", "evaluate: which examples to measure, train, validation or test.")
flags.DEFINE_string("data_dir", "", "evaluate: a folder of IDX files. Default: the one the run was trained from.")
flags.DEFINE_boolean("allow_other_data", False, "evaluate: accept data that are not those of the run.")
flags.DEFINE_list(
    "workdirs", [], "compare, report: folders of runs; table: folders with runs in or under them, as in 'runs/*'."
)
flags.DEFINE_string("out", "", "report: the file. Default: report.html in the folder, or here for several.")
flags.DEFINE_string("csv", "table.csv", "table: where the table goes with full precision.")
flags.DEFINE_string("published", "", "table: a CSV file with figures of others, to stand below ours.")
flags.DEFINE_boolean("json", False, "all but train: print one JSON value and nothing else.")
flags.DEFINE_boolean("quiet", False, "train: print nothing but the result.")
flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")


def train() -> None:
    """Trains, or resumes, and prints the result and what to do next."""
    from seqmnist_jax.cli import compile_cache, determinism
    from seqmnist_jax.cli.signals import StopOnSignal
    from seqmnist_jax.cli.terminal import Terminal
    from seqmnist_jax.devices import processes
    from seqmnist_jax.training import sweep
    from seqmnist_jax.training.run import build_run
    from seqmnist_jax.training.train import Stopped
    from seqmnist_jax.training.train import train as run_training
    from seqmnist_jax.workdir import config as configs

    config = _config()
    configs.check(config)
    if config.runtime.distributed and not FLAGS.workdir:
        raise UsageError("runtime.distributed needs --workdir, a folder that all processes see.")
    if config.runtime.deterministic:
        determinism.enable()
    processes.initialize(config.runtime.distributed)
    swept = sweep.build_sweep(config, FLAGS.seeds)
    members = sweep.build_members(config, swept) if swept else []
    if config.runtime.executor and not swept:
        raise UsageError("runtime.executor runs the groups of a sweep, but there is neither --seeds nor config.sweep.")
    run = members[0].run if members else build_run(config)
    compile_cache.enable(config.runtime.compilation_cache)
    # Only now, with everything checked, is a folder made.
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else _new_workdir()
    try:
        with StopOnSignal() as stop, Terminal(quiet=FLAGS.quiet or not processes.is_main()) as terminal:
            watch: dict[str, Any] = {"say": terminal.say, "tick": terminal.show, "should_stop": stop}
            if swept:
                executor = _executor(workdir)
                summary = sweep.train_sweep(swept, members, workdir, command=_command_with, executor=executor, **watch)
            else:
                summary = run_training(run, workdir, command=_command(sys.argv), **watch)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(128 + stop.number)  # as a shell reports a process that the signal ended
    except Exception as e:  # the loss of a process comes as any of several kinds
        if not config.runtime.distributed or isinstance(e, SeqMnistError):
            raise
        raise SeqMnistError(
            f"{type(e).__name__}: {e}\nAnother process of this run has failed, or this one (--debug shows where); "
            "JAX names a lost one within a minute. The same command, in all of them, resumes from the last checkpoint."
        ) from e
    if not processes.is_main():
        return
    if swept:
        print(f"\n{sweep.as_text(summary)}")
    else:
        _tell(summary)
    if not FLAGS.quiet:
        _tell_next(workdir, "--mode=table --workdirs" if swept else "--mode=evaluate --workdir")


def _executor(workdir: Path) -> Any:
    """What runs a sweep's groups as jobs; None for this process."""
    from seqmnist_jax.training import jobs

    runtime = _config().runtime
    options = jobs.parse_options(runtime.executor_options)
    if runtime.executor == jobs.HERE:
        return None
    return jobs.make_executor(runtime.executor, options, workdir.absolute() / "jobs")


def _tell(summary: dict[str, Any]) -> None:
    """Prints the result of a run."""
    dataset = summary["dataset"]
    print(
        f"\ntest accuracy        {summary['test_accuracy']:.2%}{_interval(summary['test_accuracy_interval'])}"
        f" of {dataset['sizes']['test']:,} images ({dataset['name']}), loss {summary['test_loss']:.4f}\n"
        f"checkpoint           step {summary['best_step']}, selected on {summary['selected_on']}"
        f" (the last one has {summary['last_test_accuracy']:.2%})\n"
        f"validation accuracy  {_percent(summary['validation_accuracy'])}\n"
        f"training             {summary['steps']} steps in {summary['train_seconds']:.1f} s,"
        f" {summary['steps_per_second']:.1f} steps/s, compiled in {summary['compile_seconds']:.1f} s\n"
        f"device               {summary['device']}"
    )
    if summary["selected_on"].startswith("test"):
        print("\nWARNING: the checkpoint was chosen on test images: this result can't be compared with an honest one.")
    if dataset["warning"]:
        print(f"\nWARNING: {dataset['warning']}")


def _tell_next(workdir: Path, look: str) -> None:
    """Prints the commands by which one looks at what is done; `look` are the flags of the plainest."""
    where, launch = shlex.quote(str(workdir)), f"{_python()} launch.py"
    print(
        f"\nNext:\n  {launch} {look} {where}\n  {launch} --mode=report --workdir {where}\n"
        f"  tensorboard --logdir {where}      (pip install tensorboard)"
    )


def evaluate() -> None:
    """Prints the metrics of a work directory's selected checkpoint."""
    from seqmnist_jax.analysis.evaluate import as_text
    from seqmnist_jax.analysis.evaluate import evaluate as run_evaluation
    from seqmnist_jax.cli import compile_cache

    if not FLAGS.workdir:
        raise UsageError("--mode=evaluate needs --workdir, the folder of a run.")
    compile_cache.enable("")
    result = run_evaluation(
        Path(FLAGS.workdir), split=FLAGS.split, data_dir=FLAGS.data_dir, allow_other_data=FLAGS.allow_other_data
    )
    if FLAGS.json:
        print(json.dumps(result, indent=2))
        return
    print(as_text(result))


def describe() -> None:
    """Prints what a run will do."""
    from seqmnist_jax.cli import describe as describing
    from seqmnist_jax.training.run import build_run

    run = build_run(_config())
    description = describing.describe(run, config_flags.get_override_values(FLAGS["config"]))
    print(json.dumps(description, indent=2) if FLAGS.json else describing.as_text(run, description))


def compare() -> None:
    """Prints whether two runs differ on the same test images."""
    from seqmnist_jax.analysis import compare as comparing

    if len(FLAGS.workdirs) != 2:
        raise UsageError(f"--mode=compare needs --workdirs with two folders, as in a,b; got {len(FLAGS.workdirs)}.")
    first, second = map(Path, FLAGS.workdirs)
    result = comparing.compare(first, second)
    print(json.dumps(result, indent=2) if FLAGS.json else comparing.as_text(result))


def table() -> None:
    """Prints the results of many runs as Markdown, and writes them as CSV."""
    from seqmnist_jax.analysis import table as tables

    if not FLAGS.workdirs:
        raise UsageError("--mode=table needs --workdirs, as in --workdirs 'runs/*'.")
    published = tables.read_published(Path(FLAGS.published)) if FLAGS.published else []
    rows = tables.rows(tables.find(FLAGS.workdirs))
    tables.write_csv(rows, Path(FLAGS.csv))
    print(json.dumps(rows, indent=2) if FLAGS.json else tables.as_markdown(rows, published))


def report() -> None:
    """Writes one page about a run, or about several."""
    from seqmnist_jax.analysis.report import build
    from seqmnist_jax.cli import compile_cache

    if bool(FLAGS.workdir) == bool(FLAGS.workdirs):
        raise UsageError("--mode=report needs --workdir, the folder of a run, or --workdirs, several.")
    compile_cache.enable("")
    folders = [FLAGS.workdir] if FLAGS.workdir else FLAGS.workdirs
    path = build.write([Path(name) for name in folders], Path(FLAGS.out) if FLAGS.out else None)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB): open it in a browser.")


def export() -> None:
    """Writes the selected checkpoint for use without this package, and prints what was written."""
    from seqmnist_jax.analysis import export as exporting

    if not FLAGS.workdir:
        raise UsageError("--mode=export needs --workdir, the folder of a run.")
    result = exporting.export(Path(FLAGS.workdir))
    print(json.dumps(result, indent=2) if FLAGS.json else exporting.as_text(result))


# Each mode, and the flags beside --mode, --debug and absl's own that it reads.
MODES = {
    "train": (train, {"config", "workdir", "seeds", "quiet"}),
    "evaluate": (evaluate, {"workdir", "split", "data_dir", "allow_other_data", "json"}),
    "describe": (describe, {"config", "workdir", "json"}),
    "compare": (compare, {"workdirs", "json"}),
    "table": (table, {"workdirs", "csv", "published", "json"}),
    "report": (report, {"workdir", "workdirs", "out"}),
    "export": (export, {"workdir", "json"}),
}


def _check_flags() -> None:
    """Refuses a flag that this mode would ignore."""
    _, used = MODES[FLAGS.mode]
    for name in set().union(*(flags_of_mode for _, flags_of_mode in MODES.values())) - used:
        if FLAGS[name].present:
            hint = " For the data of a run set --config.runtime.data_dir." if name == "data_dir" else ""
            raise UsageError(f"--mode={FLAGS.mode} does not read --{name}.{hint}")


def _config() -> ml_collections.ConfigDict:
    if FLAGS.config is None:
        raise UsageError(f"--mode={FLAGS.mode} needs --config, as in --config configs/row_lstm.py.")
    return FLAGS.config


def _command(arguments: list[str]) -> str:
    """The command that makes this run anywhere: the config and what it overrides, without this machine's paths."""
    told = []
    for argument, before in zip(arguments[1:], arguments, strict=False):
        is_config = re.match(r"--?(no)?config\b", argument) and not re.match(r"--?(no)?config\.runtime\.", argument)
        if is_config or before in ("--config", "-config"):
            told.append(argument)
    return shlex.join(["python", "launch.py", *told])


def _command_with(changes: dict[str, Any]) -> str:
    """The command of one run of a sweep."""
    alone = [argument for argument in sys.argv if not re.match(r"--?(seeds|config\.sweep)\b", argument)]
    return _command([*alone, *(f"--config.{field}={value}" for field, value in changes.items())])


def _python() -> Path:
    python = Path(sys.executable)
    return python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else Path("python")


def _interval(bounds: list[float]) -> str:
    return f" ({bounds[0]:.2%} to {bounds[1]:.2%})"


def _percent(accuracy: float | None) -> str:
    return "none (no validation set, or not evaluated)" if accuracy is None else f"{accuracy:.2%}"


def _new_workdir() -> Path:
    """A folder runs/<config name>/<timestamp> that no other run has."""
    name = Path(config_flags.get_config_filename(FLAGS["config"]).split(":")[0]).stem
    start = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = Path("runs", name, start + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UsageError(f"runs/{name} already has a thousand folders of this second; name one by --workdir.")


def _parse_flags(argv: list[str]) -> list[str]:
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
        print(f"error: {_explain(argv, e)}", file=sys.stderr)
        sys.exit(UsageError.exit_code)


def _explain(argv: list[str], error: Exception) -> str:
    """Why the flags could not be parsed: the config file, a key of it, or what absl says."""
    from seqmnist_jax.workdir.config import flatten

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


def main(argv: list[str]) -> None:
    """Runs one mode; a failure that the user can mend is one message and an exit code."""
    del argv
    # JAX and orbax report by absl what no user of a launcher asked for; errors are said in our own words.
    logging.set_verbosity(logging.INFO if FLAGS.debug else logging.FATAL)
    try:
        _check_flags()
        MODES[FLAGS.mode][0]()
    except (SeqMnistError, OSError) as e:
        if FLAGS.debug:
            traceback.print_exc()
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(e.exit_code if isinstance(e, SeqMnistError) else SeqMnistError.exit_code)
    except KeyboardInterrupt:  # where there is nothing to save
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
