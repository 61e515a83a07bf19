"""Scores of part segmentation, and the baseline that no network is needed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def best_parts(logits: Tensor, category: Tensor, category_parts: Sequence[Sequence[int]]) -> Tensor:
    """Parts (B, N), int64: the largest of `logits` (B, N, num_parts) among those that each cloud's category (B,) can have."""
    allowed = torch.zeros(len(category_parts), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for row, parts in enumerate(category_parts):
        allowed[row, list(parts)] = True
    return logits.float().masked_fill(~allowed[category].unsqueeze(1), -torch.inf).argmax(-1)


def shape_iou(predicted: np.ndarray, truth: np.ndarray, parts: Sequence[int]) -> float:
    """Mean over `parts` of intersection over union; a part that is in neither counts as 1 (ShapeNet's convention)."""
    ious = []
    for part in parts:
        ours, theirs = predicted == part, truth == part
        union = int((ours | theirs).sum())
        ious.append(int((ours & theirs).sum()) / union if union else 1.0)
    return float(np.mean(ious))


def part_scores(
    predicted: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    category: Sequence[int],
    category_parts: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Scores from 0 to 1 of clouds (each (n,), int), whose parts are -100 where nothing is scored.

    `point_accuracy` is over all points, `instance_miou` the mean IoU over clouds, `class_miou` the mean over
    categories of the mean over their clouds.
    """
    hits = total = 0
    by_category: dict[int, list[float]] = {}
    for ours, theirs, kind in zip(predicted, truth, category, strict=True):
        ours, theirs = ours[theirs != -100], theirs[theirs != -100]
        hits, total = hits + int((ours == theirs).sum()), total + len(theirs)
        by_category.setdefault(kind, []).append(shape_iou(ours, theirs, category_parts[kind]))
    return {
        "point_accuracy": hits / max(total, 1),
        "instance_miou": float(np.mean([iou for ious in by_category.values() for iou in ious])),
        "class_miou": float(np.mean([np.mean(ious) for ious in by_category.values()])),
    }


def nearest_neighbour_parts(
    points: Tensor, category: int, examples: Mapping[int, Sequence[tuple[Tensor, Tensor]]]
) -> np.ndarray:
    """Parts (n,) of `points` (n, 3): each that of the nearest point of any example of the same category.

    Args:
        points: Normalised coordinates, float32.
        category: Of the cloud.
        examples: Category to training clouds: coordinates (m, 3) and parts (m,).
    """
    best = torch.full((len(points),), torch.inf)
    parts = torch.full((len(points),), -1, dtype=torch.long)
    for others, labels in examples[category]:
        distance, index = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        nearer = distance < best  # ties to the earlier example
        best[nearer], parts[nearer] = distance[nearer], labels[index][nearer]
    return parts.numpy()
