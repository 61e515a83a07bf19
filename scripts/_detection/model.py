"""The model of a detection recipe, and how it takes images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _images import edges_of, norm_of
from _run import check_dtype
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrImageProcessor,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

import gap_hf.models  # noqa: F401  (tells the Auto classes of gap_hf_ssd)
from _detection.preparing import ImageFormat
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.models.ssd import SSDConfig, SSDForObjectDetection, torchvision_classes
from gap_hf.recipe import one_line

KNOWN = [SSDConfig.model_type, *MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DEFAULT_SIZE = 640


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`model` of a detection recipe: either `checkpoint`, or `type` and `config` for one from scratch.

    Attributes:
        checkpoint: A name on the Hub or a folder. If its classes include all of the data's it keeps its class head,
            else it gets a new one.
        dtype: In which a checkpoint's weights are trained: float32, bfloat16, float16, or auto for what they were saved in. None is
            float32, and auto with `gap.master_weights`.
        type: gap_hf_ssd, or a transformers detection model: detr, rt_detr, yolos, deformable_detr and others.
        config: Keys of that type's config. `num_labels` may be left out; if it is there it has to be the data's.
        weights, weights_backbone: Of gap_hf_ssd: names of torchvision's weights to start from, such as COCO_V1 for
            all of it, where the data's classes are among COCO's, or IMAGENET1K_FEATURES for a VGG16 backbone. torchvision
            downloads them.
        image_size: Height and width in pixels that images are resized to. None takes a checkpoint's image processor's, if that
            has a height and a width, else the config's, and 640 if it has none. A gap_hf_ssd has its own.
        image_mean, image_std: What values from 0 to 1 are normalised with. None takes a checkpoint's image processor's,
            a gap_hf_ssd's config's, and else ImageNet's.
    """

    checkpoint: str | Path | None = None
    dtype: str | None = None
    type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    weights_backbone: str | None = None
    image_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.type is None):
            found = "neither" if self.type is None else "both"
            raise GaPError(f"model.type: found {found} of type and checkpoint, expected one of the two")
        check_dtype(self.dtype, self.checkpoint)
        if self.checkpoint is not None and self.config:
            raise GaPError("model.config: contradicts model.checkpoint, which has its own; expected model.type with it")
        if self.type is not None and self.type not in KNOWN:
            raise GaPError(f"model.type: found '{self.type}', no detection model{did_you_mean(self.type, KNOWN)}")
        for name in ("weights", "weights_backbone"):
            if getattr(self, name) is not None and self.type != SSDConfig.model_type:
                raise GaPError(f"model.{name}: goes with model.type: {SSDConfig.model_type} only")
        if self.weights is not None and self.weights_backbone is not None:
            raise GaPError("model.weights_backbone: model.weights has a backbone already; expected one of the two")
        if self.image_size is not None and self.image_size < 32:
            raise GaPError(f"model.image_size: found {self.image_size}, expected at least 32 pixels")
        if self.image_size is not None and self.type == SSDConfig.model_type:
            raise GaPError(f"model.image_size: {self.type} has its own; expected model.config.image_size")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or (name == "image_std" and min(value) <= 0)):
                raise GaPError(f"model.{name}: found {value}, expected three numbers, red, green and blue")
        if self.type is not None:
            default = AutoConfig.for_model(self.type)
            names = [*vars(default), *default.attribute_map, "num_labels", "use_timm_backbone", "backbone"]
            for name in self.config:
                if name not in names or name.startswith("_"):
                    valid = [n for n in names if not n.startswith("_")]
                    raise GaPError(f"model.config.{name}: unknown key{did_you_mean(name, valid)}")


def load_model(
    section: ModelSection, names: Sequence[str], *, dtype: str = "float32"
) -> tuple[PreTrainedModel, list[int], ImageFormat]:
    """The recipe's model, its index of each class of the data, and how it takes images.

    Raises:
        GaPError: if it cannot be loaded or built, or does not fit the classes.
    """
    if section.checkpoint is not None:
        model, classes = _from_checkpoint(section.checkpoint, names, dtype)
    else:
        model, classes = _from_scratch(section, names)
    return model, classes, _image_format(section, model.config)


def image_processor(model: PreTrainedModel, form: ImageFormat) -> Any:
    """What prepares images for this model in pipelines, as they were here; None for a gap_hf_ssd, which has none."""
    if isinstance(model, SSDForObjectDetection):
        return None
    try:
        found: Any = IMAGE_PROCESSOR_MAPPING[type(model.config)]
        kind = found["torchvision"] if isinstance(found, dict) else [one for one in found if one is not None][-1]
    except KeyError:  # RT-DETR's later versions have its processor, but the mapping does not say so
        kind = RTDetrImageProcessor
    height, width = form.size
    return kind(
        size={"height": height, "width": width},
        do_pad=False,
        do_normalize=True,
        image_mean=list(form.mean),
        image_std=list(form.std),
    )


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _from_checkpoint(checkpoint: str | Path, names: Sequence[str], dtype: str) -> tuple[PreTrainedModel, list[int]]:
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        known = {str(name): int(i) for i, name in (config.id2label or {}).items()}
        if set(names) <= known.keys():
            model = AutoModelForObjectDetection.from_pretrained(checkpoint, config=config, dtype=dtype)
            return model, [known[n] for n in names]
        # The class head, and whatever else depends on the number of classes, has other shapes then.
        model = AutoModelForObjectDetection.from_pretrained(
            checkpoint, ignore_mismatched_sizes=True, dtype=dtype, **_labels(names)
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise GaPError(f"model.checkpoint: could not load {checkpoint}: {one_line(error)}") from None
    return model, list(range(len(names)))


def _from_scratch(section: ModelSection, names: Sequence[str]) -> tuple[PreTrainedModel, list[int]]:
    assert section.type is not None
    config = dict(section.config)
    own, classes = list(names), list(range(len(names)))
    if section.weights is not None:
        # torchvision numbers COCO's classes with gaps, and its heads have a place for each number.
        try:
            own = torchvision_classes(section.weights)
        except ValueError as error:
            raise GaPError(f"model.weights: {error}; expected such as COCO_V1") from None
        if missing := [name for name in names if name not in own]:
            raise GaPError(
                f"model.weights: {section.weights} does not know the class '{missing[0]}'{did_you_mean(missing[0], own)}; "
                "expected model.weights_backbone for classes of one's own"
            )
        classes = [own.index(name) for name in names]
    if (found := config.pop("num_labels", len(names))) != len(names):
        raise GaPError(f"model.config.num_labels: found {found!r}, but the data has {len(names)} classes")
    try:
        built = AutoConfig.for_model(section.type, **config, **_labels(own))
        model = AutoModelForObjectDetection.from_config(built)
    except Exception as error:  # each model checks its own config, with its own kinds of error
        raise GaPError(f"model.config: {section.type} refuses it: {one_line(error)}") from None
    key = "weights" if section.weights is not None else "weights_backbone"
    if isinstance(model, SSDForObjectDetection) and getattr(section, key) is not None:
        try:
            model.load_torchvision_weights(**{key: getattr(section, key)})
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise GaPError(f"model.{key}: could not load {getattr(section, key)}: {one_line(error)}") from None
    return model, classes


def _image_format(section: ModelSection, config: PreTrainedConfig) -> ImageFormat:
    mean: Any = IMAGENET_MEAN
    std: Any = IMAGENET_STD
    size: Any = section.image_size
    if isinstance(config, SSDConfig):
        mean, std = config.image_mean, config.image_std
    elif section.checkpoint is not None and None in (section.image_mean, section.image_std, section.image_size):
        try:
            processor: Any = AutoImageProcessor.from_pretrained(section.checkpoint)
        except (OSError, ValueError, ImportError) as error:
            if section.image_mean is None or section.image_std is None:
                raise GaPError(
                    f"model.image_mean: not set, and {section.checkpoint} has no image processor that says it "
                    f"({one_line(error)}); expected model.image_mean and model.image_std"
                ) from None
        else:
            mean, std = norm_of(processor)
            edges = edges_of(processor.size)
            if size is None and {"height", "width"} <= edges.keys():
                size = (edges["height"], edges["width"])
    size = size or vars(config).get("image_size") or DEFAULT_SIZE
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return ImageFormat((height, width), tuple(section.image_mean or mean), tuple(section.image_std or std))
