"""What the networks on point clouds share: neighbourhoods, interpolation, layers on the last dimension, the output.

This file travels in the folder of every saved network (`PreTrainedModel.register_for_auto_class`), so it imports
nothing of gap_hf. B is the batch, N and S numbers of points, K neighbours, C channels. Coordinates are float32;
neighbourhoods are found without gradients, and ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput


@dataclass
class PointSegmentationOutput(ModelOutput):
    """`loss` is None without labels; `logits` (B, N, num_parts), of every part, those of other categories included."""

    loss: Tensor | None = None
    logits: Tensor | None = None


# --- neighbourhoods --------------------------------------------------------------------------------------------------


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (B, S, N) of the points `a` (B, S, 3) from `b` (B, N, 3)."""
    # Through a matrix product, points that coincide would lie 1e-3 apart: float32 cancels.
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def farthest_points(points: Tensor, num: int) -> Tensor:
    """Indices (B, num), int64, of points (B, N, 3) far from each other (farthest point sampling).

    The first is point 0, each further one is farthest from all those before it.

    Raises:
        ValueError: if there are fewer than `num` points.
    """
    points = points.float()
    if points.shape[1] < num:
        raise ValueError(f"points: found {points.shape[1]} in a cloud, expected at least {num} to sample")
    found = torch.zeros(points.shape[0], num, dtype=torch.long, device=points.device)
    nearest = torch.full(points.shape[:2], torch.inf, device=points.device)
    for i in range(1, num):
        last = gather(points, found[:, i - 1 : i])
        nearest = torch.minimum(nearest, (points - last).square().sum(-1))
        found[:, i] = nearest.argmax(-1)
    return found


@torch.no_grad()
def ball_neighbours(points: Tensor, centroids: Tensor, radius: float, num: int) -> Tensor:
    """Indices (B, S, num), int64, of the first `num` of `points` (B, N, 3) within `radius` of each centroid (B, S, 3).

    First is by index, as in the authors' code. Where fewer are near, the first of them fills up the rest. A centroid
    has to be one of the points, so that one is always near.
    """
    total = points.shape[1]
    index = torch.arange(total, device=points.device)
    index = torch.where(distances(centroids, points) <= radius, index, total)
    first = index.topk(min(num, total), largest=False, sorted=True).values
    first = F.pad(first, (0, num - first.shape[-1]), value=total)
    return torch.where(first == total, first[..., :1], first)


@torch.no_grad()
def nearest_neighbours(points: Tensor, queries: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Distances (B, S, K) and indices of the K nearest of `points` (B, N, 3) to `queries` (B, S, 3), nearest first.

    K is `num`, or N where there are fewer. Which of equally near ones come is up to torch.
    """
    near = distances(queries, points).topk(min(num, points.shape[1]), largest=False, sorted=True)
    return near.values, near.indices


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, *index, C) of `values` (B, N, C) at `index` (B, *index)."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, values.shape[-1])


def interpolate(values: Tensor, points: Tensor, queries: Tensor) -> Tensor:
    """`values` (B, N, C) at `points` (B, N, 3), read at `queries` (B, S, 3): (B, S, C).

    The mean of the three nearest, weighted by one over the squared distance (PointNet++, equation 2).
    """
    distance, index = nearest_neighbours(points, queries, 3)
    weight = 1 / distance.square().clamp_min(1e-10)
    weight = (weight / weight.sum(-1, keepdim=True)).to(values.dtype)
    return (gather(values, index) * weight.unsqueeze(-1)).sum(-2)


# --- layers ----------------------------------------------------------------------------------------------------------


class PointNorm(nn.BatchNorm1d):
    """Batch norm of the last dimension, over all others."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).view_as(input)


def perceptron(channels: Sequence[int]) -> nn.Sequential:
    """Linear layers from each of `channels` to the next, each with a norm and a ReLU: the 1x1 convolutions of the papers."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Linear(before, after, bias=False), PointNorm(after), nn.ReLU()]
    return nn.Sequential(*layers)


class PartHead(nn.Module):
    """A hidden layer, dropout and the classifier. It is in no stage, so gap_hf leaves it dense."""

    def __init__(self, in_channels: int, hidden: int, num_parts: int, dropout: float) -> None:
        super().__init__()
        self.hidden = perceptron([in_channels, hidden])
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, num_parts)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.hidden(features)))


class PointModel(PreTrainedModel):
    """What both networks do the same: they check what they are given, score it, and start from He's initialisation."""

    main_input_name = "points"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def split(self, points: Tensor, category: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates (B, N, 3), all channels (B, N, 3 + num_features), and the one-hot category (B, N, num_categories).

        Raises:
            ValueError: if `points` or `category` has another shape.
        """
        config: Any = self.config
        wanted = 3 + config.num_features
        if points.ndim != 3 or points.shape[-1] != wanted:
            raise ValueError(f"points: found shape {tuple(points.shape)}, expected (batch, points, {wanted})")
        if category.shape != points.shape[:1]:
            raise ValueError(f"category: found shape {tuple(category.shape)}, expected ({points.shape[0]},)")
        one_hot = F.one_hot(category, config.num_categories).to(points.dtype)
        return points[..., :3], points, one_hot.unsqueeze(1).expand(-1, points.shape[1], -1)

    def score(self, logits: Tensor, labels: Tensor | None) -> PointSegmentationOutput:
        """Mean cross entropy over the points whose label is not -100."""
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return PointSegmentationOutput(loss=loss, logits=logits)


class PointConfig(PreTrainedConfig):
    """Keys of every network on points.

    Args:
        num_parts: Outputs per point: the parts of all categories, numbered on.
        num_categories: Kinds of object; which one a cloud is, is given to the network.
        num_features: Channels behind the coordinates, 3 for normals.
        category_parts: For each category the parts that it can have, for whoever picks the best of them; the
            network itself does not use it. None: any.
        dropout: Before the classifier.
    """

    def __init__(
        self,
        num_parts: int = 50,
        num_categories: int = 16,
        num_features: int = 3,
        category_parts: list[list[int]] | None = None,
        dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        for name, value, low in (("num_parts", num_parts, 1), ("num_categories", num_categories, 1)):
            if value < low:
                raise ValueError(f"{name}: found {value}, expected at least {low}")
        if num_features < 0:
            raise ValueError(f"num_features: found {num_features}, expected at least 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: found {dropout}, expected 0 to below 1")
        self.num_parts = num_parts
        self.num_categories = num_categories
        self.num_features = num_features
        self.category_parts = category_parts
        self.dropout = dropout
        super().__init__(**kwargs)
