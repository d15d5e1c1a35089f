"""What a model makes of images: logits, probabilities after each step, features, states. Pure functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Variables = dict[str, Any]
Preprocess = Callable[[Array], Array]


def logits(model: nn.Module, preprocess: Preprocess, variables: Variables, images: Array) -> Array:
    """Logits [batch, classes] of images uint8 [batch, height, width]."""
    return jnp.asarray(model.apply(variables, preprocess(images), train=False))


def probabilities(model: nn.Module, preprocess: Preprocess, variables: Variables, images: Array) -> Array:
    """What the model would say if its sequences ended at each step, [batch, time, classes]; images as in `logits`.

    These are its last layers on every output, so it must read forwards.
    """
    return jax.nn.softmax(jnp.asarray(model.apply(variables, preprocess(images), train=False, every_step=True)))


def _sown(name: str, model: nn.Module, x: Array, variables: Variables, **options: Any) -> Array:
    """The array that a model sows under a name."""
    _, seen = model.apply(variables, x, train=False, mutable=["intermediates"], **options)
    return seen["intermediates"][name][0]


def features(model: nn.Module, preprocess: Preprocess, variables: Variables, images: Array) -> Array:
    """What the dense layer sees, [batch, features]; images as in `logits`."""
    return _sown("features", model, preprocess(images), variables)


def states(model: nn.Module, preprocess: Preprocess, variables: Variables, images: Array) -> Array:
    """What the recurrent layers hand on at each step, [batch, time, hidden]; images as in `logits`."""
    return _sown("states", model, preprocess(images), variables, every_step=True)


def _in_batches(images: Array, batch_size: int) -> Array:
    """Images padded with blank ones to whole batches, [batches, batch, height, width]."""
    count = images.shape[0]
    batch_size = min(batch_size, count)
    batches = -(-count // batch_size)
    padded = jnp.pad(images, ((0, batches * batch_size - count), (0, 0), (0, 0)))
    return padded.reshape(batches, batch_size, *images.shape[1:])


def predict_logits(
    model: nn.Module, preprocess: Preprocess, batch_size: int, variables: Variables, images: Array
) -> Array:
    """Logits [count, classes] of images uint8 [count, height, width], `batch_size` at a time."""
    found = jax.lax.map(lambda batch: logits(model, preprocess, variables, batch), _in_batches(images, batch_size))
    return found.reshape(-1, found.shape[-1])[: images.shape[0]]
