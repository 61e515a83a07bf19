"""Tables and plots are made from plain data, whatever of it there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_hf.config import GaPConfig
from gap_hf.plan import Plan, make_plan
from gap_hf.report import plot_run, results_table

RESULTS = {"bleu": 18.0, "chrf": 45.0, "sparsity": 0.8, "model_sparsity": 0.6, "steps": 2000, "seconds": 312.4}
PLANS = [
    make_plan(GaPConfig(sparsity=0.8, num_partitions=2, num_rounds=1), num_groups=2, total_steps=50),
    make_plan(GaPConfig(sparsity=0.8, method="random"), num_groups=7, total_steps=50),
    make_plan(GaPConfig(sparsity=0.8, method="gmp"), num_groups=1, total_steps=50),
    None,
]
LOG = [
    {"step": 0, "gap_sparsity": 0.5, "gap_model_sparsity": 0.4},
    {"step": 5, "loss": 3.0},
    {"step": 30, "gap_sparsity": 0.8, "gap_model_sparsity": 0.6},
    {"step": 40, "eval_loss": 2.0, "eval_bleu": 10.0},
    {"step": 50, "train_runtime": 1.0},
]


def test_the_table_alone_and_beside_a_recorded_run() -> None:
    alone = results_table(RESULTS)
    assert "18.00" in alone
    assert "80.00%" in alone
    assert "recorded" not in alone
    beside = results_table(
        {**RESULTS, "bleu_by_origin": {"x": {"bleu": 1.0, "chrf": 2.0, "pairs": 3}}, "test_pairs": 9},
        reference={"bleu": 24.0, "chrf": 50.0, "steps": 2000, "command": "python dense"},
    )
    bleu = next(line for line in beside.splitlines() if line.startswith("BLEU"))
    assert bleu.split() == ["BLEU", "18.00", "24.00", "0.75"]
    assert "recorded: python dense" in beside
    assert "x: BLEU 1.00, chrF 2.00 (3 pairs)" in beside


@pytest.mark.parametrize("log", [LOG, LOG[1:2], LOG[3:4], []])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plot_of_what_there_is(log: list[dict[str, float]], plan: Plan | None, tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot_run(log, plan, path)
    assert path.read_bytes().startswith(b"\x89PNG")
