"""Exports that other software runs: ONNX Runtime gives torch's logits, CTranslate2 transformers' tokens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_bench_model import gpt2, marian, pruned, words

from gap_hf import GaPError, save_pretrained
from gap_hf.cli import main
from gap_hf.exporting import export
from gap_hf.onnx_files import compare_with_torch, write_onnx
from gap_hf.onnx_graphs import MODEL, Graph
from gap_hf.quiet import quiet


def test_onnx_of_a_language_model_goes_on_from_any_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = gpt2()
    masks = {}
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.ndim == 2:
            masks[name] = (torch.rand_like(parameter) > 0.8).to(torch.uint8)
            parameter.data[masks[name] == 0] = 0
    save_pretrained(model, tmp_path / "packed", masks, packed=True)
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "onnx"), "--to=onnx"]) == 0
    out = capsys.readouterr().out
    assert "checked: ONNX Runtime's outputs are torch's" in out and "model.onnx" in out
    assert json.loads((tmp_path / "onnx/config.json").read_text())["model_type"] == "gpt2"
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    assert [i.name for i in session.get_inputs()] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [o.name for o in session.get_outputs()] == ["logits", "present.0.key", "present.0.value"]
    ids = torch.randint(0, 64, (3, 9))
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
    past = [np.zeros((3, 2, 0, 16), dtype=np.float32)] * 2
    done = 0
    for length in (1, 4, 1, 3):
        feed = {
            "input_ids": ids[:, done : done + length].numpy(),
            "attention_mask": np.ones((3, done + length), np.int64),
        }
        feed |= {"past_key_values.0.key": past[0], "past_key_values.0.value": past[1]}
        logits, *past = session.run(None, feed)
        np.testing.assert_allclose(logits, expected[:, done : done + length], atol=1e-5)
        done += length


def test_an_onnx_file_of_another_model_is_found(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x = torch.randn(2, 4)
    with quiet():
        program = torch.onnx.export(
            layer, (x,), dynamo=True, input_names=["x"], dynamic_shapes=({0: "batch"},), verbose=False
        )
    assert program is not None
    program.save(tmp_path / "model.onnx")

    def graph(module: torch.nn.Module) -> Graph:
        return Graph(MODEL, module, (x,), (), ("x",), ("y",))

    assert compare_with_torch([graph(layer)], tmp_path) < 1e-5
    with pytest.raises(GaPError, match=r"model.onnx gives 'y' .* off torch's, expected 1e-04 at most"):
        compare_with_torch([graph(other)], tmp_path)


def test_ctranslate2_translates_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = marian()
    save_pretrained(model, tmp_path / "packed", pruned(model), packed=True)
    words(tmp_path / "packed", last="<pad>")
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "ct2"), "--to=ctranslate2"]) == 0
    assert "it gives transformers' tokens for 8 random sources" in capsys.readouterr().out
    source = torch.tensor([[5, 9, 33, 0], [7, 7, 2, 0]])
    for beams in (1, 4):
        with torch.inference_mode():
            expected = model.generate(
                source, num_beams=beams, min_new_tokens=9, max_new_tokens=9, forced_eos_token_id=None
            )
        found = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32").translate_batch(
            [[f"w{i}" for i in row] for row in source.tolist()],
            beam_size=beams,
            max_decoding_length=9,
            min_decoding_length=9,
        )
        assert [[int(t[1:]) for t in r.hypotheses[0]] for r in found] == expected[:, 1:].tolist()


def sized(config: Any, **more: Any) -> Any:
    sides = {f"{side}_{key}": 1 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    names = ("d_model", "hidden_size", "n_embd")
    layers = ("num_layers", "num_hidden_layers", "n_layer")
    heads = ("num_heads", "num_attention_heads", "n_head")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    known = dict.fromkeys(names, 16) | dict.fromkeys(layers, 1) | dict.fromkeys(heads, 2) | sides | special
    return config(vocab_size=64, **known, **more)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("BartModel", "BartConfig"),
        ("T5Model", "T5Config"),
        ("BartForSequenceClassification", "BartConfig"),
        ("MambaForCausalLM", "MambaConfig"),
        ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig"),
        ("EncoderDecoderModel", ""),
    ],
)
def test_models_that_have_no_such_graphs(tmp_path: Path, cls: str, config: str) -> None:
    pytest.importorskip("onnxscript")
    if config:
        settings = sized(getattr(transformers, config))
    else:
        bert = sized(transformers.BertConfig)
        settings = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    with pytest.raises(
        GaPError, match=rf"^onnx: {cls} has no graphs of the kinds that are known \([^\n]+\); expected a model"
    ):
        write_onnx(getattr(transformers, cls)(settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(GaPError, match="link: expected a new or empty folder"):
        export(tmp_path / "model", tmp_path / "link", "onnx")
    assert (tmp_path / "link").is_symlink()

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "here")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(GaPError, match=r"new: cannot be written: .*Permission denied"):
        export(tmp_path / "model", tmp_path / "new", "onnx")


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        (lambda f: None, ["model", "x", "--to=ctranslate2"], "has no tokenizer that loads"),
        (lambda f: words(f / "model"), ["model", "x", "--to=ctranslate2"], "does not convert PoolFormer"),
        (lambda f: (f / "x").write_text("here"), ["model", "x", "--to=onnx"], "expected a new or empty folder"),
        (lambda f: None, ["model", "x.safetensors"], "expected timm_wrapper"),
    ],
)
def test_what_cannot_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, arguments: list[str], expected: str
) -> None:
    if "tokenizer" in expected or "convert" in expected:
        pytest.importorskip("ctranslate2")
    model: Any = gpt2()
    if "PoolFormer" in expected:
        from transformers import PoolFormerConfig, PoolFormerForImageClassification

        model = PoolFormerForImageClassification(
            PoolFormerConfig(
                depths=[1], hidden_sizes=[8], num_encoder_blocks=1, patch_sizes=[7], strides=[4], padding=[2]
            )
        )
    model.save_pretrained(tmp_path / "model")
    prepare(tmp_path)
    paths = [str(tmp_path / arguments[0]), str(tmp_path / arguments[1])]
    assert main(["export", *paths, *arguments[2:]]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gap-hf: error: ")]
    assert len(error) == 1 and expected in error[0]
    assert not (tmp_path / "x").is_dir()
