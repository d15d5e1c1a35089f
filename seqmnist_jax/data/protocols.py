"""The conventions that decide whether two results can be compared, by name.

A protocol fixes the permutation of the pixels, the split of the training images into
training and validation, the scaling of the pixels, and how the reported checkpoint is
selected. To add one, add an entry to `PROTOCOLS`.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.errors import UsageError, choose, did_you_mean

Array = jax.Array

SELECTIONS = {
    "validation": "the checkpoint with the highest validation accuracy (ties: lower loss, then earlier)",
    "last": "the last checkpoint",
}
TEST_SELECTION = (
    "the checkpoint with the highest accuracy on these test images: NOT COMPARABLE, it selects on the test set"
)

SCALINGS: dict[str, Callable[[Array], Array]] = {
    # 0-255 to [0, 1], as TF's read_data_sets.
    "unit": lambda pixels: pixels.astype(jnp.float32) / 255.0,
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One convention.

    Attributes:
      permutation: where the fixed order of the pixels comes from: 'none', or 'numpy:SEED'
        for ``numpy.random.RandomState(SEED).permutation(pixels)``.
      split: 'first:N', the first N training images validate and the others train
        (N = 0: no validation set).
      scaling: a name in `SCALINGS`.
      selection: a name in `SELECTIONS`; or 'test:N', the best on the first N test images, only
        to reproduce results that were so chosen.
    """

    permutation: str
    split: str
    scaling: str
    selection: str

    def __post_init__(self) -> None:
        validation_size(self.split)
        choose(SCALINGS, self.scaling, "data.scaling")
        selection_size(self.selection)


def _numbered(text: str, prefix: str, field: str, otherwise: str, names: Iterable[str] = ()) -> int:
    """The N of 'prefix:N'; `names` are what `text` may be besides."""
    kind, _, number = text.partition(":")
    if kind != prefix or not number.isascii() or not number.isdigit() or len(number) > 10:
        raise UsageError(f"{field} is {text!r}; expected {otherwise}.{did_you_mean(text, names)}")
    return int(number)


def permutation(name: str, pixels: int) -> np.ndarray | None:
    """The fixed order of the pixels that a protocol names.

    Args:
      name: 'none' or 'numpy:SEED', with 0 <= SEED < 2**32 (NumPy's legacy generator,
        whose stream is frozen).
      pixels: how many an image has.

    Returns:
      int32 [pixels], the source index of each place in the sequence; None for 'none'.

    Raises:
      UsageError: the name is neither.
    """
    if name == "none":
        return None
    expected = "'none' or 'numpy:SEED' with 0 <= SEED < 2**32, as in 'numpy:92916'"
    seed = _numbered(name, "numpy", "data.permutation", expected)
    if seed >= 2**32:
        raise UsageError(f"data.permutation is {name!r}; expected {expected}.")
    return np.random.RandomState(seed).permutation(pixels).astype(np.int32)


def validation_size(split: str) -> int:
    """How many of the first training images 'first:N' sets aside for validation.

    Raises:
      UsageError: another form.
    """
    return _numbered(split, "first", "data.split", "'first:N', the first N training images validate")


def selection_size(selection: str) -> int | None:
    """The N of 'test:N', how many test images select; None where validation or the last step does.

    Raises:
      UsageError: another form.
    """
    if selection in SELECTIONS:
        return None
    expected = f"{', '.join(map(repr, SELECTIONS))}, or 'test:N' with N > 0 (selects on the test set)"
    size = _numbered(selection, "test", "data.selection", expected, SELECTIONS)
    if size < 1:
        raise UsageError(f"data.selection is {selection!r}; expected {expected}.")
    return size


PROTOCOLS = {
    # Ours: the split and scaling of TF's read_data_sets, selection never on the test set.
    "seqmnist": Protocol(permutation="none", split="first:5000", scaling="unit", selection="validation"),
}
