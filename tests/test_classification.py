"""scripts/classify_images.py: the whole run, its sources of images, averages that obey the masks, and what it refuses."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import classify_images  # noqa: E402
from _images import open_picture  # noqa: E402
from _norms import RecalibratedTrainer  # noqa: E402
from _vision.data import DataSection, _from_hub, load_images  # noqa: E402
from _vision.model import ImageFormat, ModelSection, known_format, load_model, make_schedule, of_processor  # noqa: E402
from _vision.scoring import accuracy, best_classes  # noqa: E402
from _vision.training import Batches, image_format, make_mixup, set_transforms  # noqa: E402

from gap_hf import GaPConfig, GaPError, Sparsifier, load_masks  # noqa: E402
from gap_hf.cli import main as gap_hf  # noqa: E402
from gap_hf.planning import summarize  # noqa: E402
from gap_hf.recipe import load_recipe  # noqa: E402

RECIPES = sorted((ROOT / "recipes" / "vision").rglob("*.yaml"))
GREY = ImageFormat((1, 12, 12), [0.5], [0.5], 1.0)
TINY = {"channels": [8, 8, 16, 16], "stem_width": 8}


def stripes(n: int, seed: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, size, size) of upright, level and slanting stripes, which are classes 0 to 2."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    y, x = np.mgrid[:size, :size]
    lines = np.stack([x, y, x + y])[labels] + rng.integers(0, 4, (n, 1, 1))
    return ((lines % 4 < 2) * 200 + rng.integers(0, 55, (n, size, size))).astype(np.uint8), labels.astype(np.uint8)


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """The first half as training images, the second as dev."""
    for i, image in enumerate(images):
        split = "train" if i < len(images) // 2 else "val"
        path = folder / split / f"class{labels[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_idx(path: Path, values: np.ndarray) -> None:
    data = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    for prefix, n in (("train", 96), ("t10k", 48)):
        images, labels = stripes(n, n)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


def recipe_for(idx: Path, output: Path) -> dict[str, Any]:
    return {
        "gap": {"sparsity": 0.9, "num_partitions": 4, "num_rounds": 1, "fine_tune_share": 0.25},
        "model": {"timm": "resnet10t", "args": TINY},
        "data": {"idx": str(idx), "dev_share": 0.25, "random_shift": 1},
        "training": {
            "output_dir": str(output),
            "max_steps": 16,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "eval_strategy": "steps",
            "eval_steps": 8,
            "save_steps": 8,
            "logging_steps": 4,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }


def run(folder: Path, recipe: dict[str, Any], *words: str) -> int:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return classify_images.main([str(path), *words])


@pytest.fixture(scope="module")
def finished(idx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that the model section can ask for."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_for(idx, folder / "out")
    recipe["model"] |= {
        "optimizer": "lamb",
        "schedule": "cosine",
        "schedule_args": {"min_lr": 1e-4},
        "average_decay": 0.9,
        "recalibrate_batchnorm": 4,
    }
    recipe["data"]["mixup"] = 0.2
    assert run(folder, recipe) == 0
    return folder


def test_what_is_saved_loads_everywhere_with_the_planned_zeros(finished: Path, tmp_path: Path) -> None:
    out = finished / "out"
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    masks = load_masks(out)
    params = dict(model.named_parameters())
    assert len(masks) == 12
    for name, mask in masks.items():
        assert int((params[name] != 0).sum()) <= int(mask.sum()) == round(0.1 * mask.numel())
        assert not params[name][mask == 0].any()
    results = json.loads((out / "results.json").read_text())
    assert results["scored"] == "test" and results["test_images"] == 48 and 0 <= results["top1"] <= results["top5"] <= 1
    assert results["steps"] == 16 and len(results["dev"]) == 2
    for name in ("mistakes.png", "plot.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    # timm's own names, and the same model.
    assert gap_hf(["export", str(out), str(tmp_path / "timm.safetensors")]) == 0
    plain = timm.create_model(
        "resnet10t", checkpoint_path=str(tmp_path / "timm.safetensors"), num_classes=10, in_chans=1, **TINY
    )
    pixels = torch.randn(2, 1, 12, 12)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(pixels), model(pixel_values=pixels).logits)
    assert gap_hf(["pack", str(out), str(tmp_path / "packed")]) == 0
    assert gap_hf(["export", str(tmp_path / "packed"), str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "timm.safetensors").read_bytes()


def test_the_score_is_that_of_the_saved_model(finished: Path, idx: Path) -> None:
    out = finished / "out"
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    test = load_images(DataSection(idx=idx))["test"]
    batch = Batches(DataSection(idx=idx), GREY, training=False)([test[i] for i in range(len(test))])
    with torch.inference_mode():
        best = best_classes(model(pixel_values=batch["pixel_values"]).logits)
    assert json.loads((out / "results.json").read_text())["top1"] == accuracy(best.numpy(), test.labels)["top1"]


def test_batch_norms_of_the_saved_model_are_of_the_batches_that_were_asked_for(finished: Path) -> None:
    counts = {n: int(v) for n, v in load_file(finished / "out/model.safetensors").items() if "num_batches" in n}
    assert counts and set(counts.values()) == {4}
    # Checkpoints hold what training has, for it to go on from.
    counts = {
        n: int(v) for n, v in load_file(finished / "out/checkpoint-16/model.safetensors").items() if "num_batches" in n
    }
    assert set(counts.values()) == {16}


def test_batch_norms_of_few_images_are_of_all_of_them() -> None:
    class Few(RecalibratedTrainer):
        def plain_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.from_numpy(indices)}

    trainer = object.__new__(Few)
    trainer.recalibrate, trainer.train_dataset = 25, range(3)  # type: ignore[assignment]
    trainer.args = SimpleNamespace(per_device_train_batch_size=8, seed=1, device="cpu")  # type: ignore[assignment]
    batches = [batch["pixel_values"].tolist() for (batch,) in trainer._plain_batches()]
    assert [sorted(batch) for batch in batches] == [[0, 1, 2]]


def test_averaged_weights_obey_the_masks_of_every_checkpoint(finished: Path) -> None:
    for step in (8, 16):
        folder = finished / "out" / f"checkpoint-{step}"
        average, raw = load_file(folder / "average.safetensors"), load_file(folder / "model.safetensors")
        sparse = load_masks(folder)
        assert sparse
        for name, mask in sparse.items():
            assert not average[name][mask == 0].any()
            assert not torch.equal(average[name], raw[name])


def test_a_resumed_run_is_the_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name != "checkpoint-8":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["training"]["output_dir"] = str(tmp_path / "out")
    assert run(tmp_path, recipe, "--training.resume_from_checkpoint=true") == 0
    for name in ("model.safetensors", "gap_masks.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes(), name
    assert (tmp_path / "out/checkpoint-16/average.safetensors").read_bytes() == (
        finished / "out/checkpoint-16/average.safetensors"
    ).read_bytes()


def test_it_learns_and_off_is_dense(idx: Path, tmp_path: Path) -> None:
    recipe = recipe_for(idx, tmp_path / "out")
    recipe["gap"] = {"method": "dense"}
    recipe["training"] |= {"max_steps": 60, "learning_rate": 0.005, "save_strategy": "no"}
    assert run(tmp_path, recipe) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["top1"] > 0.9 and results["sparsity"] == 0
    assert not (tmp_path / "out" / "gap_config.json").exists()


# --- images ----------------------------------------------------------------------------------------------------------


def test_splits_are_apart_whole_and_the_same_each_time(idx: Path) -> None:
    first, second = (load_images(DataSection(idx=idx, dev_share=0.25)) for _ in range(2))
    assert [len(first[s]) for s in ("train", "dev", "test")] == [72, 24, 48]
    whole, labels = stripes(96, 96)
    rows = np.concatenate([first["train"].pixels, first["dev"].pixels])[:, 0]  # type: ignore[list-item]
    assert sorted(map(bytes, rows)) == sorted(map(bytes, whole))
    counts = [np.bincount(first[s].labels, minlength=3) for s in ("train", "dev")]
    assert all(abs(d - 0.25 * n) <= 0.5 for d, n in zip(counts[1], np.bincount(labels), strict=True))
    assert np.array_equal(first["dev"].labels, second["dev"].labels)


def test_what_is_kept_for_the_test_is_kept_while_settings_are_chosen(tmp_path: Path) -> None:
    pixels = np.arange(80, dtype=np.uint8).repeat(16).reshape(80, 4, 4)
    np.savez(tmp_path / "a.npz", x=pixels, y=np.arange(80) % 2)
    chosen, scored = (
        load_images(DataSection(arrays=tmp_path / "a.npz", images="x", labels="y", score=score))
        for score in ("dev", "test")
    )
    for split in ("train", "dev", "test"):
        assert np.array_equal(chosen[split].pixels, scored[split].pixels)  # type: ignore[arg-type]


def test_labels_that_are_none(tmp_path: Path) -> None:
    from datasets import Dataset as Rows

    pictures = [Image.fromarray(np.zeros((4, 4, 3), np.uint8)) for _ in range(4)]
    for labels, sentence in (
        (["a", "b", "a", "b"], "holds str, expected class numbers"),
        ([0, 1, -1, 0], "the label -1"),
    ):
        folder = tmp_path / str(labels[0])
        folder.mkdir()
        Rows.from_dict({"image": pictures, "label": labels}).to_parquet(folder / "train.parquet")
        with pytest.raises(GaPError, match=sentence):
            load_images(DataSection(dataset=str(folder), images="image", labels="label"))


def test_labels_that_are_true_or_false_and_a_split_of_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets import Dataset as Rows

    pictures = [Image.fromarray(np.zeros((4, 4, 3), np.uint8)) for _ in range(8)]
    rows = Rows.from_dict({"image": pictures, "label": [False, True] * 4})
    # A split of no rows comes from the Hub only: load_dataset refuses a folder's.
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows if split == "train" else rows.select([]))
    found = _from_hub(DataSection(dataset="a/b", images="image", labels="label", test_split="test"))
    assert found["train"].labels.tolist() == [0, 1] * 4 and found["train"].classes == ["0", "1"]
    assert found["test"].labels.tolist() == []


def test_arrays_and_folders(tmp_path: Path) -> None:
    images, labels = stripes(60, 3)
    colour = np.repeat(images[..., None], 3, axis=3)
    np.savez(tmp_path / "icons.npz", x=colour, group=labels)
    section = DataSection(arrays=tmp_path / "icons.npz", images="x", labels="group")
    found = load_images(section)
    assert found["train"].channels == 3 and sum(map(len, found.values())) == 60
    write_folder(tmp_path / "folder", images, labels)
    section = DataSection(
        folder=tmp_path / "folder", score="dev", image_size=16, scale=[0.5, 1], auto_augment="rand-m3"
    )
    found = load_images(section)
    assert found.keys() == {"train", "dev"} and found["dev"].classes == ["class0", "class1", "class2"]
    form = image_format(found["train"], section, {})
    assert form.size == (3, 16, 16) and form.crop_share == 0.875
    set_transforms(found, section, form)
    example = found["train"][0]
    assert example["pixel_values"].shape == (3, 16, 16) and example["pixel_values"].dtype == torch.float32
    before = torch.get_rng_state()
    assert torch.equal(example["pixel_values"], found["train"][0]["pixel_values"])
    found["train"].epoch = 1
    assert not torch.equal(example["pixel_values"], found["train"][0]["pixel_values"])  # drawn anew
    assert torch.equal(torch.get_rng_state(), before)
    plain = found["train"].plain()
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])
    # As a loader's workers are sent it where processes are not forked.
    for images in (found["train"], found["dev"].select(np.array([3, 1]))):
        again = pickle.loads(pickle.dumps(images))
        assert np.array_equal(again.picture(1), images.picture(1)) and again.labels[1] == images.labels[1]


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, []),
        ({"horizontal_flip": 1.0}, ["RandomHorizontalFlip"]),
        ({"color_jitter": 0.4}, ["ColorJitter"]),
        ({"random_erasing": 1.0}, ["RandomErasing"]),
        ({"auto_augment": "rand-m3"}, ["RandAugment"]),
        ({"horizontal_flip": 1.0, "scale": [0.5, 1.0]}, ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]),
    ],
)
def test_what_is_asked_for_is_done_and_nothing_else(tmp_path: Path, asked: dict[str, Any], names: list[str]) -> None:
    """An augmentation by itself, and without `scale` no crop but evaluation's own."""
    write_folder(tmp_path, *stripes(40, 3))
    section = DataSection(folder=tmp_path, score="dev", image_size=12, crop_share=0.8, **asked)
    found = load_images(section)
    set_transforms(found, section, image_format(found["train"], section, {}))
    steps: Any = found["train"].transform
    always = ["MaybeToTensor", "Normalize"] + ([] if "scale" in asked else ["Resize", "CenterCrop"])
    assert sorted(type(step).__name__ for step in steps.transforms) == sorted(always + names)
    pixels, plain = found["train"][0]["pixel_values"], found["train"].plain()[0]["pixel_values"]
    assert torch.equal(pixels, plain) == (not names)
    if list(asked) == ["horizontal_flip"]:
        assert torch.equal(pixels, plain.flip(-1))


def test_what_is_not_square_is_scaled_alike_in_training_evaluation_and_pipelines(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", image=rng.integers(0, 255, (60, 16, 24, 3), np.uint8), label=np.arange(60) % 3)
    with pytest.raises(GaPError, match=r"^data\.images: .* has no array 'imag'; did you mean 'image'\?$"):
        load_images(DataSection(arrays=tmp_path / "a.npz", images="imag"))
    data = DataSection(arrays=tmp_path / "a.npz", horizontal_flip=1.0, random_erasing=1e-9, crop_share=0.8)
    found = load_images(data)
    form = image_format(found["train"], data, {})
    assert (form.size, form.scaled, form.crop_mode) == ((3, 16, 24), (20, 30), "squash")
    set_transforms(found, data, form)
    # Arrays have the size that the model takes; a larger picture shows the scaling.
    picture = Image.fromarray(rng.integers(0, 255, (70, 50, 3), np.uint8))
    train, plain = found["train"], found["train"].plain()
    train.picture = plain.picture = lambda index: picture  # type: ignore[method-assign]
    torch.testing.assert_close(train[0]["pixel_values"], plain[0]["pixel_values"].flip(-1), atol=1e-5, rtol=0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[16, 24]
    )
    ViTForImageClassification(config).bfloat16().save_pretrained(tmp_path / "vit")
    model, processor = load_model(ModelSection(checkpoint=tmp_path / "vit"), ["a", "b"], form)
    assert model.dtype is torch.float32
    processor.save_pretrained(tmp_path / "vit")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "vit")(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], plain[0]["pixel_values"], atol=0.08, rtol=0)  # noise: four levels of 255
    known = known_format(tmp_path / "vit")
    assert known["size"] == (16, 24) and known["crop_share"] == pytest.approx(0.8)
    assert ImageFormat((3, 16, 24), form.mean, form.std, known["crop_share"]).scaled == (20, 30)


@pytest.mark.parametrize(
    ("processor", "size", "share"),
    [
        (transformers.ViTImageProcessor(), (224, 224), 1.0),
        (transformers.CLIPImageProcessor(size={"shortest_edge": 256}), (224, 224), 0.875),
        (transformers.DeiTImageProcessor(), (224, 224), 0.875),
        (transformers.PoolFormerImageProcessor(), (224, 224), 0.9),
        (transformers.LevitImageProcessor(), (224, 224), 0.875),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 224}), (224, 224), 0.875),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 384}), (384, 384), 1.0),
        (transformers.PerceiverImageProcessor(), (224, 224), 1.0),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "size") else "",
)
def test_what_processors_of_transformers_say(processor: Any, size: tuple[int, int], share: float) -> None:
    known = of_processor(processor)
    assert known["size"] == size and known["crop_share"] == pytest.approx(share)
    assert len(known["mean"]) == len(known["std"]) == 3


def test_photos_are_seen_upright_and_16_bits_of_grey_are_not_cut(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    (tmp_path / "train" / "two").mkdir()
    stored = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter to the right"
    stored.save(folder / "a.png", exif=exif)
    Image.fromarray(np.array([[0, 100, 1000, 60000]], np.uint16)).save(folder / "b.png")
    stored.save(tmp_path / "train" / "two" / "c.png")
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "d.tiff")
    images = load_images(DataSection(folder=tmp_path, score="dev", dev_share=0.4, test_share=0))
    seen = {im.size: np.array(im)[:, :, 0] for im in (s.picture(i) for s in images.values() for i in range(len(s)))}
    assert np.array_equal(seen[2, 3], np.rot90(seen[3, 2], -1)) and seen[4, 1].tolist() == [[0, 0, 3, 234]]
    with pytest.raises(ValueError, match="its mode is F; expected 8 bits"):
        open_picture(tmp_path / "d.tiff")
    Image.fromarray(np.array([[0, 100, 255]], np.int32)).save(tmp_path / "e.tiff")
    assert np.array(open_picture(tmp_path / "e.tiff", mode="L")).tolist() == [[0, 100, 255]]  # 8 bits in 32
    for damaged in (b"nothing", b"Exif\0\0MM\0*\0"):  # the pixels are whole
        stored.save(tmp_path / "f.png", exif=damaged)
        assert open_picture(tmp_path / "f.png", mode="L").size == (3, 2)


def test_shifted_images_are_the_image_moved_with_black_edges() -> None:
    pixels = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    batches = Batches(DataSection(idx=Path("."), random_shift=2), GREY, training=True)
    seen = set()
    for draw in range(60):
        moved = batches([{"pixel_values": pixels, "labels": 0, "draw": draw}])["pixel_values"][0, 0]
        values = ((moved * 0.5 + 0.5) * 255).round().long()
        wide = torch.zeros(9, 9, dtype=torch.long)
        wide[2:7, 2:7] = pixels[0]
        match = [(y, x) for y in range(5) for x in range(5) if torch.equal(values, wide[y : y + 5, x : x + 5])]
        assert len(match) == 1
        seen.add(match[0])
    assert len(seen) > 15


def test_mixed_labels_sum_to_one_and_accumulation_is_a_mean(idx: Path) -> None:
    section = DataSection(idx=idx, mixup=0.4, cutmix=1.0)
    batches = Batches(section, GREY, make_mixup(section, 10, 0.1), training=True)
    train = load_images(section)["train"]
    batch = batches([train[i] for i in range(8)])
    assert batch["labels"].shape == (8, 10) and torch.allclose(batch["labels"].sum(1), torch.ones(8))
    assert batches([train[i] for i in range(7)])["labels"].ndim == 1  # an odd last batch is not mixed


def test_accuracy_by_hand() -> None:
    best = np.array([[1, 0], [2, 1], [0, 2]])
    assert accuracy(best, np.array([1, 1, 1])) == {"top1": 1 / 3, "top5": 2 / 3}
    assert best_classes(torch.tensor([[0.1, 0.9, 0.5]])).tolist() == [[1, 2, 0]]


def test_timms_schedule_step_by_step() -> None:
    section = ModelSection(timm="resnet10t", schedule="cosine", schedule_args={"min_lr": 0.1})
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = make_schedule(section, optimizer, steps=14, warmup=4, rate=1.0)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5) and rates[5:] == sorted(rates[5:], reverse=True)


# --- models ----------------------------------------------------------------------------------------------------------


def weights_of(name: str, sparsity: float, **config: Any) -> dict[str, Any]:
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=1000))
    return summarize(model, GaPConfig(sparsity=sparsity, num_rounds=1, **config), total_steps=1000)


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_plan_of_resnet_50(sparsity: float) -> None:
    """Its four stages are the partitions; stem and classifier stay dense. Counts from the layers' shapes by hand."""
    summary = weights_of("resnet50", sparsity, num_partitions=4)
    stage = lambda width, inner, blocks, before: (  # noqa: E731
        before * inner
        + inner * inner * 9
        + inner * width
        + before * width
        + (blocks - 1) * (width * inner + inner * inner * 9 + inner * width)
    )
    sizes = [stage(256, 64, 3, 64), stage(512, 128, 4, 256), stage(1024, 256, 6, 512), stage(2048, 512, 3, 1024)]
    assert [group["weights"] for group in summary["groups"]] == sizes and sum(sizes) == summary["num_prunable"]
    assert summary["num_params"] == 25_557_032
    convs = [(64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3)]
    live, before = 0, 64
    for inner, width, blocks in convs:
        shapes = [before * inner, inner * inner * 9, inner * width, before * width]
        shapes += [width * inner, inner * inner * 9, inner * width] * (blocks - 1)
        live += sum(int(n * (1 - sparsity) + 0.5) for n in shapes)
        before = width
    assert summary["num_live"] == live


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "efficientnet_b0"]
)
def test_one_step_moves_live_weights_only(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gap = Sparsifier(model, GaPConfig(sparsity=0.9, method="static"), total_steps=4, optimizer=optimizer)
    gap.start()
    params = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in params.items()}
    size = 64 if "resnet" in name or "efficient" in name or "convnext" in name else 224
    nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 1])).backward()
    gap.mask_gradients()
    optimizer.step()
    gap.mask_weights()
    depthwise = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert not any(params[n] is w for n in gap.weights for w in depthwise)
    moved = 0
    for weight in gap.weights.values():
        mask = gap.masks[weight.name]
        assert mask is not None and int(mask.sum()) == round((1 - 0.9) * weight.numel)
        assert not params[weight.name].detach()[mask == 0].any()
        moved += int((params[weight.name] != before[weight.name]).sum())
    assert moved > 0


def test_a_checkpoint_goes_on_with_its_format_and_the_datas_classes(finished: Path, idx: Path, tmp_path: Path) -> None:
    section = ModelSection(checkpoint=finished / "out")
    assert known_format(finished / "out") == {"size": (12, 12), "mean": [0.5], "std": [0.5], "crop_share": 1.0}
    form = ImageFormat((1, 14, 14), [0.25], [0.75], 0.9)
    for classes in (["a", "b", "c"], [f"class {i}" for i in range(10)]):  # another head, and the same one
        model, processor = load_model(section, classes, form)
        assert model(pixel_values=torch.zeros(1, 1, 12, 12)).logits.shape == (1, len(classes)) and processor is None
        model.save_pretrained(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert again.config.id2label == dict(enumerate(classes))
        known = known_format(tmp_path)
        assert known == {"size": (14, 14), "mean": [0.25], "std": [0.75], "crop_share": 0.9}
    images, data = load_images(DataSection(idx=idx))["train"], DataSection(idx=idx)
    assert image_format(images, data, known).mean == [0.25]
    with pytest.raises(GaPError, match="takes images of 3 channels, but the data's have 1"):
        image_format(images, data, {"mean": [0.5] * 3})


def test_transformers_own_models_are_saved_with_a_processor_that_prepares_images_as_here(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.3] * 3).save_pretrained(
        tmp_path / "vit"
    )
    write_folder(tmp_path / "data", *stripes(40, 3, size=20))
    section, data = ModelSection(checkpoint=tmp_path / "vit"), DataSection(folder=tmp_path / "data", score="dev")
    known = known_format(tmp_path / "vit")
    assert known == {"size": (16, 16), "mean": [0.1] * 3, "std": [0.3] * 3, "crop_share": 1.0}
    found = load_images(data)
    form = image_format(found["train"], data, known)
    set_transforms(found, data, form)
    model, processor = load_model(section, found["train"].classes, form)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(found["dev"].picture(0), return_tensors="pt")
    torch.testing.assert_close(pixels["pixel_values"][0], found["dev"][0]["pixel_values"], atol=0.02, rtol=0)
    classify = pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
    answers: Any = classify(found["dev"].picture(0))
    assert {answer["label"] for answer in answers} == set(found["train"].classes)


def test_predict_names_the_classes_of_files(
    finished: Path, idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model of one channel too, which no pipeline feeds."""
    test = load_images(DataSection(idx=idx))["test"]
    for i in range(3):
        test.picture(i).save(tmp_path / f"{i}.png")
    words = ["--predict", *(str(tmp_path / f"{i}.png") for i in range(3))]
    assert classify_images.main([*words, "--model", str(finished / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = AutoModelForImageClassification.from_pretrained(finished / "out").eval()
    batch = Batches(DataSection(idx=idx), GREY, training=False)([test[i] for i in range(3)])
    with torch.inference_mode():
        shares, best = model(pixel_values=batch["pixel_values"]).logits.softmax(-1).max(-1)
    expected = [
        f"{tmp_path / f'{i}.png'}: {int(c)} {float(p):.1%}," for i, (c, p) in enumerate(zip(best, shares, strict=True))
    ]
    assert [line.startswith(start) for line, start in zip(lines, expected, strict=True)] == [True] * 3
    (tmp_path / "0.png").write_bytes(b"nothing")
    assert classify_images.main([*words, "--model", str(finished / "out")]) == 2
    assert "0.png: cannot be read as an image" in capsys.readouterr().err
    assert classify_images.main(words) == 2 and classify_images.main([]) == 2
    err = capsys.readouterr().err
    assert "--predict: expected image files and --model" in err and "no recipe given" in err


# --- recipes and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_planned(path: Path, idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(path.read_text())
    values["data"] = {
        **{
            k: v
            for k, v in values["data"].items()
            if k not in ("idx", "arrays", "folder", "dataset", "images", "labels", "reference")
        },
        "idx": str(idx),
        "image_size": None,
    }
    values["data"]["score"] = "test"
    values["model"].get("args", {}).pop("in_chans", None)
    values["training"] |= {"use_cpu": True, "bf16": False, "max_steps": 2000}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(
        tmp_path / "r.yaml", [], model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments
    )
    words = [] if not recipe.gap.is_off else ["--gap.method=cyclic", "--gap.sparsity=0.8"]
    assert classify_images.main([str(tmp_path / "r.yaml"), "--plan", *words]) == 0
    assert "Phases" in capsys.readouterr().out


def test_there_are_recipes() -> None:
    assert {"mnist", "resnet50-imagenet-cgap-80", "resnet50-imagenet-cgap-90"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.timm=resnet5"], "model.timm: timm has no model 'resnet5'; did you mean"),
        (["--model.optimizer=adamm"], "model.optimizer: timm has no 'adamm'; did you mean 'adam"),
        (["--model.optimizer=sgd", "--model.optimizer_args={speed: 3}"], "model.optimizer_args: "),
        (["--model.schedule=cosin"], "model.schedule: found 'cosin', expected one of"),
        (["--model.average_decay=1.0"], "model.average_decay: found 1.0, expected between 0 and 1"),
        (["--data.idx=nowhere"], "data.idx: no such folder"),
        (["--data.mean=[0.1, 0.2]"], "data.mean: found 2 numbers, expected 1"),
        (["--data.scale=[0.9, 0.1]"], "data.scale: found [0.9, 0.1], expected two shares"),
        (["--data.auto_augment=what", "--data.image_size=12"], "data.auto_augment: timm cannot make 'what'"),
        (["--data.imagesize=3"], "data.imagesize"),
        (["--data.mixup=0.2", "--training.per_device_train_batch_size=7"], "expected an even number"),
        (["--data.dev_share=0"], "data.dev_share: 0"),
        (["--gap.sparsity=1.5"], "gap.sparsity"),
        (
            ["--gap.lr_schedule=restart", "--model.schedule=cosine"],
            "gap.lr_schedule: found restart beside model.schedule",
        ),
        (
            ["--gap.method=parallel", "--model.average_decay=0.9"],
            "model.average_decay: contradicts gap.method: parallel",
        ),
        (["--training.dataloader_in_order=false"], "training.dataloader_in_order: found false"),
        (["--data.auto_augment=rand-m3", "--data.color_jitter=0.2"], "data.color_jitter: timm leaves it out"),
        (["--training.predict_with_generate=true"], "training.predict_with_generate: unknown key"),
        (
            ["--training.dataloader_persistent_workers=true", "--training.dataloader_num_workers=1"],
            "training.dataloader_persistent_workers: found true, expected false",
        ),
    ],
)
def test_what_is_refused(
    idx: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, recipe_for(idx, tmp_path / "out"), *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and sentence in lines[0]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "t10k-images-idx3-ubyte").unlink(), "has no t10k-images-idx3-ubyte, nor with .gz"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b"\0\0"), "is no idx file of bytes with 3 dimensions"),
        (lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip"), "cannot be read"),
        (
            lambda f: write_idx(f / "t10k-labels-idx1-ubyte.gz", np.zeros(3, np.uint8)),
            "t10k has 48 images and 3 labels",
        ),
        (lambda f: write_idx(f / "t10k-labels-idx1-ubyte.gz", np.full(48, 11, np.uint8)), "a label above 9"),
    ],
)
def test_broken_files(idx: Path, tmp_path: Path, spoil: Any, sentence: str) -> None:
    folder = Path(shutil.copytree(idx, tmp_path / "idx"))
    spoil(folder)
    with pytest.raises(GaPError, match=sentence):
        load_images(DataSection(idx=folder))
