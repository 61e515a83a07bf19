"""Detections out of a model's output, and COCO's average precision of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.ops import box_convert

from _detection.data import Sample
from gap_hf.models.ssd import SSDForObjectDetection

MAX_DETECTIONS = 100  # of an image, as COCO counts


@torch.no_grad()
def detect(model: nn.Module, outputs: Any, classes: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Detections of each image, best first.

    Of SSD after non-maximum suppression; DETR and its relatives need none. Their class scores are a softmax if they
    have one class more than the config (the background, the last one), as in DETR and YOLOS, and sigmoids otherwise,
    as in Deformable DETR and RT-DETR.

    Args:
        model: Whose output it is.
        outputs: Its `logits` (batch, boxes, classes) and `pred_boxes` (batch, boxes, 4), centre x, centre y, width,
            height as shares of the image.
        classes: The model's index of each class of the data; detections of other classes are left out.

    Returns:
        For each image `scores` (n,), `labels` (n,), indices into `classes`, and `boxes` (n, 4): left, top, right,
        bottom as shares of the image.
    """
    config: Any = model.config
    num_labels = int(config.num_labels)
    if isinstance(model, SSDForObjectDetection):
        found = model.post_process(outputs)
    else:
        logits = outputs.logits.float()
        has_background = logits.shape[-1] == num_labels + 1
        scores = logits.softmax(-1)[..., :-1] if has_background else logits.sigmoid()
        found = []
        for score, box in zip(scores, box_convert(outputs.pred_boxes.float(), "cxcywh", "xyxy"), strict=True):
            top, index = score.flatten().topk(min(MAX_DETECTIONS, score.numel()))
            box = box[index // score.shape[1]].clamp(0, 1)
            found.append({"scores": top, "labels": index % score.shape[1], "boxes": box})
    own = np.full(num_labels, -1)
    own[list(classes)] = np.arange(len(classes))
    out = []
    for image in found:
        arrays = {name: value.cpu().numpy() for name, value in image.items()}
        arrays["labels"] = own[arrays["labels"]]
        out.append({name: value[arrays["labels"] >= 0] for name, value in arrays.items()})
    return out


def average_precision(
    samples: Sequence[Sample], found: Mapping[int, Mapping[str, np.ndarray]], names: Sequence[str]
) -> dict[str, Any]:
    """COCO's figures, all from 0 to 1, by pycocotools.

    Args:
        samples: The images, with their truth.
        found: Detections of each image id, as `detect` gives them; none for images that are not in it.
        names: Of the classes.

    Returns:
        `map` (mean over ten IoU thresholds from 0.5 to 0.95), `map_50`, `map_75`, and `per_class`: for each class that
        occurs its `map` and `map_50`.
    """
    truth, results = [], []
    for sample in samples:
        for box, label, crowd in zip(sample.boxes, sample.labels, sample.crowd, strict=True):
            truth.append(_annotation(len(truth) + 1, sample, box, label, iscrowd=int(crowd)))
        mine = found.get(sample.image_id)
        if mine is not None:
            scale = np.array([sample.size[1], sample.size[0]] * 2)
            for box, label, score in zip(mine["boxes"], mine["labels"], mine["scores"], strict=True):
                results.append(_annotation(len(results) + 1, sample, box * scale, label, score=float(score), iscrowd=0))
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    images = [{"id": s.image_id, "height": s.size[0], "width": s.size[1]} for s in samples]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        score = COCOeval(_index(images, truth, categories), _index(images, results, categories), "bbox")
        score.evaluate()
        score.accumulate()
    # (IoU thresholds, recalls, classes, areas, numbers of detections); -1 where a class does not occur.
    precision = np.asarray(score.eval["precision"])[:, :, :, 0, -1]
    occurs = [i for i in range(len(names)) if (precision[:, :, i] > -1).any()]
    by_class = precision[:, :, occurs].mean(axis=1) if occurs else np.zeros((10, 1))  # (IoU thresholds, classes)
    return {
        "map": float(by_class.mean()),
        "map_50": float(by_class[0].mean()),
        "map_75": float(by_class[5].mean()),
        "per_class": {
            names[i]: {"map": float(by_class[:, n].mean()), "map_50": float(by_class[0, n])}
            for n, i in enumerate(occurs)
        },
    }


def _annotation(number: int, sample: Sample, box: np.ndarray, label: int, **more: Any) -> dict[str, Any]:
    left, top, right, bottom = (float(x) for x in box)
    width, height = right - left, bottom - top
    return {
        "id": number,
        "image_id": sample.image_id,
        "category_id": int(label),
        "bbox": [left, top, width, height],
        "area": width * height,
        **more,
    }


def _index(images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    content: Any = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    coco.dataset = content
    coco.createIndex()
    return coco
