"""A loop over time against an unrolled network: compile time beside step time.

    python -m benchmarks.unroll [--config.model.cell=gru ...]

The tutorial asks which is faster, TF1's dynamic_rnn (a loop) or static_rnn (a network without
one). For each `model.unroll` this compiles the whole training step of configs/row_lstm.py on
the embedded digits and times it, in alternating rounds of real training.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import timing, trainers

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags of this module as a command."""
    config_flags.DEFINE_config_file("config", "configs/row_lstm.py", "The config to measure.")
    flags.DEFINE_list(
        "unroll", ["1", "2", "7", "28"], "Steps laid out in one pass; the sequence length is no loop at all."
    )
    timing.define_measuring(rounds=7, seconds=0.5)


def main(argv: list[str]) -> None:
    """Measures and prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    config = FLAGS.config
    config.data.source = "embedded"
    config.runtime.backend = "scan"
    found = {}
    for unroll in FLAGS.unroll:
        config.model.unroll = int(unroll)
        found[unroll] = trainers.OurTrainer(config)
    compile_seconds = {unroll: trainer.clock.compile for unroll, trainer in found.items()}
    programs = {unroll: trainer.advance for unroll, trainer in found.items()}
    timings = timing.alternate(programs, rounds=FLAGS.rounds, seconds=FLAGS.seconds)
    loop = next(iter(timings.values())).median
    rows = [
        {
            "unroll": int(unroll),
            "compile_seconds": compile_seconds[unroll],
            **took.facts(),
            "against_loop": took.median / loop,
        }
        for unroll, took in timings.items()
    ]
    timing.write_json(FLAGS.json, {"rows": rows})
    model = config.model
    print(f"{model.cell}, hidden {model.hidden_size}, batch {config.train.batch_size}; {timing.facts()['device']}")
    names = ("unroll", "compile_seconds", "milliseconds", "against_loop")
    print(timing.markdown([name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows]))


if __name__ == "__main__":
    define_flags()
    app.run(main)
