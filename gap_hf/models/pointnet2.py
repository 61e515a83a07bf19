"""PointNet++ with multi-scale grouping for part segmentation (Qi et al., NeurIPS 2017, arXiv 1706.02413), in plain torch.

Written from the paper and the sizes of its `part_seg` model with one-hot categories, which are the defaults here:
1.7 M weights, for clouds of 2,048 points with normals. Linear layers on the last dimension stand for 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .points import (
    PartHead,
    PointConfig,
    PointModel,
    PointSegmentationOutput,
    ball_neighbours,
    farthest_points,
    gather,
    interpolate,
    perceptron,
)


class PointNet2Config(PointConfig):
    """Sizes of a `PointNet2ForPartSegmentation`.

    Args:
        num_centroids: Points that each set abstraction keeps, by farthest point sampling. One more abstraction, of
            all points to one, follows.
        radii: For each abstraction, the radii of its balls, in units of the coordinates.
        num_samples: Points taken from each ball.
        channels: Widths of the layers of each ball's perceptron.
        global_channels: The same of the last abstraction.
        propagation_channels: Of the feature propagations, from the coarsest to the points: one more than `num_centroids`.
        head_channels: Width of the layer before the classifier.
        **kwargs: As `PointConfig` and transformers' `PreTrainedConfig` have them.

    Raises:
        ValueError: if the lists do not fit each other.
    """

    model_type = "gap_hf_pointnet2"

    def __init__(
        self,
        num_centroids: Sequence[int] = (512, 128),
        radii: Sequence[Sequence[float]] = ((0.1, 0.2, 0.4), (0.4, 0.8)),
        num_samples: Sequence[Sequence[int]] = ((32, 64, 128), (64, 128)),
        channels: Sequence[Sequence[Sequence[int]]] = (
            ((32, 32, 64), (64, 64, 128), (64, 96, 128)),
            ((128, 128, 256), (128, 196, 256)),
        ),
        global_channels: Sequence[int] = (256, 512, 1024),
        propagation_channels: Sequence[Sequence[int]] = ((256, 256), (256, 128), (128, 128)),
        head_channels: int = 128,
        **kwargs: Any,
    ) -> None:
        num_levels = len(num_centroids)
        for name, found, wanted in (
            ("radii", len(radii), num_levels),
            ("num_samples", len(num_samples), num_levels),
            ("channels", len(channels), num_levels),
            ("propagation_channels", len(propagation_channels), num_levels + 1),
        ):
            if found != wanted:
                raise ValueError(f"{name}: found {found} entries, expected {wanted} for {num_levels} num_centroids")
        for name, values in (("num_samples", num_samples), ("channels", channels)):
            if [len(v) for v in values] != [len(v) for v in radii]:
                raise ValueError(f"{name}: found {[len(v) for v in values]} per level, expected as many as radii has")
        # Lists, as JSON gives them back.
        self.num_centroids = list(num_centroids)
        self.radii = [list(level) for level in radii]
        self.num_samples = [list(level) for level in num_samples]
        self.channels = [[list(ball) for ball in level] for level in channels]
        self.global_channels = list(global_channels)
        self.propagation_channels = [list(level) for level in propagation_channels]
        self.head_channels = head_channels
        super().__init__(**kwargs)


class SetAbstraction(nn.Module):
    """Features of fewer points, each from the balls around it; a ball's features are the maximum over its points."""

    def __init__(
        self,
        in_channels: int,
        num_centroids: int,
        radii: Sequence[float],
        num_samples: Sequence[int],
        channels: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.num_centroids, self.radii, self.num_samples = num_centroids, radii, num_samples
        self.scales = nn.ModuleList([perceptron([3 + in_channels, *widths]) for widths in channels])
        self.out_channels = sum(widths[-1] for widths in channels)

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3) and (B, N, C) to (B, num_centroids, 3) and (B, num_centroids, out_channels)."""
        centroids = gather(points, farthest_points(points, self.num_centroids))
        pooled = []
        for radius, num, scale in zip(self.radii, self.num_samples, self.scales, strict=True):
            near = ball_neighbours(points, centroids, radius, num)
            offsets = gather(points, near) - centroids.unsqueeze(2)
            pooled.append(scale(torch.cat([gather(features, near), offsets], -1)).amax(2))
        return centroids, torch.cat(pooled, -1)


class GlobalAbstraction(nn.Module):
    """One vector for the whole cloud."""

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.perceptron = perceptron([3 + in_channels, *channels])
        self.out_channels = channels[-1]

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3) and (B, N, C) to the origin (B, 1, 3) and (B, 1, out_channels)."""
        pooled = self.perceptron(torch.cat([features, points], -1)).amax(1, keepdim=True)
        return torch.zeros_like(points[:, :1]), pooled


class FeaturePropagation(nn.Module):
    """Features of a coarse level read at the points of a finer one, beside what that one had."""

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.perceptron = perceptron([in_channels, *channels])

    def forward(self, fine: Tensor, coarse: Tensor, skip: Tensor, features: Tensor) -> Tensor:
        """`fine` (B, N, 3), `coarse` (B, S, 3), `skip` (B, N, C), `features` (B, S, D) to (B, N, out)."""
        return self.perceptron(torch.cat([interpolate(features, coarse, fine), skip], -1))


class PointNet2ForPartSegmentation(PointModel):
    """A part for every point of a cloud whose category is known."""

    config_class = PointNet2Config

    def __init__(self, config: PointNet2Config) -> None:
        super().__init__(config)
        levels = zip(config.num_centroids, config.radii, config.num_samples, config.channels, strict=True)
        widths = [config.num_features]
        abstractions: list[SetAbstraction | GlobalAbstraction] = []
        for level in levels:
            abstractions.append(SetAbstraction(widths[-1], *level))
            widths.append(abstractions[-1].out_channels)
        abstractions.append(GlobalAbstraction(widths[-1], config.global_channels))
        self.abstractions = nn.ModuleList(abstractions)
        # The finest level has, beside its features, its coordinates and the category.
        widths[0] += 3 + config.num_categories
        propagations, width = [], config.global_channels[-1]
        for skip, channels in zip(reversed(widths), config.propagation_channels, strict=True):
            propagations.append(FeaturePropagation(width + skip, channels))
            width = channels[-1]
        self.propagations = nn.ModuleList(propagations)
        self.head = PartHead(width, config.head_channels, config.num_parts, config.dropout)
        self.post_init()

    def forward(self, points: Tensor, category: Tensor, labels: Tensor | None = None) -> PointSegmentationOutput:
        """Logits of every part.

        Args:
            points: (B, N, 3 + num_features), float: coordinates, centred and within the unit sphere, then features.
            category: (B,), int64.
            labels: (B, N), int64; -100 is not scored.

        Raises:
            ValueError: for other shapes, or fewer points than the first of `num_centroids`.
        """
        xyz, channels, one_hot = self.split(points, category)
        levels = [(xyz, channels[..., 3:])]
        for abstraction in self.abstractions:
            levels.append(abstraction(*levels[-1]))
        levels[0] = (xyz, torch.cat([one_hot, channels], -1))
        coarse, features = levels.pop()
        for propagation in self.propagations:
            fine, skip = levels.pop()
            coarse, features = fine, propagation(fine, coarse, skip, features)
        return self.score(self.head(features), labels)
