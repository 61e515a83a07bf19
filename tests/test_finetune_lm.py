"""scripts/finetune_lm.py on a tiny local model: TRL's SFTTrainer with the mixin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

# TRL turns gradient checkpointing on by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

TEXTS = [f"the {animal} number {i} sat on the mat" for i in range(20) for animal in ("cat", "dog", "cow")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, texts in (("train", TEXTS[:48]), ("dev", TEXTS[48:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": len(tokenizer), "n_positions": 32}
    data: dict[str, Any] = {
        "gap": {"sparsity": 0.8, "num_partitions": 2, "num_rounds": 1},
        "model": {"type": "gpt2", "config": {**sizes, "bos_token_id": 1, "eos_token_id": 1}, "tokenizer": "tokenizer"},
        "data": {"train": "train.jsonl", "dev": "dev.jsonl"},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "max_length": 32,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_sparse_language_model(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune_lm

    assert finetune_lm.main([str(recipe)]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["sparsity"]["at_target"] and results["metrics"]["eval_perplexity"] > 1
    params = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "run").named_parameters())
    for layer in results["sparsity"]["layers"]:
        assert int((params[layer["name"]] != 0).sum()) == layer["live"] == round(0.2 * layer["numel"])
    assert "sparsity" in capsys.readouterr().out
    # TRL's own metrics stay in its own records.
    assert (tmp_path / "run/gap_masks.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--gap.include=['*.nothing']", "gap.include[0]"),
        ("--training.learning_rat=1", "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("--data.train=none.jsonl", "data.train: no such file"),
        ("--model.tokenizer=null", "model.tokenizer: not set"),
        ("--training.max_steps=3", "need at least 4 optimizer steps, but training has 3"),
        ("--data.train=bad.jsonl", "data.train: could not load it"),
    ],
)
def test_errors(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str) -> None:
    import finetune_lm

    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    if "jsonl" in override:
        override = override.replace("=", f"={tmp_path}/")
    assert finetune_lm.main([str(recipe), override]) == 2
    # The datasets library shows its progress, and its own account of a bad file, before it.
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("finetune_lm.py: error: ") and expected in last
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_left_alone(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune_lm

    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    assert finetune_lm.main([str(recipe)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
