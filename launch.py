"""The command line: flags and modes, nothing else. Each mode is one function of `seqmnist_jax.cli.modes`.

python launch.py --config configs/pixel_gru.py [--workdir DIR] [--seeds=1-8] [--config.FIELD=VALUE ...]
python launch.py --mode=evaluate --workdir DIR [--split=test] [--data_dir=DIR]
python launch.py --mode=describe --config configs/pixel_gru.py [--explain] [--json]
python launch.py --mode=compare --workdirs DIR,DIR [--json]
python launch.py --mode=table --workdirs 'runs/*' [--csv=FILE] [--published=FILE] [--json]
python launch.py --mode=report --workdir DIR | --workdirs DIR,DIR [--out=FILE]
python launch.py --mode=export --workdir DIR [--json]
"""

import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from seqmnist_jax.cli import modes
from seqmnist_jax.cli.flags import FLAGS, parse, refuse_unused
from seqmnist_jax.cli.output import Unprinted, drop_late_answers, replace_unprintable, show, show_error
from seqmnist_jax.errors import SeqMnistError

# Each mode, and the flags beside --mode, --debug and absl's own that it reads.
MODES = {
    "train": (modes.train, {"config", "workdir", "seeds", "quiet"}),
    "evaluate": (modes.evaluate, {"workdir", "split", "data_dir", "allow_other_data", "json"}),
    "describe": (modes.describe, {"config", "workdir", "seeds", "explain", "json"}),
    "compare": (modes.compare, {"workdirs", "json"}),
    "table": (modes.table, {"workdirs", "csv", "published", "json"}),
    "report": (modes.report, {"workdir", "workdirs", "out"}),
    "export": (modes.export, {"workdir", "json"}),
}

config_flags.DEFINE_config_file("config", None, "The config file, as in configs/row_lstm.py.")
flags.DEFINE_enum(
    "mode",
    "train",
    list(MODES),
    "train: train a run, or resume it; evaluate: measure the selected checkpoint of a work directory; "
    "describe: say what a run will do, and do nothing; compare: test whether two runs differ; "
    "table: the results of many runs, over their seeds; report: one page to look at, of a run or of several; "
    "export: write the selected checkpoint for use without this package.",
)
flags.DEFINE_string("workdir", None, "The run's folder. Default: runs/<config name>/<timestamp>.")
flags.DEFINE_string("seeds", None, "train, describe: a run for each seed: 1,2,3 or 1-8. Other fields: config.sweep.")
flags.DEFINE_string("split", "test", "evaluate: which examples to measure, train, validation or test.")
flags.DEFINE_string("data_dir", "", "evaluate: a folder of IDX files. Default: the one the run was trained from.")
flags.DEFINE_boolean("allow_other_data", False, "evaluate: accept data that are not those of the run.")
flags.DEFINE_list("workdirs", [], "compare, report: folders of runs; table: also folders above them, as in 'runs/*'.")
flags.DEFINE_string("out", "", "report: the file. Default: report.html in the folder, or here for several.")
flags.DEFINE_string("csv", None, "table: a file for the rows with full precision.")
flags.DEFINE_string("published", "", "table: a CSV file with figures of others, to stand below ours.")
flags.DEFINE_boolean("explain", False, "describe: tell what each field of the config means.")
flags.DEFINE_boolean("json", False, "all but train and report: print one JSON value and nothing else.")
flags.DEFINE_boolean("quiet", False, "train: print nothing but the result.")
flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")


def main(argv: list[str]) -> None:
    """Runs one mode; a failure that the user can mend is one message and an exit code."""
    # JAX and orbax report by absl what no user of a launcher asked for; errors are said in our own words.
    logging.set_verbosity(logging.INFO if FLAGS.debug else logging.FATAL)
    replace_unprintable()
    if not FLAGS.debug:
        drop_late_answers()
    try:
        refuse_unused({mode: names for mode, (_, names) in MODES.items()})
        with modes.explaining_no_device():
            show(MODES[FLAGS.mode][0](), as_json=FLAGS.json)
    except Unprinted:
        # What a run made is in its folder; of other modes it is lost.
        sys.exit(0 if FLAGS.mode == "train" else SeqMnistError.exit_code)
    except (SeqMnistError, OSError) as e:
        show_error(str(e), with_traceback=FLAGS.debug)
        sys.exit(getattr(e, "exit_code", SeqMnistError.exit_code))
    except KeyboardInterrupt:  # where there is nothing to save
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
