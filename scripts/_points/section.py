"""The `data` section of a recipe for point clouds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gap_hf.errors import GaPError, nearest

AXES = ("none", "x", "y", "z")
SCORED = ("test", "dev")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """`data` of a point cloud recipe: one of `folder` and `file`.

    Attributes:
        folder: ShapeNet-part as it is distributed with normals: synsetoffset2category.txt, train_test_split/ and a
            folder of text files (x y z nx ny nz part) per category. It has its own train, val and test lists.
        file: An .npz file with `points` (n, N, 3), `part` (n, N), optionally `normals` (n, N, 3), and two arrays of
            length n: the category of each cloud and its name.
        category_array, name_array: What these two are called; `<category_array>_names` may name the categories.
        only: A boolean array of length n of the file: clouds that are used at all.
        shared_parts: A part number of the file means the same in every category; else each category has its own.
        hold_out: Names of the clouds that are the test set, or a folder or file name within them: a1 is a1/a1.urdf.
        dev_hold_out: The same for dev.
        test_share, dev_share: Shares of the clouds drawn instead, where no names are given.
        categories: Names of those that are used; None for all.
        num_points: Points per cloud, drawn anew in each epoch. Evaluation draws once, and scores those it drew.
        normals: The network also gets normals.
        rotate: Axis of a random rotation in training: the one that points up.
        jitter: Standard deviation of noise on each coordinate in training, cut off at five of them.
        scale: Smallest and largest random scale in training.
        shift: Largest random shift along each axis in training.
        baseline_shapes: Training clouds of each category that 1-nearest-neighbour may use; None for all, 0 for no baseline.
        draw: Clouds in clouds.png.
        score: Which split is scored at the end: ``test``, or ``dev`` while settings are being chosen.
        reference: `results.json` of a run to show beside this one, such as the dense one.
    """

    folder: Path | None = None
    file: Path | None = None
    category_array: str = "cat"
    name_array: str = "name"
    only: str | None = None
    shared_parts: bool = False
    hold_out: list[str] = field(default_factory=list)
    dev_hold_out: list[str] = field(default_factory=list)
    test_share: float | None = None
    dev_share: float = 0.1
    categories: list[str] | None = None
    num_points: int = 2048
    normals: bool = True
    rotate: str = "none"
    jitter: float = 0.0
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    shift: float = 0.0
    baseline_shapes: int | None = None
    draw: int = 4
    score: str = "test"
    reference: Path | None = None

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.file is None):
            found = "neither" if self.file is None else "both"
            raise GaPError(f"data.file: found {found} of file and folder, expected one of the two")
        if self.folder is not None:
            for name in ("hold_out", "dev_hold_out", "test_share", "only", "shared_parts"):
                if getattr(self, name):
                    raise GaPError(
                        f"data.{name}: contradicts data.folder, which has its own; expected data.file with it"
                    )
        elif bool(self.hold_out) == (self.test_share is not None):
            found = "both" if self.hold_out else "neither"
            raise GaPError(f"data.hold_out: found {found} of hold_out and test_share, expected one of the two")
        for name in ("test_share", "dev_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise GaPError(f"data.{name}: found {value}, expected a number between 0 and 1")
        for name, valid in (("rotate", AXES), ("score", SCORED)):
            value = getattr(self, name)
            if value not in valid:
                raise GaPError(
                    f"data.{name}: found '{value}', expected one of {', '.join(valid)}{nearest(value, valid)}"
                )
        for name, low in (("num_points", 1), ("jitter", 0), ("shift", 0), ("draw", 0), ("baseline_shapes", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise GaPError(f"data.{name}: found {value}, expected at least {low}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise GaPError(f"data.scale: found {self.scale}, expected two numbers above 0, the smaller one first")
        if self.folder is not None and not self.folder.is_dir():
            raise GaPError(f"data.folder: no such folder: {self.folder}")
        for name in ("file", "reference"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                raise GaPError(f"data.{name}: no such file: {path}{nearest(path.name, siblings)}")
