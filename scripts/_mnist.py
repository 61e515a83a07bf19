"""MNIST's files in their original form."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from gap_hf.errors import GaPError
from gap_hf.recipe import one_line


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
        raise GaPError(f"{folder}: has no {names[0]}, nor with .gz; expected MNIST's four idx files")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise GaPError(f"{path}: cannot be read: {one_line(error)}") from None
    start = 4 + 4 * ndim
    shape = tuple(int(n) for n in np.frombuffer(content[4:start][: 4 * ndim], ">i4")) if len(content) >= start else ()
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) != start + int(np.prod(shape)):
        raise GaPError(f"{path}: is no idx file of bytes with {ndim} dimensions, or not the whole of one")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
