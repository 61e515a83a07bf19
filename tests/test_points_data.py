"""Point clouds from files, their augmentation, and scores worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from point_toys import npz_section, write_npz, write_shapenet

from gap_hf import GaPError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from _points import build_robots  # noqa: E402
from _points.data import PointClouds, augmented, load_shapes, normalised  # noqa: E402
from _points.metrics import best_parts, nearest_neighbour_parts, part_scores, shape_iou  # noqa: E402
from _points.section import DataSection  # noqa: E402

# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_worked_out_by_hand() -> None:
    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    # Part 0: 2 of 3; part 1: 1 of 2; part 2 is in neither.
    assert shape_iou(predicted, truth, [0, 1]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert shape_iou(predicted, truth, [0, 1, 2]) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert shape_iou(np.array([2, 2, 2, 2]), truth, [0, 1, 2]) == 0
    scores = part_scores(
        [predicted, truth, np.array([3, 3, 4, 4])],
        [truth, truth, np.array([3, 4, -100, 4])],
        [0, 0, 1],
        [[0, 1], [3, 4]],
    )
    first, other = (2 / 3 + 1 / 2) / 2, (1 / 2 + 1 / 2) / 2
    assert scores["point_accuracy"] == pytest.approx((3 + 4 + 2) / 11)
    assert scores["instance_miou"] == pytest.approx((first + 1 + other) / 3)
    assert scores["class_miou"] == pytest.approx(((first + 1) / 2 + other) / 2)


def test_only_parts_of_the_category_are_predicted() -> None:
    logits = torch.tensor([[[5.0, 1.0, 9.0, 2.0]], [[5.0, 1.0, 9.0, 2.0]]])
    assert best_parts(logits, torch.tensor([0, 1]), [[0, 1], [1, 3]]).tolist() == [[0], [3]]


def test_nearest_neighbour_looks_in_its_own_category() -> None:
    one = (torch.tensor([[0.0, 0, 0], [1, 0, 0]]), torch.tensor([0, 1]))
    two = (torch.tensor([[0.4, 0, 0]]), torch.tensor([2]))
    other = (torch.tensor([[0.1, 0, 0]]), torch.tensor([7]))
    points = torch.tensor([[0.1, 0, 0], [0.3, 0, 0], [0.9, 0, 0]])
    assert nearest_neighbour_parts(points, 0, {0: [one, two], 1: [other]}).tolist() == [0, 2, 1]


# --- data ------------------------------------------------------------------------------------------------------------


def test_reading_an_npz_file(tmp_path: Path) -> None:
    names = {"cat_names": np.array(["box", "rod"]), "part_names": np.array([["left", "right"], ["low", "high"]])}
    shapes = load_shapes(npz_section(write_npz(tmp_path / "a.npz", **names)))
    assert {shape.name for shape in shapes.splits["test"]} == {"r2/r2.urdf"}
    assert {split: len(found) for split, found in shapes.splits.items()} == {"train": 16, "test": 6, "dev": 2}
    assert shapes.categories == ["box", "rod"]
    assert shapes.parts == ["left", "right", "low", "high"]
    assert shapes.category_parts == [[0, 1], [2, 3]]
    for shape in shapes.splits["train"]:
        radii = np.linalg.norm(shape.points, axis=1)
        assert radii.max() == pytest.approx(1, abs=1e-5)
        assert shape.points.dtype == np.float32
        assert set(shape.parts.tolist()) == set(shapes.category_parts[shape.category])
    shared = load_shapes(npz_section(tmp_path / "a.npz", shared_parts=True, dev_hold_out=["r1.urdf"]))
    assert shared.category_parts == [[0, 1], [0, 1]]
    assert {shape.name for shape in shared.splits["dev"]} == {"r1/r1.urdf"}


def test_reading_shapenet_part(tmp_path: Path) -> None:
    folder = write_shapenet(tmp_path / "shapenet")
    shapes = load_shapes(DataSection(folder=folder))
    assert {split: len(found) for split, found in shapes.splits.items()} == {"train": 6, "dev": 2, "test": 4}
    assert shapes.categories == ["Airplane", "Bag"]
    assert shapes.category_parts == [[0, 1, 2], [3, 4]]  # 2 is in no cloud, so numbers close up
    first = shapes.splits["train"][0]
    rows = np.loadtxt(folder / "02691156" / "train0.txt")
    np.testing.assert_allclose(first.points[:, :3], normalised(rows[:, :3]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(first.points[:, 3:], axis=1), 1, atol=1e-5)
    assert first.parts.tolist() == [{0: 0, 1: 1, 3: 2}[int(part)] for part in rows[:, 6]]
    alone = load_shapes(DataSection(folder=folder, categories=["Bag"], normals=False))
    assert (alone.categories, alone.category_parts) == (["Bag"], [[0, 1]])
    assert alone.splits["train"][0].points.shape == (30, 3)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("synsetoffset2category.txt", "Airplane\n", "found 1 words, expected a category and its folder"),
        ("train_test_split/shuffled_val_file_list.json", "[1]", "expected a JSON list of shape_data"),
        ("train_test_split/shuffled_val_file_list.json", "{", "expected a JSON list of shape_data"),
        ("train_test_split/shuffled_test_file_list.json", "[]", "no clouds for test"),
        ("02773838/test1.txt", "1 2 3\n", "found 3 numbers, expected seven per line"),
        ("02773838/test1.txt", "1 2 3 4 5 6 x\n", "expected rows of x y z nx ny nz part"),
        ("02773838/test1.txt", "1 2 3 4 5 6 1.5\n", "a value that is no number or no part"),
        ("02773838/test1.txt", None, "cannot be read"),
    ],
)
def test_a_broken_shapenet_folder(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    folder = write_shapenet(tmp_path / "shapenet")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(GaPError, match=message):
        load_shapes(DataSection(folder=folder))


@pytest.mark.parametrize(
    ("arrays", "section", "message"),
    [
        ({"part": None}, {}, "data.file: .* has no array 'part'"),
        ({"cat": None}, {}, "data.category_array: .* has no array 'cat'"),
        ({}, {"name_array": "robots"}, "data.name_array: .* no array 'robots'; did you mean 'robot'"),
        ({}, {"normals": True}, "data.normals: .* has no array 'normals'"),
        ({}, {"only": "good"}, "data.only: .* has no array 'good'"),
        ({"part": np.zeros((24, 39), np.uint8)}, {}, r"part has shape \(24, 39\), expected \(24, 40\)"),
        ({"part": np.zeros((24, 40))}, {}, "part has type float64, expected whole numbers"),
        ({"points": np.zeros((24, 40, 2))}, {}, r"points has shape \(24, 40, 2\), expected \(clouds, points, 3\)"),
        ({"points": np.full((24, 40, 3), np.nan)}, {}, "not finite"),
        ({}, {"hold_out": ["r9"]}, "data.hold_out: found 'r9', no name of a cloud that is left; did you mean 'r"),
        ({}, {"hold_out": ["r0", "r2"]}, "no cloud of its category '0'"),
        ({}, {"categories": ["box"]}, "data.categories: found 'box', no category of the data"),
        ({"cat_names": np.array(["box"])}, {}, "cat has numbers beyond its names"),
    ],
)
def test_a_broken_npz_file(tmp_path: Path, arrays: dict[str, Any], section: dict[str, Any], message: str) -> None:
    with pytest.raises(GaPError, match=message):
        load_shapes(npz_section(write_npz(tmp_path / "a.npz", **arrays), **section))


def test_no_npz_file_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("nothing of the kind")
    with pytest.raises(GaPError, match=r"a\.npz cannot be read"):
        load_shapes(npz_section(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", points=np.array([object()]))
    with pytest.raises(GaPError, match=r"b\.npz cannot be read"):
        load_shapes(npz_section(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": Path(".")}, "data.file: found both"),
        ({"file": None}, "data.file: found neither"),
        ({"test_share": 0.5}, "data.hold_out: found both"),
        ({"hold_out": []}, "data.hold_out: found neither"),
        ({"dev_share": 1.0}, "data.dev_share: found 1.0"),
        ({"rotate": "up"}, "data.rotate: found 'up', expected one of none, x, y, z"),
        ({"scale": [2.0, 1.0]}, "data.scale: found"),
        ({"num_points": 0}, "data.num_points: found 0"),
        ({"file": Path("nowhere.npz")}, "data.file: no such file"),
    ],
)
def test_a_data_section_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GaPError, match=message):
        npz_section(write_npz(tmp_path / "a.npz"), **changes)


def test_what_is_random_follows_seed_and_epoch(tmp_path: Path) -> None:
    section = npz_section(write_npz(tmp_path / "a.npz"), rotate="z", jitter=0.01, scale=[0.8, 1.25], shift=0.1)
    shapes = load_shapes(section)
    clouds = [PointClouds(shapes.splits["train"], section, seed=1, training=True) for _ in range(2)]
    assert torch.equal(clouds[0][3]["points"], clouds[1][3]["points"])
    clouds[1].set_epoch(1)
    assert not torch.equal(clouds[0][3]["points"], clouds[1][3]["points"])
    plain = PointClouds(shapes.splits["train"], section, seed=1, training=False)
    first = plain[3]["points"]
    plain.set_epoch(1)
    assert torch.equal(plain[3]["points"], first)
    more = PointClouds(shapes.splits["train"], npz_section(tmp_path / "a.npz", num_points=50), seed=1, training=True)
    assert {tuple(p) for p in more[0]["points"].tolist()} == {tuple(p) for p in more.shapes[0].points.tolist()}


def test_rotation_is_about_its_axis_and_turns_normals_too() -> None:
    points = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    section = DataSection(folder=Path("."), rotate="y")
    turned = augmented(points, section, np.random.default_rng(1))
    np.testing.assert_allclose(turned[:, 1::3], points[:, 1::3], atol=1e-6)
    np.testing.assert_allclose(turned[:, :3] @ turned[:, 3:].T, points[:, :3] @ points[:, 3:].T, atol=1e-5)
    assert np.abs(turned - points).max() > 0.1


# --- robots ----------------------------------------------------------------------------------------------------------


class Sphere:
    """Stands in for pybullet: one link, a ball of radius 0.5 about (1, 2, 3), seen by ray casting."""

    ER_TINY_RENDERER = ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX = 0
    centre = np.array([1.0, 2.0, 3.0])

    def getNumJoints(self, body: int) -> int:
        return 0

    def getAABB(self, body: int, link: int) -> Any:
        return self.centre - 0.5, self.centre + 0.5

    def computeProjectionMatrixFOV(self, *values: float) -> Any:
        return values

    def computeViewMatrix(self, *vectors: list[float]) -> Any:
        return [np.array(v) for v in vectors]

    def getCameraImage(self, width: int, height: int, view: Any, projection: Any, **_: Any) -> Any:
        (eye, target, up), (angle, _, near, far) = view, projection
        ahead = (target - eye) / np.linalg.norm(target - eye)
        right = np.cross(ahead, up) / np.linalg.norm(np.cross(ahead, up))
        depth, segments = np.ones((height, width)), np.full((height, width), -1)
        for row in range(height):
            for column in range(width):
                x, y = ((v + 0.5) / width * 2 - 1 for v in (column, height - 1 - row))
                ray = ahead + np.tan(np.radians(angle) / 2) * (x * right + y * np.cross(right, ahead))
                a, b, c = ray @ ray, ray @ (eye - self.centre), (eye - self.centre) @ (eye - self.centre) - 0.25
                if b * b > a * c:
                    along = (-b - np.sqrt(b * b - a * c)) / a  # distance along the axis: `ahead` is in the ray once
                    depth[row, column] = far / (far - near) * (1 - near / along)  # OpenGL's depth buffer
                    segments[row, column] = 0
        return width, height, None, depth.ravel().tolist(), segments.ravel().tolist()


def test_cameras_see_points_where_they_are() -> None:
    points, links = build_robots._look(Sphere(), 0, np.random.default_rng(0), 12)
    np.testing.assert_allclose(np.linalg.norm(points - Sphere.centre, axis=1), 0.5, atol=1e-6)
    assert set(links.tolist()) == {-1}
    assert np.ptp(points, axis=0).min() > 0.5  # from all around


def test_links_have_families() -> None:
    quadruped, arm, wheeled = build_robots.KINDS
    found = [quadruped.part_names[quadruped.part_of(x)] for x in ("trunk", "FR_upper_shoulder", "thigh_fl", "toeRL")]
    assert found == ["trunk", "hip", "thigh", "foot"]
    found = [arm.part_names[arm.part_of(x)] for x in ("panda_link0", "lbr_iiwa_link_2", "link4", "panda_leftfinger")]
    assert found == ["base", "shoulder", "elbow", "hand"]
    assert [wheeled.part_of(x) for x in ("base_link", "left_base", "right_front_wheel")] == [0, 2, 1]


def test_without_pybullet_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(SystemExit, match="pip install pybullet"):
        build_robots.main([str(tmp_path / "robots.npz")])
