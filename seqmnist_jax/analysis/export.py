"""A trained model for use without this package: a StableHLO program, and its parameters as safetensors."""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.analysis.recorded import warnings
from seqmnist_jax.analysis.trained import TrainedModel, load
from seqmnist_jax.data.protocols import SCALINGS
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models import reading
from seqmnist_jax.models.cells import build_cell, known_options
from seqmnist_jax.models.classifier import NORM_EPSILON
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files, provenance

Json = dict[str, Any]

FOLDER = "export"
PROGRAM = "model.stablehlo"
PARAMETERS = "params.safetensors"
DESCRIPTION = "export.json"
PLATFORMS = ("cpu", "cuda", "tpu")
# The one key of the safetensors' metadata: of several, the library shuffles the order.
METADATA = "seqmnist_jax"

TCN = (
    "y = x, then each level tcn.level_0, tcn.level_1, ... in turn maps y [time, in] to relu(h + r), "
    "its tensors being those under its name:",
    "h = y, then for i = 0, 1: h = relu(convolve(h, weights_i) + conv_i.bias), causal (zeros before the first step), "
    "with dilation 2 ** level",
    "weights_i [taps, in, out] = conv_i.kernel / sqrt(sum of conv_i.kernel ** 2 over taps and in) "
    "* norm_i.conv_i/kernel/scale; the last tap multiplies the step itself, the one before it the step 2 ** level "
    "earlier",
    "r = y @ residual.kernel + residual.bias where the level has a residual, else y",
    "y = the top level's output at the last step",
)


def export(workdir: str | Path) -> Json:
    """Writes a run's selected checkpoint into its folder `export`, so that it runs without this package.

    `model.stablehlo` is a serialised `jax.export.Exported`: images uint8 [batch, height, width] to logits
    float32 [batch, classes] for any batch from 1, parameters, scaling and permutation within, lowered for
    the CPU, CUDA and TPUs with the 'scan' backend. `params.safetensors` has the parameters and norm
    statistics under dotted names, as 'params.rnn.layer_0.forward.kernel', with the description of
    `export.json` as JSON in its metadata. `export.json`, written last, says what goes in and comes out, how the
    network computes, and the other files' SHA-256. The same checkpoint and versions give the same bytes.

    Args:
      workdir: a run. One that has not ended is exported as it is: the best checkpoint so far.

    Returns:
      What `export.json` says, and the folder.

    Raises:
      UsageError: safetensors or flatbuffers is not installed.
      WorkdirError, CheckpointError: as `load`; or the folder can't be written.
    """
    _check_installed()
    workdir = Path(workdir).expanduser()
    model = load(workdir)
    description = _describe(model, workdir)
    contents = {PROGRAM: _program(model), PARAMETERS: _parameters(model, description)}
    description["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    folder = workdir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            files.write_bytes(folder / name, content)
        files.write_json(folder / DESCRIPTION, description)
    except OSError as e:
        raise files.WorkdirError(
            f"{folder} can't be written ({e.strerror or e}). Copy the run to where it can, and export it there."
        ) from e
    return {"folder": str(folder), **description}


def _check_installed() -> None:
    missing = [name for name in ("flatbuffers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--mode=export needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install -e '.[export]' -c constraints.txt"
        )


def _program(model: TrainedModel) -> bytes:
    """The serialised program, which needs nothing but JAX."""
    network, view = model.learner.measured.portable(), model.learner.view

    def read_one(image: jax.Array) -> jax.Array:
        return reading.logits(network, view, model.variables, image[None])[0]

    # Mapped over one image, because a model may ask how large its batch is, which is not known here.
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *view.image_shape), jnp.uint8)
    # GPUs and TPUs would otherwise round what they multiply.
    with _without_source_files(), jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(jax.vmap(read_one)), platforms=PLATFORMS)(images)
        return bytes(exported.serialize())


@contextlib.contextmanager
def _without_source_files() -> Iterator[None]:
    """Programs lowered herein don't name the files they come from, so that no machine's folders are in them."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _tensors(model: TrainedModel) -> dict[str, np.ndarray]:
    """Parameters and norm statistics by their dotted names."""
    return {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(model.variables, sep=".").items()}


def _parameters(model: TrainedModel, description: Json) -> bytes:
    """The tensors, and in the metadata the description, as safetensors."""
    import safetensors.numpy

    return safetensors.numpy.save(_tensors(model), metadata={METADATA: json.dumps(description)})


def _describe(model: TrainedModel, workdir: Path) -> Json:
    """All that one must know to use the program, or to write it anew around the parameters."""
    facts, view = model.facts, model.learner.view
    summary = files.read_json(workdir / files.SUMMARY) if (workdir / files.SUMMARY).exists() else {}
    is_its_result = summary.get("best_step", model.step) == model.step
    tensors = _tensors(model)
    # Where and how the run was executed is no part of the model, and may name a machine's folders.
    config = {name: value for name, value in configs.to_json(model.config).items() if name != "runtime"}
    return {
        "checkpoint_step": model.step,
        "test_accuracy": summary.get("test_accuracy") if is_its_result else None,
        "selected_on": summary.get("selected_on"),
        "warnings": [*warnings(workdir, facts, model.step), *model.warnings, *facts.get("caveats", [])],
        "input": {"dtype": "uint8", "shape": ["batch", *view.image_shape], "values": "0 to 255, as in the data set"},
        "output": {
            "dtype": "float32",
            "shape": ["batch", facts["num_classes"]],
            "values": "logits; their softmax gives the probabilities",
        },
        "load": [
            "import jax.export, pathlib",
            f'exported = jax.export.deserialize(pathlib.Path("{PROGRAM}").read_bytes())',
            "model = jax.jit(exported.call)  # `call` alone would be compiled anew each time",
            "logits = model(images)",
        ],
        "platforms": list(PLATFORMS),
        "tensors": {name: [*tensor.shape] for name, tensor in tensors.items()},
        "sequence": {
            "equations": [
                "p = pixel_values[image.ravel()]",
                "p = p[order], unless order is null",
                "x = p.reshape(time, features)",
            ],
            "view": view.name,
            "time": view.sequence_length,
            "features": view.features,
            "scaling": view.scaling,
            # Each number is the shortest decimal that names the float32.
            "pixel_values": [float(str(value)) for value in np.asarray(SCALINGS[view.scaling](jnp.arange(256)))],
            "permutation": facts["permutation"],
            "order": facts["permutation_indices"],
        },
        "network": _network(model),
        "data": {"name": facts["name"], "content_hash": facts["content_hash"]},
        "config": config,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
    }


def _network(model: TrainedModel) -> Json:
    """How the network computes logits from x [time, features], in words and equations over the tensors' names."""
    network: Json = {"layout": "row-major; vectors are rows and multiply from the left, as in x @ kernel"}
    config = model.config.model
    if config.name not in ("rnn", "tcn"):
        return network | {"network": "as seqmnist_jax has it: the program computes it", "after": []}
    if config.name == "rnn":
        cell = build_cell(model.config)
        last = "the top layer's h after the last step"
        if not model.reads_forwards:
            last = "the top layer's two h, each after the last step that it reads, side by side, forward first"
        network |= {
            "layers": "rnn.layer_0 reads x, rnn.layer_1 the h of rnn.layer_0 at each step, and so on; h and c "
            "start at 0. A layer's 'backward' part, where it has one, reads the steps from last to first, and "
            "the layer above is given both h of each step side by side, forward first.",
            "gates": cell.gates,
            "step": list(cell.step),
            "numbers": known_options(cell.cell),
            "precision": model.config.runtime.eval_precision,
            "after": [f"y = {last}"],
        }
        if config.memory or config.head_layers or config.reading != "last":
            # Equations that leave out a part would be followed.
            network |= {"network": "with parts that stand in no equation here: the program computes them", "after": []}
            return network
    else:
        network |= {"after": list(TCN)}
    if "norm" in model.params:
        network["after"].append(
            f"y = (y - batch_stats.norm.mean) / sqrt(batch_stats.norm.var + {NORM_EPSILON}) * params.norm.scale "
            "+ params.norm.bias"
        )
    network["after"].append("logits = y @ params.dense.kernel + params.dense.bias")
    return network
