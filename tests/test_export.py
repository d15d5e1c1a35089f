"""What is exported runs without this package, says all one must know, and is bit for bit what was trained."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import seqmnist_jax
from seqmnist_jax.analysis import export as exporting
from seqmnist_jax.cli import text as texts
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models.cells import CELLS, build_cell, known_options
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import CheckpointError
from seqmnist_jax.workdir.files import WorkdirError
from tests import tiny
from tests.tiny import QUICK
from tests.untrained import HEIGHT, WIDTH, random_images, write_run

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

IMAGES = random_images(5, seed=9)
MODELS = {
    "lstm": {"data.permutation": "numpy:3", "data.scaling": "standard", "model.norm": "frozen"},
    "gru": {"model.cell": "gru", "data.view": "pixel", "model.num_layers": 2, "data.scaling": "signed"},
    "gru_reset_before": {"model.cell": "gru_reset_before", "model.norm": "batch", "data.scaling": "symmetric"},
    "both_ways": {"model.cell": "gru", "model.bidirectional": True, "model.num_layers": 2, "model.norm": "batch"},
    "tcn": {"model.name": "tcn", "model.num_layers": 3, "model.kernel_size": 3, "data.view": "pixel"},
    "bfloat16": {"model.precision": "bfloat16", "model.remat": 3, "model.unroll": 2, "data.permutation": "numpy:3"},
}


SOME = ("lstm", "gru", "tcn")
NAMES = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from a model's name to its run, exported."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def of(name):
        exporting.export(write_run(folder / name, **MODELS[name]))
        return folder / name

    return of


# Runs in a process that can't have anything of this package, in each model's folder.
READER = """
import json, os, sys
import numpy as np

for workdir in sys.argv[1:]:
    os.chdir(os.path.join(workdir, "export"))
    description = json.load(open("export.json"))
    images = np.load("../images.npy")
    names = {"images": images}
    exec("\\n".join(description["load"]), names)
    exported = names["exported"]
    assert sorted(exported.platforms) == ["cpu", "cuda", "tpu"], exported.platforms
    products = [line for line in exported.mlir_module().splitlines() if "= stablehlo.dot_general" in line]
    assert products and all("HIGHEST" in line for line in products), "a GPU would round what it multiplies"
    one = names["model"](images[:1])
    assert one.shape == (1, 10) and one.dtype == "float32"
    np.testing.assert_allclose(one, names["logits"][:1], atol=1e-5)
    np.save("logits.npy", names["logits"])
ours = {"seqmnist_jax", "flax", "orbax"} & {name.partition(".")[0] for name in sys.modules}
assert not ours, ours
"""


@pytest.mark.slow
def test_the_program_runs_without_this_package(exported, tmp_path):
    for name in MODELS:
        np.save(exported(name) / "images.npy", IMAGES)
    folders = [str(exported(name)) for name in MODELS]
    subprocess.run(
        [sys.executable, "-c", READER, *folders], cwd=tmp_path, env={**os.environ, **QUICK}, check=True, timeout=300
    )
    for name in MODELS:
        logits = np.load(exported(name) / "export" / "logits.npy")
        # Rounded to bfloat16, two nearly equal numbers may become two that are not.
        tolerance = 2e-2 if name == "bfloat16" else 1e-4
        expected = seqmnist_jax.load(exported(name)).logits(IMAGES)
        np.testing.assert_allclose(logits, expected, atol=tolerance, err_msg=name)
        assert np.ptp(expected, axis=0).max() > 0.1, "images make no difference"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def split(x, count):
    return np.split(x, count, axis=-1)


def run_layer(steps, tensors, x):
    """All h of a recurrent layer over x [time, features], by the description's own lines."""
    (size,) = {len(tensors["bias"]) // 4, len(tensors["bias"]) // 3, len(tensors["bias"]) // 2} & {6}
    names = {**tensors, "h": np.zeros(size), "c": np.zeros(size), "sigmoid": sigmoid, "split": split, "tanh": np.tanh}
    hs = []
    for x_t in x:
        names["x"] = x_t
        exec("\n".join(steps), names)
        hs.append(names["h"])
    return np.stack(hs)


def run_tcn(tensors, y):
    """The features of the last level over y [time, in]."""
    for level in range(len({name.split(".")[0] for name in tensors})):
        own = {name.removeprefix(f"level_{level}."): t for name, t in tensors.items() if f"level_{level}." in name}
        h = y
        for i in (0, 1):
            v = own[f"conv_{i}.kernel"]
            weights = v / np.sqrt((v**2).sum((0, 1))) * own[f"norm_{i}.conv_{i}/kernel/scale"]
            taps, back = len(weights), 2**level
            padded = np.concatenate([np.zeros(((taps - 1) * back, h.shape[1])), h])
            sums = sum(padded[tap * back : tap * back + len(h)] @ weights[tap] for tap in range(taps))
            h = np.maximum(sums + own[f"conv_{i}.bias"], 0)
        r = y @ own["residual.kernel"] + own["residual.bias"] if "residual.kernel" in own else y
        y = np.maximum(h + r, 0)
    return y


def below(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def run_file(path, images):
    """Logits by NumPy, from nothing but the safetensors file."""
    with safetensors.safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["seqmnist_jax"])
    sequence, network = description["sequence"], description["network"]
    rows = []
    for image in images:
        p = np.array(sequence["pixel_values"])[image.ravel()]
        p = p if sequence["order"] is None else p[sequence["order"]]
        y = p.reshape(sequence["time"], sequence["features"])
        if "step" in network:
            for layer in range(description["config"]["model"]["num_layers"]):
                prefix = f"params.rnn.layer_{layer}"
                hs = [run_layer(network["step"], below(tensors, f"{prefix}.forward."), y)]
                last = [hs[0][-1]]
                backward = below(tensors, f"{prefix}.backward.")
                if backward:
                    reverse = run_layer(network["step"], backward, y[::-1])
                    hs, last = [*hs, reverse[::-1]], [*last, reverse[-1]]
                y = np.concatenate(hs, axis=-1)
            y = np.concatenate(last)
        else:
            y = run_tcn(below(tensors, "params.tcn."), y)[-1]
        norm = below(tensors, "params.norm.")
        if norm:
            stats = below(tensors, "batch_stats.norm.")
            y = (y - stats["mean"]) / np.sqrt(stats["var"] + 0.001) * norm["scale"] + norm["bias"]
        rows.append(y @ tensors["params.dense.kernel"] + tensors["params.dense.bias"])
    return np.stack(rows)


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("bfloat16",)])
def test_the_parameters_and_what_is_said_of_them_suffice(exported, name):
    logits = run_file(exported(name) / "export" / "params.safetensors", IMAGES)
    np.testing.assert_allclose(logits, seqmnist_jax.load(exported(name)).logits(IMAGES), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_checkpoint_bit_for_bit(exported, name):
    tensors = safetensors.load_file(exported(name) / "export" / "params.safetensors")
    variables = seqmnist_jax.load(exported(name)).variables
    expected = {
        ".".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
    }
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype
        np.testing.assert_array_equal(tensor, expected[key])


def test_every_cell_has_its_equations():
    for name, choice in CELLS.items():
        assert choice.title
        assert choice.gates
        assert build_cell(tiny.config(**{"model.cell": name})).step
    # Of the field's they are source, whose numbers stand beside it.
    numbers = known_options(build_cell(tiny.config(**{"model.cell": "lem", "model.cell_options": "{'dt': 0.5}"})).cell)
    assert numbers == {"dt": 0.5}


def test_the_same_run_gives_the_same_bytes_and_none_of_them_names_a_folder(exported):
    folder = exported("lstm") / "export"
    names = (exporting.PROGRAM, exporting.PARAMETERS, exporting.DESCRIPTION)
    before = [(folder / name).read_bytes() for name in names]
    exporting.export(folder.parent)
    assert [(folder / name).read_bytes() for name in names] == before
    for content in before:
        assert not re.search(rb"/(home|root|tmp|work|Users|usr)/|\.py\b", content)
        assert str(folder.parent.parent).encode() not in content


def test_description_and_text(exported):
    result = exporting.export(exported("lstm"))
    written = json.loads((exported("lstm") / "export" / "export.json").read_text())
    assert {"folder": result["folder"], **written} == result
    assert result["input"]["shape"] == ["batch", HEIGHT, WIDTH]
    assert result["sequence"]["order"] == np.random.RandomState(3).permutation(HEIGHT * WIDTH).tolist()
    for name, file in result["files"].items():
        assert (exported("lstm") / "export" / name).stat().st_size == file["bytes"]
    text = texts.export(result)
    assert "uint8 [batch, 7, 5] -> logits float32 [batch, 10], on cpu, cuda, tpu" in text
    assert all(line in text for line in result["load"])
    assert "WARNING: The run has not ended. This is its checkpoint of step 7." in text


def test_a_finished_run_tells_its_result_and_warns_of_nothing(tmp_path):
    folder = write_run(tmp_path / "run")
    files.write_json(folder / files.SUMMARY, {"test_accuracy": 0.25, "selected_on": "validation"})
    result = exporting.export(folder)
    assert (result["test_accuracy"], result["selected_on"], result["warnings"]) == (0.25, "validation", [])
    (folder / files.SUMMARY).unlink()
    files.write_json(folder / files.DIVERGED, {})
    assert "diverged" in texts.export(exporting.export(folder))


def test_what_can_not_be_exported(tmp_path, monkeypatch):
    with pytest.raises(WorkdirError, match="expected a work directory"):
        exporting.export(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "export").write_text("a file where the folder should be")
    with pytest.raises(WorkdirError, match=r"export can't be written \(File exists\)"):
        exporting.export(folder)
    (folder / "export").unlink()
    (folder / files.CHECKPOINTS).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        exporting.export(folder)
    (folder / files.SWEEP).write_text("{}")
    with pytest.raises(WorkdirError, match="holds a sweep; name one of its runs"):
        exporting.export(folder)
    assert not (folder / "export").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"flatbuffers and safetensors, which are not installed: .*\[export\]"):
        exporting.export(folder)
