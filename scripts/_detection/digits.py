"""MNIST's idx files, and images of several of its digits with a box around each."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gap_hf.errors import GaPError
from gap_hf.recipe import one_line

DIGITS = [str(digit) for digit in range(10)]
HEIGHTS = (14, 31)  # of a digit's ink, in pixels, the second one excluded
MAX_OVERLAP = 0.1  # of the smaller box
INK = 32  # of 255: fainter pixels, which resizing leaves at the edges, are cleared


def read_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits (n, 28, 28) and labels (n,), uint8, of one part: ``train`` or ``t10k``.

    Raises:
        GaPError: if a file is not there, or is no idx file of that shape.
    """
    images, labels = _read_idx(folder, f"{part}-images", 3), _read_idx(folder, f"{part}-labels", 1)
    if len(images) != len(labels):
        raise GaPError(f"{folder}: {part} has {len(images)} images and {len(labels)} labels, expected as many")
    if not len(labels) or labels.max() > 9:
        raise GaPError(f"{folder}: {part} has no digits, or a label above 9; expected MNIST's")
    return images, labels


def _read_idx(folder: Path, stem: str, ndim: int) -> np.ndarray:
    """An idx file: 0, 0, 8 (unsigned bytes), the number of dimensions, each as a big-endian int32, then the bytes."""
    names = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise GaPError(f"data.folder: {folder} has no {names[0]}, nor with .gz; expected MNIST's four idx files")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise GaPError(f"{path}: cannot be read: {one_line(error)}") from None
    start = 4 + 4 * ndim
    shape = tuple(int(n) for n in np.frombuffer(content[4:start][: 4 * ndim], ">i4")) if len(content) >= start else ()
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) != start + int(np.prod(shape)):
        raise GaPError(f"{path}: is no idx file of bytes with {ndim} dimensions, or not the whole of one")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def make_digits(
    digits: np.ndarray, labels: np.ndarray, count: int, *, size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`count` grey images (size, size), uint8, with boxes (n, 4) float64 and labels (n,) int64, n from 1 to 4.

    Boxes are left, top, right, bottom in pixels, right and bottom excluded, and as tight as pixels allow. An image
    depends on `seed` and its own number only, so the first ones are the same however many are made.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, number])
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
