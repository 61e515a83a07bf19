"""What the scripts that train from a recipe have in common: its cost, the recorded run beside it, what is drawn at random."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, get_scheduler

from gap_hf import GaPConfig, GaPError, planning
from gap_hf.errors import did_you_mean
from gap_hf.planning import format_summary, summarize
from gap_hf.recipe import Recipe, one_line

RECIPE_FILE = "recipe.yaml"
# Shares of a dense run of the same length.
COSTS = ("training_flops_of_prunable", "training_flops_of_model", "inference_flops_of_model")


DTYPES = ("float32", "bfloat16", "float16", "auto")


def check_dtype(found: str | None, checkpoint: str | Path | None) -> None:
    """`model.dtype`, in which a checkpoint's weights are trained. Raises GaPError if it is none, or of no checkpoint."""
    if found is not None and found not in DTYPES:
        raise GaPError(f"model.dtype: found '{found}'{did_you_mean(found, DTYPES)}")
    if found is not None and checkpoint is None:
        raise GaPError("model.dtype: is of a checkpoint's weights; expected model.checkpoint with it")


def dtype_of(found: str | None, gap: GaPConfig, args: TrainingArguments) -> str:
    """`gap_hf.planning.dtype_of`. Raises GaPError for weights that a gradient scaler does not take."""
    if found == "float16" and args.fp16:
        raise GaPError(
            "model.dtype: found float16 with training.fp16: true, whose gradient scaler takes fp32 weights; expected float32"
        )
    return planning.dtype_of(found, gap)


def cost_of(
    recipe: Recipe[Any, Any],
    model: PreTrainedModel,
    args: TrainingArguments,
    length: tuple[int, Fraction | None],
    *,
    plan_only: bool,
) -> dict[str, float] | None:
    """Average density and `COSTS`. With `plan_only` the plan is printed instead, and None returned.

    Targets, pattern, partition and phases are all worked out here, for their errors.

    Args:
        length: Optimizer steps of the run and of an epoch.

    Raises:
        GaPError: for anything that GaPTrainer would refuse about the model, the targets or the length.
    """
    if recipe.gap.is_off:
        return {"average_density": 1.0, **dict.fromkeys(COSTS, 1.0)}
    total_steps, steps_per_epoch = length
    summary = summarize(model, recipe.gap, total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=args.seed)
    if plan_only:
        print(format_summary(summary))
        return None
    return {name: summary[name] for name in ("average_density", *COSTS)}


def read_reference(path: Path | None, scores: Sequence[str]) -> dict[str, Any] | None:
    """A recorded run to compare with. Raises GaPError if it is no results file with these scores."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, **{name: float(found[name]) for name in scores}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GaPError(
            f"data.reference: {path} is no results.json ({one_line(repr(error))}); expected {' and '.join(scores)} in it"
        ) from None


def sparsity_of(trainer: Any, model: PreTrainedModel) -> dict[str, Any]:
    """What the masks say, or the same keys of a dense run."""
    if trainer.gap is None:
        return {"sparsity": 0.0, "model_sparsity": 0.0, "num_params": model.num_parameters()}
    return trainer.gap.report()


def data_seed(args: TrainingArguments) -> int:
    """The seed of the order of the data and of what is drawn for them, as Trainer has it."""
    return args.seed if args.data_seed is None else args.data_seed


def draw_for(seed: int, epoch: int, index: int) -> int:
    """A number for one item in one epoch, from which all that is random about it is to come.

    A loader makes batches ahead of their use, so that what it drew from a global generator would be drawn again by a resumed run.
    """
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


def check_schedule(args: TrainingArguments, total_steps: int, gap: GaPConfig) -> None:
    """Make the schedule of the rate once, before an earlier run is removed; a warning where it is longer than the run.

    Raises:
        GaPError: if `lr_scheduler_kwargs` are none that `lr_scheduler_type` takes.
    """
    kind, found = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type), args.lr_scheduler_kwargs
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    warmup = args.get_warmup_steps(total_steps)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=stand_in,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=found,  # type: ignore[arg-type]
        )
    except Exception as error:  # whatever a schedule makes of what it is given
        raise GaPError(
            f"training.lr_scheduler_kwargs: found {found or 'null'}, which lr_scheduler_type '{kind}' does not take ({one_line(error)})"
        ) from None
    decay = (found or {}).get("num_decay_steps", 0) if isinstance(found, dict) else 0
    if gap.lr_schedule == "whole" and warmup + decay > total_steps:
        print(
            f"training.lr_scheduler_kwargs: num_decay_steps is {decay} and warm-up {warmup}, but the run has {total_steps} steps: the "
            "rate drops where the warm-up ends"
        )


def refuse_other_orders(args: TrainingArguments) -> None:
    """Predictions are compared with what stands at their places. Raises GaPError where Trainer would give them in another order."""
    strategy = getattr(args, "train_sampling_strategy", None)
    if getattr(strategy, "value", strategy) == "group_by_length" or getattr(args, "group_by_length", False):
        raise GaPError(
            "training.train_sampling_strategy: 'group_by_length' sorts what is scored too, which no longer matches its references; "
            "expected random (or data.max_tokens_per_batch, which sorts the training data alone)"
        )
    if not args.dataloader_in_order:
        raise GaPError(
            "training.dataloader_in_order: found false, under which predictions come in another order than their references; expected true"
        )


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """In it the CPU's global generators start from `seed`, for transforms that use them; after it they are where they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # the CPU's alone: dropout on a GPU goes on as it was
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def refuse_persistent_workers(args: TrainingArguments) -> None:
    """Raises GaPError if loader workers would outlive an epoch, as they keep the data's first one."""
    if args.dataloader_persistent_workers:
        raise GaPError(
            "training.dataloader_persistent_workers: found true, expected false: what is random in the data follows "
            "the epoch, which workers only learn when they start"
        )


class SetEpoch(TrainerCallback):
    """Tells the data its epoch; after a resume the Trainer's own call does not reach it in all versions."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A sum of shares of an epoch may lie just below the whole number.
        self.data.set_epoch(int((state.epoch or 0) + 1e-6))
