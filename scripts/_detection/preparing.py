"""From samples to what a model takes: augmented, resized, normalised, and batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from _images import UNREADABLE, open_picture
from _run import draw_for, drawn_from
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from _detection.data import Sample
from gap_hf.errors import GaPError
from gap_hf.recipe import one_line


@dataclass(frozen=True)
class ImageFormat:
    """Images as a model takes them: height and width in pixels, and mean and deviation of values from 0 to 1."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class DetectionSet(Dataset[dict[str, Any]]):
    """Samples as tensors.

    An item has `pixel_values` (3, height, width), float32, and `labels` with `image_id` (), `class_labels` (n,), both
    int64, and `boxes` (n, 4), float32: centre x, centre y, width, height as shares of the image. Objects that are
    crowds or have no area are left out, as no model can learn them. What is random about an image follows from
    (seed, epoch, index) alone, so that a resumed run draws the same.

    Args:
        classes: The model's index of each class of the data; the same ones unless a checkpoint numbers them otherwise.
        augmentation: See `DataSection`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        form: ImageFormat,
        *,
        classes: Sequence[int],
        augmentation: str = "none",
        seed: int = 0,
    ) -> None:
        self.samples, self.form, self.seed, self.epoch = samples, form, seed, 0
        self.classes = np.array(classes, np.int64)
        self.augment = _augmentation(augmentation, form)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        pixels = torch.from_numpy(read_pixels(sample)).permute(2, 0, 1).contiguous()
        height, width = pixels.shape[-2:]
        # Files may have another size than their annotations say; boxes are then scaled along.
        scale = np.array([width / sample.size[1], height / sample.size[0]] * 2)
        boxes = torch.from_numpy(sample.boxes[~sample.crowd] * scale).float()
        labels = torch.from_numpy(self.classes[sample.labels[~sample.crowd]])
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        boxes, labels = _with_area(boxes, labels)
        if self.augment is not None:
            with drawn_from(draw_for(self.seed, self.epoch, index)):
                pixels, boxes, labels = self._augmented(pixels, boxes, labels)
        height, width = pixels.shape[-2:]
        pixels = v2.functional.resize(pixels, list(self.form.size), antialias=True)
        values = v2.functional.normalize(pixels.float() / 255, list(self.form.mean), list(self.form.std))
        shares = box_convert(boxes / boxes.new_tensor([width, height] * 2), "xyxy", "cxcywh")
        target = {"image_id": torch.tensor(sample.image_id), "class_labels": labels, "boxes": shares}
        return {"pixel_values": values, "labels": target}

    def _augmented(
        self, pixels: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.augment is not None
        canvas: Any = tuple(pixels.shape[-2:])
        wrapped: Any = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)  # type: ignore[call-arg]
        out, wrapped, labels = self.augment(tv_tensors.Image(pixels), wrapped, labels)
        return out.as_subclass(torch.Tensor), *_with_area(wrapped.as_subclass(torch.Tensor), labels)


def _with_area(boxes: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    good = ((boxes[:, 2:] - boxes[:, :2]) >= 0.5).all(dim=1)  # half a pixel
    return boxes[good], labels[good]


def _augmentation(name: str, form: ImageFormat) -> v2.Transform | None:
    if name == "none":
        return None
    flip = v2.RandomHorizontalFlip(0.5)
    if name == "flip":
        return flip
    fill: Any = [round(255 * mean) for mean in form.mean]
    # SSD's own (section 2.2 of its paper), as torchvision provides it.
    clean = v2.SanitizeBoundingBoxes(labels_getter=itemgetter(2))
    return v2.Compose([v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), _Crop(), flip, clean])


class _Crop(v2.RandomIoUCrop):
    """Crops need an object to keep."""

    def forward(self, *inputs: Any) -> Any:
        return super().forward(*inputs) if len(inputs[1]) else inputs


def read_pixels(sample: Sample) -> np.ndarray:
    """(height, width, 3), uint8.

    Raises:
        GaPError: naming the file, if it is no image that can be read.
    """
    if isinstance(sample.image, np.ndarray):
        return np.repeat(sample.image[:, :, None], 3, axis=2)
    try:
        image = open_picture(sample.image)
        width, height = image.size
        if _bends((width, height), sample.size) and not _bends((height, width), sample.size):
            # Some tools write boxes down for the pixels as they are stored, not as they are seen.
            image = open_picture(sample.image, upright=False)
        return np.array(image)
    except UNREADABLE as error:
        raise GaPError(f"{sample.image}: cannot be read as an image: {one_line(error)}") from None


def _bends(size: tuple[int, int], annotated: tuple[int, int]) -> bool:
    """True if an image of this width and height is no scaled copy of one of the annotated height and width."""
    height = annotated[0] * size[0] / annotated[1]
    return abs(size[1] - height) > 1 + annotated[0] / annotated[1] + 0.02 * height


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`pixel_values` (batch, 3, height, width) and `labels`, a list of one dict for each image."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [item["labels"] for item in items],
    }
