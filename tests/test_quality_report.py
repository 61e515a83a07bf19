"""benchmarks/quality: BLEU from sentence statistics, the bootstrap, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality import report, write_tier

# isort: split
from _quality.bootstrap import bleu_of, p_value, resampled_bleu
from _quality.cell import Cell
from _quality.results import pack, result_path, unpack, write_json
from _quality.rows import _compare, build
from _quality.tables import markdown, show_p
from _quality.tier import load_tier
from _translation.scoring import Scorer
from sacrebleu.metrics.bleu import BLEU

from gap_hf.errors import GaPError

# --- statistics ------------------------------------------------------------------------------------------------------

WORDS = ["die", "Datei", "öffnen", ",", "schließen", "und", "speichern", ".", "Fenster", "neu", "laden", "?"]


def texts(rng: np.random.Generator, number: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 14))) for _ in range(number)]


def garbled(rng: np.random.Generator, references: list[str], share: float) -> list[str]:
    """With this share of the words replaced."""
    return [" ".join("x" if rng.random() < share else word for word in text.split()) for text in references]


def test_bleu_from_statistics_is_sacrebleus() -> None:
    rng = np.random.default_rng(0)
    for number, share in ((1, 0.0), (1, 0.5), (2, 0.7), (5, 0.5), (40, 0.2), (40, 0.9), (300, 0.4), (3, 1.0)):
        references = texts(rng, number)
        hypotheses = garbled(rng, references, share)
        hypotheses[0] = hypotheses[0].rsplit(" ", 2)[0]  # shorter than its reference
        statistics = np.array(Scorer().sentence_statistics(hypotheses, references))
        expected = BLEU().corpus_score(hypotheses, [references]).score
        assert bleu_of(statistics.sum(axis=0)) == pytest.approx(expected, abs=1e-9)
        assert (unpack(pack(statistics.tolist())) == statistics).all()
    assert bleu_of(np.zeros(10)) == 0
    with pytest.raises(GaPError, match="65535"):
        pack([[70_000] * 10])


def test_the_bootstrap_draws_the_same_sentences_for_all() -> None:
    rng = np.random.default_rng(1)
    references = texts(rng, 120)
    good, bad = (
        np.array(Scorer().sentence_statistics(garbled(rng, references, share), references)) for share in (0.1, 0.35)
    )
    other = np.array(Scorer().sentence_statistics(garbled(rng, references, 0.1), references))
    draws = resampled_bleu([good, bad, good, other], resamples=2000)
    assert draws.shape == (4, 2000)
    assert (draws[0] == draws[2]).all()
    whole = [float(bleu_of(s.sum(axis=0))) for s in (good, bad, good, other)]
    assert draws.mean(axis=1) == pytest.approx(whole, abs=1.5)
    assert p_value(whole[0] - whole[2], draws[0] - draws[2]) == 1
    assert p_value(whole[0] - whole[1], draws[0] - draws[1]) < 0.01
    assert p_value(whole[1] - whole[0], draws[1] - draws[0]) < 0.01
    assert p_value(whole[0] - whole[3], draws[0] - draws[3]) > 0.05
    # The plain way: indices, sums, sacreBLEU's formula.
    plain = np.random.default_rng(3)
    by_hand = [bleu_of(good[plain.integers(0, 120, size=120)].sum(axis=0)) for _ in range(2000)]
    assert np.std(by_hand) == pytest.approx(np.std(draws[0]), rel=0.1)
    with pytest.raises(GaPError, match="one number for all"):
        resampled_bleu([good, bad[:-1]])


# --- the report ------------------------------------------------------------------------------------------------------


def made_up(cell: Cell, references: list[str], *, loss: float = 2.0) -> dict[str, Any]:
    """A result whose quality follows from its cell alone."""
    rng = np.random.default_rng([len(cell.method), cell.seed])
    share = {"dense": 0.1, "gmp": 0.2, "mine": 0.25}[cell.method] + (cell.sparsity or 0) / 10 - 0.02 * cell.steps
    hypotheses = garbled(rng, references, share)
    return {
        "identity": cell.identity(),
        "bleu": BLEU().corpus_score(hypotheses, [references]).score,
        "chrf": 50.0,
        "scored": cell.score,
        "scored_pairs": len(references),
        "signatures": {"bleu": "nrefs:1"},
        "sparsity": cell.sparsity or 0.0,
        "steps": int(2000 * cell.steps),
        "seconds": 360.0,
        "resumed_from": None,
        "threads": 1,
        "dev": [{"step": 1000, "bleu": 15.0, "loss": 9.0 - loss}, {"step": 2000, "bleu": 17.5, "loss": loss}],
        "cost": {"average_density": 0.3, "training_flops_of_model": 1.0 if cell.sparsity is None else 0.4},
        "versions": {"torch": "2"},
        "code_sha256": ["0", "1"] if cell.method == "gmp" else ["1"],
        "sentence_statistics": pack(Scorer().sentence_statistics(hypotheses, references)),
    }


def test_a_dense_run_of_other_settings_is_not_what_others_are_compared_with() -> None:
    keys: Any = [("dense", None, 1, ""), ("gmp", 0.9, 1, ""), ("dense", None, 1, "rate")]
    rows: Any = [{"bleu_mean": mean, "label": key[0]} for key, mean in zip(keys, (20.0, 18.0, 10.0), strict=True)]
    _compare(rows, keys, {key: np.full(50, row["bleu_mean"]) for key, row in zip(keys, rows, strict=True)})
    assert rows[1]["difference_to_dense"] == -2


def test_the_report_of_results_some_of_which_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tier(tmp_path, hardware="a slide rule")
    tier, results, output = load_tier(path), tmp_path / "results", tmp_path / "docs"
    words = [str(path), "--results", str(results), "--output", str(output)]
    assert report.main(words) == 2
    assert "no result of tier toy" in capsys.readouterr().err
    assert not output.exists()
    references = texts(np.random.default_rng(0), 60)
    left_out = ("gmp-s90-seed2", "mine-s50-seed1", "mine-s50-seed2")
    for cell in [c for c in tier.cells if c.name not in left_out] + tier.trials[:1]:
        write_json(result_path(results, cell), made_up(cell, references))
    assert report.main(words) == 0
    text = (output / "toy.md").read_text()
    assert "**Missing:** gmp-s90-seed2, mine-s50-seed1, mine-s50-seed2." in text
    assert "| **1 of 2** |" in text and "| mine | missing |" in text and "| **0 of 2** |" in text
    for part in (
        "## 80 %",
        "## 90 %",
        "## 2 × the steps",
        "## 2of4",
        "| gmp-1 | gap.fine_tune_share 0.4 | lowest so far | 2.0000 |",
        "0.9 CPU hours of training (1 thread a run) on a slide rule. ",
    ):
        assert part in text, text
    data = json.loads((output / "toy.json").read_text())
    assert (data["planned"], data["finished"]) == (12, 9)
    rows = {(r["method"], r["sparsity"], r["steps_multiple"], r["variant"]): r for r in data["rows"]}
    gmp = rows["gmp", 0.8, 1, ""]
    assert gmp["n"] == 2 and gmp["best_other"] is None
    assert gmp["bleu_sd"] == pytest.approx(np.std(gmp["bleu"], ddof=1))  # of a sample
    assert "| < 0.0001 |" in text and "| 0.000 |" not in text
    assert data["code_sha256"] == ["0", "1"] and "the sources changed between or during runs (2 states)" in text
    assert gmp["difference_to_dense"] == pytest.approx(gmp["bleu_mean"] - rows["dense", None, 1, ""]["bleu_mean"])
    assert gmp["difference_to_dense"] < -5 and gmp["p_dense"] < 0.01
    assert rows["gmp", 0.9, 2, ""]["p_dense"] is not None  # against dense of the same length
    assert rows["gmp", 0.9, 2, ""]["training_flops"] == pytest.approx(0.8)
    for kind in ("sparsity", "budget", "flops"):
        assert (output / f"toy-{kind}.png").read_bytes().startswith(b"\x89PNG")
    # Results of other settings are named, and not mixed in.
    assert report.main([str(write_tier(tmp_path, training={"seed": 1, "warmup_steps": 5})), *words[1:]]) == 2


def test_a_p_of_no_draw_is_not_zero() -> None:
    assert p_value(50.0, np.random.default_rng(0).normal(size=10_000)) == 1 / 10_001
    assert [show_p(p, 10_000) for p in (1 / 10_001, 2 / 10_001, 0.0042, 1.0, None)] == [
        *("< 0.0001", "0.0002", "0.004", "1.000", "")
    ]
    assert show_p(1 / 501, 500) == "< 0.002"


def test_trials_are_chosen_by_dev_loss(tmp_path: Path) -> None:
    references = texts(np.random.default_rng(0), 20)

    def reported(losses: dict[str, float], **gmp: Any) -> tuple[str, dict[str, Any]]:
        methods = {"dense": {}, "gmp": {"label": "GMP", "gap": {"dense_share": 0.1}, **gmp}, "static": {}}
        trials = {"gmp": [{}, {"gap": {"fine_tune_share": 0.4}}, {"training": {"learning_rate": 0.006}}]}
        tune = {"seed": 101, "sparsity": 0.9, "trials": trials}
        tier = load_tier(write_tier(tmp_path, methods=methods, extras=None, tune=tune))
        for cell in [tier.cells[0], *(t for t in tier.trials if t.name in losses)]:
            result = made_up(cell, references, loss=losses.get(cell.name, 2.0))
            write_json(result_path(tmp_path, cell), {**result, "bleu": 10 * result["dev"][-1]["loss"]})
        found = build(tier, tmp_path, resamples=100)
        return markdown(found, []), {row["method"]: row for row in found["settings"]}

    text, rows = reported({"gmp-1": 2.5, "gmp-2": 2.25})
    assert "| gmp-2 | gap.fine_tune_share 0.4 | lowest so far | 2.2500 | 22.50 |" in text
    assert "| gmp-3 | training.learning_rate 0.006 |  | missing |  |" in text
    assert "| GMP | gap.dense_share 0.1 | open (2 of 3 trials done) |" in text
    assert rows["gmp"]["is_lowest"] is None and "does not run" not in text

    text, rows = reported({"gmp-3": float("nan")})  # diverged: done, and never the lowest
    assert "| gmp-1 | no change |  | 2.5000 | 25.00 |" in text and "|  | none |" in text
    assert "| gmp-2 | gap.fine_tune_share 0.4 | chosen | 2.2500 | 22.50 |" in text  # although its BLEU is the lower one
    assert "lowest loss on dev" in text
    assert "**GMP does not run with what its trials choose: the tier has no change, and the lowest dev loss is" in text
    assert "that of gmp-2 (gap.fine_tune_share 0.4).**" in text

    # Written down, it is no conflict, and the trials are still those of the tier.
    text, rows = reported({}, chosen={"gap": {"fine_tune_share": 0.4}})
    assert rows["gmp"]["is_lowest"] and "does not run" not in text and "missing |" not in text.split("## Trials")[1]
    assert "| GMP | gap.dense_share 0.1 | gap.fine_tune_share 0.4 |" in text
    assert "| static | defaults | no trials |" in text
    text, rows = reported({}, chosen={"training": {"learning_rate": 0.006}})
    assert rows["gmp"]["is_lowest"] is False and "the tier has training.learning_rate 0.006, and" in text
