"""Pictures of how a model errs, as arrays: the confusion matrix, and the digits that it was most surely wrong about.

Drawn by Pillow, with its own font; the same numbers give the same bits.
"""

import functools
from typing import Any

import numpy as np

# Classes beyond which a matrix has no room for numbers.
MOST_NAMED = 16
# Mistakes in a picture: columns and rows.
GRID = (8, 5)
CELL, MARGIN = 40, 52
ZOOM, CAPTION = 3, 20
PAPER, INK, PALE = (255, 255, 255), (32, 33, 36), (110, 114, 120)
RIGHT, WRONG = np.array([26, 95, 180]), np.array([200, 55, 45])


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The confusion matrix: of each true class (a row) the counts of what was predicted, and the share as a shade.

    Args:
      logits: float [count, classes].
      labels: integers [count].

    Returns:
      uint8 [height, width, 3].
    """
    classes = logits.shape[-1]
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, logits.argmax(-1)), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    is_named = classes <= MOST_NAMED
    cell = CELL if is_named else max(4, MOST_NAMED * CELL // classes)
    # A root, because mistakes are few; a mistake is red.
    shades = np.sqrt(shares)[..., None]
    full = np.where(np.eye(classes, dtype=bool)[..., None], RIGHT, WRONG)
    colours = np.rint(np.array(PAPER) * (1 - shades) + full * shades).astype(np.uint8)
    side = MARGIN + classes * cell + 8
    pixels = np.full((side, side, 3), PAPER, np.uint8)
    pixels[MARGIN:-8, MARGIN:-8] = colours.repeat(cell, 0).repeat(cell, 1)
    page = _Page(pixels)
    page.text((MARGIN + classes * cell / 2, 14), "predicted", PALE)
    page.text((4, 14), "true", PALE, "lm")
    for k in range(classes):
        middle = MARGIN + (k + 0.5) * cell
        if is_named or k % 5 == 0:
            page.text((middle, MARGIN - 14), str(k))
            page.text((MARGIN - 18, middle), str(k))
        for other in range(classes) if is_named else ():
            if counts[k, other]:
                place = (MARGIN + (other + 0.5) * cell, middle)
                page.text(place, str(counts[k, other]), PAPER if shades[k, other, 0] > 0.6 else INK)
    return page.pixels()


def mistakes(images: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """The images of which the model was most sure to be something else, each with its true class and the predicted one.

    Args:
      images: uint8 [count, height, width].
      logits: float [count, classes].
      labels: integers [count].

    Returns:
      uint8 [height, width, 3], the surest first; None where there is no mistake.
    """
    predictions = logits.argmax(-1)
    wrong = np.flatnonzero(predictions != labels)
    if not len(wrong):
        return None
    shifted = logits[wrong] - logits[wrong].max(-1, keepdims=True)
    confidence = 1.0 / np.exp(shifted.astype(np.float64)).sum(-1)
    order = np.argsort(-confidence, kind="stable")[: GRID[0] * GRID[1]]
    height, width = images.shape[1] * ZOOM, images.shape[2] * ZOOM
    gap = 6
    rows, columns = -(-len(order) // GRID[0]), GRID[0]
    pixels = np.full((rows * (height + CAPTION + gap) + gap, columns * (width + gap) + gap, 3), PAPER, np.uint8)
    places = [
        (gap + (k // columns) * (height + CAPTION + gap), gap + (k % columns) * (width + gap))
        for k in range(len(order))
    ]
    for place, (top, left) in zip(order, places, strict=True):
        digit = images[wrong[place]].repeat(ZOOM, 0).repeat(ZOOM, 1)
        pixels[top : top + height, left : left + width] = 255 - digit[..., None]
        # A frame, because both the digit's ground and the page are white.
        pixels[[top, top + height - 1], left : left + width] = 200
        pixels[top : top + height, [left, left + width - 1]] = 200
    page = _Page(pixels)
    for place, (top, left) in zip(order, places, strict=True):
        index = wrong[place]
        middle = top + height + CAPTION / 2
        page.text((left + 2, middle), f"{labels[index]} read as {predictions[index]}", INK, "lm", size=12)
    return page.pixels()


class _Page:
    """An image that text is written on."""

    def __init__(self, pixels: np.ndarray):
        from PIL import Image, ImageDraw

        self._image = Image.fromarray(pixels)
        self._draw = ImageDraw.Draw(self._image)

    def text(
        self, place: tuple[float, float], text: str, colour: Any = INK, anchor: str = "mm", size: float = 14
    ) -> None:
        """Writes text at a place (x, y), by default around it."""
        self._draw.text(place, text, fill=colour, anchor=anchor, font=_font(size))

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3]."""
        return np.asarray(self._image)


@functools.cache
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
