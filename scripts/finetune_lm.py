"""Sparse fine-tuning of a causal language model with TRL's SFTTrainer.

    accelerate launch scripts/finetune_lm.py recipes/causal-lm/sft.yaml [--section.key=value …]

Everything under `training` is TRL's SFTConfig, data is what SFTTrainer understands: columns `text`, `messages`, or
`prompt` and `completion`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _run import check_dtype, check_schedule, dtype_of
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from gap_hf import GaPError, GaPMixin
from gap_hf.output import checkpoint_to_resume, remove_earlier_run
from gap_hf.planning import count_batches, count_optimizer_steps, plan_for
from gap_hf.recipe import load_recipe, one_line
from gap_hf.refusals import check_model

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Either `checkpoint` (Hub name or folder), or `type`, `config` and `tokenizer` for a model from scratch.

    `dtype` is in which a checkpoint's weights are trained: float32, bfloat16, float16, or auto for what they were saved in. None is
    float32, and auto with `gap.master_weights`.
    """

    checkpoint: str | Path | None = None
    type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | Path | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.type is None):
            found = "neither" if self.type is None else "both"
            raise GaPError(f"model.type: found {found} of type and checkpoint, expected one of the two")
        check_dtype(self.dtype, self.checkpoint)
        if self.type is not None and self.tokenizer is None:
            raise GaPError("model.tokenizer: not set; a model from scratch needs the name or folder of a tokenizer")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Files (.jsonl, .parquet, .csv, .txt) or a dataset on the Hub with its splits."""

    train: Path | None = None
    dev: Path | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    dev_split: str | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.dataset is None):
            raise GaPError("data.train: expected one of train (a file) and dataset (a name on the Hub)")
        other, own = ("dev_split", "train") if self.dataset is None else ("dev", "dataset")
        if getattr(self, other) is not None:
            raise GaPError(
                f"data.{other}: found {getattr(self, other)} beside data.{own}, which has no use for it; expected null"
            )
        for key in ("train", "dev"):
            path = getattr(self, key)
            if path is not None and not path.is_file():
                raise GaPError(f"data.{key}: no such file: {path}")
            if path is not None and path.suffix not in READERS:
                raise GaPError(f"data.{key}: found a {path.suffix} file, expected one of {', '.join(READERS)}")


class GaPSFTTrainer(GaPMixin, SFTTrainer):
    """TRL's SFTTrainer with grow-and-prune: the mixin is all it takes."""


def load_data(data: DataSection) -> tuple[Dataset, Dataset | None]:
    try:
        if data.dataset is not None:
            loaded = load_dataset(data.dataset, data.dataset_config)
            assert isinstance(loaded, DatasetDict)
            return loaded[data.train_split], loaded[data.dev_split] if data.dev_split else None
        assert data.train is not None
        files = {"train": str(data.train)} | ({"dev": str(data.dev)} if data.dev else {})
        loaded = load_dataset(READERS[data.train.suffix], data_files=files)
        assert isinstance(loaded, DatasetDict)
        return loaded["train"], loaded.get("dev")
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise GaPError(f"data.{'dataset' if data.dataset else 'train'}: could not load it: {one_line(error)}") from None


def load_model(section: ModelSection, *, dtype: str = "float32") -> PreTrainedModel:
    try:
        if section.checkpoint is not None:
            return AutoModelForCausalLM.from_pretrained(section.checkpoint, dtype=dtype)
        assert section.type is not None
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(section.type, **section.config))
    except (OSError, ValueError, TypeError) as error:
        key = "checkpoint" if section.checkpoint is not None else "config"
        raise GaPError(f"model.{key}: {one_line(error)}") from None


def count_steps(num_examples: int, args: SFTConfig) -> int | None:
    """Optimizer steps of the run; None where packing makes them known only after tokenizing."""
    if args.packing and args.max_steps <= 0:
        return None
    return count_optimizer_steps(count_batches(num_examples, args), args)[0]


def run(argv: Sequence[str]) -> None:
    if not argv:
        raise GaPError("no recipe given; expected the path of a YAML file, such as recipes/causal-lm/sft.yaml")
    recipe = load_recipe(argv[0], argv[1:], model_cls=ModelSection, data_cls=DataSection, training_cls=SFTConfig)
    args: SFTConfig = recipe.training_arguments(SFTConfig)
    resume = checkpoint_to_resume(args, overwrite=recipe.overwrite_output_dir)
    train, dev = load_data(recipe.data)
    if dev is None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise GaPError(
            "training.eval_strategy: there is nothing to evaluate; expected no, or data.dev (data.dev_split of a dataset)"
        )
    set_seed(args.seed)  # the same weights, whatever came before
    model = load_model(recipe.model, dtype=dtype_of(recipe.model.dtype, recipe.gap, args))
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.tokenizer or recipe.model.checkpoint)
    except (OSError, ValueError) as error:
        raise GaPError(f"model.tokenizer: {one_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Whatever is wrong about targets or length is said before SFTTrainer tokenizes or writes anything.
    steps = count_steps(len(train), args)
    check_schedule(args, 10**9 if steps is None else steps, recipe.gap)
    if not recipe.gap.is_off:
        check_model(model, recipe.gap)
        if steps is not None:
            plan_for(model, recipe.gap, args, total_steps=steps)
    try:
        trainer = GaPSFTTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=dev,
            processing_class=tokenizer,
            gap_config=recipe.gap,
        )
    except KeyError as error:  # TRL's, while it tokenizes
        raise GaPError(
            f"data.{'train' if recipe.data.train else 'dataset'}: found the columns {', '.join(train.column_names)} and no {error}; expected "
            "messages, prompt and completion, or text"
        ) from None
    if resume is None and trainer.is_world_process_zero():
        remove_earlier_run(Path(str(args.output_dir)))
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    metrics = {**result.metrics, **(trainer.evaluate() if dev is not None else {})}
    if "eval_loss" in metrics:
        metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
    report = trainer.gap.report() if trainer.gap is not None else {}
    if trainer.is_world_process_zero():
        results = {"recipe": recipe.to_dict(), "metrics": metrics, "sparsity": report}
        Path(str(args.output_dir), "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for key in ("train_loss", "eval_loss", "eval_perplexity", "train_runtime"):
            if key in metrics:
                print(f"{key:20} {metrics[key]:.4f}")
        for key in ("sparsity", "model_sparsity"):
            if key in report:
                print(f"{key:20} {report[key]:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(sys.argv[1:] if argv is None else argv)
    except GaPError as error:
        print(f"finetune_lm.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
