"""The model, optimizer and schedule of an image classification recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from _images import edges_of, norm_of
from _run import check_dtype
from timm.data.transforms_factory import create_transform
from timm.optim import (
    create_optimizer_v2,  # pyright: ignore[reportPrivateImportUsage]
    list_optimizers,  # pyright: ignore[reportPrivateImportUsage]
)
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from gap_hf.errors import GaPError, did_you_mean
from gap_hf.recipe import one_line

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`model` of an image classification recipe: either `timm`, a model from scratch, or `checkpoint`.

    Attributes:
        timm: A name that timm knows, such as resnet50.
        args: Keyword arguments for timm's constructor, such as drop_path_rate; classes and channels come from the data.
        checkpoint: A name on the Hub, such as timm/resnet50.a1_in1k, or a folder. Its head is made anew where the number of classes
            is another one. Images are prepared as it says, where `data` does not say otherwise.
        dtype: In which a checkpoint's weights are trained: float32, bfloat16, float16, or auto for what they were saved in. None is
            float32, and auto with `gap.master_weights`.
        optimizer: One of timm's, by name, such as lamb, in place of `training.optim`; rate and weight decay are those of `training`, and
            norms and biases have no decay.
        optimizer_args: For it, such as momentum.
        schedule: One of timm's (cosine, tanh, step, multistep, poly), in place of `training.lr_scheduler_type`, over optimizer steps;
            warm-up steps are those of `training`.
        schedule_args: timm's names: min_lr, decay_rate, decay_epochs, decay_milestones, k_decay. `min_lr` is a rate, epochs are steps.
        average_decay: Keep an average of the weights, timm's ModelEmaV3 with its warm-up, and evaluate and save that; masked weights
            are 0 in it too.
        recalibrate_batchnorm: Batches of training images on which batch norms' statistics are estimated anew before each evaluation
            and at the end; 0 leaves what training has averaged.
    """

    timm: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | Path | None = None
    dtype: str | None = None
    optimizer: str | None = None
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    schedule_args: dict[str, Any] = field(default_factory=dict)
    average_decay: float | None = None
    recalibrate_batchnorm: int = 0

    def __post_init__(self) -> None:
        check_dtype(self.dtype, self.checkpoint)
        if (self.checkpoint is None) == (self.timm is None):
            found = "neither" if self.timm is None else "both"
            raise GaPError(f"model.timm: found {found} of timm and checkpoint, expected one of the two")
        if self.timm is not None and not timm.is_model(self.timm):
            raise GaPError(
                f"model.timm: timm has no model '{self.timm}'{did_you_mean(self.timm, [str(name) for name in timm.list_models()])}"
            )
        if self.checkpoint is not None and self.args:
            raise GaPError("model.args: contradicts model.checkpoint, which has its own; expected model.timm with it")
        known = list_optimizers()
        if self.optimizer is not None and self.optimizer not in known:
            hint = did_you_mean(self.optimizer, [str(name) for name in known])
            raise GaPError(f"model.optimizer: timm has no '{self.optimizer}'{hint}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            hint = did_you_mean(self.schedule, SCHEDULES)
            raise GaPError(f"model.schedule: found '{self.schedule}', expected one of {', '.join(SCHEDULES)}{hint}")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise GaPError(f"model.average_decay: found {self.average_decay}, expected between 0 and 1")
        if self.recalibrate_batchnorm < 0:
            raise GaPError(f"model.recalibrate_batchnorm: found {self.recalibrate_batchnorm}, expected at least 0")


@dataclass(frozen=True)
class ImageFormat:
    """How images become what a model takes.

    Attributes:
        size: Channels, height and width.
        mean, std: For each channel, of values from 0 to 1.
        crop_share: Share of the scaled image's side that is looked at, from the middle.
    """

    size: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    crop_share: float

    @property
    def crop_mode(self) -> str:
        """timm's: a square is cut from the scaled image; to anything else images are scaled whatever their shape."""
        return "center" if self.size[1] == self.size[2] else "squash"

    @property
    def scaled(self) -> tuple[int, int]:
        """Height and width before the cut; of an image that keeps its shape, of its shorter side."""
        return math.floor(self.size[1] / self.crop_share), math.floor(self.size[2] / self.crop_share)

    def transform(self, **training: Any) -> Any:
        """timm's, from a PIL image to a float tensor (C, H, W): evaluation's, or with its arguments for training."""
        make: Any = create_transform  # annotated for three channels and no None, and takes both
        evaluation = {} if training else {"crop_pct": self.crop_share, "crop_mode": self.crop_mode}
        norm = {"mean": tuple(self.mean), "std": tuple(self.std), "interpolation": "bicubic"}
        return make(self.size, is_training=bool(training), **norm, **evaluation, **training)


def known_format(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint says of `size` (height and width), `mean`, `std` and `crop_share`, as far as it says it.

    Raises:
        GaPError: if it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, ImportError) as error:
        raise GaPError(f"model.checkpoint: {one_line(error)}") from None
    if isinstance(config, TimmWrapperConfig):
        known = getattr(config, "pretrained_cfg", None) or {}
        size = known.get("input_size")
        out = {"size": tuple(size[1:]) if size else None, "crop_share": known.get("crop_pct")}
        out |= {name: known.get(name) for name in ("mean", "std")}
        return {name: value for name, value in out.items() if value}
    try:
        processor: Any = AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError, ImportError) as error:
        raise GaPError(
            f"model.checkpoint: {checkpoint} has no image processor that says how images are prepared ({one_line(error)}); "
            "expected data.mean, data.std and data.image_size"
        ) from None
    return of_processor(processor)


def of_processor(processor: Any) -> dict[str, Any]:
    """`known_format` of one of transformers' image processors."""
    mean, std = norm_of(processor)
    out: dict[str, Any] = {"mean": mean, "std": std}
    scaled = edges_of(processor.size)
    if {"height", "width"} <= scaled.keys():
        whole = (scaled["height"], scaled["width"])
    elif "shortest_edge" in scaled:
        whole = (scaled["shortest_edge"], scaled["shortest_edge"])
    else:
        return out
    crop = edges_of(processor.crop_size) if getattr(processor, "do_center_crop", None) else {}
    size = (crop["height"], crop["width"]) if {"height", "width"} <= crop.keys() else whole
    if min(size) > min(whole):  # a cut before the scaling
        size = whole
    # A little less, so that what is scaled to is the same whole number of pixels again.
    share = 1.0 if size == whole else min(size) / (min(whole) + 1e-6)
    name = type(processor).__name__
    if name.startswith("Levit"):  # scales to more than its `size` says
        share *= 224 / 256
    elif not (name.startswith("ConvNext") and min(whole) >= 384):  # where it does not cut
        share *= getattr(processor, "crop_pct", None) or 1.0
    return {**out, "size": size, "crop_share": share}


def load_model(
    section: ModelSection, classes: Sequence[str], form: ImageFormat, *, dtype: str = "float32"
) -> tuple[PreTrainedModel, Any]:
    """Build or load it. What `form` says is kept with it, so that pipelines prepare images as they were here.

    Returns:
        The model, and the image processor to be saved beside it; None if the model's config has all of that, as timm's have.

    Raises:
        GaPError: if it cannot be made.
    """
    labels = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    try:
        if section.checkpoint is not None:
            model = AutoModelForImageClassification.from_pretrained(
                section.checkpoint, ignore_mismatched_sizes=True, dtype=dtype, **labels
            )
        else:
            assert section.timm is not None
            args = {"in_chans": form.size[0], **section.args}
            config = TimmWrapperConfig(architecture=section.timm, model_args=args, **labels)
            model = TimmWrapperForImageClassification(config)
    except (OSError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        key = "checkpoint" if section.checkpoint is not None else "args"
        raise GaPError(f"model.{key}: {one_line(error)}") from None
    if not isinstance(model.config, TimmWrapperConfig):
        # Scaled and cut from the middle, which is what evaluation does here, whatever the checkpoint's own processor did.
        (height, width), (_, *cut) = form.scaled, form.size
        is_square = form.crop_mode == "center"
        return model, CLIPImageProcessor(
            size={"shortest_edge": height} if is_square else {"height": height, "width": width},
            crop_size={"height": cut[0], "width": cut[1]},
            image_mean=form.mean,
            image_std=form.std,
        )
    # What transformers' TimmWrapperImageProcessor reads.
    model.config.pretrained_cfg = {
        **(getattr(model.config, "pretrained_cfg", None) or {}),
        "architecture": model.config.architecture,
        "input_size": list(form.size),
        "interpolation": "bicubic",
        "crop_mode": form.crop_mode,
        "mean": form.mean,
        "std": form.std,
        "crop_pct": form.crop_share,
    }
    # A loaded config has the names that it was saved with, and would be saved with them again.
    model.config.label_names = list(classes)
    return model, None


def check_training(section: ModelSection, model: torch.nn.Module, args: Any, steps: int) -> None:
    """Make optimizer and schedule once, for their errors, before there is an output folder."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    if section.optimizer is not None:
        optimizer = make_optimizer(section, model, args)
    if section.schedule is not None:
        warmup = args.get_warmup_steps(steps)
        make_schedule(section, optimizer, steps=steps, warmup=warmup, rate=args.learning_rate)


def make_optimizer(section: ModelSection, model: torch.nn.Module, args: Any) -> torch.optim.Optimizer:
    """timm's optimizer. Raises GaPError if it does not take what `optimizer_args` has."""
    try:
        return create_optimizer_v2(
            model,
            opt=str(section.optimizer),
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            **section.optimizer_args,
        )
    except (TypeError, ValueError) as error:
        raise GaPError(f"model.optimizer_args: {one_line(error)}") from None


def make_schedule(
    section: ModelSection, optimizer: torch.optim.Optimizer, *, steps: int, warmup: int, rate: float
) -> LambdaLR:
    """timm's schedule as one of torch's, so that it is saved and resumed as Trainer's are.

    Raises:
        GaPError: if it does not take what `schedule_args` has.
    """
    # timm's schedules set the rate of an optimizer: one without weights, whose rate is then read.
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        schedule, _ = create_scheduler_v2(
            stand_in,
            sched=str(section.schedule),
            num_epochs=max(1, steps - warmup),
            warmup_epochs=warmup,
            warmup_prefix=True,
            warmup_lr=section.schedule_args.get("warmup_lr", 0.0),
            step_on_epochs=False,
            updates_per_epoch=1,
            **{key: value for key, value in section.schedule_args.items() if key != "warmup_lr"},
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise GaPError(f"model.schedule_args: {one_line(error)}") from None
    assert schedule is not None

    def factor(step: int) -> float:
        schedule.step_update(step)
        return stand_in.param_groups[0]["lr"] / rate

    return LambdaLR(optimizer, factor)
