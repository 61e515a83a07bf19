"""The trainer of image classification: batches, soft labels, averaged weights that obey the masks, batch norms."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _norms import RecalibratedTrainer
from _run import SetEpoch, data_seed, drawn_from
from safetensors.torch import load_file, save_file
from timm.data.mixup import Mixup
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, Resize
from transformers import TrainerCallback

from _vision.data import DataSection, Images
from _vision.model import ImageFormat, ModelSection, make_optimizer, make_schedule
from gap_hf.errors import GaPError

AVERAGE = "average.safetensors"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def image_format(images: Images, data: DataSection, known: Mapping[str, Any]) -> ImageFormat:
    """How the model takes images: as the recipe says, else as a checkpoint does (`known_format`), else by default.

    Raises:
        GaPError: if mean or std are of another number of channels.
    """
    channels = images.channels
    default = IMAGENET if channels == 3 else {"mean": [0.5] * channels, "std": [0.5] * channels}
    norm = {key: list(getattr(data, key) or known.get(key) or default[key]) for key in ("mean", "std")}
    if "mean" in known and len(known["mean"]) != channels:
        raise GaPError(
            f"model.checkpoint: takes images of {len(known['mean'])} channels, but the data's have {channels}"
        )
    for key, values in norm.items():
        if len(values) != channels:
            raise GaPError(f"data.{key}: found {len(values)} numbers, expected {channels}, one for each channel")
    if data.image_size is not None:
        size = (data.image_size, data.image_size)
    elif images.pixels is not None:
        size = (int(images.pixels.shape[2]), int(images.pixels.shape[3]))
    else:
        size = known.get("size") or (224, 224)
    share = data.crop_share or known.get("crop_share") or 0.875
    return ImageFormat((channels, size[0], size[1]), norm["mean"], norm["std"], share if data.needs_pictures else 1.0)


def set_transforms(splits: Mapping[str, Images], data: DataSection, form: ImageFormat) -> None:
    """Give the splits timm's transforms, where images are augmented one by one.

    Raises:
        GaPError: if timm does not know `data.auto_augment`.
    """
    if not data.needs_pictures:
        return
    plain = form.transform()
    try:
        augmented = form.transform(
            scale=tuple(data.scale) if data.scale else None,
            hflip=data.horizontal_flip,
            color_jitter=data.color_jitter or None,
            auto_augment=data.auto_augment,
            re_prob=data.random_erasing,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise GaPError(f"data.auto_augment: timm cannot make '{data.auto_augment}': {error}") from None
    if data.scale is None:
        # timm's first step is a crop of a random part, which None asks not to have.
        first, *rest = augmented.transforms
        assert isinstance(first, RandomResizedCropAndInterpolation)
        augmented = Compose([step for step in plain.transforms if isinstance(step, (Resize, CenterCrop))] + rest)
    for split, images in splits.items():
        images.plain_transform = plain
        images.transform = augmented if split == "train" else plain


class Batches:
    """From examples to a batch: float images, normalised, moved and flipped in training; int or, mixed, soft labels.

    What is drawn comes from the first example's `draw` alone: a loader makes batches ahead of their use, so that nothing drawn from
    a global generator could be drawn again by a resumed run.

    Args:
        mixup: timm's, or None.
    """

    def __init__(
        self,
        data: DataSection,
        form: ImageFormat,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        *,
        training: bool,
    ) -> None:
        # Pictures come normalised, and flipped, from their transform.
        self.ready = data.needs_pictures
        self.shift = data.random_shift if training else 0
        self.flip = data.horizontal_flip if training and not self.ready else 0.0
        self.mixup = mixup if training else None
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (form.mean, form.std))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example["labels"] for example in examples])
        if not self.ready:
            pixels = (pixels.float() / 255 - self.mean) / self.std
        draw = int(examples[0].get("draw", 0))
        generator = torch.Generator().manual_seed(draw)
        if self.shift:
            pixels = _shifted(pixels, self.shift, (0 - self.mean) / self.std, generator)
        if self.flip:
            flipped = torch.rand(len(pixels), generator=generator) < self.flip
            pixels[flipped] = pixels[flipped].flip(-1)
        if self.mixup is not None and len(pixels) % 2 == 0:
            with drawn_from(draw):
                pixels, labels = self.mixup(pixels, labels)
        return {"pixel_values": pixels, "labels": labels}


def _shifted(pixels: Tensor, most: int, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels either way."""
    n, c, h, w = pixels.shape
    wide = fill.expand(n, c, h + 2 * most, w + 2 * most).clone()
    wide[:, :, most : most + h, most : most + w] = pixels
    y, x = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    rows = (y[:, None] + torch.arange(h))[:, None, :, None]
    columns = (x[:, None] + torch.arange(w))[:, None, None, :]
    return wide[torch.arange(n)[:, None, None, None], torch.arange(c)[None, :, None, None], rows, columns]


def make_mixup(data: DataSection, num_classes: int, smoothing: float) -> Mixup | None:
    """timm's Mixup, if the recipe has any; label smoothing is then in its soft labels."""
    if not data.mixup and not data.cutmix:
        return None
    return Mixup(data.mixup, data.cutmix, label_smoothing=smoothing, num_classes=num_classes)


class ClassificationTrainer(RecalibratedTrainer):
    """RecalibratedTrainer on labelled images. `attach` comes before `train`."""

    section: ModelSection
    train_batches: Batches
    plain_batches: Batches
    average: WeightAverage | None = None

    def attach(self, section: ModelSection, train_batches: Batches, plain_batches: Batches) -> None:
        """What the recipe's `model` section says of training, and how its images become batches, with and without moving them."""
        self.section, self.train_batches, self.plain_batches = section, train_batches, plain_batches
        self.recalibrate = section.recalibrate_batchnorm
        # Its loss is a mean, which Trainer has to divide by the accumulation's length.
        self.model_accepts_loss_kwargs = False
        images: Any = self.train_dataset
        images.seed = data_seed(self.args)
        self.add_callback(SetEpoch(images))
        if section.average_decay is not None:
            self.average = WeightAverage(self, section.average_decay)
            self.add_callback(self.average)

    def get_train_dataloader(self) -> Any:
        # Trainer has one collator for all; this one moves and mixes images, which no evaluation may.
        own, self.data_collator = self.data_collator, self.train_batches
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = own

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.section.optimizer is None or self.optimizer is not None:
            return super().create_optimizer(model)
        assert self.model is not None
        self.optimizer = make_optimizer(self.section, model or self.model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.section.schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = make_schedule(
            self.section,
            optimizer or self.optimizer,
            steps=num_training_steps,
            warmup=self.args.get_warmup_steps(num_training_steps),
            rate=self.args.learning_rate,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Cross entropy with whole or soft labels; label smoothing is of whole ones only, in training."""
        outputs = model(pixel_values=inputs["pixel_values"])
        labels = inputs["labels"]
        smoothing = self.args.label_smoothing_factor if model.training and labels.ndim == 1 else 0.0
        loss = F.cross_entropy(outputs.logits, labels, label_smoothing=smoothing)
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def plain_batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Images as evaluation sees them."""
        images: Any = self.train_dataset
        assert isinstance(images, Images)
        plain = images.plain()
        return {"pixel_values": self.plain_batches([plain[int(i)] for i in indices])["pixel_values"]}

    def differs_when_finished(self) -> bool:
        return self.average is not None or super().differs_when_finished()

    def finish(self) -> None:
        """The average, if there is one, with its batch norms estimated anew, if that is asked for."""
        assert self.model is not None
        if self.average is not None:
            self.model.load_state_dict(self.average.state())
        super().finish()

    def keep_finished_weights(self) -> None:
        super().keep_finished_weights()
        self.average = None


class WeightAverage(TrainerCallback):
    """timm's average of the weights, in which masked weights are 0 as they are in the model. Saved with every checkpoint."""

    def __init__(self, trainer: ClassificationTrainer, decay: float) -> None:
        self.trainer = trainer
        self.decay = decay
        self.average: ModelEmaV3 | None = None
        self.resume: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer.model is not None
        self.average = ModelEmaV3(self.trainer.model, decay=self.decay, use_warmup=True)
        if self.resume is not None:
            path = self.resume / AVERAGE
            if not path.is_file():
                raise GaPError(f"{path}: is not there; expected the average that model.average_decay keeps")
            self.average.module.load_state_dict(load_file(path))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.average is not None and self.trainer.model is not None
        self.average.update(self.trainer.model, step=state.global_step)
        self._mask()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                part = folder / f".{AVERAGE}.part"
                save_file({name: value.contiguous() for name, value in self.state().items()}, part)
                shutil.move(part, folder / AVERAGE)

    def state(self) -> dict[str, Tensor]:
        """The averaged model's state, by the model's own names."""
        assert self.average is not None
        self._mask()
        return self.average.module.state_dict()

    def _mask(self) -> None:
        gap = self.trainer.gap
        if gap is None:
            return
        assert self.average is not None
        params = dict(self.average.module.named_parameters())
        with torch.no_grad():
            for name in gap.masks:
                if (mask := gap.masks[name]) is not None:
                    params[name].masked_fill_(mask == 0, 0)
