"""The one callback that a GaP trainer adds: Trainer's events turned into calls of the trainer's own methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from gap_hf.trainer import GaPMixin


class GaPCallback(TrainerCallback):
    """Tells the trainer where it is; first in the list, so that others see weights that obey their masks."""

    def __init__(self, trainer: GaPMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._gap_begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gap = self.trainer._gap_sparsifier
        gap.workers.begin_step()
        gap.masks.writes += 1
        self.trainer._gap_report_start()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._gap_sparsifier.mask_weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._gap_clear_gradients()  # those of a step that was left out; Trainer has just set the others to None
        self.trainer._gap_advance()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._gap_leave_gradients()
        self.trainer._gap_end()
