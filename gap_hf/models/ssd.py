"""SSD (Liu et al., ECCV 2016, arXiv 1512.02325) as a transformers model, built from torchvision's parts.

This file is copied into every folder that a model is saved to, so it imports nothing from gap_hf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    SSD300_VGG16_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG, SSDScoringHead
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import batched_nms, box_convert, box_iou
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

VGG, LITE, SMALL = "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "small"
_SIZES = {VGG: 300, LITE: 320, SMALL: 64}
# VGG reads images of 0 to 255 with the mean taken away, as in Caffe; torchvision's weights expect that.
_MEANS = {VGG: [0.48235, 0.45882, 0.40784], LITE: [0.5] * 3, SMALL: [0.5] * 3}
_STDS = {VGG: [1 / 255] * 3, LITE: [0.5] * 3, SMALL: [0.5] * 3}


class SSDConfig(PreTrainedConfig):
    """Architecture and sizes of an `SSDForObjectDetection`. `num_labels` counts classes without the background.

    Args:
        architecture: ``ssd300_vgg16``, ``ssdlite320_mobilenet_v3_large``, or ``small``: a convolutional backbone
            whose sizes are given here, for small images.
        image_size: Height and width in pixels. The two architectures by name have one (300, 320), ``small`` has 64
            unless told.
        image_mean, image_std: What `pixel_values` were normalised with, of values from 0 to 1. The model does not
            use them; whoever prepares its images does.
        embedding_size: Channels of the stem (stride 2) of ``small``.
        hidden_sizes: Channels of its stages, each of which halves height and width.
        num_maps: How many stages, the last ones, have class and box heads.
        scales: Sizes of the default boxes of those maps as shares of the image, and one more for the last.
        aspect_ratios: Default boxes of every map beside the two squares: each ratio and its inverse.

    Raises:
        ValueError: on an unknown architecture and on sizes that contradict each other.
    """

    model_type = "gap_hf_ssd"

    architecture: str = VGG
    image_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    embedding_size: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128)
    num_maps: int = 2
    scales: list[float] | tuple[float, ...] = (0.2, 0.35, 0.6)
    aspect_ratios: list[float] | tuple[float, ...] = (2.0,)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.architecture not in _SIZES:
            raise ValueError(f"architecture: found {self.architecture!r}, expected one of {', '.join(_SIZES)}")
        size = _SIZES[self.architecture]
        self.image_size = size if self.image_size is None else self.image_size
        self.image_mean = _MEANS[self.architecture] if self.image_mean is None else self.image_mean
        self.image_std = _STDS[self.architecture] if self.image_std is None else self.image_std
        if self.architecture != SMALL and self.image_size != size:
            raise ValueError(f"image_size: found {self.image_size}, but {self.architecture} has {size}")
        if self.architecture == SMALL:
            if not 1 <= self.num_maps <= len(self.hidden_sizes):
                raise ValueError(f"num_maps: found {self.num_maps}, expected 1 to {len(self.hidden_sizes)}, the stages")
            if len(self.scales) != self.num_maps + 1:
                raise ValueError(
                    f"scales: found {len(self.scales)} of them, expected num_maps + 1, {self.num_maps + 1}"
                )
            smallest = 2 ** (len(self.hidden_sizes) + 1)
            if self.image_size % smallest:
                raise ValueError(
                    f"image_size: found {self.image_size}, expected a multiple of {smallest} (2 per stage)"
                )


@dataclass
class SSDOutput(ModelOutput):
    """What `SSDForObjectDetection` returns; DETR's names and meanings.

    Attributes:
        loss: Sum of `loss_dict`, a scalar; only with labels.
        loss_dict: ``bbox_regression`` and ``classification``, as torchvision computes them.
        logits: (batch, default boxes, num_labels + 1), for a softmax; the last class is the background.
        pred_boxes: (batch, default boxes, 4), float32: centre x, centre y, width, height as shares of the image.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None


class SSDForObjectDetection(PreTrainedModel):
    """torchvision's SSD behind the interface of transformers' detection models."""

    config_class = SSDConfig
    config: SSDConfig
    base_model_prefix = "ssd"
    main_input_name = "pixel_values"

    def __init__(self, config: SSDConfig) -> None:
        super().__init__(config)
        self.ssd = _build(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            if self.config.architecture == LITE:
                init.normal_(module.weight, std=0.03)
            else:
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            state = dict(module.named_parameters()) | dict(module.named_buffers())
            for name, tensor in state.items():
                (init.ones_ if name in ("weight", "running_var") else init.zeros_)(tensor)
        elif isinstance(module, SSDFeatureExtractorVGG):
            init.constant_(module.scale_weight, 20.0)
        elif isinstance(module, SSDScoringHead) and self.config.architecture != LITE:
            # A module comes after what is in it, so this is the heads' last word.
            for layer in module.module_list:
                assert isinstance(layer, nn.Conv2d)
                init.xavier_uniform_(layer.weight)

    def load_torchvision_weights(self, *, weights: str | None = None, weights_backbone: str | None = None) -> None:
        """Take over torchvision's trained weights, which it downloads.

        Args:
            weights: Name of weights of the whole network, such as ``COCO_V1``; they know 90 classes (91 with background).
            weights_backbone: Name of weights of its backbone, such as ``IMAGENET1K_FEATURES``; of VGG only, since
                torchvision's MobileNetV3 is another network with trained weights than without.

        Raises:
            ValueError: if this architecture or number of classes has none.
        """
        builders = {VGG: ssd300_vgg16, LITE: ssdlite320_mobilenet_v3_large}
        if self.config.architecture not in builders or (weights_backbone and self.config.architecture != VGG):
            raise ValueError(f"torchvision has no such weights for {self.config.architecture}")
        if weights is not None and self.config.num_labels != 90:
            raise ValueError(f"{weights} knows 90 classes, but the config has {self.config.num_labels}")
        source = builders[self.config.architecture](weights=weights, weights_backbone=weights_backbone)
        if weights is None:
            self.ssd.backbone.load_state_dict(source.backbone.state_dict())
        else:
            self.ssd.load_state_dict(source.state_dict())

    def forward(
        self,
        pixel_values: Tensor,
        labels: Sequence[dict[str, Tensor]] | None = None,
        pixel_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SSDOutput | tuple[Any, ...]:
        """Class logits and boxes of every default box, and the loss if there are labels.

        Args:
            pixel_values: (batch, 3, height, width), normalised.
            labels: For each image `class_labels` (n,), int64 from 0, and `boxes` (n, 4): centre x, centre y, width,
                height as shares of the image, none of them empty. More keys are ignored; n may be 0.
            pixel_mask: Taken as DETR takes it and not used: images fill their batch here.
            return_dict: False for a tuple.
        """
        height, width = pixel_values.shape[-2:]
        features = list(self.ssd.backbone(pixel_values).values())
        # Boxes are found to fractions of a pixel, so everything after the convolutions is in float32.
        head = {name: value.float() for name, value in self.ssd.head(features).items()}
        anchors = self._anchors(pixel_values, features)
        offsets = head["bbox_regression"]
        decoded = self.ssd.box_coder.decode_single(offsets.flatten(0, 1), torch.cat(anchors)).view_as(offsets)
        scale = decoded.new_tensor([width, height, width, height])
        background, classes = head["cls_logits"].split([1, self.config.num_labels], dim=-1)
        losses = None if labels is None else self._losses(labels, head, anchors, scale)
        output = SSDOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            loss_dict=losses,
            logits=torch.cat([classes, background], dim=-1),
            pred_boxes=box_convert(decoded / scale, "xyxy", "cxcywh"),
        )
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def _anchors(self, pixel_values: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Default boxes of each image, (boxes, 4) in pixels: the same ones, which torchvision works out for one."""
        # Of the features it takes sizes and type, and in half precision centres would be off by half a pixel.
        sizes = [pixel_values.new_empty((1, 1, *feature.shape[-2:]), dtype=torch.float32) for feature in features]
        height, width = pixel_values.shape[-2:]
        boxes = self.ssd.anchor_generator(ImageList(pixel_values[:1], [(height, width)]), sizes)[0]
        return [boxes.float()] * len(pixel_values)

    def _losses(
        self, labels: Sequence[dict[str, Tensor]], head: dict[str, Tensor], anchors: list[Tensor], scale: Tensor
    ) -> dict[str, Tensor]:
        # torchvision has the background first.
        targets = [
            {
                "boxes": box_convert(label["boxes"].float().to(scale.device), "cxcywh", "xyxy").reshape(-1, 4) * scale,
                "labels": label["class_labels"].to(scale.device) + 1,
            }
            for label in labels
        ]
        matched = [match(target["boxes"], boxes, self.ssd) for target, boxes in zip(targets, anchors, strict=True)]
        return self.ssd.compute_loss(targets, head, anchors, matched)

    @torch.no_grad()
    def post_process(
        self,
        outputs: SSDOutput,
        *,
        threshold: float | None = None,
        iou: float | None = None,
        max_candidates: int | None = None,
        max_detections: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, best first: non-maximum suppression per class, as torchvision does it.

        What is None is torchvision's for the architecture: 0.01, 0.45, 400 and 200, and for SSDlite 0.001, 0.55, 300 and 300.

        Args:
            outputs: What `forward` returned.
            threshold: Lowest score that counts.
            iou: Of two boxes of a class that overlap by more, only the better one stays.
            max_candidates: Boxes of each class and image that are looked at, the best ones.
            max_detections: Of each image.

        Returns:
            For each image `scores` (n,), `labels` (n,) int64 from 0, and `boxes` (n, 4), float32: left, top, right,
            bottom as shares of the image, from 0 to 1.
        """
        assert outputs.logits is not None and outputs.pred_boxes is not None
        threshold = self.ssd.score_thresh if threshold is None else threshold
        iou = self.ssd.nms_thresh if iou is None else iou
        max_candidates = self.ssd.topk_candidates if max_candidates is None else max_candidates
        max_detections = self.ssd.detections_per_img if max_detections is None else max_detections
        found = []
        scores_of_all = outputs.logits.softmax(-1)[..., :-1]
        for boxes, scores in zip(box_convert(outputs.pred_boxes, "cxcywh", "xyxy"), scores_of_all, strict=True):
            top, box = scores.topk(min(max_candidates, len(scores)), dim=0)  # (candidates, classes)
            label = torch.arange(scores.shape[1], device=scores.device).expand_as(top)
            good = top > threshold
            top, box, label = top[good], boxes[box[good]].clamp(0, 1), label[good]
            keep = batched_nms(box, top, label, iou)[:max_detections]
            found.append({"scores": top[keep], "labels": label[keep], "boxes": box[keep]})
        return found


def torchvision_classes(weights: str) -> list[str]:
    """Names of the classes that torchvision's weights of this name know, without the background: COCO's 80 and ten unused numbers.

    Raises:
        ValueError: if torchvision has no such weights.
    """
    for kind in (SSD300_VGG16_Weights, SSDLite320_MobileNet_V3_Large_Weights):
        if weights in kind.__members__:
            names = kind[weights].meta["categories"][1:]
            return [f"unused {i}" if name == "N/A" else name for i, name in enumerate(names)]
    raise ValueError(f"torchvision has no weights '{weights}' of an SSD")


def match(boxes: Tensor, anchors: Tensor, ssd: SSD) -> Tensor:
    """Index of the box that each default box is to find, or -1 for background: (len(anchors),), int64.

    A default box takes the box that it overlaps most, if by at least 0.5; and each box gets the default box that
    overlaps it most, however little that is. `boxes` and `anchors` (n, 4) are left, top, right, bottom in pixels.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    return ssd.proposal_matcher(box_iou(boxes, anchors))


# --- architectures ---------------------------------------------------------------------------------------------------


def _build(config: SSDConfig) -> SSD:
    assert config.num_labels is not None
    num_classes = config.num_labels + 1
    if config.architecture == LITE:
        return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
    assert config.image_size is not None
    size = (config.image_size, config.image_size)
    if config.architecture == VGG:
        # As ssd300_vgg16 does it, but without building VGG's classifier, 120 million weights that SSD has no use for.
        backbone = SSDFeatureExtractorVGG(make_layers(cfgs["D"]), highres=False)
        boxes = DefaultBoxGenerator(
            [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
            scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
            steps=[8, 16, 32, 64, 100, 300],
        )
    else:
        backbone = SmallBackbone(config.embedding_size, config.hidden_sizes, config.num_maps)
        ratios: Any = list(config.aspect_ratios)  # fractions work as well as the whole numbers that it asks for
        boxes = DefaultBoxGenerator([ratios] * config.num_maps, scales=list(config.scales))
    return SSD(backbone, boxes, size, num_classes)


class SmallBackbone(nn.Module):
    """A stem and stages of two convolutions with batch norms. Input (batch, 3, h, w); the output of the last stages."""

    def __init__(self, embedding_size: int, hidden_sizes: Sequence[int], num_maps: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, embedding_size, stride=2))
        sizes = [embedding_size, *hidden_sizes]
        self.names = [f"layer{i}" for i in range(1, len(sizes))]
        for name, num_in, num_out in zip(self.names, sizes, hidden_sizes, strict=False):
            self.add_module(name, nn.Sequential(*_conv(num_in, num_out, stride=2), *_conv(num_out, num_out)))
        self.num_maps = num_maps
        self.out_channels = list(hidden_sizes[-num_maps:])

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.stem(x)
        maps = OrderedDict[str, Tensor]()
        for name in self.names:
            x = maps[name] = self.get_submodule(name)(x)
        return OrderedDict((name, maps[name]) for name in self.names[-self.num_maps :])


def _conv(num_in: int, num_out: int, *, stride: int = 1) -> list[nn.Module]:
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    return [conv(num_in, num_out, stride=stride), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]


def register() -> None:
    """Tell transformers' Auto classes of the model, and that its code is to be saved beside its weights."""
    AutoConfig.register(SSDConfig.model_type, SSDConfig)
    AutoModelForObjectDetection.register(SSDConfig, SSDForObjectDetection)
    SSDConfig.register_for_auto_class()
    SSDForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
