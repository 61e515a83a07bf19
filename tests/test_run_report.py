"""The HTML report of a run: its figures are those of the run, and nothing in it needs a network or a script."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from toys import Tokens, causal_lm
from transformers import Trainer, TrainingArguments

from gap_hf import GaPConfig, GaPTrainer, load_masks
from gap_hf.cli import main
from gap_hf.run_record import read_run

STEPS = 24


def train(folder: Path, gap: GaPConfig | None, **kwargs: Any) -> Trainer:
    settings = {"max_steps": STEPS, "save_steps": 6, "eval_steps": 8, "logging_steps": 4, **kwargs}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        save_strategy="steps",
        eval_strategy="steps",
        disable_tqdm=True,
        **({"report_to": []} | settings),
    )
    trainer = GaPTrainer(model=causal_lm(), args=args, train_dataset=Tokens(), eval_dataset=Tokens(8), gap_config=gap)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a run <b> & more"
    trainer = train(folder, GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=2))
    trainer.save_model()
    trainer.save_state()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / finished.name))


class Page(HTMLParser):
    """Tags, rows of tables, pictures, and words of a page."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.pictures: list[ET.Element] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        values = dict(attrs)
        if tag == "img":
            assert values["alt"]
            head, data = str(values["src"]).split(",", 1)
            assert head == "data:image/svg+xml;base64"
            self.pictures.append(ET.fromstring(base64.b64decode(data)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_it_is_whole_offline_and_the_same_each_time(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th"),
        *("td", "div", "img", "pre", "details", "summary"),
    }
    assert "://" not in re.sub(r'src="data:[^"]*"', "", text) and "url(" not in re.sub(r'src="data:[^"]*"', "", text)
    assert len(page.pictures) == 5 and "a run <b> & more" in page.words
    assert main(["report", str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == text


def test_its_figures_are_those_of_the_run(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    rows = {row[0]: row[1:] for row in page.rows if row}
    record = json.loads((run / "gap_config.json").read_text())
    layers = [entry for entry in record["weights"] if not entry["dense"]]
    for entry in layers:
        weights = entry["shape"][0] * entry["shape"][1]
        zeros = f"{1 - entry['live'] / weights:.2%}"
        assert rows[entry["name"]] == ["×".join(map(str, entry["shape"])), f"{weights:,}", f"{entry['live']:,}", zeros]
    assert rows["sparsity of the prunable set"] == [f"{record['sparsity']:.2%}"]
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    loss = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert rows["loss on the evaluation set"] == [f"{loss[-1]:.4g}"]
    for number, phase in enumerate(record["plan"]["phases"], 1):
        kind, steps, _, error, iou, _ = rows[str(number)]
        assert (kind, steps) == (phase["kind"], f"{phase['start']:,} to {phase['end']:,}")
        at_end = [entry for entry in log if entry["step"] == phase["end"] and "gap_mask_iou" in entry]
        if at_end:
            assert (error, iou) == (f"{at_end[-1]['gap_pruning_error']:.4f}", f"{at_end[-1]['gap_mask_iou']:.3f}")
    assert {rows[str(n)][2] for n in range(2, 6)} == {"1", "2"}  # each group is dense in turn


def test_saves_are_compared_mask_by_mask(run: Path) -> None:
    record = read_run(run)
    assert [save.step for save in record.saves] == [6, 12, 18, 24]
    before: dict[str, Any] = {}
    compared = 0
    for save in record.saves:
        masks = {name: mask.bool() for name, mask in load_masks(run / f"checkpoint-{save.step}").items()}
        assert {name for name, live in save.live.items() if live < 1} <= masks.keys()
        for name, mask in masks.items():
            assert save.live[name] == pytest.approx(mask.float().mean().item())
            if name in before:
                both, either = (mask & before[name]).sum().item(), (mask | before[name]).sum().item()
                assert save.iou[name] == both / either
                compared += both < either
        assert save.iou.keys() == masks.keys() & before.keys()
        before |= masks
    assert compared  # else all of them were one mask


@pytest.mark.parametrize("method", ["gmp", "rigl", "static", "parallel"])
def test_other_methods_and_a_run_that_was_stopped(method: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if method == "parallel":
        given = {"num_partitions": 2, "num_rounds": 1, "workers": "sequential"}
    if method == "rigl":
        given = {"update_steps": 4}
    turns = 2 if method == "parallel" else 1
    train(tmp_path, GaPConfig(sparsity=0.8, method=method, **given), gradient_accumulation_steps=turns)
    shutil.rmtree(tmp_path / "checkpoint-24")  # it got no farther, and nothing is at the top
    assert main(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert f"GPT2LMHeadModel, {method}, " in page.words and "18 of 24 steps" in page.words and len(page.pictures) >= 3


def test_the_log_is_the_one_that_goes_furthest(run: Path) -> None:
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] <= 8]
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(run, measure=False).log[-1]["step"] == STEPS


def test_a_checkpoint_whose_state_is_cut_short(run: Path) -> None:
    (run / "trainer_state.json").unlink()
    cut, *_, last = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    cut.write_text(cut.read_text()[:100])
    assert read_run(run, measure=False).log[-1]["step"] == int(last.parent.name.split("-")[1])


def test_numbers_that_are_none_are_left_out(run: Path) -> None:
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"] += [{"loss": float("nan"), "step": 24}, {"eval_f1": "0.5", "step": 24}, {"eval_f1": 0.25}]
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert main(["report", str(run)]) == 0
    assert read_run(run).scores() == []


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (lambda f: shutil.rmtree(f), [], "is no folder; expected the output_dir of a run"),
        (
            lambda f: [p.unlink() for p in f.rglob("gap_config.json")],
            [],
            "has no gap_config.json, nor has a checkpoint",
        ),
        (lambda f: [p.unlink() for p in f.rglob("trainer_state.json")], [], "has no trainer_state.json with a log"),
        (lambda f: (f / "trainer_state.json").write_text('{"log_history": 3}'), [], "is no trainer's state"),
        (lambda f: (f / "trainer_state.json").write_text("{"), [], "is no trainer's state"),
        (lambda f: (f / "gap_config.json").write_text("{}"), [], "gap_config.json: not written by gap_hf"),
        (lambda f: None, ["--output", "{f}"], "is no place for a file"),
        (lambda f: None, ["--output", "{f}/no/r.html"], "is no place for a file"),
    ],
)
def test_what_is_refused(
    run: Path, change: Any, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run)
    capsys.readouterr()
    assert main(["report", str(run), *[word.replace("{f}", str(run)) for word in words]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gap-hf: error: ") and sentence in line
    assert not list(run.rglob("*.html*"))


def test_a_run_without_gap_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, None)
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    assert "expected the output_dir of a run with GaP on" in capsys.readouterr().err


def test_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'gap_hf[report]'" in capsys.readouterr().err and not (run / "report.html").exists()


def test_trackers_get_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from what TensorBoard was given: every number of the trainer's log, at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    gap = GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=2)
    trainer = train(tmp_path / "run", gap, report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for key in ("gap_sparsity", "gap_model_sparsity", "gap_phase", "gap_pruning_error", "gap_mask_iou"):
        logged = [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]
        found = [(event.step, event.value) for event in board.Scalars(f"train/{key}")]
        assert len(logged) > 1
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], key
