"""Tiny models, data and trainers that the Trainer tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from gap_hf import GaPConfig, GaPSeq2SeqTrainer, GaPTrainer

# `make test-gpu` sets it: the same tests, with the models on a GPU.
ON_GPU = os.environ.get("GAP_HF_TEST_DEVICE") == "cuda"
# The paper's schedule: masks change where a phase begins and nowhere else.
CONFIG = GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=2, ramp_share=0, prune_share=0)


class Tokens(Dataset):
    """Fixed pseudo-random token rows; `labels` equal the inputs, and serve a seq2seq model too."""

    def __init__(self, size: int = 40, length: int = 10) -> None:
        self.rows = torch.randint(3, 64, (size, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i].clone()}


class Images(Dataset):
    """Fixed pseudo-random images of three classes."""

    def __init__(self, size: int = 40) -> None:
        self.pixels = torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[i], "labels": i % 3}


def causal_lm(**changes: Any) -> PreTrainedModel:
    set_seed(0)
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 16, **changes}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **sizes))


def seq2seq() -> PreTrainedModel:
    set_seed(0)
    side = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
    sides = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
    return MarianMTModel(
        MarianConfig(
            vocab_size=64, d_model=16, max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=0, **sides
        )
    )


def image_classifier() -> PreTrainedModel:
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )


KINDS = {
    "causal-lm": (causal_lm, Tokens),
    "seq2seq": (seq2seq, Tokens),
    "vit": (image_classifier, Images),
}


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    """Arguments of a short quiet run, on a CPU unless `ON_GPU`: 20 optimizer steps unless changed, every one logged, nothing saved."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not ON_GPU,
        "full_determinism": ON_GPU,  # bit for bit, which some of CUDA's kernels are not by themselves
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**values, **changes})


def gap_trainer(folder: Path, *, config: Any = CONFIG, kind: str = "causal-lm", **changes: Any) -> GaPTrainer:
    """A GaP trainer on a toy; `changes` are training arguments, but for the trainer's own keywords."""
    own = {k: changes.pop(k) for k in _TRAINER_KEYS if k in changes}
    make_model, make_data = KINDS[kind]
    if "model_init" not in own:
        own.setdefault("model", make_model())
    own.setdefault("train_dataset", make_data())
    return GaPTrainer(args=arguments(folder, **changes), gap_config=config, **own)


_TRAINER_KEYS = (
    "model",
    "model_init",
    "train_dataset",
    "eval_dataset",
    "callbacks",
    "optimizers",
    "compute_metrics",
    "data_collator",
)


def gap_seq2seq_trainer(folder: Path, *, config: Any = CONFIG, **changes: Any) -> GaPSeq2SeqTrainer:
    args = arguments(folder, Seq2SeqTrainingArguments, **changes)
    return GaPSeq2SeqTrainer(model=seq2seq(), args=args, train_dataset=Tokens(), gap_config=config)


def same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """True if two state dicts hold the same tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def assert_masked_weights_are_zero(trainer: Any) -> None:
    """Every masked weight is exactly 0 in the model."""
    params = dict(trainer.model.named_parameters())
    for name in trainer.gap.weights:
        mask = trainer.gap.masks[name]
        if mask is not None:
            assert not params[name].detach()[mask == 0].any(), name


def zeros_per_tensor(model: torch.nn.Module, names: Any) -> dict[str, int]:
    params = dict(model.named_parameters())
    return {name: int((params[name] == 0).sum()) for name in names}
