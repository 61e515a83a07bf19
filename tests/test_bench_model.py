"""`gap-hf bench`: a tiny sparse model through all of it; what is wrong with a call or a folder; verdicts on made-up times."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from gap_hf import GaPError, save_pretrained
from gap_hf.bench.measure import Settings, measure
from gap_hf.bench.profile import LOOP, OUTPUT_LAYER, SPARSE_LAYERS
from gap_hf.bench.results import GENERATE, LAYERS, Agreement, make_cell, verdict
from gap_hf.bench.rivals import BASE, KINDS, OURS, until_end
from gap_hf.bench.show import as_text
from gap_hf.bench.subject import Job, random_inputs, search_settings, subject_of
from gap_hf.bench.timing import in_turns, ratio
from gap_hf.cli import main

TORCH = ("fp32", "bf16", "int8", "ours")
TOKENS = 12  # so many that the first of them takes less than all, on a busy machine too


def pruned(model: Any) -> dict[str, torch.Tensor]:
    """16×1 blocks of 3 of 4 set to 0 in every matrix of the layers; the masks."""
    masks, generator = {}, torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layer" in name and parameter.shape[0] % 16 == 0:
            live = torch.rand(parameter.shape[0] // 16, parameter.shape[1], generator=generator) > 0.75
            masks[name] = live.repeat_interleave(16, 0).to(torch.uint8)
            parameter.data.mul_(4)[masks[name] == 0] = 0
    return masks


# Smaller layers than 256×256 are left dense.
def marian() -> MarianMTModel:
    torch.manual_seed(0)
    side = {"layers": 1, "attention_heads": 2, "ffn_dim": 512}
    sides = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
    special = {"pad_token_id": 63, "decoder_start_token_id": 63, "eos_token_id": 0, "forced_eos_token_id": 0}
    model = MarianMTModel(MarianConfig(vocab_size=64, d_model=256, max_position_embeddings=64, **special, **sides))
    model.generation_config.bad_words_ids = [[63]]
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


def words(folder: Path, last: str = "w63") -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*(f"w{i}" for i in range(63)), last]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", unk_token="w1", pad_token=last).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = marian()
    masks = pruned(model)
    path = tmp_path_factory.mktemp("model") / "packed"
    save_pretrained(model, path, masks, packed=True)
    return path


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    small = ["--batch=1,3", "--beams=1,3", "--repeats=3", f"--tokens={TOKENS}", "--length=6", "--quiet"]
    files = [f"--json={out / 'bench.json'}", f"--plot={out / 'bench.png'}"]
    rivals = "bf16,int8,onnx,onnx-int8,ctranslate2,ctranslate2-int8"
    assert main(["bench", str(folder), *small, *files, f"--rivals={rivals}"]) == 0
    assert (out / "bench.png").stat().st_size > 10_000
    return json.loads((out / "bench.json").read_text())


def test_every_rival_gives_the_same_tokens_or_says_why_not(report: dict[str, Any]) -> None:
    compared = {(a["rival"], a["beams"]): a for a in report["agreement"]}
    for kind in KINDS.values():
        if kind.title in report["missing"]:
            assert report["missing"][kind.title].startswith("not installed: pip install "), kind.title
            continue
        # fp32 sums in another order, here and there; what is rounded may differ.
        exact = kind.title in (OURS, "ONNX Runtime fp32", "CTranslate2 fp32")
        for beams in (1, 3):
            found = compared[kind.title, beams]
            assert found["tokens"] == 1 if exact else 0 <= found["tokens"] <= 1
        if (logits := compared[kind.title, 1]["logits"]) is not None:
            assert logits < (1e-4 if exact else 0.5)
    assert "ours" not in report["missing"] and compared[BASE, 1]["logits"] == 0
    if importlib.util.find_spec("onnxruntime"):
        assert "ONNX Runtime int8" not in report["missing"] and compared["ONNX Runtime int8", 1]["logits"] > 0


def test_the_json(report: dict[str, Any]) -> None:
    assert report["task"] == "seq2seq" and report["sparse_layers"] == 6 + 10
    assert report["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["settings"]["batches"] == [1, 3] and report["settings"]["inputs"] == "random tokens"
    whole = [cell for cell in report["cells"] if cell["level"] == GENERATE]
    assert [(c["batch"], c["beams"]) for c in whole] == [(1, 1), (1, 3), (3, 1), (3, 3)]
    layers = [cell for cell in report["cells"] if cell["level"] == LAYERS]
    assert {c["batch"] for c in layers} == {1, 3, 6, 18}
    assert {c["shape"] for c in layers} == {None, "256x256 (12)", "256x512 (2)", "512x256 (2)"}
    for cell in report["cells"]:
        rows = {row["rival"]: row for row in cell["rows"]}
        assert rows[BASE]["speed"] == {"median": 1, "low": 1, "high": 1}
        assert rows[OURS]["ours"] is None and rows[OURS]["speed"]["median"] == pytest.approx(
            rows[BASE]["ours"]["median"]
        )
        for row in rows.values():
            assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
            if cell["level"] == GENERATE:
                assert 0 < row["first_ms"] < row["ms"]["high"] and row["token_ms"] is not None
    assert len(report["verdict"]) == len(whole) + 4
    assert all("as fast as" in sentence for sentence in report["verdict"])


def test_the_profile_adds_up(report: dict[str, Any]) -> None:
    for name in (BASE, OURS):
        parts = {part["name"]: part for part in report["profile"][name]}
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        assert parts[LOOP]["calls"] == 1 and parts[OUTPUT_LAYER]["calls"] == TOKENS
        # Six layers of the encoder once; of ten of the decoder, two read the source once and eight every token.
        assert parts[SPARSE_LAYERS]["calls"] == 6 + 2 + 8 * TOKENS


def test_missing_packages_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    gone = ("onnx", "onnxscript", "onnxruntime", "ctranslate2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in gone else found(name, *args))
    model = marian()
    pruned(model)
    settings = Settings(batches=(1,), repeats=3, tokens=3, length=4, layers=False)
    report = measure(subject_of(model), tuple(KINDS), settings)
    assert report.missing["ONNX Runtime int8"] == "not installed: pip install onnx"
    assert report.missing["CTranslate2 int8"] == "not installed: pip install ctranslate2"
    text = as_text(report)
    assert "CTranslate2 int8: not installed: pip install ctranslate2" in text and "as fast as" in text
    assert [row.rival for row in report.cells[0].rows] == [BASE, "torch bf16", "torch int8", OURS]


def test_a_language_model_and_a_classifier() -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    models: list[Any] = [
        GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=256, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=1)
        ),
        BertForSequenceClassification(BertConfig(**sizes)),
    ]
    for model, level in zip(models, (GENERATE, "forward"), strict=True):
        for name, parameter in model.named_parameters():
            if (parameter.ndim == 2 and ".layer" in name) or (".h." in name and parameter.ndim == 2):
                parameter.data.mul_(torch.rand_like(parameter) > 0.8)
        settings = Settings(batches=(2,), repeats=3, tokens=4, length=5)
        report = measure(subject_of(model), TORCH, settings)
        assert report.cells[-1].level == level and {row.rival for row in report.cells[-1].rows} >= {BASE, OURS}
        ours = next(a for a in report.agreement if a.rival == OURS)
        assert ours.tokens == 1 and ours.logits is not None and ours.logits < 1e-4


def test_a_dense_model_has_nothing_of_ours() -> None:
    report = measure(subject_of(marian()), TORCH, Settings(batches=(1,), repeats=3, tokens=3, length=4))
    assert "sparse" in report.missing[OURS] and report.sparse_layers == 0
    assert "ours was not timed" in as_text(report)


_BERT = BertConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)
_SIDES = {f"{side}_{key}": 1 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}


@pytest.mark.parametrize(
    ("make", "length", "expected"),
    [
        (
            lambda: BartForSequenceClassification(BartConfig(vocab_size=64, d_model=16, **_SIDES)),
            5,
            "BartForSequenceClassification is an encoder-decoder that does not generate",
        ),
        (
            lambda: BertForQuestionAnswering(_BERT),
            5,
            "gives start_logits, end_logits, expected logits or last_hidden_state",
        ),
        (lambda: BertForPreTraining(_BERT), 5, "gives prediction_logits, seq_relationship_logits, expected logits or"),
        (lambda: BertForSequenceClassification(_BERT), 17, "--length: found 17, but the model has 16 positions"),
        (
            lambda: RobertaForMaskedLM(RobertaConfig(**{**_BERT.to_diff_dict(), "pad_token_id": 1})),
            16,
            "RobertaForMaskedLM cannot be run on input_ids of shape (2, 16): index",
        ),
    ],
    ids=["encoder-decoder", "two logits", "pretraining", "positions", "fewer positions"],
)
def test_models_that_cannot_be_measured(make: Any, length: int, expected: str) -> None:
    said: list[str] = []
    with pytest.raises(GaPError, match=re.escape(expected)):
        measure(subject_of(make()), TORCH, Settings(batches=(2,), repeats=3, length=length), say=said.append)
    assert not said  # no rival was made before it


def test_encoders_that_go_beyond_the_positions_of_their_config() -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=16,
    )
    model = LlamaForSequenceClassification(config)  # rotary
    model.config.pad_token_id = 0
    report = measure(subject_of(model), TORCH, Settings(batches=(1,), repeats=3, length=24), say=lambda _: None)
    assert report.cells


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_texts_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    model: Any = marian() if kind == "seq2seq" else gpt2()
    model.save_pretrained(tmp_path / "model")
    words(tmp_path / "model")
    (tmp_path / "text").write_text("w5 w6\n" * 3 + "w7 " * 65 + "\n", encoding="utf-8")
    arguments = [
        "bench",
        str(tmp_path / "model"),
        f"--text={tmp_path / 'text'}",
        "--quiet",
        "--rivals=bf16",
        "--batch=4",
    ]
    if kind == "causal":
        (tmp_path / "text").write_text("w7 " * 30, encoding="utf-8")
        arguments.append("--tokens=3")
    assert main(arguments) == 2
    limit, tokens = (64, 65) if kind == "seq2seq" else (32, 30)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gap-hf: error: ")]
    assert (
        len(error) == 1
        and f"--text: its sources have up to {tokens} tokens" in error[0]
        and f"{limit} positions" in error[0]
    )


def test_a_file_that_cannot_be_written_comes_after_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    small = ["--batch=1", "--repeats=3", "--tokens=2", "--length=4", "--rivals=fp32", "--no-layers", "--quiet"]
    assert main(["bench", str(folder), *small, f"--json={tmp_path / 'x.json'}"]) == 2
    out = capsys.readouterr()
    assert "as fast as" in out.out and "x.json cannot be written: No space left on device" in out.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--json=."], "--json: . is a folder, expected a file"),
        (["--plot=."], "--plot: . is a folder, expected a file"),
        (["--rivals=onnx-int4"], "--rivals: unknown 'onnx-int4'; did you mean 'onnx-int8'?"),
        (["--repeats=2"], "--repeats: found 2, expected at least 3"),
        (["--tokens=1"], "--tokens: found 1, expected at least 2"),
        (["--tokens=65"], "the model has 64 positions"),
        (["--json=nowhere/x.json"], "--json: nowhere is no folder that exists"),
        (["--plot=bench.pgn"], "bench.pgn: found the suffix 'pgn', expected one of "),
        (["--text=nowhere.txt"], "--text: nowhere.txt cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert main(["bench", str(folder), "--quiet", *arguments]) == 2
    out = capsys.readouterr()
    error = [line for line in out.err.splitlines() if line.startswith("gap-hf: error: ")]
    assert len(error) == 1 and expected in error[0] and not out.out


@pytest.mark.parametrize("batch", ["0", "two", "1,,2"])
def test_wrong_numbers(folder: Path, capsys: pytest.CaptureFixture[str], batch: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", str(folder), f"--batch={batch}"])
    assert left.value.code == 2 and f"found '{batch}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text('{"architectures": ["MarianModle"]}'), "no class 'MarianModle'"),
        (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "cannot be loaded as MarianMTModel"),
        (
            lambda f: _without(f / "model.safetensors", "model.encoder.layers.0.fc1.weight"),
            "do not have 'model.encoder.layers.0.fc1.weight'",
        ),
    ],
)
def test_damaged_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, expected: str) -> None:
    marian().save_pretrained(tmp_path)
    damage(tmp_path)
    assert main(["bench", str(tmp_path), "--quiet"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gap-hf: error: ")]
    assert len(error) == 1 and expected in error[0]


def _without(path: Path, key: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(path).items() if k != key}, path, metadata={"format": "pt"})


def cell(base: float, rival: float, ours: float, noise: float = 0.0) -> Any:
    def seconds(value: float, sign: int) -> list[float]:
        return [value * (1 + sign * noise * (-1) ** i) for i in range(10)]

    times = {BASE: seconds(base, 1), "CTranslate2 int8": seconds(rival, 1), OURS: seconds(ours, -1)}
    return make_cell(GENERATE, 1, 1, 2, times)


def test_verdicts() -> None:
    assert verdict(cell(8, 4, 2)).startswith(
        "batch 1, greedy, 2 threads: ours is 2.00 × as fast as the best dense alternative, CTranslate2 int8 (95 %: 2.00–2.00), 4.00 ×"
    )
    lost = verdict(cell(8, 1.5, 2))
    assert "no gain: the best dense alternative, CTranslate2 int8, is 1.33 × as fast as ours" in lost
    assert "no gain that can be told: ours is" in verdict(cell(8, 2, 2, noise=0.2))
    other = (Agreement(beams=1, rival="CTranslate2 int8", tokens=0.5, logits=None),)
    assert "CTranslate2 int8 (which gives 50% of torch fp32's tokens)" in verdict(cell(8, 4, 2), other)


def test_turns_and_ratios() -> None:
    order: list[str] = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc" and {len(seconds) for seconds in times.values()} == {4}
    found = ratio([2, 4, 6], [1, 2, 3])
    assert (found.median, found.low, found.high) == (2, 2, 2)


def test_what_rivals_are_given() -> None:
    subject = subject_of(marian())
    assert subject.special.ends == (0,) and subject.special.banned == (63,) and subject.special.start == 63
    inputs = random_inputs(subject, 200, 9)
    ids = inputs["input_ids"]
    assert (
        ids.shape == (200, 9)
        and bool((ids[:, -1] == 0).all())
        and set(ids[:, :-1].unique().tolist()) == set(range(1, 63))
    )
    settings = search_settings(subject.special, Job(7, 4))
    assert settings.min_new_tokens == settings.max_new_tokens == 7 and settings.forced_eos_token_id is None
    assert until_end([[3, 0, 5], [0], [4, 4]], (0,)) == [[3], [], [4, 4]]
