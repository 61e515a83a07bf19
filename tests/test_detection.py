"""Object detection: SSD as a transformers model, scripts/detect_objects.py, its data and its figures."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torchvision.models import alexnet, vgg16
from torchvision.models.detection import (
    SSDLite320_MobileNet_V3_Large_Weights,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, TrainingArguments, pipeline

import gap_hf.models
from gap_hf import GaPConfig, GaPError, Sparsifier, find_targets, load_masks, make_partition
from gap_hf.models.ssd import LITE, SMALL, VGG, SSDConfig, SSDForObjectDetection, SSDOutput, match
from gap_hf.planning import summarize
from gap_hf.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import detect_objects  # noqa: E402
from _detection.data import DataSection, Sample, load_splits, read_coco  # noqa: E402
from _detection.digits import make_digits  # noqa: E402
from _detection.model import ModelSection, load_model  # noqa: E402
from _detection.preparing import DetectionSet, ImageFormat, collate  # noqa: E402
from _detection.results import results_table  # noqa: E402
from _detection.scoring import average_precision, detect  # noqa: E402
from _mnist import read_mnist  # noqa: E402

TINY_SSD: dict[str, Any] = {"architecture": SMALL, "embedding_size": 4, "hidden_sizes": [8, 8, 16], "num_maps": 2}
TINY_DETR: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}


def ssd(architecture: str = SMALL, **config: Any) -> SSDForObjectDetection:
    config = {**(TINY_SSD if architecture == SMALL else {}), "architecture": architecture, **config}
    return SSDForObjectDetection(SSDConfig(**config))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def batch(size: int, number: int = 2) -> dict[str, Any]:
    """Images with two objects, with one, and so on, the last one with none if there are several."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.25, 0.4], [0.2, 0.3, 0.1, 0.1]])
    counts = [2, 0][:number]
    labels = [
        {"class_labels": torch.tensor([1, 0])[:n], "boxes": boxes[:n], "image_id": torch.tensor(n)} for n in counts
    ]
    return {"pixel_values": torch.randn(number, 3, size, size, generator=generator), "labels": labels}


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "size"), [(SMALL, 64), (LITE, 320)])
def test_the_loss_is_torchvisions(architecture: str, size: int) -> None:
    torch.manual_seed(0)
    model = ssd(architecture, num_labels=3).train()
    inputs = batch(size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(**inputs)
    model.load_state_dict(before)  # batch norms have counted
    reference = model.ssd
    reference.transform.image_mean, reference.transform.image_std = [0.0] * 3, [1.0] * 3
    targets = [
        {"boxes": box_convert(label["boxes"] * size, "cxcywh", "xyxy"), "labels": label["class_labels"] + 1}
        for label in inputs["labels"]
    ]
    losses = reference(list(inputs["pixel_values"]), targets)
    assert output.loss_dict is not None and losses.keys() == output.loss_dict.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(output.loss_dict[name], loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, sum(losses.values()), rtol=1e-5, atol=1e-5)
    assert output.loss.requires_grad and output.logits.shape[-1] == 4
    assert torch.equal(output[0], output.loss) and len(model(**inputs, return_dict=False)) == 4


@pytest.mark.parametrize(("architecture", "size"), [(SMALL, 64), (LITE, 320)])
def test_detections_are_torchvisions(architecture: str, size: int) -> None:
    torch.manual_seed(0)
    model = ssd(architecture, num_labels=3).eval()
    with torch.no_grad():  # an untrained one gives all classes the same scores, whose order says nothing
        for param in model.ssd.head.get_submodule("classification_head").parameters() if architecture == LITE else []:
            param.copy_(torch.randn_like(param) / 8)
    model.ssd.transform.image_mean, model.ssd.transform.image_std = [0.0] * 3, [1.0] * 3
    pixels = batch(size)["pixel_values"]
    with torch.no_grad():
        found, expected = model.post_process(model(pixels)), model.ssd(list(pixels))
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine["scores"]) == len(theirs["scores"]) > 0
        torch.testing.assert_close(mine["scores"], theirs["scores"])
        assert torch.equal(mine["labels"], theirs["labels"] - 1)
        torch.testing.assert_close(mine["boxes"] * size, theirs["boxes"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "builder"), [(VGG, ssd300_vgg16), (LITE, ssdlite320_mobilenet_v3_large)])
def test_the_networks_are_torchvisions(architecture: str, builder: Any) -> None:
    mine = on_meta(lambda: ssd(architecture, num_labels=90))
    theirs = on_meta(lambda: builder(weights=None, weights_backbone=None, num_classes=91))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name.removeprefix("ssd."): value.shape for name, value in mine.state_dict().items()} == shapes
    boxes: Any = mine.ssd.anchor_generator
    for name in ("aspect_ratios", "scales", "steps", "clip"):
        assert getattr(boxes, name) == getattr(theirs.anchor_generator, name)
    transform: Any = theirs.transform
    assert [mine.config.image_mean, mine.config.image_std] == [transform.image_mean, transform.image_std]
    assert mine.config.image_size == transform.fixed_size[0]


def test_default_boxes_are_whole_in_half_precision() -> None:
    model, size = ssd(LITE), 300
    maps = [torch.zeros(1, 8, n, n) for n in (38, 19, 10, 5, 3, 1)]
    pixels = torch.zeros(2, 3, size, size)
    whole = model._anchors(pixels, maps)
    expected = model.ssd.anchor_generator(ImageList(pixels, [(size, size)] * 2), maps)
    half = model._anchors(pixels.bfloat16(), [one.bfloat16() for one in maps])
    for one, two, three in zip(whole, expected, half, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    used: list[Any] = []
    model._anchors = lambda *args: used.append(args) or whole  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="size"):  # of the forward's own maps there are others
        model(torch.zeros(2, 3, 64, 64))
    assert used


def test_matching_by_hand() -> None:
    model = ssd()
    anchors = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 20], [20, 20, 30, 30], [50, 50, 60, 60]], dtype=torch.float32)
    boxes = torch.tensor([[0, 0, 10, 11], [52, 52, 54, 54]], dtype=torch.float32)
    # The first box overlaps the first default box by 10/11 and the second by 11/20; the other one lies in the last,
    # which it overlaps by 4 % only, but no default box overlaps it more.
    assert match(boxes, anchors, model.ssd).tolist() == [0, 0, -1, 1]
    assert match(torch.zeros(0, 4), anchors, model.ssd).tolist() == [-1] * 4


def test_nothing_but_the_best_of_what_overlaps_is_found() -> None:
    model = ssd(num_labels=2)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.1, 0.9, 0.1, 0.4], [0.5, 0.5, 0.4, 0.4]]])
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.005, 0.9, 0.095], [0.001, 0.002, 0.997]]])
    (found,) = model.post_process(SSDOutput(logits=scores.log(), pred_boxes=boxes), threshold=0.25)
    assert found["labels"].tolist() == [1, 0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7, 0.3]))
    # Clipped to the image; the second box of class 0 went, the first one of class 1 stays.
    expected = torch.tensor([[0.05, 0.7, 0.15, 1.0], [0.31, 0.3, 0.71, 0.7], [0.3, 0.3, 0.7, 0.7]])
    torch.testing.assert_close(found["boxes"], expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architecture": "ssd512"}, "architecture: found 'ssd512', expected one of ssd300_vgg16"),
        ({"architecture": VGG, "image_size": 512}, "image_size: found 512, but ssd300_vgg16 has 300"),
        ({**TINY_SSD, "num_maps": 4}, "num_maps: found 4, expected 1 to 3"),
        ({**TINY_SSD, "scales": [0.1, 0.2]}, "scales: found 2 of them, expected num_maps + 1, 3"),
        ({**TINY_SSD, "image_size": 72}, "image_size: found 72, expected a multiple of 16"),
    ],
)
def test_configs_that_contradict_themselves(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        SSDConfig(**config)


def test_torchvisions_weights_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="no such weights for small"):
        ssd().load_torchvision_weights(weights="COCO_V1")
    with pytest.raises(ValueError, match="knows 90 classes, but the config has 2"):
        on_meta(lambda: ssd(VGG)).load_torchvision_weights(weights="COCO_V1")  # type: ignore[operator]


def test_torchvisions_weights_know_cocos_classes_by_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO numbers its 80 classes with gaps, and torchvision's heads have all 90 places."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    url = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.url
    torch.save(
        theirs, tmp_path / "hub/checkpoints" / url.rsplit("/", 1)[1]
    )  # as torchvision keeps what it has downloaded
    section = ModelSection(type="gap_hf_ssd", config={"architecture": LITE}, weights="COCO_V1")
    model, classes, _ = load_model(section, ["stop sign", "person"])
    assert classes == [12, 0] and model.config.num_labels == 90
    assert [model.config.id2label[i] for i in (0, 11, 12)] == ["person", "unused 11", "stop sign"]
    assert all(torch.equal(value, theirs[name.removeprefix("ssd.")]) for name, value in model.state_dict().items())
    with pytest.raises(GaPError, match="COCO_V1 does not know the class 'persn'; did you mean 'person'"):
        load_model(section, ["persn"])
    with pytest.raises(GaPError, match="has no weights 'COCO' of an SSD; expected such as COCO_V1"):
        load_model(dataclasses.replace(section, weights="COCO"), ["person"])


# --- what is pruned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "live"), [(0.8, 4_586_700), (0.9, 2_293_352)])
def test_the_plan_of_ssd300(sparsity: float, live: int) -> None:
    """COCO's 80 classes: all of VGG and the extra layers but the convolution that reads the image; no head."""
    model = on_meta(lambda: ssd(VGG, num_labels=80))
    config = GaPConfig(sparsity=sparsity, num_partitions=4, num_rounds=1)
    targets = find_targets(model, config)
    assert len(targets.weights) == 22 and sum(w.numel for w in targets.weights) == 22_933_504
    assert sum(p.numel() for p in model.parameters()) == 34_305_206
    assert sum(round((1 - config.target) * w.numel) for w in targets.weights) == live
    assert {s.name.split(".")[1] for s in targets.skipped} == {"backbone", "head"}
    assert [s.name for s in targets.skipped if "head" not in s.name] == ["ssd.backbone.features.0.weight"]
    assert len([s for s in targets.skipped if "head" in s.name]) == 12
    groups = make_partition(targets, config)
    assert [group.numel for group in groups] == [5_271_552, 7_077_888, 7_077_888, 3_506_176]
    summary = summarize(model, config, total_steps=100)
    assert summary["num_prunable"] == 22_933_504 and len(summary["groups"]) == 4


def test_the_heads_of_ssdlite_stay_dense() -> None:
    targets = find_targets(on_meta(lambda: ssd(LITE, num_labels=80)), GaPConfig(sparsity=0.8))
    assert len(targets.weights) == 55 and all(w.name.startswith("ssd.backbone") for w in targets.weights)
    assert targets.blocks[:3] == ("ssd.backbone.features.0", "ssd.backbone.features.1", "ssd.backbone.extra.0")
    reasons = {s.reason for s in targets.skipped if s.name.startswith("ssd.backbone")}
    assert reasons == {"a depthwise convolution"}


@pytest.mark.parametrize(("build", "number", "last"), [(vgg16, 14, "classifier.6"), (alexnet, 6, "classifier.6")])
def test_networks_without_norms(build: Any, number: int, last: str) -> None:
    """The stem reads the image, the last layer is the head; between them every layer is its own block."""
    targets = find_targets(on_meta(build), GaPConfig(sparsity=0.8))
    assert len(targets.weights) == len(targets.blocks) == number
    assert [s.name for s in targets.skipped] == ["features.0.weight", f"{last}.weight"]


def step(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """One update under masks: exact zeros, the planned numbers of them, and everything live moves."""
    config = GaPConfig(sparsity=0.8, method="static")
    # The first step of Adam is as long for every gradient but 0.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-20)
    sparsifier = Sparsifier(model, config, total_steps=2, optimizer=optimizer)
    sparsifier.start()
    model.train()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    output = model(**inputs)
    output.loss.backward()
    sparsifier.mask_gradients()
    moving = {name: param.grad != 0 for name, param in model.named_parameters() if param.grad is not None}
    optimizer.step()
    sparsifier.mask_weights()
    assert output.loss.isfinite()
    params = dict(model.named_parameters())
    targets = find_targets(model, config).weights
    assert targets
    for target in targets:
        param, mask = params[target.name], sparsifier.masks[target.name]
        assert mask is not None and int(mask.sum()) == round(0.2 * target.numel)
        mask = mask.bool()
        assert not param[~mask].any() and not moving[target.name][~mask].any()
    # What has a gradient moves, but for a few that are smaller still than that.
    moved = sum(int((params[name] != before[name])[grad].sum()) for name, grad in moving.items())
    assert moved > 0.99 * sum(int(grad.sum()) for grad in moving.values()) > 0
    for name, param in params.items():
        assert torch.equal(param[~moving[name]], before[name][~moving[name]]) if name in moving else True
    return output


def test_a_step_of_ssd300() -> None:
    torch.manual_seed(0)
    model = ssd(VGG, num_labels=3)
    assert step(model, batch(300, 1)).logits.shape == (1, 8732, 4)  # as in SSD's paper


def test_a_step_of_detr() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("detr", **TINY_DETR, num_labels=3)
    step(AutoModelForObjectDetection.from_config(config), batch(64))


# --- saving and loading ----------------------------------------------------------------------------------------------

WITHOUT_GAP = """
import sys, torch
from transformers import AutoModelForObjectDetection
model = AutoModelForObjectDetection.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters()}
pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
with torch.no_grad():
    output = model(pixels)
import json
print(json.dumps([zeros, output.logits.double().sum().item(), len(model.post_process(output)),
                  [m for m in sys.modules if m.split(".")[0] == "gap_hf"]]))
"""


def test_it_loads_with_and_without_gap_hf(tmp_path: Path) -> None:
    model = ssd(num_labels=3)
    config = GaPConfig(sparsity=0.8, method="static")
    sparsifier = Sparsifier(model, config, total_steps=2)
    sparsifier.start()
    gap_hf.save_pretrained(model, tmp_path, sparsifier)
    assert (tmp_path / "ssd.py").read_text() == (ROOT / "gap_hf/models/ssd.py").read_text()

    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(loaded) is SSDForObjectDetection
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    masks, params = load_masks(tmp_path), dict(loaded.named_parameters())
    for target in find_targets(model, config).weights:
        assert int((params[target.name] != 0).sum()) == round(0.2 * target.numel)
    assert len(list(masks)) == 6

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_GAP, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    zeros, total, images, modules = json.loads(run.stdout.splitlines()[-1])
    assert zeros == {name: int((p == 0).sum()) for name, p in model.named_parameters()}
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        assert total == pytest.approx(loaded(pixels).logits.double().sum().item(), rel=1e-5)
    assert images == 1 and modules == []


# --- figures ---------------------------------------------------------------------------------------------------------


def sample(boxes: list[list[float]], labels: list[int], image_id: int = 1, crowd: list[bool] | None = None) -> Sample:
    flags = np.array(crowd or [False] * len(labels), bool)
    return Sample(
        image_id, Path("none.png"), (100, 200), np.array(boxes, float).reshape(-1, 4), np.array(labels), flags
    )


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, np.ndarray]:
    shares = np.array(boxes, float).reshape(-1, 4) / [200, 100, 200, 100]
    return {"boxes": shares, "labels": np.array(labels, int), "scores": np.array(scores)}


def test_average_precision_by_hand() -> None:
    names = ["cat", "dog", "owl"]
    samples = [
        sample([[0, 0, 50, 50], [100, 0, 150, 50]], [0, 0]),
        sample([[10, 10, 30, 30]], [1], image_id=2),
        sample([], [], image_id=3),
    ]
    perfect = {
        1: found([[0, 0, 50, 50], [100, 0, 150, 50]], [0, 0], [0.9, 0.8]),
        2: found([[10, 10, 30, 30]], [1], [0.5]),
    }
    figures = average_precision(samples, perfect, names)
    assert figures["map"] == figures["map_50"] == pytest.approx(1)
    assert figures["per_class"].keys() == {"cat", "dog"}  # there is no owl to find
    # One cat of two is found, with 40 of 50 pixels (IoU 0.8), which is enough at the thresholds 0.5 to 0.8, and the
    # dog is taken for a cat. COCO's precision at 101 recalls: 51 of them are reached.
    half = {1: found([[0, 0, 40, 50]], [0], [0.9]), 2: found([[10, 10, 30, 30]], [0], [0.5])}
    figures = average_precision(samples, half, names)
    assert figures["per_class"]["cat"]["map_50"] == pytest.approx(51 / 101)
    assert figures["map_50"] == pytest.approx(51 / 202) and figures["per_class"]["dog"]["map"] == 0
    assert figures["map"] == pytest.approx(51 / 202 * 0.7, abs=1e-3)
    assert average_precision(samples, {}, names)["map"] == 0
    # A crowd is neither missed nor a mistake to find.
    crowd = [sample([[0, 0, 50, 50], [100, 0, 150, 50]], [0, 0], crowd=[False, True])]
    assert average_precision(crowd, {1: perfect[1]}, names)["map"] == pytest.approx(1)


@pytest.mark.parametrize("with_background", [True, False])
def test_detections_of_detr_and_its_relatives(with_background: bool) -> None:
    """The model's classes 2 and 0 are the data's 0 and 1; its class 1 is none of the data's."""
    logits = torch.full((1, 3, 3), -9.0)
    logits[0, 0, 2], logits[0, 1, 0], logits[0, 2, 1] = 3.0, 2.0, 4.0
    if with_background:
        logits = torch.cat([logits, torch.full((1, 3, 1), 1.0)], dim=-1)
    model = nn.Module()
    model.config = SSDConfig(num_labels=3)  # type: ignore[assignment]
    output = SSDOutput(logits=logits, pred_boxes=torch.tensor([[[0.5, 0.5, 0.2, 0.4]] * 3]))
    (image,) = detect(model, output, [2, 0])
    assert image["labels"][:2].tolist() == [0, 1] and set(image["labels"]) == {0, 1}
    assert image["scores"][0] == pytest.approx(
        float(torch.tensor([3.0, 1.0]).softmax(0)[0] if with_background else torch.tensor(3.0).sigmoid()), abs=1e-4
    )
    assert image["boxes"][0] == pytest.approx([0.4, 0.3, 0.6, 0.7])


# --- data ------------------------------------------------------------------------------------------------------------


def write_coco(folder: Path, number: int, *, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """Images with a bright square or bar on each, and their annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    images, annotations = [], []
    for i in range(number):
        pixels = np.zeros((60, 80, 3), np.uint8)
        left, top = (int(x) for x in rng.integers(0, 30, 2))
        width, height = ((20, 20), (40, 10))[i % 2]
        pixels[top : top + height, left : left + width] = (200, 40, 90)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 60, "width": 80})
        row = {"id": i, "image_id": 10 + i, "category_id": (7, 3)[i % 2], "iscrowd": 0}
        annotations.append({**row, "bbox": [left, top, width, height], "area": width * height})
    categories = [{"id": 7, "name": "square"}, {"id": 3, "name": "bar"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if change is not None:
        change(content)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_reading_coco(tmp_path: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        crowd = {"id": 9, "image_id": 10, "category_id": 7, "iscrowd": 1, "bbox": [0, 0, 80, 60]}
        outside = {"id": 10, "image_id": 10, "category_id": 3, "bbox": [-10, 50, 20, 20.5]}
        flat = {"id": 11, "image_id": 10, "category_id": 3, "bbox": [5, 5, 0, 8]}
        content["annotations"] += [crowd, outside, flat]

    samples, names = read_coco(tmp_path, write_coco(tmp_path, 3, change=add))
    assert names == ["bar", "square"]  # by the numbers of their categories
    assert [s.image_id for s in samples] == [10, 11, 12] and samples[0].size == (60, 80)
    assert samples[0].labels.tolist() == [1, 1, 0, 0] and samples[0].crowd.tolist() == [False, True, False, False]
    assert samples[0].boxes[2].tolist() == [-10, 50, 10, 70.5]

    form = ImageFormat((30, 40), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    items = DetectionSet(samples, form, classes=[4, 6])
    inputs = collate([items[0], items[1]])
    assert inputs["pixel_values"].shape == (2, 3, 30, 40) and inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].min() == -1
    label = inputs["labels"][0]
    assert label["class_labels"].tolist() == [6, 4] and label["image_id"] == 10  # no crowd, nothing flat
    assert label["boxes"][1].tolist() == pytest.approx([5 / 80, 55 / 60, 10 / 80, 10 / 60])  # cut at the image's edges


@pytest.mark.parametrize("augmentation", ["flip", "ssd"])
def test_boxes_follow_augmentation(tmp_path: Path, augmentation: str) -> None:
    samples, _ = read_coco(tmp_path, write_coco(tmp_path, 2))
    form = ImageFormat((120, 160), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    items = DetectionSet(samples, form, classes=[0, 1], augmentation=augmentation)
    before, seen = torch.get_rng_state(), []
    for place in range(12):
        items.set_epoch(place // 2)
        item = items[place % 2]
        boxes = box_convert(item["labels"]["boxes"], "cxcywh", "xyxy")
        assert item["pixel_values"].shape == (3, 120, 160) and len(boxes) == len(item["labels"]["class_labels"]) <= 1
        for left, top, right, bottom in boxes.tolist():
            assert 0 <= left < right <= 1 + 1e-6 and 0 <= top < bottom <= 1 + 1e-6
            inner: Tensor = item["pixel_values"][
                :, round(top * 120) + 2 : round(bottom * 120) - 2, round(left * 160) + 2 : round(right * 160) - 2
            ]
            bright = item["pixel_values"].amax(0) > 0.25
            # All of the object is in its box, and all of its box is the object.
            assert inner.numel() == 0 or inner.amax(0).min() > 0.2
            seen.append((round(left, 2), int(bright.sum())))
    assert len({left for left, _ in seen}) > 2
    # What is drawn follows from the epoch and the place, whatever was drawn before; and workers may be sent it in a pickle.
    again = pickle.loads(pickle.dumps(items))[1]
    assert torch.equal(again["pixel_values"], item["pixel_values"]) and torch.equal(torch.get_rng_state(), before)
    other = DetectionSet(samples, form, classes=[0, 1], augmentation=augmentation, seed=1)
    assert any(not torch.equal(other[i]["pixel_values"], items[i]["pixel_values"]) for i in (0, 1))


@pytest.mark.parametrize(("annotated", "upright"), [((80, 60), True), ((40, 30), True), ((60, 80), False)])
def test_boxes_of_photos_that_are_stored_on_their_side(
    tmp_path: Path, annotated: tuple[int, int], upright: bool
) -> None:
    """Annotations are of the photo as it is seen, at some scale; or of the pixels as they are stored, if only that fits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:30, 60:] = 255  # on the upper right as it is stored, and on the lower right as it is seen
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    height, width = annotated
    box = np.array([[width / 2, height * 3 / 4, width, height] if upright else [60, 0, 80, 30]], float)
    sample = Sample(1, tmp_path / "a.png", annotated, box, np.zeros(1, int), np.zeros(1, bool))
    item = DetectionSet([sample], ImageFormat((80, 60) if upright else (60, 80), (0.0,) * 3, (1.0,) * 3), classes=[0])[
        0
    ]
    size = torch.tensor(item["pixel_values"].shape[:0:-1]).repeat(2)
    left, top, right, bottom = (box_convert(item["labels"]["boxes"], "cxcywh", "xyxy")[0] * size).round().int().tolist()
    inside = torch.zeros(item["pixel_values"].shape[1:], dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert inside.sum() == 600 and torch.equal(item["pixel_values"][0] > 0.5, inside)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.pop("images"), "'images' is no list of objects"),
    (lambda c: c["images"].clear() or c["annotations"].clear(), "found no images"),
    (lambda c: c["images"][0].pop("height"), "found None as height"),
    (lambda c: c["images"][0].update(file_name="gone.png"), "image 10 is not there"),
    (lambda c: c["images"][1].update(id=10), "two of its images have the id 10"),
    (lambda c: c["annotations"][0].update(image_id=99), "annotation 0 is of image 99"),
    (lambda c: c["annotations"][1].update(category_id=1), "annotation 1 is of category 1"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 0 has the bbox [1, 2, 3]"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "annotation 0 has the bbox"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "expected left, top, width and height"),
]


@pytest.mark.parametrize(("change", "expected"), BROKEN)
def test_broken_annotations(tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    path = write_coco(tmp_path, 2, change=change)
    with pytest.raises(GaPError, match=re.escape(expected)) as error:
        read_coco(tmp_path, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 2)
    samples, _ = read_coco(tmp_path, path)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(GaPError, match=r"1\.png: cannot be read as an image"):
        DetectionSet(samples, ImageFormat((8, 8), (0.5,) * 3, (0.5,) * 3), classes=[0, 1])[1]
    path.write_text('{"images": [')
    with pytest.raises(GaPError, match=r"annotations\.json: cannot be read as JSON"):
        read_coco(tmp_path, path)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, number: int = 20) -> None:
    """Strokes in MNIST's format, half of the files compressed."""
    rng = np.random.default_rng(0)
    for part, gz in (("train", ""), ("t10k", ".gz")):
        images = np.zeros((number, 28, 28), np.uint8)
        for image in images:
            top, left = rng.integers(2, 8, 2)
            image[top : 28 - top, left : left + rng.integers(4, 14)] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte{gz}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{gz}", np.arange(number, dtype=np.uint8) % 10)


def test_digits(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    pair = read_mnist(tmp_path, "train")
    made = list(make_digits(*pair, 40, size=64, seed=(3,)))
    for (a, boxes_a, labels_a), (b, boxes_b, labels_b) in zip(
        made, make_digits(*pair, 30, size=64, seed=(3,)), strict=False
    ):
        assert (a == b).all() and (boxes_a == boxes_b).all() and (labels_a == labels_b).all()
    assert any((a[0] != b[0]).any() for a, b in zip(made, make_digits(*pair, 5, size=64, seed=(4,)), strict=False))
    assert {len(boxes) for _, boxes, _ in made} == {1, 2, 3, 4}
    for pixels, boxes, labels in made:
        assert pixels.shape == (64, 64) and pixels.dtype == np.uint8 and labels.dtype == np.int64
        outside = pixels.copy()
        for left, top, right, bottom in boxes.astype(int):
            outside[top:bottom, left:right] = 0
            edges = (
                pixels[top, left:right],
                pixels[bottom - 1, left:right],
                pixels[top:bottom, left],
                pixels[top:bottom, right - 1],
            )
            assert all(edge.any() for edge in edges)  # as tight as can be
        assert not outside.any()  # no ink that has no box
        for i in range(len(boxes)):
            for j in range(i):
                low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
                areas = [np.prod(box[2:] - box[:2]) for box in (boxes[i], boxes[j])]
                assert np.prod(np.clip(high - low, 0, None)) <= 0.1 * min(areas)


def test_splits_of_digits(tmp_path: Path) -> None:
    """Train, dev and test are made of other digits each, at other places."""
    write_mnist(tmp_path)
    section = DataSection(builtin="digits", folder=tmp_path, num_train=6, num_dev=4, num_test=3, max_train_samples=5)
    splits = load_splits(section)
    assert (len(splits.train), len(splits.dev), len(splits.test), splits.names[3]) == (5, 4, 3, "3")
    assert splits.scored(None) == splits.scored("test") == ("test", splits.test)
    assert splits.scored("dev") == ("dev", splits.dev)
    train, _ = read_mnist(tmp_path, "train")
    labels = [set(np.concatenate([sample.labels for sample in split])) for split in (splits.train, splits.dev)]
    own = np.arange(len(train)) % 10
    assert len(train) == 20 and labels[0] <= set(own[:17]) and labels[1] <= set(own[17:])
    places = [split[0].boxes[:, :2].tolist() for split in (splits.train, splits.dev, splits.test)]
    assert places[0] != places[1] != places[2] != places[0]
    with pytest.raises(GaPError, match="has 1 training digit, expected at least 2"):
        write_mnist(tmp_path, 1)
        load_splits(section)


def test_broken_digits(tmp_path: Path) -> None:
    with pytest.raises(GaPError, match="has no train-images-idx3-ubyte"):
        read_mnist(tmp_path, "train")
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GaPError, match="train-images-idx3-ubyte: is no idx file"):
        read_mnist(tmp_path, "train")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"nothing")
    with pytest.raises(GaPError, match=r"t10k-labels-idx1-ubyte\.gz: cannot be read"):
        read_mnist(tmp_path, "t10k")


# --- the script ------------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, model: dict[str, Any]) -> Path:
    write_coco(folder / "train", 8)
    write_coco(folder / "dev", 3)
    write_coco(folder / "test", 2)
    recipe = {
        "gap": {"sparsity": 0.8, "num_partitions": 2, "num_rounds": 1, "fine_tune_share": 0.25},
        "model": model,
        "data": {
            f"{split}_{what}": f"{split}{'/annotations.json' if what == 'annotations' else ''}"
            for split in ("train", "dev")
            for what in ("images", "annotations")
        }
        | {"num_drawn": 2, "augmentation": "flip"},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "logging_steps": 2,
            "save_strategy": "steps",
            "save_steps": 3,
            "metric_for_best_model": "eval_map",
            "report_to": "none",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "model",
    [{"type": "gap_hf_ssd", "config": TINY_SSD}, {"type": "detr", "config": TINY_DETR, "image_size": 64}],
    ids=["ssd", "detr"],
)
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path, model)
    assert detect_objects.main([str(recipe), "--plan"]) == 0
    assert "group" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert detect_objects.main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "mAP@[.5:.95]" in out and "8 training images of 64×64, 2 classes" in out

    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert 0 <= results["map"] <= results["map_50"] <= 1 and results["per_class"].keys() == {"bar", "square"}
    assert results["at_target"] and results["dev_images"] == 3 and len(results["dev"]) == 3
    assert results["scored"] == "dev" and "on 3 dev images" in out
    half, _, _ = load_model(ModelSection(checkpoint=tmp_path / "run"), ["bar", "square"], dtype="bfloat16")
    assert half.dtype is torch.bfloat16
    shutil.copytree(tmp_path / "run", tmp_path / "half")  # with its image processor
    half.save_pretrained(tmp_path / "half")
    assert load_model(ModelSection(checkpoint=tmp_path / "half"), ["bar", "square"])[0].dtype is torch.float32
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    params = dict(loaded.named_parameters())
    for layer in results["layers"]:
        assert int((params[layer["name"]] != 0).sum()) == layer["live"] == round(0.2 * layer["numel"])
    assert loaded.config.id2label == {0: "bar", 1: "square"}
    assert loaded.config.label2id == {"bar": 0, "square": 1}
    for name in ("detections.png", "plot.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert min(image.size) > 200
    assert load_recipe(
        tmp_path / "run/recipe.yaml", model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments
    )

    if model["type"] == "detr":
        # Pipelines prepare images as they were here, and the script goes on from the folder.
        samples, _ = read_coco(tmp_path / "dev", tmp_path / "dev/annotations.json")
        again, classes, form = load_model(ModelSection(checkpoint=tmp_path / "run"), ["bar", "square"])
        assert classes == [0, 1] and form == ImageFormat((64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
        pixels = processor(Image.open(samples[0].image), return_tensors="pt")["pixel_values"][0]
        here = DetectionSet(samples, form, classes=classes)[0]["pixel_values"]
        torch.testing.assert_close(pixels, here, atol=0.02, rtol=0)
        find: Any = pipeline("object-detection", model=str(tmp_path / "run"), device="cpu", threshold=0.0)
        assert {answer["label"] for answer in find(str(samples[0].image))} <= {"bar", "square"}

    # Resumed, from the middle of an epoch and with a dense run's figures beside it, it is the same run.
    reference = tmp_path / "dense.json"
    reference.write_text(json.dumps({"map": 0.5, "map_50": 0.75}), encoding="utf-8")
    words = [f"--training.resume_from_checkpoint={tmp_path}/run/checkpoint-3", f"--data.reference={reference}"]
    assert detect_objects.main([str(recipe), *words]) == 0
    out = capsys.readouterr().out
    assert "0.7500" in out and "other images" not in out
    reference.write_text(json.dumps({"map": 0.5, "map_50": 0.75, "scored": "test"}), encoding="utf-8")
    assert "recorded on other images: test" in results_table(results, reference=json.loads(reference.read_text()))
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))


def test_dense_and_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without GaP, and then on from what that left, which keeps its heads."""
    recipe = write_recipe(tmp_path, {"type": "gap_hf_ssd", "config": TINY_SSD})
    words = ["--gap.method=dense", "--training.max_steps=2", "--training.save_strategy=no", "--data.num_drawn=0"]
    assert detect_objects.main([str(recipe), *words]) == 0
    assert not list((tmp_path / "run").glob("gap*")) and not (tmp_path / "run/detections.png").exists()
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert results["sparsity"] == 0 and results["cost"]["average_density"] == 1
    trained, classes, form = load_model(ModelSection(checkpoint=tmp_path / "run"), ["square", "bar"])
    assert classes == [1, 0] and form == ImageFormat((64, 64), (0.5,) * 3, (0.5,) * 3)
    saved = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), saved.parameters(), strict=True))
    other, classes, _ = load_model(ModelSection(checkpoint=tmp_path / "run"), ["a", "b", "c"])
    assert classes == [0, 1, 2] and other.config.num_labels == 3
    assert all(p.isfinite().all() for p in other.parameters())
    assert results["scored"] == "dev" and "on 3 dev images" in capsys.readouterr().out


def test_a_test_set_is_scored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end, and never while training goes on, which dev is for."""
    recipe = write_recipe(tmp_path, {"type": "gap_hf_ssd", "config": TINY_SSD})
    words = ["--gap.method=dense", "--training.save_strategy=no", f"--data.test_images={tmp_path}/test"]
    words.append(f"--data.test_annotations={tmp_path}/test/annotations.json")
    assert detect_objects.main([str(recipe), *words]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert results["scored"] == "test" and results["test_images"] == 2 and "dev_images" not in results
    assert "on 2 test images" in capsys.readouterr().out
    assert [entry["step"] for entry in results["dev"]] == [4, 8]
    splits = load_splits(
        load_recipe(recipe, words, model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments).data
    )
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [8, 3, 2]
    assert detect_objects.main([str(recipe), *words, "--data.score=dev", "--training.overwrite_output_dir=true"]) == 0
    assert "on 3 dev images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--gap.sparsty=0.8", "gap.sparsty: unknown key; did you mean 'sparsity'?"),
        ("--gap.num_partitions=4", "the largest that works is 3"),
        ("--model.type=det", "model.type: found 'det', no detection model"),
        ("--model.checkpoint=none", "model.type: found both of type and checkpoint"),
        ("--model.config.hidden_size=3", "model.config.hidden_size: unknown key"),
        ("--model.config.num_labels=3", "model.config.num_labels: found 3, but the data has 2 classes"),
        ("--model.config.num_maps=5", "model.config: gap_hf_ssd refuses it: num_maps: found 5"),
        ("--model.weights=COCO_V1", "model.weights: COCO_V1 does not know the class 'bar'"),
        ("--training.label_smoothing_factor=0.1", "training.label_smoothing_factor: found 0.1, expected 0"),
        ("--model.image_size=64", "model.image_size: gap_hf_ssd has its own"),
        ("--model.image_mean=[1, 2]", "model.image_mean: found [1, 2], expected three numbers"),
        ("--data.builtin=letters", "data.builtin: found 'letters', expected one of digits"),
        ("--data.builtin=digits", "data.train_images: contradicts data.builtin"),
        ("--data.dev_images=null", "data.dev_images: not set"),
        ("--data.test_images=test", "data.test_annotations: not set"),
        ("--data.score=test", "data.test_images: not set"),
        ("--data.score=tset", "data.score: found 'tset', expected one of test, dev; did you mean 'test'?"),
        ("--data.num_test=0", "data.num_test: found 0, expected at least 1"),
        ("--data.train_annotations=none.json", "data.train_annotations: no such file"),
        ("--data.augmentation=flips", "data.augmentation: found 'flips', expected one of none, flip, ssd"),
        ("--data.num_dev=0", "data.num_dev: found 0, expected at least 1"),
        ("--data.reference={}/recipe.yaml", "is no results.json"),
        ("--training.max_steps=2", "optimizer steps, but training has 2"),
        ("--training.predict_with_generate=true", "training.predict_with_generate: unknown key"),
    ],
)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str) -> None:
    recipe = write_recipe(tmp_path, {"type": "gap_hf_ssd", "config": TINY_SSD})
    assert detect_objects.main([str(recipe), override.format(tmp_path)]) == 2
    out = capsys.readouterr()
    assert expected in out.err and out.err.count("\n") == 1 and out.err.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_other_categories_and_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, {"type": "gap_hf_ssd", "config": TINY_SSD})
    write_coco(tmp_path / "dev", 2, change=lambda c: c["categories"][0].update(name="cube"))
    assert detect_objects.main([str(recipe)]) == 2
    assert "has other categories than" in capsys.readouterr().err
    assert detect_objects.main([]) == 2
    assert "no recipe given" in capsys.readouterr().err


RECIPES = sorted((ROOT / "recipes/detection").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path, tmp_path: Path) -> None:
    assert len(RECIPES) == 4
    (tmp_path / "instances.json").write_text("{}")
    words = [f"--data.folder={tmp_path}"]
    if "digits" not in path.stem:
        words = [f"--data.{split}_images={tmp_path}" for split in ("train", "dev")]
        words += [f"--data.{split}_annotations={tmp_path}/instances.json" for split in ("train", "dev")]
    recipe = load_recipe(path, words, model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments)
    assert recipe.gap.is_off == path.stem.endswith("-dense")
    # bf16 needs a GPU, which a test may not have.
    args = {**recipe.training, "bf16": False, "output_dir": str(tmp_path / "out"), "use_cpu": True}
    assert TrainingArguments(**args).seed == 1
