"""Labelled images: MNIST's idx files, arrays, folders, or the Hub; whole in memory where they are small."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _images import UNREADABLE, as_eight_bits, open_picture
from _mnist import read_mnist
from _run import draw_for, drawn_from
from PIL import Image
from torch.utils.data import Dataset

from gap_hf.errors import GaPError, did_you_mean, nearest
from gap_hf.recipe import one_line

SPLITS = ("train", "dev", "test")
SCORED = ("test", "dev")
FOLDERS = {"train": ("train",), "dev": ("dev", "val", "valid", "validation"), "test": ("test",)}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """`data` of an image classification recipe: one of `idx`, `arrays`, `folder`, `dataset`.

    Attributes:
        idx: Folder with MNIST's four files (train-images-idx3-ubyte and so on, each as it is or with .gz).
        arrays: An .npz file; `images` and `labels` name its arrays: uint8 (N, H, W, C) or (N, H, W), and whole numbers (N,).
        folder: Folder with train, dev (or val) and test; in each a folder for every class.
        dataset, dataset_config: Name and configuration on the Hub; `images` and `labels` name its columns.
        train_split, dev_split, test_split: Splits of that dataset. One that is not named is cut from train, whatever the dataset has.
        images, labels: See above.
        dev_share, test_share: Shares of the training images that are kept apart, drawn class by class with `split_seed`, where
            the source has no such split.
        image_size: Side of the square that images are cut and scaled to. None is a checkpoint's own size, else 224; arrays then
            keep theirs.
        crop_share: Share of the scaled image's side that evaluation looks at, from the middle (timm's crop_pct). None is a
            checkpoint's, else 0.875.
        mean, std: For each channel, of values from 0 to 1. None is a checkpoint's, else ImageNet's for three channels and 0.5 for others.
        random_shift: Training images are moved by up to so many pixels, edges filled with black.
        horizontal_flip: Probability.
        scale: Smallest and largest share of the area that a training crop has; None cuts as evaluation does.
        color_jitter, auto_augment, random_erasing: timm's; auto_augment is such as rand-m9-mstd0.5, and has color_jitter's place.
        mixup, cutmix: Their alphas; 0 is none.
        max_train_samples, max_eval_samples: Use only so many.
        score: Which split is scored at the end; ``dev`` while settings are being chosen.
        reference: `results.json` of a run to show beside this one, such as the dense one.
    """

    idx: Path | None = None
    arrays: Path | None = None
    folder: Path | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    dev_split: str | None = None
    test_split: str | None = None
    images: str = "image"
    labels: str = "label"
    dev_share: float = 0.05
    test_share: float = 0.1
    split_seed: int = 0
    image_size: int | None = None
    crop_share: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    random_shift: int = 0
    horizontal_flip: float = 0.0
    scale: list[float] | None = None
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    score: str = "test"
    reference: Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("idx", "arrays", "folder", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise GaPError(
                f"data.{(given or ['folder'])[0]}: found {found}, expected one of idx, arrays, folder, dataset"
            )
        for name in ("idx", "folder"):
            path = getattr(self, name)
            if path is not None and not path.is_dir():
                raise GaPError(f"data.{name}: no such folder: {path}")
        for name in ("arrays", "reference"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise GaPError(f"data.{name}: no such file: {path}")
        if self.score not in SCORED:
            hint = nearest(self.score, SCORED)
            raise GaPError(f"data.score: found '{self.score}', expected one of {', '.join(SCORED)}{hint}")
        for name in ("dev_share", "test_share", "horizontal_flip", "random_erasing", "crop_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise GaPError(f"data.{name}: found {value}, expected from 0 to 1")
        for name in ("random_shift", "mixup", "cutmix", "color_jitter"):
            if getattr(self, name) < 0:
                raise GaPError(f"data.{name}: found {getattr(self, name)}, expected at least 0")
        for name in ("image_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GaPError(f"data.{name}: found {value}, expected at least 1")
        if self.auto_augment and "3a" not in self.auto_augment and self.color_jitter:
            raise GaPError("data.color_jitter: timm leaves it out beside data.auto_augment; expected one of the two")
        if self.scale is not None and not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise GaPError(f"data.scale: found {self.scale}, expected two shares of the area, the smaller one first")

    @property
    def needs_pictures(self) -> bool:
        """True if images have to be augmented one by one, and not as arrays."""
        by_one = self.scale is not None or self.color_jitter or self.auto_augment or self.random_erasing
        return bool(by_one or self.folder or self.dataset or self.image_size)


@dataclass(frozen=True)
class Reader:
    """Opens one image at a time. No function in it: loader workers may be sent it in a pickle.

    Attributes:
        source: Files, or rows of a dataset with one column.
        places: Which of them, in this order; None is all.
    """

    source: Any
    places: np.ndarray | None = None

    def __call__(self, index: int) -> Image.Image:
        place = index if self.places is None else int(self.places[index])
        is_file = isinstance(self.source, list)
        what = f"data.folder: {self.source[place]}" if is_file else f"data.dataset: image {place}"
        try:
            if is_file:
                return open_picture(self.source[place])
            (picture,) = self.source[place].values()
            return as_eight_bits(picture).convert("RGB")
        except UNREADABLE as error:
            raise GaPError(f"{what} cannot be read: {one_line(error)}") from None


class Images(Dataset):
    """One split.

    Attributes:
        labels: int64 (N,).
        classes: Their names.
        pixels: uint8 (N, C, H, W), or None where images are opened one by one by `open`.
        transform: From a PIL image to a float tensor (C, H, W); None where `pixels` are taken as they are.
        plain_transform: The same, without any augmentation.
        seed, epoch: What is drawn for an image depends on these and its place alone, so that a resumed run draws the same.
    """

    def __init__(
        self,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        pixels: np.ndarray | None = None,
        open: Reader | None = None,
    ) -> None:
        assert (pixels is None) != (open is None)
        self.labels, self.classes, self.pixels = labels.astype(np.int64), list(classes), pixels
        self.transform: Callable[[Image.Image], torch.Tensor] | None = None
        self.plain_transform: Callable[[Image.Image], torch.Tensor] | None = None
        self.seed = self.epoch = 0
        self._open = open

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """The image as it is."""
        if self.pixels is not None:
            values = self.pixels[index].transpose(1, 2, 0)
            return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
        assert self._open is not None
        return self._open(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values`, `labels`, and `draw`, from which everything random about this image in this epoch is to come."""
        draw = draw_for(self.seed, self.epoch, index)
        if self.transform is None:
            assert self.pixels is not None
            pixels = torch.from_numpy(self.pixels[index])
        else:
            with drawn_from(draw):
                pixels = self.transform(self.picture(index))
        return {"pixel_values": pixels, "labels": int(self.labels[index]), "draw": draw}

    def plain(self) -> Images:
        """The same images, not augmented."""
        out = Images(self.labels, self.classes, pixels=self.pixels, open=self._open)
        out.transform = out.plain_transform = self.plain_transform
        return out

    def select(self, indices: np.ndarray) -> Images:
        """Some of them, in this order."""
        if self.pixels is not None:
            return Images(self.labels[indices], self.classes, pixels=self.pixels[indices])
        assert self._open is not None
        places = np.arange(len(self)) if self._open.places is None else self._open.places
        return Images(self.labels[indices], self.classes, open=replace(self._open, places=places[indices]))

    @property
    def channels(self) -> int:
        if self.pixels is not None:
            return self.pixels.shape[1]
        return 3


def load_images(data: DataSection) -> dict[str, Images]:
    """The splits train, dev and test. Where the source has no dev, test is kept apart whatever `data.score` is, so that a run that
    chooses settings by dev trains on no image of it, unless `data.test_share` is 0; one with a dev of its own and no test has none while `data.score` is dev.

    Raises:
        GaPError: if a file is missing or broken, or a split would be empty.
    """
    if data.idx is not None:
        found = _from_idx(data.idx)
    elif data.arrays is not None:
        found = {"train": _from_arrays(data)}
    elif data.folder is not None:
        found = _from_folder(data.folder)
    else:
        found = _from_hub(data)
    if "test" not in found and (data.score == "test" or ("dev" not in found and data.test_share > 0)):
        found["train"], found["test"] = _split(found["train"], data.test_share, data.split_seed, "test")
    if "dev" not in found:
        found["train"], found["dev"] = _split(found["train"], data.dev_share, data.split_seed + 1, "dev")
    classes = found["train"].classes
    for split, images in found.items():
        if images.classes != classes:
            raise GaPError(f"data.folder: {split} has other classes than train")
        most = data.max_train_samples if split == "train" else data.max_eval_samples
        if most is not None and most < len(images):
            found[split] = images.select(
                np.sort(np.random.default_rng(data.split_seed).permutation(len(images))[:most])
            )
    return {split: found[split] for split in SPLITS if split in found}


def _split(images: Images, share: float, seed: int, name: str) -> tuple[Images, Images]:
    """What stays, and what is kept apart: the share of each class, drawn at random."""
    rng = np.random.default_rng(seed)
    apart: list[np.ndarray] = []
    for label in np.unique(images.labels):
        members = rng.permutation(np.flatnonzero(images.labels == label))
        apart.append(members[: round(share * len(members))])
    chosen = np.sort(np.concatenate(apart))
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    if not len(chosen) or not len(rest):
        raise GaPError(f"data.{name}_share: {share} of {len(images)} images leaves {len(chosen)} for {name}")
    return images.select(rest), images.select(chosen)


# --- sources ---------------------------------------------------------------------------------------------------------


def _from_idx(folder: Path) -> dict[str, Images]:
    out = {}
    for split, part in (("train", "train"), ("test", "t10k")):
        pixels, labels = read_mnist(folder, part)
        out[split] = Images(labels, [str(n) for n in range(10)], pixels=pixels[:, None])
    return out


def _from_arrays(data: DataSection) -> Images:
    assert data.arrays is not None
    try:
        with np.load(data.arrays, allow_pickle=False) as file:
            for key, name in (("images", data.images), ("labels", data.labels)):
                if name not in file.files:
                    raise GaPError(f"data.{key}: {data.arrays} has no array '{name}'{did_you_mean(name, file.files)}")
            pixels, labels = file[data.images], file[data.labels]
    except GaPError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise GaPError(f"data.arrays: {data.arrays} cannot be read: {one_line(error)}") from None
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(labels) or labels.ndim != 1:
        raise GaPError(
            f"data.arrays: found images {pixels.dtype} {pixels.shape} and labels {labels.shape}, expected uint8 (N, H, W[, C]) and (N,)"
        )
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    names, numbers = np.unique(labels, return_inverse=True)
    return Images(numbers, [str(name) for name in names], pixels=np.ascontiguousarray(pixels))


def _from_folder(folder: Path) -> dict[str, Images]:
    out = {}
    for split, names in FOLDERS.items():
        path = next((folder / name for name in names if (folder / name).is_dir()), None)
        if path is None and split == "train":
            raise GaPError(f"data.folder: {folder} has no folder train; expected train, dev (or val) and test in it")
        if path is not None:
            out[split] = _of_classes(path)
    return out


def _of_classes(folder: Path) -> Images:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [
        (path, number)
        for number, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise GaPError(f"data.folder: {folder} has no images in folders of classes; expected {', '.join(SUFFIXES)}")

    numbers = np.array([number for _, number in files])
    return Images(numbers, classes, open=Reader([path for path, _ in files]))


def _from_hub(data: DataSection) -> dict[str, Images]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    out = {}
    for split, name in (("train", data.train_split), ("dev", data.dev_split), ("test", data.test_split)):
        if name is None:
            continue
        try:
            rows: Any = load_dataset(str(data.dataset), data.dataset_config, split=name)
        except (OSError, ValueError, DatasetsError) as error:
            raise GaPError(f"data.dataset: could not load it: {one_line(error)}") from None
        for key, column in (("images", data.images), ("labels", data.labels)):
            if column not in rows.column_names:
                hint = did_you_mean(column, rows.column_names)
                raise GaPError(f"data.{key}: '{data.dataset}' has no column '{column}'{hint}")
        labels = np.array(rows[data.labels])
        if labels.dtype.kind == "b" or not len(labels):
            labels = labels.astype(np.int64)
        known = getattr(rows.features[data.labels], "names", None)
        if labels.dtype.kind not in "iu":
            raise GaPError(
                f"data.labels: '{data.labels}' of {data.dataset} holds {type(rows[0][data.labels]).__name__}, expected class numbers; "
                "dataset.class_encode_column makes them of names"
            )
        if len(labels) and labels.min() < 0:
            raise GaPError(
                f"data.{split}_split: {name} of {data.dataset} has the label {labels.min()}, that is none; expected a split with labels"
            )
        known = known or [str(n) for n in range(int(labels.max(initial=-1)) + 1)]
        pictures = rows.select_columns([data.images])
        out[split] = Images(labels, known, open=Reader(pictures))
    return out
