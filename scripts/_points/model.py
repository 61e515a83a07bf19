"""The model of a point cloud recipe."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel

from _points.data import PointData
from _points.section import DataSection
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.models import (
    PointNet2Config,
    PointNet2ForPartSegmentation,
    PointTransformerConfig,
    PointTransformerForPartSegmentation,
)
from gap_hf.models.points import PointConfig
from gap_hf.recipe import one_line

TYPES: dict[str, tuple[type[PointConfig], type[PreTrainedModel]]] = {
    PointNet2Config.model_type: (PointNet2Config, PointNet2ForPartSegmentation),
    PointTransformerConfig.model_type: (PointTransformerConfig, PointTransformerForPartSegmentation),
}


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`model` of a point cloud recipe: either `checkpoint`, or `type` and `config` for one from scratch.

    Attributes:
        checkpoint: A folder that an earlier run saved, with the same categories and parts.
        type: ``gap_hf_pointnet2`` or ``gap_hf_point_transformer``.
        config: Keys of `PointNet2Config` or `PointTransformerConfig`. What the data says (num_parts, num_categories,
            num_features, category_parts) may be left out; ``gap-hf plan``, which reads no data, counts by what is here.
        recalibrate_batchnorm: Batches of training clouds on which batch norms' statistics are estimated anew before each evaluation
            and at the end; 0 leaves what training has averaged, which very sparse networks should not rely on.
    """

    checkpoint: Path | None = None
    type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    recalibrate_batchnorm: int = 0

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.type is None):
            found = "neither" if self.type is None else "both"
            raise GaPError(f"model.type: found {found} of type and checkpoint, expected one of the two")
        if self.recalibrate_batchnorm < 0:
            raise GaPError(f"model.recalibrate_batchnorm: found {self.recalibrate_batchnorm}, expected at least 0")
        if self.checkpoint is not None:
            if self.config:
                raise GaPError("model.config: contradicts model.checkpoint, which has its own; expected model.type")
            if not self.checkpoint.is_dir():
                raise GaPError(f"model.checkpoint: no such folder: {self.checkpoint}")
            return
        if self.type not in TYPES:
            raise GaPError(
                f"model.type: found '{self.type}', no network on points{did_you_mean(str(self.type), TYPES)}"
            )
        valid = [
            name
            for cls in (TYPES[self.type][0], PointConfig)
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
        ]
        for name in self.config:
            if name not in valid:
                raise GaPError(f"model.config.{name}: unknown key{did_you_mean(name, valid)}")


def load_model(section: ModelSection, data: DataSection, shapes: PointData) -> PreTrainedModel:
    """The recipe's model, for the categories and parts of the data.

    Raises:
        GaPError: if it cannot be loaded or built, or does not fit the data.
    """
    wanted = {
        "num_parts": len(shapes.parts),
        "num_categories": len(shapes.categories),
        "num_features": 3 if data.normals else 0,
        "category_parts": shapes.category_parts,
    }
    if section.checkpoint is not None:
        try:
            model = AutoModel.from_pretrained(section.checkpoint)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise GaPError(f"model.checkpoint: could not load {section.checkpoint}: {one_line(error)}") from None
        for name, value in wanted.items():
            found = getattr(model.config, name, None)
            if found != value:
                raise GaPError(f"model.checkpoint: its {name} is {found}, expected {value}, as the data has")
    else:
        assert section.type is not None
        for name, value in wanted.items():
            if (found := section.config.get(name, value)) != value:
                raise GaPError(f"model.config.{name}: found {found}, expected {value}, as the data has")
        config_cls, model_cls = TYPES[section.type]
        try:
            model = model_cls(config_cls(**{**section.config, **wanted}))
        except Exception as error:  # whatever torch makes of sizes that are no sizes
            raise GaPError(f"model.config: {section.type} refuses it: {one_line(error)}") from None
        model.config.id2label = dict(enumerate(shapes.parts))
        model.config.label2id = {name: i for i, name in enumerate(shapes.parts)}
    first = getattr(model.config, "num_centroids", [0])[0]
    if first > data.num_points:
        raise GaPError(
            f"data.num_points: found {data.num_points}, expected at least model.config.num_centroids[0], {first}"
        )
    return model
