"""The direction of imports: launch -> modes -> run -> steps -> models, optimizers, data -> rnn."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "seqmnist_jax"

# Each layer may import from the layers above it in this list, and from itself where it is a package.
LAYERS = [
    {"errors"},
    {"rnn", "data", "models.tcn", "devices.mesh", "devices.trees", "models.reading"},  # none knows another
    {
        "models.classifier",
        "workdir.files",
        "workdir.provenance",
        "workdir.tensorboard",
        "workdir.lock",
        "workdir.graph",
        "workdir.pictures",
        "training.clock",
        "training.scores",
        "devices.memory",
        "devices.processes",
        "devices.profiling",
        "cli.compile_cache",
        "cli.determinism",
        "cli.signals",
    },
    {"models.build", "workdir.metrics"},
    {"models", "workdir.recorder"},
    {"training.optimizers", "cli.terminal"},
    {"workdir.config", "training.state"},
    {"training.step"},
    {"training.run", "workdir.checkpoints", "training.jobs"},
    {"training.programs", "analysis.rerun", "analysis.trained"},
    {"training.records"},
    {"training.train", "analysis.evaluate", "analysis.export", "cli.describe", "analysis.compare", "analysis.table"},
    {"training.sweep", "analysis.report"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part_of(name):
    """The part of the package that a module, or a name in one, belongs to: 'rnn' for rnn.cells."""
    parts = name.split(".")
    return next((part for n in (2, 1) if (part := ".".join(parts[:n])) in LEVEL), name)


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "seqmnist_jax":
            for alias in node.names:
                yield part_of(f"{node.module}.{alias.name}".removeprefix("seqmnist_jax."))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("seqmnist_jax."):
                    yield part_of(alias.name.removeprefix("seqmnist_jax."))


SOURCES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py" and ast.parse(path.read_text()).body[1:]
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = part_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"))
    assert own in LEVEL, f"{path} is in no layer; give it its place in LAYERS"
    for part in imported_parts(path):
        assert part == own or LEVEL[part] < LEVEL[own], f"{path} imports {part}, which is not below {own}"


def test_rnn_imports_nothing_of_ours():
    for path in (PACKAGE / "rnn").rglob("*.py"):
        assert set(imported_parts(path)) <= {"rnn"}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_config_stops_at_the_builders(path):
    """Functions that take a config are named build_* or from_config, or live in config.py."""
    if path.name == "config.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(a.annotation for a in node.args.args if a.arg == "config"):
            public = not node.name.startswith("_")
            assert (
                not public
                or node.name.startswith("build_")
                or node.name in ("from_config", "schedule_depends_on_steps")
            ), f"{path}: {node.name} reads a config"


def test_training_from_files_imports_neither_tensorflow_nor_torch_nor_tfds(tmp_path):
    code = (
        "import sys, pathlib; from configs import row_lstm; from seqmnist_jax.training.run import build_run;"
        "from seqmnist_jax.training.train import train; c = row_lstm.get_config(); c.data.source = 'embedded';"
        "c.train.steps = 2; c.model.hidden_size = 4; c.train.batch_size = 4;"
        f"train(build_run(c), pathlib.Path({str(tmp_path / 'run')!r}), say=lambda line: None);"
        "print(*(set(sys.modules) & {'tensorflow', 'tensorflow_datasets'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_rnn_imports_without_the_rest():
    code = (
        "import sys; from seqmnist_jax import rnn;"
        "print(*(set(sys.modules) & {'flax', 'orbax', 'clu', 'optax', 'ml_collections'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
