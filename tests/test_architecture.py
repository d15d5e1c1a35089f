"""The direction of imports: one list of all modules, in which each may import those before it."""

import ast
import os
import subprocess
import sys

import pytest

from tests.launching import ROOT
from tests.tiny import QUICK

PACKAGE = ROOT / "seqmnist_jax"

# The order of the house: each module may import those before it, between packages and inside each.
ORDER = """
errors
rnn        checks initializers cells per_device eager scan gaps remat jaxprs division divide readout stages \
           derived native recurrence any_cell layers cell stack weights convert
data       idx cache embedded registry sources references protocols views batches task
devices    trees mesh processes memory profiling
models     reading own_cell cells head legendre classifier deep tcn build
workdir    files caveats lock provenance config checkpoints graph pictures metrics tensorboard
training   signals scores optimizers state step run folders clock programs records replicas start finish train jobs \
           plan sweep
analysis   recorded trained evaluate rerun compare table results_page export report
cli        output process terminal flags commands describe text modes
"""
# Inside the packages of packages.
INSIDE = {
    "analysis.report": "runs summary gradients reading comparison page build",
    "models.cells": "min_gru min_lstm elman ur_lstm ur_gru peephole_lstm ind_rnn exp_rnn cornn lem lru s5 diagonal "
    "registry",
}


def places():
    """The place of each module, by its dotted name; a package's own comes after those that it hands on."""
    names = []
    for package, *modules in map(str.split, ORDER.strip().splitlines()):
        for module in modules:
            within = INSIDE.get(f"{package}.{module}", "").split()
            names += [f"{package}.{module}.{name}" for name in within] + [f"{package}.{module}"]
        names.append(package)
    return {name: place for place, name in enumerate(names)}


PLACES = places()


def known(name):
    """The longest part of a dotted name that has a place."""
    parts = name.split(".")
    return next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in PLACES)


def imported(path):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "seqmnist_jax":
            for alias in node.names:
                yield f"{node.module}.{alias.name}".removeprefix("seqmnist_jax.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("seqmnist_jax."):
                    yield alias.name.removeprefix("seqmnist_jax.")


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_place():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__.py", "errors.py", *(line.split()[0] for line in ORDER.strip().splitlines()[1:])}
    lost = [path for path in SOURCES if name_of(path) not in PLACES and "native" not in path.parts]
    assert [path for path in lost if path.parent.name != "embedded"] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = known(name_of(path))
    for name in imported(path):
        assert known(name) == own or PLACES[known(name)] < PLACES[own], f"{path} imports {name}, which is not before it"


def test_the_lower_packages_know_nothing_of_one_another():
    for package in ("rnn", "data", "devices"):
        for path in (PACKAGE / package).rglob("*.py"):
            assert {name.split(".")[0] for name in imported(path)} <= {package, "errors"}, path


def test_rnn_imports_nothing_of_ours():
    for path in (PACKAGE / "rnn").rglob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= {"rnn"}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_config_stops_at_the_builders(path):
    """Functions that take a config are named build_* or from_config, or live in config.py."""
    if path.name == "config.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(a.annotation for a in node.args.args if a.arg == "config"):
            public = not node.name.startswith("_")
            assert not public or node.name.startswith("build_") or node.name == "from_config", (
                f"{path}: {node.name} reads a config"
            )


def test_rnn_runs_with_jax_alone_and_training_from_files_without_tensorflow_torch_and_tfds(tmp_path):
    """platformdirs, where it is installed, says where kernels are kept."""
    code = """
import pathlib, sys, jax
before = set(sys.modules)
from seqmnist_jax import rnn
params = rnn.init_gru(jax.random.key(0), 3, 8, time_scales=("log_uniform", 5))
jax.grad(lambda params: rnn.gru(params, jax.numpy.ones((2, 5, 3)))[1].sum())(params)
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))

from configs import row_lstm
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train
config = row_lstm.get_config()
config.update_from_flattened_dict(
    {"data.source": "embedded", "model.hidden_size": 4, "train.batch_size": 4, "train.steps": 2}
)
train(build_run(config), pathlib.Path(sys.argv[1]), watch=QUIET)
print(*set(sys.modules) & {"tensorflow", "tensorflow_datasets", "torch", "scipy.stats"})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, **QUICK},
        capture_output=True,
        text=True,
        check=True,
    )
    of_rnn, of_training = done.stdout.split("\n")[:2]
    assert set(of_rnn.split()) - {"jax", "jaxlib", "numpy", "platformdirs"} == {"seqmnist_jax"}
    assert of_training == ""
