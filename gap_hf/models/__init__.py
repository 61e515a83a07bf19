"""Networks that transformers does not have. Importing this registers them with its Auto classes; `import gap_hf` does not.

transformers has no Auto class for the segmentation of points, so it is `AutoModel` here; detection has
`AutoModelForObjectDetection`, where torchvision is installed. A saved folder carries the code of its network: `trust_remote_code=True`
loads it where gap_hf is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec

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

if find_spec("torchvision") is not None:
    from gap_hf.models import ssd

    ssd.register()

__all__ = [
    "PointNet2Config",
    "PointNet2ForPartSegmentation",
    "PointTransformerConfig",
    "PointTransformerForPartSegmentation",
]
