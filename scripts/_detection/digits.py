"""Images of several of MNIST's digits with a box around each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

DIGITS = [str(digit) for digit in range(10)]
HEIGHTS = (14, 31)  # of a digit's ink, in pixels, the second one excluded
MAX_OVERLAP = 0.1  # of the smaller box
INK = 32  # of 255: fainter pixels, which resizing leaves at the edges, are cleared


def make_digits(
    digits: np.ndarray, labels: np.ndarray, count: int, *, size: int, seed: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`count` grey images (size, size), uint8, with boxes (n, 4) float64 and labels (n,) int64, n from 1 to 4.

    Boxes are left, top, right, bottom in pixels, right and bottom excluded, and as tight as pixels allow. An image
    depends on `seed` and its own number only, so the first ones are the same however many are made.
    """
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        canvas = np.zeros((size, size), np.uint8)
        boxes: list[tuple[int, int, int, int]] = []
        found: list[int] = []
        for _ in range(rng.integers(1, 5)):
            chosen = int(rng.integers(len(digits)))
            ink = _resize(digits[chosen], int(rng.integers(*HEIGHTS)))
            box = _place(ink.shape, boxes, size, rng)
            if box is None:
                continue
            left, top, right, bottom = box
            canvas[top:bottom, left:right] = np.maximum(canvas[top:bottom, left:right], ink)
            boxes.append(box)
            found.append(int(labels[chosen]))
        yield canvas, np.array(boxes, np.float64), np.array(found, np.int64)


def _resize(digit: np.ndarray, height: int) -> np.ndarray:
    """The ink of a digit at about this height, without empty rows and columns around it."""
    ink = _crop(digit)
    width = max(3, round(ink.shape[1] * height / ink.shape[0]))
    pixels = np.asarray(Image.fromarray(ink).resize((min(width, 2 * height), height), Image.Resampling.BILINEAR))
    return _crop(np.where(pixels < INK, 0, pixels).astype(np.uint8))


def _crop(pixels: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else np.full((3, 3), 255, np.uint8)


def _place(
    shape: tuple[int, ...], boxes: list[tuple[int, int, int, int]], size: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Where an object of this height and width overlaps no other by much; None if chance finds no such place."""
    height, width = shape
    if height > size or width > size:
        return None
    for _ in range(30):
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_intersection(box, other) <= MAX_OVERLAP * min(_area(box), _area(other)) for other in boxes):
            return box
    return None


def _intersection(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
