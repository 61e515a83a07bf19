"""Time that is foreseen: steps of each kind are measured as they would be trained, and added up by the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gap_hf import GaPConfig, find_targets
from gap_hf import step_times as module
from gap_hf.cli import main
from gap_hf.memory import batch_of
from gap_hf.planning import format_summary, summarize
from gap_hf.sparse_products import Products
from gap_hf.step_times import StepTimer
from gap_hf.tables import time_text

GAP = GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=1, phase_steps=20, ramp_share=0, prune_share=0)
LIVE = GAP.replace(live_state=True, sparse_compute=True)
RECIPE = """
gap: {sparsity: 0.9, num_partitions: 2, num_rounds: 1, live_state: true, sparse_compute: true}
model: {type: gpt2, vocab_size: 128, config: {n_layer: 2, n_embd: 64, n_head: 2, n_positions: 32}}
training: {output_dir: out, max_steps: 100, per_device_train_batch_size: 4, gradient_accumulation_steps: 2}
"""


def network() -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def timer(config: GaPConfig, **changes: Any) -> StepTimer:
    batch = partial(batch_of, size=4, tokens=16)
    return StepTimer(network, batch, partial(torch.optim.AdamW, lr=1e-4), config, total_steps=100, **changes)


def test_what_is_timed_is_a_step_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = Products.weight_gradient

    def counted(self: Products, *args: Any) -> Any:
        calls.append("sparse")
        return original(self, *args)

    monkeypatch.setattr(Products, "weight_gradient", counted)
    timed = timer(LIVE, accumulation=2)
    model = timed._model
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert timed.dense() > 0 and calls == []
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters() if "wpe" not in name)
    assert timed.sparse([0, 1]) > 0
    num_sparse = sum(weight.name.startswith("transformer.h.1.") for weight in find_targets(model, LIVE).weights)
    assert len(calls) == num_sparse * 2 * (module.WARM_UP + module.MEASURED)
    gap = timed._sparsifier
    assert gap is not None and gap.sparsity() == pytest.approx(0.45, abs=0.01)
    for name, param in gap.masks.params.items():
        if (mask := gap.masks[name]) is not None:
            assert not param.detach()[mask == 0].any()
            assert gap.optimizer.optimizer.state[param]["exp_avg"].ndim == 1
    assert timed.sparse([1, 1]) > 0 and gap.sparsity() == pytest.approx(0.9, abs=0.01)
    assert all(type(m).__name__ != "_SparseConv1D" for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in gap.masks.params.values())


def test_seconds_are_added_up_by_the_plan() -> None:
    """A dense step takes 2 s, and one with levels (a, b) 2 - a - b / 2: groups of one size are measured once."""
    asked: list[Sequence[float] | None] = []

    def seconds(levels: Sequence[float] | None) -> float:
        asked.append(levels)
        return 2.0 if levels is None else 2 - sum(sorted(levels)) / 2

    summary = summarize(network(), GAP, total_steps=100, seed=1, step_seconds=seconds)
    assert summary["seconds_of_dense"] == 200
    # Three phases of 20 steps with one dense group, then a fine-tune of 40 in which both are sparse.
    assert [p["seconds"] for p in summary["phases"]] == [30, 30, 30, 40]
    assert asked == [None, [0.0, 1.0], [1.0, 1.0]]
    text = format_summary(summary)
    assert "time of all steps on this machine: 2 min 10 s, dense training 3 min 20 s (0.650 of it)" in text
    assert text.split("Phases")[1].splitlines()[1].split()[-1] == "time"


def test_ramps_are_sampled() -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=1)
    summary = summarize(network(), config, total_steps=200, step_seconds=lambda x: 1.0 if x is None else 1 - sum(x) / 4)
    seconds = [p["seconds"] / (p["end"] - p["start"]) for p in summary["phases"]]
    assert seconds[0] > seconds[-1] == 0.5


def test_a_recipes_time_phase_by_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ["plan", str(tmp_path / "recipe.yaml"), "--time", "--tokens", "16"]
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["seconds_of_dense"] > 0 and all(p["seconds"] > 0 for p in summary["phases"])
    assert "peak_bytes_of_dense" not in summary
    assert main([*words, "--memory"]) == 0
    text = capsys.readouterr().out
    assert "time of all steps on this machine" in text and "peak memory of a training step" in text
    assert not (tmp_path / "out").exists() and not Path("unused").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--gap.method=parallel", "--gap.sparse_compute=false", "--gap.live_state=false"],
            "--time: gap.method is 'parallel'",
        ),
        (["--training.optim=adafactor"], "gap.live_state: Adafactor"),
        (["--tokens=33"], "--tokens: found 33, but GPT2LMHeadModel has 32 positions"),
        ([], "--time: a step of this recipe cannot be measured (on purpose)"),
    ],
)
def test_what_cannot_be_measured(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not words:

        def fails(self: StepTimer) -> float:
            raise ValueError("on purpose")

        monkeypatch.setattr(StepTimer, "dense", fails)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--time", *words]) == 2
    assert error in capsys.readouterr().err


def test_durations() -> None:
    assert [time_text(s) for s in (0.04, 59.9, 61, 3599.6, 7300, 200_000)] == [
        "0.0 s",
        "59.9 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 2 min",
        "2 d 8 h",
    ]
