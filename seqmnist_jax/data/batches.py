"""Which examples make a training step: one endless stream, a pure function of (key, step).

Epochs are permutations of the training set laid end to end; step k takes examples
k * B to (k + 1) * B - 1 of that stream. Nothing is dropped, so a batch may span two
epochs.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.jit, static_argnums=2)
def epoch_pair(key: Array, epoch: Array, size: int) -> Array:
    """The orders of an epoch and the next, end to end: int32 [2 * size]."""
    epochs = jnp.stack([epoch, epoch + 1])
    orders = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), size))(epochs)
    return orders.reshape(-1).astype(jnp.int32)


class ExampleStream:
    """Hands out the piece of the stream from which the next steps can be cut on the device.

    The order of an epoch is made when training enters it, not at each step or dispatch.
    What is kept here is only that order, which `key` and the step make again at any time.
    """

    def __init__(self, key: Array, size: int, batch_size: int):
        """A stream over `size` examples in batches of `batch_size` <= `size`."""
        self._key = key
        self._size = size
        self._batch_size = batch_size
        self._epoch: int | None = None
        self._orders: Array | None = None

    def window(self, step: int) -> tuple[Array, int, int]:
        """The part of the stream around a step.

        Returns:
          (orders, offset, steps): the batch of step + i is ``orders[offset + i * B:][:B]``
          for each i < steps; steps is at least 1.
        """
        first = step * self._batch_size
        epoch = first // self._size
        if epoch != self._epoch:
            self._epoch, self._orders = epoch, epoch_pair(self._key, jnp.uint32(epoch), self._size)
        offset = first - epoch * self._size
        assert self._orders is not None
        return self._orders, offset, (2 * self._size - offset) // self._batch_size
