"""benchmarks/quality: cells and their identity, runs and what stops them."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from quality import QUALITY, ROOT, TIER, make_tier, run, write_tier

# isort: split
from _quality import runner as quality_runner
from _quality.bootstrap import bleu_of
from _quality.results import code_hash, difference, is_done, read_result, result_path, unpack, write_json
from _quality.runner import Runner, last_checkpoint
from _quality.tier import load_tier

from gap_hf.commands.plan import build_on_meta
from gap_hf.errors import GaPError
from gap_hf.planning import summarize

# --- cells -----------------------------------------------------------------------------------------------------------


def test_the_cells_of_a_tier(tmp_path: Path) -> None:
    tier = make_tier(tmp_path)
    assert [cell.name for cell in tier.cells] == [
        *("dense-seed1", "dense-seed2"),
        *("gmp-s80-seed1", "gmp-s80-seed2", "gmp-s90-seed1", "gmp-s90-seed2"),
        *("mine-s50-seed1", "mine-s50-seed2"),
        *("dense-x2-seed1", "gmp-s90-x2-seed1"),
        *("gmp-s50-2of4-seed1", "gmp-s50-2of4-seed2"),
    ]
    by_name = {cell.name: cell for cell in tier.cells}
    longer = by_name["gmp-s90-x2-seed1"].load()
    assert (longer.training["max_steps"], longer.training["eval_steps"]) == (4000, 500)
    assert longer.training["lr_scheduler_kwargs"] == {"num_decay_steps": 1600}
    assert by_name["gmp-s50-2of4-seed1"].load().gap.pattern == "2:4"
    mine = by_name["mine-s50-seed2"].load()
    assert (mine.gap.method, mine.gap.sparsity, mine.training["seed"]) == ("cyclic", 0.5, 2)
    assert by_name["dense-seed1"].load().gap.is_off


def test_what_tuning_chose_is_in_cells_and_makes_no_trial_another_one(tmp_path: Path) -> None:
    chosen = {"gap": {"fine_tune_share": 0.4}, "training": {"learning_rate": 0.006}}
    own = {"gap": {"dense_share": 0.1, "fine_tune_share": 0.3}}
    before = make_tier(tmp_path, methods={**TIER["methods"], "gmp": own})
    after = make_tier(tmp_path, methods={**TIER["methods"], "gmp": {**own, "chosen": chosen}})
    assert [cell.identity() for cell in before.trials] == [cell.identity() for cell in after.trials]
    assert after.trials[1].load().gap.fine_tune_share == 0.3
    cells = [cell for cell in after.cells if cell.method == "gmp"]
    assert {cell.extra for cell in cells} == {"", "budget", "structure"}
    for cell in cells:
        recipe = cell.load()
        assert (recipe.gap.dense_share, recipe.gap.fine_tune_share) == (0.1, 0.4)
        assert recipe.training["learning_rate"] == 0.006
    assert next(cell for cell in after.cells if cell.method == "mine").load().gap.fine_tune_share is None


def test_trials_never_see_the_test_set(tmp_path: Path) -> None:
    trials = make_tier(tmp_path).trials
    assert [cell.name for cell in trials] == ["gmp-1", "gmp-2", "dense-1"]
    for cell in trials:
        recipe = cell.load()
        assert recipe.data.score == "dev"
        assert '--data.score="dev"' in cell.words()
        assert recipe.training["seed"] == 101
        assert result_path(tmp_path, cell) == tmp_path / "toy" / "tune" / f"{cell.name}.json"
    with pytest.raises(GaPError, match="score"):
        make_tier(tmp_path, tune={"seed": 1, "trials": {"gmp": [{"score": "test"}]}})


@pytest.mark.parametrize("path", sorted((QUALITY / "tiers").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_tier_is_planned(path: Path) -> None:
    """Every cell and trial has a valid recipe; one of each kind is planned on the meta device."""
    tier = load_tier(path)
    assert {"dense", "gmp", "rigl", "acdc", "cyclic"} <= {cell.method for cell in tier.cells}
    lengths = set()
    for cell in tier.cells + tier.trials:
        recipe = cell.load()
        assert recipe.data.score == ("dev" if cell in tier.trials else "test")
        epochs = recipe.training.get("num_train_epochs", 0)
        per_epoch = tier.steps_per_epoch
        steps = recipe.training.get("max_steps") or math.ceil(epochs * (per_epoch or 0))
        if cell in tier.cells:
            lengths.add(steps / cell.steps)
        if recipe.gap.is_off or cell.seed != tier.seeds[0] or cell.sparsity != 0.9:
            continue
        fraction = None if per_epoch is None else Fraction(per_epoch)
        plan = summarize(build_on_meta(vars(recipe.model)), recipe.gap, total_steps=steps, steps_per_epoch=fraction)
        assert plan["sparsity"] == pytest.approx(0.9, abs=0.005)
    assert len(lengths) == 1  # dense too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsitys": [0.8]}, "did you mean 'sparsities'?"),
        ({"seeds": []}, "seeds: found []"),
        ({"jobs": 0}, "jobs: found 0"),
        ({"recipe": "recipes/none.yaml"}, "no such file"),
        ({"recipe": None}, "recipe is None"),
        ({"methods": {"gpm": None}}, "did you mean 'gmp'?"),
        ({"methods": {"gmp": {"gap": {"drop_fraction": 0.1}}}, "extras": None, "tune": None}, "does not use it"),
        ({"methods": {"gmp": {"gap": {"drop_fractoin": 0.1}}}, "extras": None, "tune": None}, "'drop_fraction'?"),
        ({"methods": {"gmp": {"chosen": {"trainign": {}}}}, "extras": None, "tune": None}, "gmp.chosen: unknown key"),
        ({"extras": {"budget": {"methods": ["rigl"]}}}, "no method of this tier"),
        ({"extras": {"again": {"methods": ["gmp"]}}}, "two cells are called gmp-s80-seed1"),
    ],
)
def test_a_bad_tier_is_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tier(tmp_path, **changes)
    assert run.main([str(path), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == [path]


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_is_of_what_figures_depend_on(tmp_path: Path) -> None:
    first = make_tier(tmp_path).cells[2].identity()
    assert str(ROOT) not in json.dumps(first)
    relabelled = make_tier(tmp_path, methods={**TIER["methods"], "gmp": {"label": "other", "paper": "x"}})
    assert difference(first, relabelled.cells[2].identity()) is None
    silent = make_tier(tmp_path, training={"disable_tqdm": True, "output_dir": "elsewhere"})
    assert difference(first, silent.cells[2].identity()) is None
    faster = make_tier(tmp_path, training={"learning_rate": 0.01})
    assert difference(first, faster.cells[2].identity()) == "training.learning_rate: found 0.004, expected 0.01"
    assert "data_sha256" in str(difference(first, {**first, "data_sha256": "0"}))
    assert difference(first, {**first, "data_sha256": None}) is None


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_results_that_are_recorded_are_of_these_tiers(name: str) -> None:
    """A new key of the config would make another run of every one of them, to be done again for hours."""
    found = 0
    for cell in load_tier(QUALITY / f"tiers/{name}.yaml").cells:
        if (result := read_result(result_path(QUALITY / "results", cell))) is not None:
            assert difference(result["identity"], cell.identity()) is None, cell.name
            found += 1
    assert found >= {"tiny": 103, "small": 8}[name]


def test_a_result_is_skipped_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    cell = make_tier(tmp_path).cells[2]
    assert not is_done(results, cell)
    write_json(result_path(results, cell), {"identity": cell.identity(), "bleu": 1.0, "seconds": 5})
    assert is_done(results, cell)
    other = make_tier(tmp_path, training={"learning_rate": 0.01}).cells[2]
    with pytest.raises(GaPError, match=r"gmp-s80-seed1\.json .*learning_rate: found 0.004, expected 0.01.*--redo"):
        is_done(results, other)
    assert not is_done(results, other, redo=True)
    path = write_tier(tmp_path, training={"learning_rate": 0.01})
    words = [str(path), "--results", str(results), "--runs", str(tmp_path / "runs")]
    assert run.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert run.main([*words, "--list"]) == 0
    assert "gmp-s80-seed1       refused: " in capsys.readouterr().out
    result_path(results, cell).write_text("{}")
    assert run.main(words) == 2
    assert "no result of a cell" in capsys.readouterr().err


# --- runs ------------------------------------------------------------------------------------------------------------

# What translate.py leaves behind, without its training.
STUB = """
import json, sys, time
from pathlib import Path
words = dict(word[2:].split("=", 1) for word in sys.argv[2:])
output, step = Path(json.loads(words["training.output_dir"])), 0
output.mkdir(parents=True, exist_ok=True)
if "training.resume_from_checkpoint" in words:
    step = int(words["training.resume_from_checkpoint"].strip('"').rsplit("-", 1)[1])
if "BROKEN" in sys.argv[1:] or words["training.seed"] == "13":
    print("first line")
    sys.exit("error: it broke")
while step < 4:
    step += 1
    folder = output / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 4}))
    time.sleep(30 if words["training.seed"] == "14" and step == 2 else 0.01)
scored = json.loads(words.get("data.score", '"test"'))
(output / "results.json").write_text(json.dumps({
    "bleu": 20.0, "chrf": 50.0, "scored": scored, f"{scored}_pairs": 2, "signatures": {"bleu": "b"}, "sparsity": 0.8,
    "steps": 4, "seconds": 1.0, "dev": [{"step": 4, "eval_bleu": 19.0, "eval_loss": 2.0}], "versions": {"x": "1"},
    "sentence_statistics": [[1, 0, 0, 0, 4, 3, 2, 1, 4, 4]] * 2, "cost": None,
}))
"""

Call = Callable[..., int]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(quality_runner, "command", lambda words: [sys.executable, "-S", str(stub), *words])

    def call(*words: str, **changes: Any) -> int:
        path = write_tier(tmp_path, **changes)
        return run.main([str(path), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *words])

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def test_runs_are_recorded_and_not_repeated(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--only", "gmp-s*0-seed1") == 0
    out = capsys.readouterr().out
    assert "[2/2] gmp-s" in out and "BLEU 20.00 on test, 1 s" in out
    found = tmp_path / "results" / "toy"
    assert names(found) == ["gmp-s80-seed1", "gmp-s90-seed1"]
    result = read_result(found / "gmp-s80-seed1.json")
    assert result is not None and str(tmp_path) not in json.dumps(result)
    assert result["dev"] == [{"step": 4, "bleu": 19.0, "loss": 2.0}]
    assert result["resumed_from"] is None and result["scored_pairs"] == 2
    assert result["code_sha256"] == [code_hash()]
    assert unpack(result["sentence_statistics"]).tolist() == [[1, 0, 0, 0, 4, 3, 2, 1, 4, 4]] * 2
    assert not list((tmp_path / "runs").rglob("checkpoint-*"))  # they are large, and no longer needed
    before = (found / "gmp-s80-seed1.json").stat().st_mtime_ns
    assert call("--only", "gmp-s80-*") == 0
    assert "1 cells done, 1 to do" in capsys.readouterr().out
    assert (found / "gmp-s80-seed1.json").stat().st_mtime_ns == before
    assert call("--list") == 0
    assert "3 of 12 done, about" in capsys.readouterr().out
    assert call("--only", "none") == 2


def test_trials_have_results_of_their_own(call: Call, tmp_path: Path) -> None:
    assert call("--tune") == 0
    assert names(tmp_path / "results" / "toy" / "tune") == ["dense-1", "gmp-1", "gmp-2"]
    assert names(tmp_path / "results" / "toy") == []
    result = read_result(tmp_path / "results" / "toy" / "tune" / "gmp-1.json")
    assert result is not None and result["scored"] == "dev"


def test_a_failed_cell_does_not_stop_the_others(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--only", "gmp-s80-seed*", seeds=[13, 1], extras=None) == 1
    err = capsys.readouterr().err
    assert "failed: gmp-s80-seed13: exit code 1" in err and "    error: it broke" in err
    assert names(tmp_path / "results" / "toy") == ["gmp-s80-seed1"]


def test_an_interrupt_stops_the_children_and_the_next_call_goes_on(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs" / "toy" / "gmp-s80-seed14"
    sources = ["first"]
    monkeypatch.setattr(quality_runner, "code_hash", lambda: sources[-1])

    def interrupt() -> None:
        while not (output / "checkpoint-2" / "trainer_state.json").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), 15)

    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    assert call("--only", "gmp-s80-*", seeds=[14], extras=None) == 130
    assert time.monotonic() - begin < 15
    assert "1 cells left" in capsys.readouterr().err
    assert last_checkpoint(output) == output / "checkpoint-2"
    assert json.loads(output.with_suffix(".identity.json").read_text())["code_sha256"] == ["first"]
    path = tmp_path / "results" / "toy" / "gmp-s80-seed14.json"
    # The sources of every part of the run, in order; those of a call that only writes its result are none.
    for code in ("second", "third"):
        sources.append(code)
        assert call("--only", "gmp-s80-*", seeds=[14], extras=None) == 0
        result = read_result(path)
        assert result is not None and result["resumed_from"] == 2
        assert result["code_sha256"] == ["first", "second"]
        path.unlink()


def test_only_a_checkpoint_of_the_same_run_is_resumed(call: Call, tmp_path: Path) -> None:
    cell = make_tier(tmp_path).cells[2]
    folder = tmp_path / "runs" / "toy"
    for step, text in ((1, '{"global_step": 1, "max_steps": 4}'), (3, "{"), (4, '{"global_step": 4, "max_steps": 4}')):
        (folder / cell.name / f"checkpoint-{step}").mkdir(parents=True)
        (folder / cell.name / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    # The one that was cut off does not count, nor that of the end, which Trainer would take a step further.
    assert last_checkpoint(folder / cell.name) == folder / cell.name / "checkpoint-1"
    write_json(folder / f"{cell.name}.identity.json", {"identity": {**cell.identity(), "seed": 7}})
    assert call("--only", cell.name) == 0
    result = read_result(tmp_path / "results" / "toy" / f"{cell.name}.json")
    assert result is not None and result["resumed_from"] is None


def test_no_time_left_begins_nothing(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--only", "gmp-s80-seed1") == 0
    path = tmp_path / "results" / "toy" / "gmp-s80-seed1.json"
    write_json(path, {**json.loads(path.read_text()), "wall_seconds": 500})
    assert call("--only", "gmp-*", "--time-limit", "400") == 1
    assert "left for want of time: gmp-s" in capsys.readouterr().err
    assert names(path.parent) == ["gmp-s80-seed1"]


def test_two_runners_do_not_share_a_cell(tmp_path: Path) -> None:
    import fcntl

    tier = make_tier(tmp_path)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    with open(tmp_path / "runs" / "toy" / f"{tier.cells[2].name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runner = Runner(tier, tmp_path / "runs", tmp_path / "results", 1)
        runner.run([tier.cells[2]])
    assert [why for _, why in runner.failed] == ["another process is running this cell"]


def test_a_real_cell(tmp_path: Path) -> None:
    """scripts/translate.py itself, for three steps."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    tier = write_tier(
        tmp_path,
        methods={"gmp": {"gap": {"update_steps": 1}}},
        extras=None,
        tune={"seed": 5, "sparsity": 0.5, "trials": {"gmp": [{}]}},
        model={"vocab_size": 400, "config": small},
        data={"max_train_samples": 40, "max_eval_samples": 4},
        training={"max_steps": 3, "eval_steps": 3, "generation_num_beams": 1, "generation_max_length": 4},
    )
    words = [str(tier), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--tune"]
    assert run.main(words) == 0, (tmp_path / "runs" / "toy" / "tune" / "gmp-1.log").read_text()
    result = read_result(tmp_path / "results" / "toy" / "tune" / "gmp-1.json")
    assert result is not None
    assert result["steps"] == 3 and result["scored_pairs"] == 4 and result["scored"] == "dev"
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert 0.5 < result["cost"]["average_density"] <= 1
    sums = unpack(result["sentence_statistics"]).sum(axis=0)
    assert bleu_of(sums) == pytest.approx(result["bleu"], abs=1e-9)
    assert run.main(words) == 0
