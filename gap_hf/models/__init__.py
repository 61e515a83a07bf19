"""Networks that transformers does not have. Importing this registers them with `AutoConfig` and `AutoModel`.

transformers has no Auto class for the segmentation of points, so it is `AutoModel` here. A saved folder carries the
code of its network: `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where gap_hf is not installed.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

from gap_hf.models.point_transformer import PointTransformerConfig, PointTransformerForPartSegmentation
from gap_hf.models.pointnet2 import PointNet2Config, PointNet2ForPartSegmentation

for _config, _model in (
    (PointNet2Config, PointNet2ForPartSegmentation),
    (PointTransformerConfig, PointTransformerForPartSegmentation),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")

__all__ = [
    "PointNet2Config",
    "PointNet2ForPartSegmentation",
    "PointTransformerConfig",
    "PointTransformerForPartSegmentation",
]
