"""Point clouds of robots with part labels, from the models that the PyPI package pybullet ships.

    pip install pybullet
    python scripts/_points/build_robots.py recipes/points/robots.npz

Each robot takes random poses and is looked at by depth cameras all around. A point's part is the family of the link
that it lies on. The models have licences of their own, so the file is made on your machine and never shipped.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VIEWS, PIXELS, ANGLE = 8, 96, 40.0  # cameras around a robot, their width and height, their field of view in degrees


@dataclass(frozen=True)
class Kind:
    """Robots built alike. `parts` are families of links and what their names contain, the first that fits; `rest` is all else."""

    name: str
    robots: tuple[str, ...]
    rest: str
    parts: tuple[tuple[str, str], ...]

    def part_of(self, link: str) -> int:
        for number, (_, pattern) in enumerate(self.parts, 1):
            if re.search(pattern, link.lower()):
                return number
        return 0

    @property
    def part_names(self) -> list[str]:
        return [self.rest, *(name for name, _ in self.parts)]


KINDS = (
    Kind(
        "quadruped",
        (
            "a1/a1.urdf",
            "aliengo/aliengo.urdf",
            "laikago/laikago_toes.urdf",
            "mini_cheetah/mini_cheetah.urdf",
            "quadruped/spirit40.urdf",
            "quadruped/vision60.urdf",
        ),
        "trunk",
        (("hip", "hip|abduct|shoulder"), ("thigh", "thigh|upper"), ("shank", "shank|lower"), ("foot", "toe")),
    ),
    Kind(
        "arm",
        ("franka_panda/panda.urdf", "kuka_iiwa/model.urdf", "xarm/xarm6_robot.urdf"),
        "base",
        (
            ("shoulder", "link_?[12]$"),
            ("elbow", "link_?[34]$"),
            ("wrist", "link_?[56]$"),
            ("hand", "link_?7$|hand|finger"),
        ),
    ),
    Kind(
        "wheeled",
        ("husky/husky.urdf", "r2d2.urdf", "racecar/racecar.urdf"),
        "body",
        (
            ("wheel", "wheel"),
            ("leg", "leg|hinge|bumper|(left|right)_base"),
            ("top", "head|pole|grip|tip|plate|rail|laser|cam"),
        ),
    ),
)


def build(num_clouds: int, num_points: int, *, seed: int, size: int = PIXELS) -> dict[str, np.ndarray]:
    """The arrays that `data.file` wants, for `num_clouds` poses of each robot.

    `points` (n, num_points, 3) float16, in metres about their mean, z up; `part` (n, num_points) uint8; `cat` (n,) int64
    and `robot` (n,), the file of its model; `cat_names`, and `part_names` (categories, parts), empty where there is none.
    """
    bullet = _pybullet()
    rng = np.random.default_rng(seed)
    points, parts, kinds, robots = [], [], [], []
    client = bullet.connect(bullet.DIRECT)
    try:
        bullet.setAdditionalSearchPath(importlib.import_module("pybullet_data").getDataPath())
        for number, kind in enumerate(KINDS):
            for robot in kind.robots:
                bullet.resetSimulation()
                body = bullet.loadURDF(robot, useFixedBase=True)
                family = {-1: kind.part_of(bullet.getBodyInfo(body)[0].decode())}
                for joint in range(bullet.getNumJoints(body)):
                    family[joint] = kind.part_of(bullet.getJointInfo(body, joint)[12].decode())
                for _ in range(num_clouds):
                    _pose(bullet, body, rng)
                    seen, links = _look(bullet, body, rng, size)
                    chosen = rng.choice(len(seen), num_points, replace=len(seen) < num_points)
                    points.append((seen[chosen] - seen[chosen].mean(0)).astype(np.float16))
                    parts.append(np.array([family[int(link)] for link in links[chosen]], dtype=np.uint8))
                    kinds.append(number)
                    robots.append(robot)
    finally:
        bullet.disconnect(client)
    width = max(len(kind.part_names) for kind in KINDS)
    return {
        "points": np.stack(points),
        "part": np.stack(parts),
        "cat": np.array(kinds),
        "robot": np.array(robots),
        "cat_names": np.array([kind.name for kind in KINDS]),
        "part_names": np.array([kind.part_names + [""] * (width - len(kind.part_names)) for kind in KINDS]),
    }


def _pybullet() -> Any:
    try:
        return importlib.import_module("pybullet")
    except ImportError:
        sys.exit("error: the robots are pybullet's; install it with: pip install pybullet")


def _pose(bullet: Any, body: int, rng: np.random.Generator) -> None:
    """Every joint somewhere in the middle two thirds of its range; one that has none, within a radian of zero."""
    for joint in range(bullet.getNumJoints(body)):
        info = bullet.getJointInfo(body, joint)
        low, high = info[8], info[9]
        if info[2] in (bullet.JOINT_REVOLUTE, bullet.JOINT_PRISMATIC):
            if not 0 < high - low < 2 * np.pi:
                low, high = -1.0, 1.0
            middle, reach = (low + high) / 2, (high - low) / 3
            bullet.resetJointState(body, joint, rng.uniform(middle - reach, middle + reach))


def _look(bullet: Any, body: int, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the cameras see: points (n, 3) in the world, and the link of each (n,), -1 for the base."""
    boxes = np.array([bullet.getAABB(body, link) for link in range(-1, bullet.getNumJoints(body))])
    low, high = boxes[:, 0].min(0), boxes[:, 1].max(0)
    centre, radius = (low + high) / 2, float(np.linalg.norm(high - low)) / 2
    half = np.tan(np.radians(ANGLE) / 2)
    distance = radius / np.sin(np.radians(ANGLE) / 2)
    near, far = distance - radius, distance + radius
    projection = bullet.computeProjectionMatrixFOV(ANGLE, 1.0, near, far)
    # Pixels run from the upper left; each is a ray through its middle.
    ticks = ((np.arange(size) + 0.5) / size * 2 - 1) * half
    across, down = np.meshgrid(ticks, ticks)
    found, links = [], []
    for view in range(VIEWS):
        azimuth = 2 * np.pi * (view + rng.uniform(-0.3, 0.3)) / VIEWS
        height = rng.uniform(-0.6, 1.0)
        back = np.array([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)])
        eye = centre + distance * back
        right = np.cross(-back, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        above = np.cross(right, -back)
        _, _, _, depth, segments = bullet.getCameraImage(
            size,
            size,
            bullet.computeViewMatrix(eye.tolist(), centre.tolist(), [0.0, 0.0, 1.0]),
            projection,
            renderer=bullet.ER_TINY_RENDERER,
            flags=bullet.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX,
        )
        depth, segments = np.reshape(depth, (size, size)), np.reshape(segments, (size, size))
        hit = segments >= 0
        # The depth buffer holds a value between 0 at `near` and 1 at `far`, linear in one over the distance.
        along = (near * far / (far - (far - near) * depth))[hit][:, None]
        rays = across[hit][:, None] * right - down[hit][:, None] * above - back
        found.append(eye + along * rays)
        links.append((segments[hit] >> 24) - 1)
    return np.concatenate(found), np.concatenate(links)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .npz file to write")
    parser.add_argument("--clouds", type=int, default=24, help="poses of each robot")
    parser.add_argument("--points", type=int, default=1024, help="points of each cloud")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.clouds, args.points) < 1:
        parser.error("--clouds and --points: expected at least 1")
    arrays: dict[str, Any] = build(args.clouds, args.points, seed=args.seed)
    np.savez_compressed(args.output, **arrays)
    for number, kind in enumerate(KINDS):
        mine = arrays["part"][arrays["cat"] == number]
        shares = ", ".join(f"{name} {float((mine == i).mean()):.1%}" for i, name in enumerate(kind.part_names))
        print(f"{kind.name}: {len(mine)} clouds; {shares}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
