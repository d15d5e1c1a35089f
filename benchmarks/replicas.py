"""A whole training step of several replicas in one program, beside that of one.

    python -m benchmarks.replicas [--config=configs/row_lstm.py] [--counts=1,2,4,8] [--json=FILE]
        [--config.FIELD=VALUE ...]

The programs are those of `python launch.py --seeds=...`: data, forward, backward, clip and optimiser,
many steps in a dispatch. Medians of alternating rounds in one process.
"""

from typing import Any

from absl import app, flags
from ml_collections import config_flags

from benchmarks import timing, trainers

FLAGS = flags.FLAGS
Row = dict[str, Any]


def define_flags() -> None:
    """The flags of this module as a command."""
    config_flags.DEFINE_config_file("config", "configs/row_lstm.py", "What is trained.")
    flags.DEFINE_list("counts", ["1", "2", "4", "8"], "How many replicas, one measurement each.")
    timing.define_measuring(rounds=5, seconds=2.0)


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    del argv
    programs = {count: trainers.OurTrainer(FLAGS.config, int(count)).advance for count in FLAGS.counts}
    timings = timing.alternate(programs, rounds=FLAGS.rounds, seconds=FLAGS.seconds)
    one = timings[FLAGS.counts[0]].facts()["milliseconds"]
    rows: list[Row] = [{"replicas": int(count), **timings[count].facts()} for count in FLAGS.counts]
    header = ["replicas", "ms a step of all", f"times as long as {FLAGS.counts[0]}", "ms a step of each"]
    body = [
        [row["replicas"], row["milliseconds"], row["milliseconds"] / one, row["milliseconds"] / row["replicas"]]
        for row in rows
    ]
    print(timing.markdown(header, body))
    timing.write_json(FLAGS.json, {"rows": rows, "config": FLAGS.config.to_dict()})


if __name__ == "__main__":
    define_flags()
    app.run(main)
