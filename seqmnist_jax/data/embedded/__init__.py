"""5,000 real MNIST digits that ship with the package, as IDX files; see README.md beside this file."""

from pathlib import Path

FOLDER = Path(__file__).parent
# 4,500 training images in the order of a fixed shuffle: the first 500 of them, 50 of
# each digit, validate; 500 more, 50 of each digit, are the test set.
VALIDATION_SIZE = 500
