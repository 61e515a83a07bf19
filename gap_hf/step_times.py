"""How long an optimizer step takes on this machine, dense and under masks: measured, with the recipe's model and made-up data.

What a step is made of is real: forward, backward, what grow-and-prune adds, clipping, the optimizer. Batches come from
memory, so loading data, evaluating and saving are not in it, nor are changes of masks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gap_hf.config import GaPConfig
from gap_hf.memory import enable_checkpointing
from gap_hf.optimizer_state import unwrap
from gap_hf.packed_gradients import PackedGradients
from gap_hf.sparse_layers import sparse_compute
from gap_hf.sparsifier import Sparsifier

WARM_UP, MEASURED = 1, 3


class StepTimer:
    """Measures steps of one model.

    Args:
        make_model: Gives the model, with weights.
        make_batch: Gives what the model is called with, such as ``{"input_ids": …, "labels": …}``.
        make_optimizer: Gives the optimizer of a list of parameters.
        config: Of grow-and-prune, not P-GaP.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Needed where the config goes by epochs.
        accumulation: Micro-batches of a step.
        autocast: Type that products are made in; None: that of the weights.
        clips: Gradients are clipped before the step.
        checkpointing: Activations are computed again in backward.
        device: Where it is measured.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_batch: Callable[[nn.Module], dict[str, Any]],
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        config: GaPConfig,
        *,
        total_steps: int,
        steps_per_epoch: Any = None,
        accumulation: int = 1,
        autocast: torch.dtype | None = None,
        clips: bool = True,
        checkpointing: bool = False,
        device: str = "cpu",
    ) -> None:
        self._model: Any = make_model().to(device).train()
        if checkpointing:
            enable_checkpointing(self._model)
        self._batch = {key: value.to(device) for key, value in make_batch(self._model).items()}
        self._make_optimizer, self._config = make_optimizer, config
        self._lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        self._accumulation, self._autocast, self._clips, self._device = accumulation, autocast, clips, device
        self._params = [p for p in self._model.parameters() if p.requires_grad]
        self._sparsifier: Sparsifier | None = None

    def dense(self) -> float:
        """Seconds of a step of plain Trainer: the shortest of some, to which other programs added least."""
        return self._shortest(self._make_optimizer(self._params), None, None)

    def sparse(self, levels: Sequence[float]) -> float:
        """Seconds of a step where each group has one of these levels, 0 (dense) to 1 (its target), with random masks."""
        if self._sparsifier is None:
            optimizer = self._make_optimizer(self._params)
            self._sparsifier = Sparsifier(self._model, self._config, optimizer=optimizer, **self._lengths)
        gap = self._sparsifier
        masks = {
            name: gap.selection.at_random(name, level) if level > 0 else None
            for group, level in zip(gap.groups, levels, strict=True)
            for name in group.names
        }
        gap.load(0, masks, {}, levels=levels, num_done=len(gap.plan.updates))
        with ExitStack() as stack:
            gradients = None
            if self._config.live_state:
                gradients = PackedGradients(gap, clips=False)
                stack.callback(gradients.detach)
            if self._config.sparse_compute:
                stack.enter_context(sparse_compute(gap))
            return self._shortest(gap.optimizer, gap, gradients)

    def _shortest(self, optimizer: Any, gap: Sparsifier | None, gradients: PackedGradients | None) -> float:
        seconds = []
        for _ in range(WARM_UP + MEASURED):
            begin = time.perf_counter()
            self._step(unwrap(optimizer), gap, gradients)
            if self._device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return min(seconds[WARM_UP:])

    def _step(self, optimizer: Optimizer, gap: Sparsifier | None, gradients: PackedGradients | None) -> None:
        kind = torch.device(self._device).type
        for _ in range(self._accumulation):
            with nullcontext() if gradients is None else gradients.packing():
                with nullcontext() if self._autocast is None else torch.autocast(kind, self._autocast):
                    loss = self._model(**self._batch).loss / self._accumulation
                loss.backward()
        if gap is not None:
            gap.mask_gradients()
        if self._clips:
            nn.utils.clip_grad_norm_(self._params if gradients is None else gradients.stand_ins(self._params), 1.0)
        optimizer.step()
        if gap is not None:
            gap.mask_weights()
        optimizer.zero_grad()
