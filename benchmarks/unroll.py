"""A loop over time against an unrolled network: compile time beside step time.

    python -m benchmarks.unroll [--config.model.cell=gru ...]

The tutorial asks which is faster, TF1's dynamic_rnn (a loop) or static_rnn (a network without
one). For each `model.unroll` this compiles the whole training step of configs/row_lstm.py on
synthetic digits and times it, in alternating rounds, without data or evaluation.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

from seqmnist_jax import provenance, steps
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.run import build_run

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "configs/row_lstm.py", "The config to measure.")
flags.DEFINE_list("unroll", ["1", "2", "7", "28"], "Steps laid out in one pass; the sequence length is no loop at all.")
flags.DEFINE_integer("steps", 200, "Training steps a round.")
flags.DEFINE_integer("rounds", 7, "Rounds; the median counts.")
flags.DEFINE_string("json", "", "A file for the same figures as JSON.")


def main(argv: list[str]) -> None:
    """Measures and prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    config = FLAGS.config
    config.data.source = "embedded"
    config.runtime.backend = "scan"
    programs, compile_seconds = {}, {}
    for unroll in map(int, FLAGS.unroll):
        config.model.unroll = unroll
        run = build_run(config)
        learner, part = run.learner, run.task.part("train")
        state = jax.jit(learner.init)()
        orders, offset, most = ExampleStream(steps.data_key(state), len(part), run.batch_size).window(0)
        count = min(FLAGS.steps, most)
        arguments = (
            state,
            learner.hyper,
            *(jnp.asarray(array) for array in (part.images, part.labels)),
            orders,
            jnp.int32(offset),
            jnp.int32(count),
        )
        start = time.perf_counter()
        program = jax.jit(learner.train_steps()).lower(*arguments).compile()
        compile_seconds[unroll] = time.perf_counter() - start
        programs[unroll] = (program, arguments, count)
    seconds: dict[int, list[float]] = {unroll: [] for unroll in programs}
    for _ in range(FLAGS.rounds):
        for unroll, (program, arguments, count) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[unroll].append((time.perf_counter() - start) / count)
    rows = [
        {"unroll": u, "compile_seconds": compile_seconds[u], "step_seconds": statistics.median(seconds[u])}
        for u in programs
    ]
    model = config.model
    print(f"{model.cell}, hidden {model.hidden_size}, batch {config.train.batch_size}; {provenance.device()}")
    print("| unroll | compile, s | step, ms | against the loop |\n| --- | --- | --- | --- |")
    loop = rows[0]["step_seconds"]
    for row in rows:
        step = row["step_seconds"]
        print(f"| {row['unroll']} | {row['compile_seconds']:.1f} | {1e3 * step:.2f} | {step / loop:.2f} |")
    if FLAGS.json:
        facts = {"device": provenance.device(), "versions": provenance.versions(), "commit": provenance.git_commit()}
        with open(FLAGS.json, "w") as file:
            json.dump({"rows": rows, **facts}, file, indent=2)


if __name__ == "__main__":
    app.run(main)
