"""Top-1 and top-5 accuracy, and pictures of what was got wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _vision.data import Images

KEPT = 5


def best_classes(logits: Any, labels: Any = None) -> Tensor:
    """The five best classes of each image, int64 (N, 5), best first: all that is kept of the logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.topk(logits, min(KEPT, logits.shape[-1]), dim=-1).indices


def accuracy(best: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares from 0 to 1.

    Args:
        best: int (N, k), from `best_classes`.
        labels: int (N,).
    """
    hits = best == labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}


def draw_mistakes(images: Images, best: np.ndarray, path: Path, *, most: int = 32) -> int:
    """Images that were got wrong, with the right class and the one that was found. Returns how many there are in all."""
    from matplotlib.figure import Figure

    wrong = np.flatnonzero(best[:, 0] != images.labels)
    shown = wrong[:: max(1, len(wrong) // most)][:most]
    columns = 8
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(1.3 * columns, 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, index in zip(axes, shown, strict=False):
        axis.imshow(np.asarray(images.picture(int(index))), cmap="gray")
        found, right = _name(images.classes, int(best[index, 0])), _name(images.classes, int(images.labels[index]))
        axis.set_title(f"{right}, found {found}", fontsize=7)
    figure.savefig(path, dpi=110)
    return len(wrong)


def _name(classes: Sequence[str], number: int) -> str:
    return classes[number][:14]
