"""`gap-hf plan`: targets, groups, phases and cost of a recipe, before any training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    Seq2SeqTrainingArguments,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
)

from gap_hf.config import load_yaml
from gap_hf.errors import GaPError, did_you_mean, first_line
from gap_hf.pattern_names import parse_pattern
from gap_hf.planning import dtype_of, format_summary, summarize
from gap_hf.recipe import OVERWRITE, load_recipe, one_line
from gap_hf.refusals import check_sparse_compute_device

# A config type that several of these know is built by the first.
_AUTO_CLASSES = (
    AutoModelForSeq2SeqLM,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModel,
)

# Token ids of a tokenizer that is trained later: a config's own defaults may lie outside a small vocabulary.
_TRAINED_TOKENIZER = {
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "forced_eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Print what a recipe would train: which weights, in which groups and phases, at which cost. "
        "--section.key=value overrides the recipe, as in training."
    )
    parser.add_argument("recipe", type=Path, help="the recipe's YAML file")
    parser.add_argument("--steps", type=int, help="optimizer steps of the whole run, if the recipe has no max_steps")
    parser.add_argument("--steps-per-epoch", type=int, help="optimizer steps of an epoch, if the recipe goes by epochs")
    parser.add_argument(
        "--memory", action="store_true", help="foresee the peak memory of each phase; takes seconds to minutes"
    )
    parser.add_argument(
        "--time", action="store_true", help="measure some steps of each kind here, and foresee the time of each phase"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help="with --memory and --time: of each sequence (the recipe's data.max_length where it has a max_tokens_per_batch, "
        "otherwise 128, or as many as the model has positions)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the plan. Returns the exit code."""
    if args.tokens is not None and args.tokens < 1:
        raise GaPError(f"--tokens: found {args.tokens}, expected at least 1")
    summary = plan_recipe(
        args.recipe,
        args.overrides,
        steps=args.steps,
        steps_per_epoch=args.steps_per_epoch,
        tokens=args.tokens,
        memory=args.memory,
        time=args.time,
    )
    print(json.dumps(summary, indent=2) if args.json else format_summary(summary))
    return 0


def plan_recipe(
    path: Path,
    overrides: Sequence[str],
    *,
    steps: int | None,
    steps_per_epoch: int | None,
    tokens: int | None = None,
    memory: bool = False,
    time: bool = False,
) -> dict[str, Any]:
    """`gap_hf.planning.summarize` for a recipe; with peak memory and time, of sequences of `tokens` (`batch_of`), if they are asked for.

    Raises:
        GaPError: for a bad recipe, or if its length depends on data that is not counted here.
    """
    recipe = load_recipe(path, overrides, model_cls=dict, data_cls=dict, training_cls=_training_class(path))
    if recipe.gap.is_off:
        raise GaPError("gap.method: 'dense' trains without grow-and-prune, so there is nothing to plan")
    total_steps, per_epoch = _length(recipe.training, steps, steps_per_epoch)
    model, seed = build_on_meta(recipe.model), recipe.training.get("seed", 42)
    return summarize(
        model,
        recipe.gap,
        total_steps=total_steps,
        steps_per_epoch=per_epoch,
        seed=seed,
        peak_bytes=_memory(recipe, tokens) if memory else None,
        step_seconds=_time(recipe, tokens, total_steps, per_epoch) if time else None,
    )


def _step_of(recipe: Any, tokens: int | None, flag: str) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """What a step of a recipe is made of, for `MemoryForecast` and `StepTimer`."""
    from gap_hf.memory import batch_of

    if recipe.gap.method == "parallel":
        raise GaPError(f"{flag}: gap.method is 'parallel', whose replicas are not foreseen; expected another method")
    training = recipe.training
    keys = [key for key in training if key.startswith(("adam_", "optim"))]
    arguments = TrainingArguments("unused", use_cpu=True, **{key: training[key] for key in keys})
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    parts = (
        lambda: build(recipe.model, dtype=dtype_of(recipe.model.get("dtype"), recipe.gap)),
        partial(batch_of, **_batch_shape(recipe, tokens)),
        partial(optimizer, **settings),
    )
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return parts, {
        "autocast": next((kind for key, kind in types.items() if training.get(key)), None),
        "clips": training.get("max_grad_norm", 1.0) > 0,
        "checkpointing": training.get("gradient_checkpointing", False),
    }


def _batch_shape(recipe: Any, tokens: int | None) -> dict[str, int | None]:
    """How many sequences a batch has and how long they are (None: `batch_of` knows). By `data.max_tokens_per_batch`, where a
    recipe goes by it, a batch of its longest: so many padded tokens on either side.
    """
    most, longest = (recipe.data.get(key) for key in ("max_tokens_per_batch", "max_length"))
    if not isinstance(most, int):
        return {"size": recipe.training.get("per_device_train_batch_size", 8), "tokens": tokens}
    length = tokens or (longest if isinstance(longest, int) and longest > 0 else 128)
    return {"size": max(1, most // length), "tokens": length}


def _time(
    recipe: Any, tokens: int | None, total_steps: int, per_epoch: Any
) -> Callable[[Sequence[float] | None], float]:
    """Measures steps of a recipe; a line shows how far it is."""
    from gap_hf.step_times import StepTimer

    try:
        parts, settings = _step_of(recipe, tokens, "--time")
        on_cpu = recipe.training.get("use_cpu", False) or not torch.cuda.is_available()
        device = "cpu" if on_cpu else "cuda"
        if recipe.gap.sparse_compute:
            check_sparse_compute_device(torch.device(device))
        timer = StepTimer(
            *parts,
            recipe.gap,
            total_steps=total_steps,
            steps_per_epoch=per_epoch,
            accumulation=recipe.training.get("gradient_accumulation_steps", 1),
            device=device,
            **settings,
        )
        dense = timer.dense()  # what cannot be measured is refused here
    except GaPError:
        raise
    except Exception as error:  # a stranger's model or optimizer
        raise GaPError(f"--time: a step of this recipe cannot be measured ({first_line(error)})") from None
    bar = tqdm(desc="measured", unit=" kinds of step", disable=None)

    def step_seconds(levels: Sequence[float] | None) -> float:
        bar.update()
        return dense if levels is None else timer.sparse(levels)

    return step_seconds


def _memory(recipe: Any, tokens: int | None) -> Callable[[Mapping[str, int]], int]:
    """Foresees the peak memory of a recipe's step; a line shows how far it is, because each takes seconds."""
    from gap_hf.memory import MemoryForecast

    try:
        parts, settings = _step_of(recipe, tokens, "--memory")
        forecast = MemoryForecast(*parts, **settings)
        gap = recipe.gap
        rows = parse_pattern(gap.pattern).rows if gap.sparse_compute else 0
        options: Any = {
            "live_state": gap.live_state,
            "master_weights": gap.master_weights,
            "compute_rows": rows,
        }
        bar = tqdm(desc="forecasts", unit="", disable=None)

        dense = forecast.peak_bytes({})  # what cannot be foreseen is refused here

        def peak_bytes(live: Mapping[str, int]) -> int:
            bar.update()
            return forecast.peak_bytes(live, **options) if live else dense
    except GaPError:
        raise
    except Exception as error:  # a stranger's model or optimizer that needs numbers
        raise GaPError(f"--memory: a step of this recipe cannot be foreseen ({first_line(error)})") from None
    return peak_bytes


def _training_class(path: Path) -> type:
    """TRL's SFTConfig if `training` has a name that only it has, else transformers' own."""
    training = load_yaml(path).get("training")
    names = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)} | {OVERWRITE}
    if not isinstance(training, dict) or training.keys() <= names:
        return Seq2SeqTrainingArguments
    try:
        from trl.trainer.sft_config import SFTConfig
    except ImportError:
        return Seq2SeqTrainingArguments  # which then names the key that it does not know
    known = names | {f.name for f in dataclasses.fields(SFTConfig)}
    return SFTConfig if training.keys() <= known and training.keys() - names else Seq2SeqTrainingArguments


def _length(training: Mapping[str, Any], steps: int | None, per_epoch: int | None) -> tuple[int, Fraction | None]:
    for name, value in (("--steps", steps), ("--steps-per-epoch", per_epoch)):
        if value is not None and value < 1:
            raise GaPError(f"{name}: found {value}, expected at least 1")
    max_steps = training.get("max_steps", -1)
    if steps is not None or max_steps > 0:
        total = steps if steps is not None else max_steps
        return total, Fraction(per_epoch) if per_epoch else None
    if per_epoch is None:
        raise GaPError(
            "training.max_steps: not set, so the length depends on the data, which is not counted here; expected "
            "--steps or --steps-per-epoch, or use the training script's own --plan"
        )
    epochs = Fraction(str(training.get("num_train_epochs", 3.0)))
    return math.ceil(epochs * per_epoch), Fraction(per_epoch)


def build_on_meta(section: Mapping[str, Any]) -> nn.Module:
    """The model of a recipe's `model` section without its weights, whatever its size.

    Raises:
        GaPError: as `build`.
    """
    with torch.device("meta"):
        return build(section)


def build(section: Mapping[str, Any], *, dtype: str = "auto") -> nn.Module:
    """The model of a recipe's `model` section, with weights as they are before training; a checkpoint's in `dtype`.

    Raises:
        GaPError: if the type is unknown or the config cannot be loaded or refuses a value.
    """
    import gap_hf.models  # noqa: F401  # registers the networks that transformers does not have

    try:
        if section.get("timm") is not None:
            config = TimmWrapperConfig(architecture=str(section["timm"]), model_args=section.get("args") or {})
        elif section.get("checkpoint") is not None:
            config = AutoConfig.from_pretrained(str(section["checkpoint"]))
            if dtype != "auto":
                config.dtype = getattr(torch, dtype)
        else:
            known = _TRAINED_TOKENIZER | {"vocab_size": section["vocab_size"]} if "vocab_size" in section else {}
            config = AutoConfig.for_model(str(section.get("type")), **{**known, **section.get("config", {})})
        return _auto_class(config).from_config(config)
    except Exception as error:  # each model checks its own config, with its own kinds of error
        key = next((key for key in ("timm", "checkpoint") if section.get(key) is not None), "type")
        unknown = key == "type" and section.get(key) not in CONFIG_MAPPING
        detail = did_you_mean(str(section.get(key)), CONFIG_MAPPING) if unknown else f": {one_line(error)}"
        raise GaPError(f"model.{key}: found {section.get(key)!r}, which gives no model{detail}") from None


def _auto_class(config: PreTrainedConfig) -> Any:
    for auto in _AUTO_CLASSES:
        if type(config) in auto._model_mapping:
            return auto
    raise GaPError(f"model.type: no transformers Auto class builds a model from {type(config).__name__}")
