"""scripts/segment_points.py from recipe to results, and the recipes that are shipped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from point_toys import SIZES, write_npz
from transformers import AutoModel, TrainingArguments

from gap_hf.models import PointNet2Config, PointNet2ForPartSegmentation
from gap_hf.planning import summarize
from gap_hf.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import segment_points  # noqa: E402
from _points.data import PointClouds, load_shapes  # noqa: E402
from _points.model import ModelSection  # noqa: E402
from _points.section import DataSection  # noqa: E402

RECIPES = sorted((ROOT / "recipes" / "points").rglob("*.yaml"))


def write_recipe(folder: Path, **sections: Any) -> Path:
    recipe: dict[str, Any] = {
        "gap": {"sparsity": 0.8, "num_partitions": 2, "num_rounds": 1},
        "model": {"type": "gap_hf_pointnet2", "config": SIZES},
        "data": {"file": "a.npz", "name_array": "robot", "hold_out": ["r2"], "num_points": 32, "normals": False},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "logging_steps": 2,
            "save_strategy": "steps",
            "save_steps": 6,
            "report_to": "none",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        },
    }
    for name, values in sections.items():
        recipe[name] = {**recipe[name], **values}
    write_npz(folder / "a.npz")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def reference_clouds(*, folder: Path, batches: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first batches of the training clouds in the order that the seed gives, without augmentation."""
    words = {"model_cls": ModelSection, "data_cls": DataSection, "training_cls": TrainingArguments}
    recipe = load_recipe(folder / "recipe.yaml", [], **words)
    clouds = PointClouds(load_shapes(recipe.data).splits["train"], recipe.data, seed=3, training=False)
    order = np.random.default_rng(3).permutation(len(clouds))
    for start in range(0, 4 * batches, 4):
        items = [clouds[int(i)] for i in order[start : start + 4]]
        yield {name: torch.stack([item[name] for item in items]) for name in ("points", "category")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("points")
    recipe = write_recipe(folder, data={"rotate": "z", "jitter": 0.01}, model={"recalibrate_batchnorm": 2})
    assert segment_points.main([str(recipe), "--training.seed=3"]) == 0
    yield folder


def test_it_ends_with_everything_in_the_folder(finished: Path) -> None:
    output = finished / "run"
    results = json.loads((output / "results.json").read_text())
    assert results["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert results["steps"] == 12
    assert results["recipe"]["training"]["seed"] == 3
    assert [entry["step"] for entry in results["dev"]] == [6, 12]
    assert results["num_clouds"] == 6
    (name,) = results["by_name"]
    assert name == "r2/r2.urdf"
    assert results["by_name"][name]["clouds"] == 6
    assert results["baseline"]["num_examples"] == 16
    assert {path.name for path in output.iterdir()} >= {
        *(
            "clouds.png",
            "plot.png",
            "recipe.yaml",
            "predictions.npz",
            "pointnet2.py",
            "points.py",
            "gap_masks.safetensors",
        )
    }
    model = AutoModel.from_pretrained(output)
    # Batch norms are of the two batches that were asked for, averaged alike: a plain reference.
    clouds, norm = reference_clouds(folder=finished, batches=2), model.abstractions[0].scales[0][1]
    inputs: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in clouds:
            model(**batch)
    handle.remove()
    assert norm.num_batches_tracked == 2
    assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), atol=1e-5)
    zeros = {layer["name"]: layer["numel"] - layer["live"] for layer in results["layers"]}
    assert {name: int((model.get_parameter(name) == 0).sum()) for name in zeros} == zeros
    with np.load(output / "predictions.npz") as saved:
        assert saved["predicted"].shape == saved["truth"].shape == (6, 32)
        assert float((saved["predicted"] == saved["truth"]).mean()) == pytest.approx(results["point_accuracy"])


def test_a_resumed_run_is_the_run(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    words = [f"--training.output_dir={tmp_path / 'again'}", "--training.seed=3"]
    words.append(f"--training.resume_from_checkpoint={finished / 'run' / 'checkpoint-6'}")
    assert segment_points.main([str(recipe), *words]) == 0
    one, two = (AutoModel.from_pretrained(path).state_dict() for path in (finished / "run", tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_gap_it_is_plain_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(
        tmp_path, model={"type": "gap_hf_point_transformer", "config": {"channels": [8, 8], "depths": [1, 1]}}
    )
    words = ["--gap.method=dense", "--training.max_steps=2", "--data.baseline_shapes=0", "--training.save_strategy=no"]
    assert segment_points.main([str(recipe), *words]) == 0
    assert "1-NN" not in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sparsity"] == 0
    assert results["baseline"] is None
    assert not (tmp_path / "run" / "gap_masks.safetensors").exists()


def test_the_plan_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment_points.main([str(write_recipe(tmp_path)), "--plan"]) == 0
    assert "head.classifier.weight" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--data.jiter=1", "data.jiter: unknown key; did you mean 'jitter'?"),
        (
            "--model.type=pointnet",
            "model.type: found 'pointnet', no network on points; did you mean 'gap_hf_pointnet2'?",
        ),
        ("--model.config.num_centroid=[4]", "model.config.num_centroid: unknown key; did you mean 'num_centroids'?"),
        ("--model.config.num_parts=5", "model.config.num_parts: found 5, expected 4, as the data has"),
        ("--model.config.radii=[[1]]", "model.config: gap_hf_pointnet2 refuses it: radii: found 1 entries, expected 2"),
        ("--model.checkpoint=x", "model.type: found both of type and checkpoint"),
        ("--data.num_points=8", "data.num_points: found 8, expected at least model.config.num_centroids[0], 16"),
        ("--data.hold_out=[a1]", "data.hold_out: found 'a1'"),
        ("--gap.num_partitions=9", "gap.num_partitions: found 9"),
        ("--training.max_stps=3", "training.max_stps: unknown key; did you mean 'max_steps'?"),
        ("--training.dataloader_persistent_workers=true", "training.dataloader_persistent_workers: found true"),
        ("--data.reference=a.npz", "data.reference"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment_points.main([str(write_recipe(tmp_path)), word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_its_network_can_be_planned(path: Path, tmp_path: Path) -> None:
    assert len(RECIPES) == 3
    (tmp_path / "robots.npz").touch()
    words = [f"--data.file={tmp_path / 'robots.npz'}"]
    if path.stem.startswith("shapenet"):
        words = [f"--data.folder={tmp_path}"]
    recipe = load_recipe(path, words, model_cls=ModelSection, data_cls=DataSection)
    with torch.device("meta"):
        model = PointNet2ForPartSegmentation(PointNet2Config(**recipe.model.config))
    if recipe.gap.is_off:
        return
    steps = int(recipe.training.get("max_steps", 210 * 438))
    plan = summarize(model, recipe.gap, total_steps=steps, steps_per_epoch=Fraction(438))
    assert plan["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert len(plan["groups"]) == 4
    if path.stem.startswith("shapenet"):
        default = PointNet2Config()
        assert all(getattr(default, key) == value for key, value in recipe.model.config.items())
        assert plan["phases"][-1]["end"] - plan["phases"][-1]["start"] == 40 * 438


def test_the_dense_recipe_differs_in_nothing_else() -> None:
    sparse, dense = (yaml.safe_load(path.read_text()) for path in RECIPES if path.stem.startswith("robots"))
    sparse, dense = (dense, sparse) if "sparsity" in dense["gap"] else (sparse, dense)
    assert dense.pop("gap") == {"method": "dense"}
    assert sparse.pop("gap")["sparsity"] == 0.8
    assert [recipe["training"].pop("output_dir") for recipe in (sparse, dense)] == ["runs/robots", "runs/robots-dense"]
    assert sparse == dense
