"""A run so small that it costs a second, once its programs are compiled: tests that can do with it share those."""

import contextlib

import jax

from configs import row_lstm
from seqmnist_jax.training import train as training
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run

STEPS = 60


def config(**changes):
    """A permuted row LSTM with batch norm, on the embedded digits; with these fields changed."""
    made = row_lstm.get_config()
    made.update_from_flattened_dict(
        {
            "data.source": "embedded",
            "data.permutation": "numpy:100",
            "model.hidden_size": 8,
            "model.norm": "batch",
            "train.batch_size": 16,
            "train.steps": STEPS,
            "train.eval_every": 20,
            **changes,
        }
    )
    return made


@contextlib.contextmanager
def quick_compiler():
    """XLA without most of its optimizations."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def train(folder):
    """Trains the run, by the quick compiler; who compares with it uses that too."""
    with quick_compiler():
        training.train(build_run(config()), folder, watch=QUIET)
