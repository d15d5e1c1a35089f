"""A run so small that it costs a second, once its programs are compiled: tests that can do with it share those."""

import contextlib
from unittest import mock

import jax
from jax._src import compiler

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


# XLA without most of its optimizations, with its older, four times faster way to make code for a CPU, in one piece.
OPTIONS = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 12):  # later ones have the new way alone
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
QUICK_FLAG = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": QUICK_FLAG}


get_options = compiler.get_compile_options


def get_quick_options(*given, env_options_overrides=None, **options):
    # Other devices' compilers refuse an option that is not theirs.
    own = OPTIONS if jax.devices()[0].platform == "cpu" else {}
    overrides = {**(env_options_overrides or {}), **own}
    return get_options(*given, env_options_overrides=overrides, **options)


@contextlib.contextmanager
def quick_compiler(is_on=True):
    """What the environment QUICK does, in this process and for a while. JAX has no public setting for flags of XLA."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", is_on)
    try:
        with mock.patch.object(compiler, "get_compile_options", get_quick_options if is_on else get_options):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def train(folder):
    """Trains the run, by the quick compiler; who compares with it uses that too."""
    with quick_compiler():
        training.train(build_run(config()), folder, watch=QUIET)
