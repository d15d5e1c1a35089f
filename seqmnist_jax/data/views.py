"""How an image becomes a sequence: scaled, its pixels perhaps permuted, read by rows or by pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.data.protocols import SCALINGS
from seqmnist_jax.errors import choose

Array = jax.Array

VIEWS = {
    # name: (steps, features per step) of a height x width image
    "row": lambda height, width: (height, width),
    "pixel": lambda height, width: (height * width, 1),
}


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: arrays have no hash
class SequenceView:
    """A pure function from images to sequences.

    Attributes:
      name: a name in `VIEWS`: 'row' reads one row a step, 'pixel' one pixel.
      image_shape: (height, width).
      scaling: a name in `SCALINGS`.
      permutation: int32 [height * width], the pixel read at each place, perhaps one at several;
        None for the natural order. It acts on the flattened image, whatever the view.
    """

    name: str
    image_shape: tuple[int, int]
    scaling: str
    permutation: np.ndarray | None = None

    def __post_init__(self) -> None:
        choose(VIEWS, self.name, "data.view")
        pixels = self.image_shape[0] * self.image_shape[1]
        order = self.permutation
        if order is not None and (order.shape != (pixels,) or order.min() < 0 or order.max() >= pixels):
            raise ValueError(f"permutation has shape {order.shape}; expected {pixels} numbers from 0 to {pixels - 1}")

    @property
    def sequence_length(self) -> int:
        """Steps per image."""
        return VIEWS[self.name](*self.image_shape)[0]

    @property
    def features(self) -> int:
        """Values per step."""
        return VIEWS[self.name](*self.image_shape)[1]

    def __call__(self, images: Array) -> Array:
        """uint8 [batch, height, width] to float32 [batch, time, features]; traceable."""
        pixels = SCALINGS[self.scaling](images.reshape(images.shape[0], -1))
        if self.permutation is not None:
            pixels = pixels[:, jnp.asarray(self.permutation)]
        return pixels.reshape(images.shape[0], self.sequence_length, self.features)
