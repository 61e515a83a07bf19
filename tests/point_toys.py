"""Tiny point clouds on disk that the tests of scripts/segment_points.py share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from _points.section import DataSection  # noqa: E402

SIZES: dict[str, Any] = {
    "num_centroids": [16, 4],
    "radii": [[0.3, 0.6], [0.8]],
    "num_samples": [[4, 8], [4]],
    "channels": [[[8, 8], [8, 12]], [[16, 16]]],
    "global_channels": [16, 24],
    "propagation_channels": [[16, 16], [16, 16], [16, 16]],
    "head_channels": 16,
}


def write_npz(path: Path, **changes: Any) -> Path:
    """24 clouds of four robots, two in each category; a part is a half along x. A change to None leaves an array out."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (24, 40, 3)).astype(np.float16)
    arrays = {
        "points": points,
        "part": (points[..., 0] > 0).astype(np.uint8),
        "cat": np.arange(24) % 2,
        "robot": np.array([f"r{i % 4}/r{i % 4}.urdf" for i in range(24)]),
    }
    arrays = {**arrays, **changes}
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_shapenet(folder: Path) -> Path:
    """Two categories in ShapeNet-part's format, with parts 0, 1, 3 and 4, 5."""
    rng = np.random.default_rng(0)
    (folder / "train_test_split").mkdir(parents=True)
    (folder / "synsetoffset2category.txt").write_text("Airplane\t02691156\nBag\t02773838\n")
    for split, number in (("train", 3), ("val", 1), ("test", 2)):
        entries = []
        for code, parts in (("02691156", [0, 1, 3]), ("02773838", [4, 5])):
            (folder / code).mkdir(exist_ok=True)
            for i in range(number):
                rows = np.concatenate([rng.normal(size=(30, 6)), rng.choice(parts, (30, 1))], 1)
                rows[: len(parts), 6] = parts
                np.savetxt(folder / code / f"{split}{i}.txt", rows, fmt="%.6f")
                entries.append(f"shape_data/{code}/{split}{i}")
        (folder / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(entries))
    return folder


def npz_section(path: Path, **changes: Any) -> DataSection:
    values = {"file": path, "name_array": "robot", "hold_out": ["r2"], "num_points": 32, "normals": False}
    return DataSection(**{**values, **changes})
