"""GaPTrainer with COCO's figures in its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from _detection.data import Sample
from _detection.scoring import average_precision, detect
from gap_hf import GaPTrainer


class DetectionTrainer(GaPTrainer):
    """Evaluations add `map`, `map_50` and `map_75` of the scored split to the loss.

    The outputs of a detection model are large (of SSD300 on COCO 0.7 million scores for each image), so detections
    are taken out of each batch, and only they are kept.

    Attributes:
        found: Detections of each image id, from the last evaluation.
        figures: All figures of the last evaluation (`average_precision`).
    """

    load_renamed_weights = True  # a dense DETR is resumed too
    samples: Sequence[Sample] = ()
    names: Sequence[str] = ()
    classes: Sequence[int] = ()

    def score_on(self, samples: Sequence[Sample], names: Sequence[str], classes: Sequence[int]) -> None:
        """Which samples evaluations are about, the names of their classes, and the model's indices of these."""
        self.samples, self.names, self.classes = samples, names, classes
        self.found: dict[int, dict[str, np.ndarray]] = {}
        self.figures: dict[str, Any] = {}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, None, None]:
        """Trainer's, with detections kept instead of outputs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        images = detect(self.accelerator.unwrap_model(model), outputs, self.classes)
        self.found.update(
            (int(label["image_id"]), image) for label, image in zip(inputs["labels"], images, strict=True)
        )
        return outputs.loss.detach().mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's, with the figures of the whole split, the same on every process."""
        self.found = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Images that several processes had, to fill up their last batch, count once.
        self.found = dict(gather_object(list(self.found.items())))
        self.figures = average_precision(self.samples, self.found, self.names)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self.figures.items() if k != "per_class"})
        return output
