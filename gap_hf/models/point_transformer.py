"""A small point transformer (Zhao et al., ICCV 2021, arXiv 2012.09164) for part segmentation, in plain torch.

Vector attention over nearest neighbours in a U of four levels. Written from the paper; shallower than the authors'.
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
    PointNorm,
    PointSegmentationOutput,
    farthest_points,
    gather,
    interpolate,
    nearest_neighbours,
    perceptron,
)


class PointTransformerConfig(PointConfig):
    """Sizes of a `PointTransformerForPartSegmentation`.

    Args:
        channels: Width of each level, the points' own first.
        depths: Blocks of each level, on the way down and again on the way up (the last level only once).
        num_neighbours: Points that each point attends to.
        stride: Each level has one point for this many of the level before.
        **kwargs: As `PointConfig` and transformers' `PreTrainedConfig` have them.

    Raises:
        ValueError: if there are not as many depths as channels, or the stride is below 1.
    """

    model_type = "gap_hf_point_transformer"

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (1, 1, 1, 1),
        num_neighbours: int = 16,
        stride: int = 4,
        **kwargs: Any,
    ) -> None:
        if len(depths) != len(channels):
            raise ValueError(f"depths: found {len(depths)} entries, expected {len(channels)}, as channels has")
        for name, value in (("num_neighbours", num_neighbours), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1")
        self.channels, self.depths = list(channels), list(depths)
        self.num_neighbours, self.stride = num_neighbours, stride
        super().__init__(**kwargs)


class VectorAttention(nn.Module):
    """Each channel has its own weights over the neighbours, from the difference of query and key (equation 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.position = nn.Sequential(nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.weight = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))

    def forward(self, features: Tensor, offsets: Tensor, near: Tensor) -> Tensor:
        """`features` (B, N, C), `offsets` (B, N, K, 3) and indices of the neighbours (B, N, K) to (B, N, C)."""
        position = self.position(offsets)
        difference = self.query(features).unsqueeze(2) - gather(self.key(features), near)
        attention = self.weight(difference + position).softmax(2)
        return (attention * (gather(self.value(features), near) + position)).sum(2)


class PointTransformerBlock(nn.Module):
    """Attention between two linear layers, with a residual around all three."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = perceptron([channels, channels])
        self.attention = VectorAttention(channels)
        self.norm = PointNorm(channels)
        self.after = nn.Linear(channels, channels, bias=False)
        self.after_norm = PointNorm(channels)

    def forward(self, features: Tensor, offsets: Tensor, near: Tensor) -> Tensor:
        """Shapes as in `VectorAttention`."""
        inner = self.norm(self.attention(self.before(features), offsets, near)).relu()
        return (features + self.after_norm(self.after(inner))).relu()


class Stage(nn.Module):
    """The blocks of one level, which share their neighbourhoods."""

    def __init__(self, channels: int, depth: int, num_neighbours: int) -> None:
        super().__init__()
        self.num_neighbours = num_neighbours
        self.blocks = nn.ModuleList([PointTransformerBlock(channels) for _ in range(depth)])

    def attend(self, points: Tensor, features: Tensor) -> Tensor:
        _, near = nearest_neighbours(points, points, self.num_neighbours)
        offsets = points.unsqueeze(2) - gather(points, near)
        for block in self.blocks:
            features = block(features, offsets, near)
        return features


class DownStage(Stage):
    """To one point in `stride`, each with the maximum over its neighbours; with a stride of 1, to the points themselves."""

    def __init__(self, in_channels: int, channels: int, depth: int, num_neighbours: int, stride: int) -> None:
        super().__init__(channels, depth, num_neighbours)
        self.stride = stride
        self.transition = perceptron([in_channels if stride == 1 else 3 + in_channels, channels])

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3) and (B, N, C) to (B, ceil(N / stride), 3) and (B, ceil(N / stride), channels)."""
        if self.stride == 1:
            return points, self.attend(points, self.transition(features))
        kept = gather(points, farthest_points(points, -(-points.shape[1] // self.stride)))
        _, near = nearest_neighbours(points, kept, self.num_neighbours)
        offsets = gather(points, near) - kept.unsqueeze(2)
        pooled = self.transition(torch.cat([gather(features, near), offsets], -1)).amax(2)
        return kept, self.attend(kept, pooled)


class UpStage(Stage):
    """Back to the points of the level above: its features plus those of the coarse level, read there."""

    def __init__(self, in_channels: int, channels: int, depth: int, num_neighbours: int) -> None:
        super().__init__(channels, depth, num_neighbours)
        self.coarse = perceptron([in_channels, channels])
        self.skip = perceptron([channels, channels])

    def forward(self, fine: Tensor, coarse: Tensor, skip: Tensor, features: Tensor) -> Tensor:
        """`fine` (B, N, 3), `coarse` (B, S, 3), `skip` (B, N, C), `features` (B, S, D) to (B, N, C)."""
        return self.attend(fine, self.skip(skip) + interpolate(self.coarse(features), coarse, fine))


class PointTransformerForPartSegmentation(PointModel):
    """A part for every point of a cloud whose category is known."""

    config_class = PointTransformerConfig

    def __init__(self, config: PointTransformerConfig) -> None:
        super().__init__(config)
        widths, depths, near = config.channels, config.depths, config.num_neighbours
        # Coordinates to features: outside the stages, so gap_hf leaves it dense, as the first layers of other networks.
        self.stem = perceptron([3 + config.num_features, widths[0]])
        self.encoder = nn.ModuleList(
            DownStage(widths[max(i - 1, 0)], widths[i], depths[i], near, config.stride if i else 1)
            for i in range(len(widths))
        )
        self.decoder = nn.ModuleList(
            UpStage(widths[i + 1], widths[i], depths[i], near) for i in reversed(range(len(widths) - 1))
        )
        self.head = PartHead(widths[0] + config.num_categories, widths[0], config.num_parts, config.dropout)
        self.post_init()

    def forward(self, points: Tensor, category: Tensor, labels: Tensor | None = None) -> PointSegmentationOutput:
        """Logits of every part.

        Args:
            points: (B, N, 3 + num_features), float: coordinates, centred and within the unit sphere, then features.
            category: (B,), int64.
            labels: (B, N), int64; -100 is not scored.

        Raises:
            ValueError: for other shapes.
        """
        xyz, channels, one_hot = self.split(points, category)
        levels = [(xyz, self.stem(channels))]
        for stage in self.encoder:
            levels.append(stage(*levels[-1]))
        coarse, features = levels.pop()
        levels = levels[1:]  # the first stage has the stem's points
        for stage in self.decoder:
            fine, skip = levels.pop()
            coarse, features = fine, stage(fine, coarse, skip, features)
        return self.score(self.head(torch.cat([features, one_hot], -1)), labels)
