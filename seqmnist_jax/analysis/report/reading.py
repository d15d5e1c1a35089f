"""What the page needs to show a network reading: digits, weights or recorded readings, how soon it knows."""

import base64
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import scipy.special

from seqmnist_jax.analysis.evaluate import anytime
from seqmnist_jax.analysis.report.runs import Opened
from seqmnist_jax.analysis.trained import TrainedModel
from seqmnist_jax.data.protocols import SCALINGS
from seqmnist_jax.data.views import SequenceView
from seqmnist_jax.models.classifier import NORM_EPSILON

Json = dict[str, Any]

HARDEST, RANDOM = 24, 16
LIVE_CELLS = ("lstm", "gru")
# What the page may spend, in numbers, on weights, and on recorded states.
MOST_WEIGHTS = 750_000
MOST_STATES = 1_200_000


def _base64(array: npt.ArrayLike, dtype: str) -> str:
    """The array's numbers, little-endian."""
    return base64.b64encode(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def choose_digits(images: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Json:
    """The hardest images by their loss, then some at random.

    Args:
      images: uint8 [count, height, width].
      labels: int [count].
      logits: float [count, classes].

    Returns:
      height, width; pixels, base64 of uint8 [count, height, width]; list, of each its place in the split,
      label, prediction, the probability of both, loss in nats, and whether it is one of the hardest.
    """
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    loss = 0.0 - log_p[np.arange(len(log_p)), labels]
    hardest = np.argsort(-loss, kind="stable")[:HARDEST]
    others = np.setdiff1d(np.arange(len(loss)), hardest)
    some = np.sort(np.random.default_rng(0).choice(others, min(RANDOM, len(others)), replace=False))
    chosen = np.concatenate([hardest, some])
    _, height, width = images.shape
    predictions = logits.argmax(-1)
    return {
        "height": height,
        "width": width,
        "pixels": _base64(images[chosen], "u1"),
        "list": [
            {
                "index": int(index),
                "label": int(labels[index]),
                "predicted": int(predictions[index]),
                "probability": float(np.exp(log_p[index, predictions[index]])),
                "label_probability": float(np.exp(log_p[index, labels[index]])),
                "loss": float(loss[index]),
                "hardest": place < HARDEST,
            }
            for place, index in enumerate(chosen)
        ],
    }


def describe_view(view: SequenceView) -> Json:
    """How an image becomes a sequence; scale is the value of each of the 256 pixel values."""
    return {
        "name": view.name,
        "height": view.image_shape[0],
        "width": view.image_shape[1],
        "time": view.sequence_length,
        "features": view.features,
        "order": None if view.permutation is None else view.permutation.tolist(),
        "scale": np.asarray(SCALINGS[view.scaling](jnp.arange(256, dtype=jnp.uint8)), np.float64).tolist(),
    }


def why_not_live(model: TrainedModel) -> str | None:
    """Why the page can't run a model itself, but only play what was recorded; None where it can."""
    config = model.config.model
    if config.name != "rnn":
        return f"The page's own few lines run LSTMs and GRUs; this model is another (model.name={config.name})."
    if config.cell not in LIVE_CELLS:
        return f"The page's own few lines run the cells {' and '.join(LIVE_CELLS)}; this one is {config.cell}."
    if not model.reads_forwards:
        return "This model reads both ways, so that it can't be watched as it reads."
    if config.head_layers or config.memory or config.reading != "last":
        return (
            "The page's own few lines know neither a memory, nor hidden layers behind the cell, nor the mean of steps."
        )
    count = sum(leaf.size for layer in model.params["rnn"].values() for leaf in layer["forward"].values())
    if count > MOST_WEIGHTS:
        return f"Its {count:,} recurrent weights would make the page too large."
    return None


def describe_network(model: TrainedModel) -> Json | None:
    """The weights that recurrence.js runs, base64 of float32; None where it can't run the model.

    The norm layer, which at this stage is affine, is put into the dense one.
    """
    if why_not_live(model) is not None:
        return None
    layers = []
    for index in range(len(model.params["rnn"])):
        params = model.params["rnn"][f"layer_{index}"]["forward"]
        layers.append({name: _base64(np.asarray(leaf), "f4") for name, leaf in params.items()})
    kernel, bias = (np.asarray(model.params["dense"][name], np.float64) for name in ("kernel", "bias"))
    if "norm" in model.params:
        moved = model.variables["batch_stats"]["norm"]
        scale, offset = (np.asarray(model.params["norm"][name], np.float64) for name in ("scale", "bias"))
        mean, variance = (np.asarray(moved[name], np.float64) for name in ("mean", "var"))
        gain = scale / np.sqrt(variance + NORM_EPSILON)
        kernel, bias = gain[:, None] * kernel, bias + (offset - gain * mean) @ kernel
    return {
        "cell": model.config.model.cell,
        "layers": layers,
        "dense": {"kernel": _base64(kernel, "f4"), "bias": _base64(bias, "f4")},
    }


def record(model: TrainedModel, images: np.ndarray) -> Json:
    """What a model reads of images, for a page that can't run it, rounded to what can be seen.

    Returns:
      probabilities, base64 of uint8 [count, time, classes], 255 for 1, and leaders, uint8 [count, time], the most
      probable class before that rounding, or None of a model that reads both ways;
      states, base64 of int8 [count, columns, units], 127 for `largest`, or None of a model without any. From one
      column to the next are `stride` steps: the states of a deep stack are those of its last, shortest stage.
    """
    recorded: Json = {"probabilities": None, "leaders": None, "states": None}
    if model.reads_forwards:
        read = model.read(images)
        recorded["probabilities"] = _base64(np.rint(255 * read), "u1")
        recorded["leaders"] = _base64(read.argmax(-1), "u1")
    if model.has_states:
        states = model.states(images)
        every = -(-states.size // MOST_STATES)
        stride = every * (model.learner.view.sequence_length // states.shape[1])
        states = states[:, ::every]
        largest = float(max(1.0, np.abs(states).max()))
        recorded["states"] = _base64(np.rint(127 * states / largest), "i1")
        recorded |= {"stride": stride, "units": states.shape[-1], "largest": largest}
    return recorded


def describe(opened: Opened, digits: Json | None) -> Json | None:
    """All that "watch it read" needs beside the digits; None without a model.

    Args:
      opened: the run.
      digits: as `choose_digits` has them; None where there are none.
    """
    model, images, answers = opened.model, opened.images, opened.answers
    if model is None:
        return None
    network = describe_network(model)
    recorded = soon = None
    if images is not None and answers is not None:
        soon = anytime(model, images, answers.labels)
        if network is None and digits is not None:
            recorded = record(model, images[[one["index"] for one in digits["list"]]])
    return {
        "view": describe_view(model.learner.view),
        "classes": model.facts["num_classes"],
        "network": network,
        "why_not_live": why_not_live(model),
        "recorded": recorded,
        "soon": soon and {name: np.round(soon[name], 5).tolist() for name in ("accuracy", "decided", "median")},
    }
