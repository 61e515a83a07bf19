"""Point clouds with part labels: from ShapeNet-part's folder or an .npz file, and as training examples."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from _points.section import DataSection
from gap_hf.errors import GaPError, did_you_mean, nearest
from gap_hf.recipe import one_line

SPLITS = {"train": "train", "dev": "val", "test": "test"}  # ours to ShapeNet's


@dataclass(frozen=True)
class Shape:
    """One cloud: centred, within the unit sphere.

    `points` (n, 3), or (n, 6) with unit normals, float32; `parts` (n,), int64, numbered through all categories.
    """

    name: str
    category: int
    points: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class PointData:
    """Splits, and names of categories and parts. `category_parts` has the parts that each category can have."""

    splits: dict[str, list[Shape]]
    categories: list[str]
    parts: list[str]
    category_parts: list[list[int]]


def load_shapes(data: DataSection) -> PointData:
    """Read all of it: ShapeNet-part takes 1 GB of memory.

    Raises:
        GaPError: for missing and broken files, arrays and lines, names that match nothing, and empty splits.
    """
    found = _from_folder(data, data.folder) if data.folder is not None else _from_file(data)
    for split, shapes in found.splits.items():
        if not shapes:
            raise GaPError(f"data.{'file' if data.folder is None else 'folder'}: no clouds for {split}; expected some")
    trained = {shape.category for shape in found.splits["train"]}
    for split in ("dev", "test"):
        for shape in found.splits[split]:
            if shape.category not in trained:
                raise GaPError(
                    f"data.{'hold_out' if data.folder is None else 'folder'}: {split} has '{shape.name}', but training no "
                    f"cloud of its category '{found.categories[shape.category]}'; expected at least one"
                )
    return found


def normalised(points: np.ndarray) -> np.ndarray:
    """Coordinates (n, 3) about their mean, the farthest at distance 1."""
    centred = points - points.mean(0)
    return centred / max(float(np.linalg.norm(centred, axis=1).max()), 1e-9)


def _shape(name: str, category: int, points: np.ndarray, normals: np.ndarray | None, parts: np.ndarray) -> Shape:
    channels = [normalised(points.astype(np.float32))]
    if normals is not None:
        normals = normals.astype(np.float32)
        channels.append(normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9))
    return Shape(name, category, np.concatenate(channels, 1).astype(np.float32), parts.astype(np.int64))


def _numbered(
    splits: dict[str, list[Shape]], categories: Sequence[str], names: dict[tuple[int, int], str], *, shared: bool
) -> PointData:
    """Parts numbered from 0 without gaps, in order of category (unless `shared`) and number in the files."""
    shapes = [shape for split in splits.values() for shape in split]
    keys = sorted({(-1 if shared else s.category, int(p)) for s in shapes for p in np.unique(s.parts)})
    number = {key: i for i, key in enumerate(keys)}
    allowed: list[set[int]] = [set() for _ in categories]
    out: dict[str, list[Shape]] = {split: [] for split in splits}
    for split, found in splits.items():
        for shape in found:
            used, inverse = np.unique(shape.parts, return_inverse=True)
            new = np.array([number[-1 if shared else shape.category, int(part)] for part in used])
            allowed[shape.category].update(new.tolist())
            out[split].append(Shape(shape.name, shape.category, shape.points, new[inverse]))
    parts = [names.get(key, str(key[1]) if shared else f"{categories[key[0]]}: {key[1]}") for key in keys]
    return PointData(out, list(categories), parts, [sorted(parts) for parts in allowed])


# --- ShapeNet-part ---------------------------------------------------------------------------------------------------


def _from_folder(data: DataSection, folder: Path) -> PointData:
    table = folder / "synsetoffset2category.txt"
    lines = [line.split() for line in _text(table).splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) != 2:
            raise GaPError(f"{table}:{number}: found {len(line)} words, expected a category and its folder")
    names = [name for name, _ in lines]
    _check_categories(data, names)
    wanted = [(name, code) for name, code in lines if data.categories is None or name in data.categories]
    category = {code: i for i, (_, code) in enumerate(wanted)}
    splits: dict[str, list[Shape]] = {}
    for split, theirs in SPLITS.items():
        path = folder / "train_test_split" / f"shuffled_{theirs}_file_list.json"
        try:
            entries = json.loads(_text(path))
            codes = [PurePosixPath(entry).parts[-2:] for entry in entries]
            pairs = [(code, name) for code, name in codes]
        except (ValueError, TypeError) as error:
            if isinstance(error, GaPError):
                raise
            raise GaPError(
                f"{path}: {one_line(error)}; expected a JSON list of shape_data/<category>/<cloud>"
            ) from None
        splits[split] = [
            _read_text(folder / code / f"{name}.txt", category[code], data.normals)
            for code, name in pairs
            if code in category
        ]
    return _numbered(splits, [name for name, _ in wanted], {}, shared=True)


def _read_text(path: Path, category: int, normals: bool) -> Shape:
    try:
        values = np.array(_text(path).split(), dtype=np.float32)
    except ValueError as error:
        if isinstance(error, GaPError):
            raise
        raise GaPError(f"{path}: {one_line(error)}; expected rows of x y z nx ny nz part") from None
    if not values.size or values.size % 7:
        raise GaPError(f"{path}: found {values.size} numbers, expected seven per line (x y z nx ny nz part)")
    rows = values.reshape(-1, 7)
    parts = rows[:, 6]
    if not np.isfinite(rows).all() or (parts != parts.astype(np.int64)).any() or (parts < 0).any():
        raise GaPError(f"{path}: found a value that is no number or no part; expected rows of x y z nx ny nz part")
    return _shape(path.stem, category, rows[:, :3], rows[:, 3:6] if normals else None, parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GaPError(f"data.folder: {path} cannot be read: {one_line(error)}") from None


def _check_categories(data: DataSection, names: Sequence[str]) -> None:
    for name in data.categories or ():
        if name not in names:
            raise GaPError(f"data.categories: found '{name}', no category of the data{did_you_mean(name, names)}")


# --- .npz ------------------------------------------------------------------------------------------------------------


def _from_file(data: DataSection) -> PointData:
    assert data.file is not None
    arrays = _arrays(data)
    points, parts = arrays["points"], arrays["part"]
    codes, names = arrays[data.category_array], [str(name) for name in arrays[data.name_array]]
    labels = arrays.get(f"{data.category_array}_names")
    kinds = np.unique(codes).tolist()
    try:
        categories = [str(kind) if labels is None else str(labels[kind]) for kind in kinds]
    except IndexError:
        raise GaPError(f"data.file: {data.file}: {data.category_array} has numbers beyond its names") from None
    _check_categories(data, categories)
    kept = np.ones(len(points), dtype=bool) if data.only is None else arrays[data.only].astype(bool)
    if data.categories is not None:
        kept &= np.isin(codes, [kind for kind, name in zip(kinds, categories, strict=True) if name in data.categories])
    rows = np.flatnonzero(kept).tolist()
    used = [kind for kind in kinds if kind in set(codes[rows].tolist())]
    shapes = {}
    for i in rows:
        normals = arrays["normals"][i] if data.normals else None
        shapes[i] = _shape(names[i], used.index(codes[i]), points[i], normals, parts[i])
    splits = {split: [shapes[i] for i in chosen] for split, chosen in _split(data, rows, names).items()}
    return _numbered(
        splits,
        [categories[kinds.index(kind)] for kind in used],
        _part_names(arrays.get("part_names"), used, shared=data.shared_parts),
        shared=data.shared_parts,
    )


def _part_names(found: np.ndarray | None, used: Sequence[int], *, shared: bool) -> dict[tuple[int, int], str]:
    """(category or -1, number in the file) to name: `part_names` is (parts,) if shared, else (categories, parts)."""
    if found is None or found.ndim != (1 if shared else 2):
        return {}
    if shared:
        return {(-1, i): str(name) for i, name in enumerate(found)}
    return {(c, i): str(name) for c, kind in enumerate(used) if kind < len(found) for i, name in enumerate(found[kind])}


def _arrays(data: DataSection) -> dict[str, np.ndarray]:
    try:
        with np.load(str(data.file), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise GaPError(f"data.file: {data.file} cannot be read: {one_line(error)}; expected an .npz file") from None
    needed = {"data.file": ["points", "part"], "data.category_array": [data.category_array]}
    needed["data.name_array"] = [data.name_array]
    needed["data.only"] = [data.only] if data.only else []
    needed["data.normals"] = ["normals"] if data.normals else []
    for key, wanted in needed.items():
        for name in wanted:
            if name not in arrays:
                raise GaPError(f"{key}: {data.file} has no array '{name}'{did_you_mean(name, arrays)}")
    shape = arrays["points"].shape
    if len(shape) != 3 or shape[2] != 3 or not shape[1]:
        raise GaPError(f"data.file: points has shape {shape}, expected (clouds, points, 3)")
    rows = (data.category_array, data.name_array, *needed["data.only"])
    for name, expected in (("part", shape[:2]), *((name, shape[:1]) for name in rows)):
        if arrays[name].shape != expected:
            raise GaPError(f"data.file: {name} has shape {arrays[name].shape}, expected {expected}, as points has")
    if data.normals and arrays["normals"].shape != shape:
        raise GaPError(f"data.file: normals has shape {arrays['normals'].shape}, expected {shape}, as points has")
    for name in ("part", data.category_array):
        if arrays[name].dtype.kind not in "iu" or (arrays[name].size and int(arrays[name].min()) < 0):
            raise GaPError(f"data.file: {name} has type {arrays[name].dtype}, expected whole numbers from 0")
    if not np.isfinite(arrays["points"]).all():
        raise GaPError("data.file: points has values that are not finite")
    return arrays


def _split(data: DataSection, rows: Sequence[int], names: Sequence[str]) -> dict[str, list[int]]:
    """Rows of each split: those held out by name, then shares of the rest, drawn the same in every run."""
    # Not the training seed: other seeds are to be compared on the same test set.
    left: list[int] = np.random.default_rng(0).permutation(rows).tolist()
    out: dict[str, list[int]] = {}
    for split, key, wanted, share in (
        ("test", "hold_out", data.hold_out, data.test_share),
        ("dev", "dev_hold_out", data.dev_hold_out, data.dev_share),
    ):
        for entry in wanted:
            if not any(_is_called(names[i], entry) for i in left):
                hint = nearest(entry, {part for i in left for part in _parts_of(names[i])})
                raise GaPError(f"data.{key}: found '{entry}', no name of a cloud that is left{hint}")
        if wanted:
            chosen = [i for i in left if any(_is_called(names[i], entry) for entry in wanted)]
        else:
            chosen = left[: max(1, round((share or 0) * len(left)))]
        out[split] = sorted(chosen)
        left = [i for i in left if i not in set(chosen)]
    return {"train": sorted(left), **out}


def _parts_of(name: str) -> set[str]:
    path = PurePosixPath(name)
    return {name, *path.parts, path.stem}


def _is_called(name: str, entry: str) -> bool:
    return entry in _parts_of(name)


# --- examples --------------------------------------------------------------------------------------------------------


class PointClouds(Dataset):
    """Clouds as a network takes them: `points` (num_points, channels), `category`, `labels` (num_points,).

    What is random is a function of (seed, epoch, index), so a resumed run and every process draw the same.
    Without `training` the points are drawn once, and nothing else is random.
    """

    def __init__(self, shapes: Sequence[Shape], data: DataSection, *, seed: int, training: bool) -> None:
        self.shapes, self.data, self.seed, self.training, self.epoch = shapes, data, seed, training, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shape = self.shapes[index]
        rng = np.random.default_rng((self.seed, self.epoch if self.training else 0, index))
        total, wanted = len(shape.points), self.data.num_points
        order = rng.permutation(total) if self.training or total > wanted else np.arange(total)
        if total < wanted:
            order = np.concatenate([order, rng.integers(0, total, wanted - total)])
        points, parts = shape.points[order[:wanted]], shape.parts[order[:wanted]]
        if self.training:
            points = augmented(points, self.data, rng)
        return {
            "points": torch.from_numpy(points),
            "category": torch.tensor(shape.category),
            "labels": torch.from_numpy(parts),
        }


def augmented(points: np.ndarray, data: DataSection, rng: np.random.Generator) -> np.ndarray:
    """A copy of (n, 3 or 6) rotated, scaled, shifted and jittered as `data` says; normals are only rotated."""
    out = points.copy()
    if data.rotate != "none":
        angle, axis = rng.uniform(0, 2 * np.pi), "xyz".index(data.rotate)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[second, first] = np.sin(angle)
        turn[first, second] = -np.sin(angle)
        for start in range(0, out.shape[1], 3):
            out[:, start : start + 3] = out[:, start : start + 3] @ turn.T
    out[:, :3] *= rng.uniform(data.scale[0], data.scale[1])
    out[:, :3] += rng.uniform(-1, 1, 3) * data.shift
    out[:, :3] += data.jitter * rng.standard_normal((len(out), 3)).clip(-5, 5)
    return out
