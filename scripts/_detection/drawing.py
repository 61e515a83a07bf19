"""Images with their boxes: truth and detections side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from _detection.data import Sample
from _detection.preparing import read_pixels

# Okabe and Ito's palette, without its black and its yellow, which nothing stands out in.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


def draw_detections(
    samples: Sequence[Sample],
    found: Mapping[int, Mapping[str, np.ndarray]],
    names: Sequence[str],
    path: Path,
    *,
    threshold: float,
) -> None:
    """Write a picture: two images in a row, the truth on the left of each and on its right what was found.

    Args:
        samples: Images to show, at least one.
        found: Detections of each image id, boxes as shares of the image.
        names: Of the classes.
        path: File to write; its suffix sets the format.
        threshold: Lowest score that is drawn.
    """
    rows = (len(samples) + 1) // 2
    figure = Figure(figsize=(10, 0.3 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for sample, (left, right) in zip(samples, axes.reshape(-1, 2), strict=False):
        pixels = read_pixels(sample)
        scale = np.array([pixels.shape[1], pixels.shape[0]] * 2)
        truth = sample.boxes / np.array([sample.size[1], sample.size[0]] * 2) * scale
        mine = found.get(sample.image_id, {})
        good = mine["scores"] >= threshold if mine else np.zeros(0, bool)
        _panel(left, pixels, "truth")
        for box, label in zip(truth, sample.labels, strict=True):
            _box(left, box, int(label), names[int(label)])
        _panel(right, pixels, f"found, score ≥ {threshold:g}")
        if mine:
            boxes = mine["boxes"][good] * scale
            for box, label, score in zip(boxes, mine["labels"][good], mine["scores"][good], strict=True):
                _box(right, box, int(label), f"{names[int(label)]} {score:.2f}")
    figure.savefig(path, dpi=110)


def _panel(axis: Any, pixels: np.ndarray, title: str) -> None:
    axis.imshow(pixels, interpolation="nearest")
    axis.set_title(title, fontsize=8)


def _box(axis: Any, box: np.ndarray, label: int, text: str) -> None:
    colour = COLOURS[label % len(COLOURS)]
    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.4))
    # On the box, so that what lies at the upper edge of the image is not cut off.
    style = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.9}
    axis.text(left, top, text, fontsize=6, color="white", va="bottom", bbox=style, clip_on=False)
