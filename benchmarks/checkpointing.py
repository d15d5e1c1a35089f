"""What checkpoints cost: how long training waits for one, and what saving every so often takes from its rate.

    python -m benchmarks.checkpointing [--config=configs/row_lstm.py] [--every=1,30] [--steps=60000]
        [--rounds=3] [--json=FILE] [--config.FIELD=VALUE ...]

The first table saves the run's state again and again, alone: the time until training goes on, and
until the checkpoint is whole on disk. The second trains whole runs in turns, with a checkpoint every so many
seconds and without any but the last, and counts steps from the first dispatch to the end.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import timing
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import Run, build_run
from seqmnist_jax.training.train import train
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import Checkpoints

FLAGS = flags.FLAGS
SAVES = 20
NEVER = 0.0


def define_flags() -> None:
    """The flags of this module as a command."""
    config_flags.DEFINE_config_file("config", "configs/row_lstm.py", "What is trained.")
    flags.DEFINE_list("every", ["1", "30"], "Seconds between checkpoints, one measurement each.")
    flags.DEFINE_integer("steps", 60_000, "How many steps a run has.")
    flags.DEFINE_integer("rounds", 3, "How many runs of each.")
    flags.DEFINE_string("json", "", "Where the measurements go.")


def waiting(run: Run) -> dict[str, float]:
    """Median milliseconds of a save, until training goes on and until it is on disk."""
    state = jax.block_until_ready(jax.jit(run.learner.init)())
    goes_on, on_disk = [], []
    with tempfile.TemporaryDirectory() as name, Checkpoints(Path(name) / files.CHECKPOINTS) as checkpoints:
        for step in range(1, SAVES + 1):
            start = time.perf_counter()
            checkpoints.save(state.replace(step=state.step + step).split(), {"config": run.config}, None)
            goes_on.append(time.perf_counter() - start)
            problem = checkpoints.wait()
            on_disk.append(time.perf_counter() - start)
            assert problem is None, problem
    return {"goes_on": 1e3 * statistics.median(goes_on), "on_disk": 1e3 * statistics.median(on_disk)}


def rate(config: Any, every: float) -> float:
    """Steps a second of a whole run, from its first dispatch to its last."""
    config.train.steps = config.train.eval_every = FLAGS.steps
    config.runtime.checkpoint_seconds = every
    ticks: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        train(
            build_run(config),
            Path(name) / "run",
            watch=QUIET._replace(show=lambda now: ticks.setdefault(now.step, time.perf_counter())),
        )
    (first, start), *_, (last, end) = ticks.items()
    return (last - first) / (end - start)


def main(argv: list[str]) -> None:
    """Measures and prints two tables."""
    del argv
    waits = waiting(build_run(FLAGS.config))
    print(timing.markdown(["until training goes on, ms", "until it is on disk, ms"], [[*waits.values()]]))
    intervals = [NEVER, *map(float, FLAGS.every)]
    rates: dict[float, list[float]] = {every: [] for every in intervals}
    for _ in range(FLAGS.rounds):
        for every in intervals:
            rates[every].append(rate(FLAGS.config, every))
    rows = []
    for every in intervals:
        # Of neighbours in time, because machines change their pace.
        costs = [1.0 - with_it / without for with_it, without in zip(rates[every], rates[NEVER], strict=True)]
        rows.append([every or "never", statistics.median(rates[every]), 100.0 * statistics.median(costs)])
    print(timing.markdown(["a checkpoint every, s", "steps a second", "cost, %"], rows))
    facts = {"waits": waits, "rates": {str(every): found for every, found in rates.items()}}
    timing.write_json(FLAGS.json, {**facts, "config": FLAGS.config.to_dict()})


if __name__ == "__main__":
    define_flags()
    app.run(main)
