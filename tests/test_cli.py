"""`gap-hf plan`: what it prints, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gap_hf.cli import main

RECIPE: dict[str, Any] = {
    "gap": {"sparsity": 0.9, "num_partitions": 3, "num_rounds": 2, "fine_tune_share": 0.25},
    "model": {
        "type": "marian",
        "vocab_size": 400,
        "config": {
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 32,
        },
    },
    "data": {"whatever": "a script understands"},
    "training": {"output_dir": "nowhere", "max_steps": 80},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_the_numbers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--json", "--gap.ramp_share=0", "--gap.prune_share=0"]) == 0
    plan = json.loads(capsys.readouterr().out)
    encoder, decoder = 4 * 32 * 32 + 2 * 32 * 64, 8 * 32 * 32 + 2 * 32 * 64
    prunable = 3 * (encoder + decoder)
    assert plan["num_prunable"] == prunable
    assert plan["num_live"] == 3 * (12 * 102 + 4 * 205)  # round(102.4) of 1,024 and round(204.8) of 2,048
    assert [g["weights"] for g in plan["groups"]] == [2 * encoder, encoder + decoder, 2 * decoder]
    assert [p["end"] for p in plan["phases"]] == [8, 17, 25, 34, 42, 51, 60, 80]
    shares = [1 if g == p else 0.1 for p in range(3) for g in range(3)]
    dense = sum(w * s for w, s in zip([g["weights"] for g in plan["groups"]], shares[:3], strict=True)) / prunable
    assert plan["phases"][0]["live_share"] == pytest.approx(dense, abs=1e-3)
    assert plan["average_density"] == pytest.approx(
        sum(p["live_share"] * (p["end"] - p["start"]) for p in plan["phases"]) / 80
    )
    head = 400 * 32
    assert plan["training_flops_of_model"] == pytest.approx(
        (plan["average_density"] * prunable + head) / (prunable + head)
    )
    assert not Path("nowhere").exists()


def test_the_tables(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--gap.method=random"]) == 0
    text = capsys.readouterr().out
    for expected in ("model.encoder.layers.*.fc1.weight", "Left dense", "an embedding", "fine-tune", "16 tensors"):
        assert expected in text


def test_a_length_by_epochs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = ["--training.max_steps=-1", "--training.num_train_epochs=4"]
    assert main(["plan", str(recipe), *epochs, "--steps-per-epoch", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == 80
    assert main(["plan", str(recipe), *epochs]) == 2
    assert "expected --steps or --steps-per-epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gap.sparsty=0.9"], "gap.sparsty: unknown key; did you mean 'sparsity'?"),
        (["--gap.method=dense"], "nothing to plan"),
        (["--model.type=marin"], "model.type: found 'marin', which gives no model; did you mean 'marian'?"),
        (["--model.config.d_model=33"], "model.type: found 'marian', which gives no model: "),
        (["--steps", "5"], "need at least 9 optimizer steps, but training has 5"),
        (["--steps", "0"], "--steps: found 0, expected at least 1"),
        (["--gap.num_partitions=9"], "gap.num_partitions"),
        (["--gap.pattern=block:7x1"], "which 7 does not divide"),
        (["--gap.exclude=['*.nothing']"], "gap.exclude[0]"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors(recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert main(["plan", str(recipe), *arguments]) == 2
    out = capsys.readouterr()
    assert expected in out.err and out.err.count("\n") == 1 and not out.out


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
# Models that only the Hub has: their type's default config stands in.
STAND_INS = {
    "detr-coco-finetune": ["--model.checkpoint=null", "--model.type=detr"],
    "finetune-opus-mt-en-de": ["--model.checkpoint=null", "--model.type=marian"],
    "finetune-t5-small": ["--model.checkpoint=null", "--model.type=t5"],
    "sft": ["--model.checkpoint=null", "--model.type=qwen2", "--model.config={num_hidden_layers: 4, hidden_size: 64}"],
}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", str(path), "--steps-per-epoch", "3500", "--json", *STAND_INS.get(path.stem, [])])
    out = capsys.readouterr()
    if path.stem.endswith("-dense"):
        assert code == 2 and "nothing to plan" in out.err
        return
    assert code == 0, out.err
    plan = json.loads(out.out)
    assert plan["phases"][-1]["end"] == plan["total_steps"] and plan["sparsity"] > 0.4


def test_the_authors_big_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    path = next(p for p in RECIPES if p.stem == "wmt14-en-de-big-cgap-90")
    assert main(["plan", str(path), "--steps-per-epoch", "3500", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["targets"]) == 96 and plan["num_prunable"] == 176_160_768  # 176.2 M, as published
    assert plan["groups"][0]["blocks"][-1] == "model.encoder.layers.3"
    assert [p["end"] - p["start"] for p in plan["phases"]] == [35_000] * 10 + [140_000]  # 10 epochs each, then 40
