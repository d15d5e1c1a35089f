"""Seconds of training until the validation images are read well enough.

    python -m benchmarks.time_to_accuracy [--target=0.98] [--seeds=10,11,12] [--library=torch]
        [--config=configs/pixel_gru.py] [--config.FIELD=VALUE ...] [--json=FILE]

Each seed trains until the accuracy on the validation images, measured every `train.eval_every` steps,
first reaches the target, or to the config's last step. Counted apart: steps, evaluations, and the time
from the first step to the end with both. Compiling comes before and is not counted. The schedule is
the config's, so a run that stops early has not seen its end.
"""

import time
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import timing, trainers

FLAGS = flags.FLAGS
Row = dict[str, Any]


def measure(config: ml_collections.ConfigDict, library: str, target: float) -> Row:
    """One training to the target, or to its end."""
    start = time.perf_counter()
    trainer = trainers.TRAINERS[library](config)
    trainer.validate()  # which compiles it
    row: Row = {"library": library, "seed": config.seed, "setup_seconds": time.perf_counter() - start}
    train_seconds = evaluate_seconds = 0.0
    done, accuracy, start = 0, -1.0, time.perf_counter()
    while done < config.train.steps and accuracy < target:
        count = min(config.train.eval_every, config.train.steps - done)
        train_seconds += timing.seconds_of(trainer.advance, count)
        done += count
        before = time.perf_counter()
        accuracy = trainer.validate()
        evaluate_seconds += time.perf_counter() - before
        print(f"  seed {config.seed}, step {done}: {accuracy:.2%} after {train_seconds:.1f} s of training", flush=True)
    return row | {
        "reached": accuracy >= target,
        "steps": done,
        "validation_accuracy": accuracy,
        "train_seconds": train_seconds,
        "evaluate_seconds": evaluate_seconds,
        "total_seconds": time.perf_counter() - start,
    }


def define_flags() -> None:
    """The flags of this module as a command."""
    config_flags.DEFINE_config_file("config", "configs/pixel_gru.py", "What is trained.")
    flags.DEFINE_float("target", 0.98, "The validation accuracy to reach.")
    flags.DEFINE_list("seeds", ["10", "11", "12"], "One training each.")
    flags.DEFINE_enum("library", "ours", list(trainers.TRAINERS), "Who trains.")
    flags.DEFINE_string("json", "", "A file for the same figures as JSON, written after each seed.")


def main(argv: list[str]) -> None:
    """Trains, prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    config = FLAGS.config
    rows = []
    for seed in FLAGS.seeds:
        config.seed = int(seed)
        rows.append(measure(config, FLAGS.library, FLAGS.target))
        timing.write_json(FLAGS.json, {"target": FLAGS.target, "config": config.to_dict(), "rows": rows})
    print(f"\n{timing.facts()['device']}; target {FLAGS.target:.1%}\n")
    print(timing.markdown([name.replace("_", " ") for name in rows[0]], [list(row.values()) for row in rows]))


if __name__ == "__main__":
    define_flags()
    app.run(main)
