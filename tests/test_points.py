"""Networks on point clouds and scripts/segment_points.py: neighbourhoods, plans, exact zeros, data, scores, a whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from point_toys import SIZES
from torch.utils.data import Dataset
from toys import arguments, assert_masked_weights_are_zero
from transformers import AutoConfig, AutoModel, set_seed

from gap_hf import GaPConfig, GaPTrainer
from gap_hf.models import (
    PointNet2Config,
    PointNet2ForPartSegmentation,
    PointTransformerConfig,
    PointTransformerForPartSegmentation,
)
from gap_hf.models import points as layers
from gap_hf.planning import summarize

ROOT = Path(__file__).resolve().parents[1]


DATA = {"num_parts": 6, "num_categories": 2, "num_features": 0, "category_parts": [[0, 1, 2], [3, 4, 5]]}


def pointnet2(**changes: Any) -> PointNet2ForPartSegmentation:
    set_seed(0)
    return PointNet2ForPartSegmentation(PointNet2Config(**{**SIZES, **DATA, **changes}))


def point_transformer(**changes: Any) -> PointTransformerForPartSegmentation:
    set_seed(0)
    sizes = {"channels": [8, 16, 16], "depths": [1, 1, 1], "num_neighbours": 4}
    return PointTransformerForPartSegmentation(PointTransformerConfig(**{**sizes, **DATA, **changes}))


NETWORKS = pytest.mark.parametrize("make", [pointnet2, point_transformer])


class Clouds(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        points = torch.randn(32, 3, generator=torch.Generator().manual_seed(i))
        return {"points": points, "category": i % 2, "labels": (points[:, 0] > 0).long() + 3 * (i % 2)}


def batch() -> dict[str, torch.Tensor]:
    rows = [Clouds()[i] for i in range(4)]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


# --- neighbourhoods --------------------------------------------------------------------------------------------------


def cloud_of(seed: int) -> np.ndarray:
    """Of a grid, so that distances are equal often, and some points are the same."""
    return np.random.default_rng(seed).integers(0, 4, (40, 3)).astype(np.float32) / 4


@pytest.mark.parametrize("seed", range(3))
def test_neighbourhoods_are_those_of_the_plain_reference(seed: int) -> None:
    clouds = np.stack([cloud_of(seed), cloud_of(seed + 100)])
    points = torch.from_numpy(clouds)
    sampled = layers.farthest_points(points, 12)
    assert sampled.tolist() == [reference.farthest_points(cloud, 12) for cloud in clouds]
    centres = layers.gather(points, sampled)
    # 0.6 is no distance on the grid, so rounding decides nothing.
    found = layers.ball_neighbours(points, centres, 0.6, 7)
    wanted = [[reference.ball_neighbours(c, c[i], 0.6, 7) for i in s] for c, s in zip(clouds, sampled, strict=True)]
    assert found.tolist() == wanted
    everything = layers.ball_neighbours(points, centres, 9.0, 50)
    assert everything[0, 0].tolist() == [*range(40), *[0] * 10]


def test_interpolation_is_that_of_the_plain_reference() -> None:
    rng = np.random.default_rng(0)
    points, queries, values = (rng.random((2, n, c)).astype(np.float32) for n, c in ((9, 3), (14, 3), (9, 5)))
    queries[:, 0] = points[:, 3]  # at a point itself its own value, and no division by 0
    found = layers.interpolate(*map(torch.from_numpy, (values, points, queries))).numpy()
    for b in range(2):
        wanted = [reference.interpolated(values[b], points[b], query) for query in queries[b]]
        np.testing.assert_allclose(found[b], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 0], values[:, 3], rtol=1e-5)
    alone = layers.interpolate(*map(torch.from_numpy, (values[:, :1], points[:, :1], queries)))
    np.testing.assert_allclose(alone[:, 5], values[:, 0], rtol=1e-6)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="found 8 in a cloud, expected at least 16"):
        pointnet2()(torch.zeros(1, 8, 3), torch.tensor([0]))


# --- networks --------------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("num_features", [0, 3])
def test_shapes_and_loss(make: Any, num_features: int) -> None:
    model = make(num_features=num_features)
    points = torch.randn(2, 24, 3 + num_features)
    category, labels = torch.tensor([0, 1]), torch.randint(0, 6, (2, 24))
    labels[:, ::3] = -100
    out = model(points, category, labels)
    assert out.logits.shape == (2, 24, 6)
    kept = labels != -100
    wanted = torch.nn.functional.cross_entropy(out.logits[kept], labels[kept])
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model(points, category).loss is None
    with pytest.raises(ValueError, match=r"points: found shape .* expected \(batch, points, "):
        model(points[..., :2], category)
    with pytest.raises(ValueError, match="category: found shape"):
        model(points, category[:1])


@NETWORKS
def test_order_of_the_points_and_place_of_the_cloud(make: Any) -> None:
    """But for the first point, where sampling starts, the order is of no account; and the category is of some."""
    model = make(radii=[[9.0, 9.0], [9.0]], num_samples=[[32, 32], [16]]).eval()
    points, category = batch()["points"], batch()["category"]
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(31)])
    with torch.no_grad():
        whole, turned = model(points, category).logits, model(points[:, order], category).logits
        other = model(points, 1 - category).logits
    torch.testing.assert_close(whole[:, order], turned, rtol=1e-4, atol=1e-4)
    assert (whole - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": [[0.1]]}, "radii: found 1 entries, expected 2"),
        ({"num_samples": [[4], [4]]}, "num_samples: found"),
        ({"num_parts": 0}, "num_parts: found 0"),
        ({"num_features": -1}, "num_features: found -1"),
        ({"dropout": 1.0}, "dropout: found 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointNet2Config(**{**SIZES, **changes})
    with pytest.raises(ValueError, match="depths: found 1 entries, expected 2"):
        PointTransformerConfig(channels=[8, 8], depths=[1])


# --- grow-and-prune --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["0.8", "0.9"])
def test_the_plan_of_the_paper_sized_network(sparsity: str) -> None:
    with torch.device("meta"):
        model = PointNet2ForPartSegmentation(PointNet2Config())
    plan = summarize(model, GaPConfig(sparsity=float(sparsity), num_partitions=4), total_steps=400)
    # By hand, from Qi et al.'s sizes: six inputs at first, then 323 (64 + 128 + 128 + 3) and 515 (256 + 256 + 3).
    local = 6 * 32 + 32 * 32 + 32 * 64 + 6 * 64 + 64 * 64 + 64 * 128 + 6 * 64 + 64 * 96 + 96 * 128
    middle = 323 * 128 + 128 * 128 + 128 * 256 + 323 * 128 + 128 * 196 + 196 * 256
    overall = 515 * 256 + 256 * 512 + 512 * 1024
    first = (1024 + 512) * 256 + 256 * 256
    last = (256 + 320) * 256 + 256 * 128 + (128 + 16 + 6) * 128 + 128 * 128
    assert [group["weights"] for group in plan["groups"]] == [local + middle, overall, first, last]
    assert len(plan["targets"]) == 24
    for target in plan["targets"]:
        assert target["live"] == reference.exact_keep(Fraction(sparsity), int(np.prod(target["shape"]))), target
    assert plan["num_live"] == {"0.8": 340_725, "0.9": 170_361}[sparsity]
    assert [entry["name"] for entry in plan["left_dense"]] == ["head.hidden.0.weight", "head.classifier.weight"]


@NETWORKS
def test_heads_and_stems_stay_dense_and_all_else_is_found(make: Any) -> None:
    model = make()
    plan = summarize(model, GaPConfig(sparsity=0.5, num_partitions=2), total_steps=100)
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    found = {target["name"] for target in plan["targets"]}
    assert {name.split(".")[0] for name in matrices - found} <= {"head", "stem"}
    assert found | {entry["name"] for entry in plan["left_dense"]} == matrices


@NETWORKS
def test_only_live_weights_move(make: Any, tmp_path: Path) -> None:
    model = make()
    config = GaPConfig(sparsity=0.8, method="static")
    trainer = GaPTrainer(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=Clouds(), gap_config=config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert trainer.gap is not None
    assert_masked_weights_are_zero(trainer)
    for name, weight in trainer.gap.weights.items():
        mask, now = trainer.gap.masks[name], model.get_parameter(name)
        assert int((now != 0).sum()) <= int(mask.sum()) == reference.exact_keep(Fraction("0.8"), weight.numel)
        assert (now[mask == 1] != before[name][mask == 1]).any(), name
    assert any((p != before[name]).any() for name, p in model.named_parameters() if name not in trainer.gap.weights)


def test_saved_networks_load_with_and_without_the_package(tmp_path: Path) -> None:
    """The same logits to the bit, and the planned zeros; without gap_hf both in one process, which takes a while to start."""
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    wanted: dict[str, Any] = {}
    for make in (pointnet2, point_transformer):
        config = GaPConfig(sparsity=0.8, num_partitions=2, num_rounds=1)
        args = arguments(tmp_path / "run", max_steps=8)
        trainer = GaPTrainer(model=make(), args=args, train_dataset=Clouds(), gap_config=config)
        trainer.train()
        trainer.save_model(str(tmp_path / make.__name__))
        model: Any = trainer.model
        assert trainer.gap is not None
        zeros = {layer["name"]: layer["numel"] - layer["live"] for layer in trainer.gap.report()["layers"]}
        assert zeros == {
            name: weight.numel - reference.exact_keep(Fraction("0.8"), weight.numel)
            for name, weight in trainer.gap.weights.items()
        }
        here = AutoModel.from_pretrained(tmp_path / make.__name__).eval()
        assert type(here) is type(model)
        assert {name: int((here.get_parameter(name) == 0).sum()) for name in zeros} == zeros
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
            assert torch.equal(here(**inputs).logits, logits)
        wanted[make.__name__] = (zeros, logits)
    torch.save({"inputs": inputs, "wanted": wanted}, tmp_path / "wanted.pt")

    code = f"""
import sys, torch
sys.modules["gap_hf"] = None  # any import of it fails
from transformers import AutoModel
saved = torch.load({str(tmp_path / "wanted.pt")!r})
for name, (zeros, logits) in saved["wanted"].items():
    model = AutoModel.from_pretrained({str(tmp_path)!r} + "/" + name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert {{name: int((model.get_parameter(name) == 0).sum()) for name in zeros}} == zeros
    with torch.no_grad():
        assert torch.equal(model(**saved["inputs"]).logits, logits), name
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr


def test_importing_the_networks_registers_them() -> None:
    """That nothing else of the package imports them is held by tests/test_imports.py."""
    assert type(AutoConfig.for_model("gap_hf_pointnet2")) is PointNet2Config
    assert type(AutoConfig.for_model("gap_hf_point_transformer")) is PointTransformerConfig
