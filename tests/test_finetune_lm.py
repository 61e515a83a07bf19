"""scripts/finetune_lm.py on a tiny local model: TRL's SFTTrainer with the mixin."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig

from gap_hf import GaPError
from gap_hf.commands.plan import build
from gap_hf.planning import dtype_of
from gap_hf.recipe import load_recipe

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
    ("overrides", "expected"),
    [
        ([], "F32"),
        (["--model.dtype=auto"], "BF16"),
        (["--gap.live_state=true", "--gap.master_weights=true"], "BF16"),
        (["--gap.live_state=true", "--gap.master_weights=true", "--model.dtype=float32"], "F32"),
        (["--gap.live_state=true", "--gap.master_weights=true", "--gap.method=dense"], "F32"),
    ],
)
def test_a_checkpoint_in_bf16_is_trained_in_fp32(
    recipe: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    """transformers would take what was saved, and then AdamW's small steps are lost in rounding."""
    import finetune_lm

    values = yaml.safe_load(recipe.read_text())
    config = AutoConfig.for_model(values["model"]["type"], **values["model"]["config"])
    checkpoint = tmp_path / "bf16"
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(checkpoint)
    values["model"] = {"checkpoint": str(checkpoint), "tokenizer": str(tmp_path / "tokenizer")}
    recipe.write_text(yaml.safe_dump(values))
    assert finetune_lm.main([str(recipe), *overrides]) == 0
    with safe_open(tmp_path / "run/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {expected}  # noqa: SIM118 - no mapping
    # gap-hf plan foresees the same.
    recipe_with = load_recipe(recipe, overrides, model_cls=dict, data_cls=dict, training_cls=SFTConfig)
    dtype = dtype_of(recipe_with.model.get("dtype"), recipe_with.gap)
    assert build(recipe_with.model, dtype=dtype).dtype is {"F32": torch.float32, "BF16": torch.bfloat16}[expected]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--gap.include=['*.nothing']", "gap.include[0]"),
        ("--training.learning_rat=1", "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("--data.train=none.jsonl", "data.train: no such file"),
        ("--model.tokenizer=null", "model.tokenizer: not set"),
        ("--training.max_steps=3", "need at least 4 optimizer steps, but training has 3"),
        ("--data.train=bad.jsonl", "data.train: could not load it"),
        (
            "--data.dev=null --training.eval_strategy=steps --training.eval_steps=4",
            "training.eval_strategy: there is nothing to evaluate",
        ),
        ("--data.dev_split=test", "data.dev_split: found test beside data.train"),
        ("--data.train=other.jsonl --data.dev=null", "found the columns words and no 'text'"),
        ("--training.lr_scheduler_kwargs={speed: 3}", "which lr_scheduler_type"),
    ],
)
def test_errors(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str) -> None:
    import finetune_lm

    (tmp_path / "other.jsonl").write_text('{"words": "fine"}\n' * 20)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    if "jsonl" in override:
        override = override.replace("=", f"={tmp_path}/", 1)
    assert finetune_lm.main([str(recipe), *re.split(" (?=--)", override)]) == 2
    # The datasets library shows its progress, and its own account of a bad file, before it.
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("finetune_lm.py: error: ") and expected in last
    assert not (tmp_path / "run").exists()


def test_the_seed_is_that_of_the_first_weights(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune_lm

    found = []

    def stop(section: Any, dtype: str) -> Any:
        found.append(torch.rand(4))
        raise GaPError("enough")

    monkeypatch.setattr(finetune_lm, "load_model", stop)
    for seed in (1, 2, 1):
        assert finetune_lm.main([str(recipe), f"--training.seed={seed}"]) == 2
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_a_used_folder_is_left_alone(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune_lm

    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    assert finetune_lm.main([str(recipe)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
