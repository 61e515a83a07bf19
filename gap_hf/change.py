"""What a change of masks did, and the sums over tensors that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gap_hf.largest import CHUNK
from gap_hf.phases import Phase, Update
from gap_hf.shards import Part, exchange, total_counts


@dataclass(frozen=True)
class Change:
    """What happened between two optimizer steps.

    Attributes:
        step: Optimizer steps done before it.
        phase: The phase that it belongs to.
        begins_phase: True if the phase begins here.
        pruned, grown: Groups that were pruned or grown; a group whose weights were exchanged is in both.
        sparsity: Share of zeros of the prunable set after the change.
        model_sparsity: The same over all parameters of the model.
        pruning_error: ``|W - m W|^2 / |W|^2`` over the weights just pruned, None if none were.
        mask_iou: Intersection over union of the new masks with those that they replace or, of tensors that were grown
            meanwhile, with those of their last prune; None without any. Prunes inside a grown group's phase do not count.
    """

    step: int
    phase: Phase
    begins_phase: bool
    pruned: tuple[int, ...]
    grown: tuple[int, ...]
    sparsity: float
    model_sparsity: float
    pruning_error: float | None
    mask_iou: float | None


class Tally:
    """Sums over the tensors of one change; tensors are the parts that lie here, sums those of the whole. On all ranks."""

    def __init__(self) -> None:
        self.pruned: set[int] = set()
        self.grown: set[int] = set()
        self._norm: list[float] = []
        self._dropped: list[float] = []
        self._overlap = self._union = 0

    def note(self, update: Update) -> None:
        """Note which groups an update prunes and grows; an exchange is both."""
        if update.prune_to is not None or update.drop:
            self.pruned.update(update.groups)
        if update.grow_to is not None:
            self.grown.update(update.groups)

    def drop(self, param: Tensor, mask: Tensor, part: Part) -> None:
        """Note what a mask will take from a weight, which it has not yet been applied to."""
        norm = float(torch.linalg.vector_norm(param, dtype=_sum_dtype(param))) ** 2
        # In chunks: a masked copy of the whole would double what a prune of bf16 weights needs.
        chunks = zip(param.reshape(-1).split(CHUNK), mask.reshape(-1).split(CHUNK), strict=True)
        dropped = [
            float(torch.linalg.vector_norm(p.masked_fill(m == 1, 0), dtype=_sum_dtype(p))) ** 2 for p, m in chunks
        ]
        norms, losses = exchange([norm, math.fsum(dropped)], [part, part])
        self._norm += norms
        self._dropped += losses

    def compare(self, old: Tensor, new: Tensor, part: Part) -> None:
        """Note how far two masks of a weight agree; the older may lie where the weight was before it was moved."""
        old = old.to(new.device)
        overlap, union = total_counts([int((old & new).sum()), int((old | new).sum())], [part, part])
        self._overlap += overlap
        self._union += union

    @property
    def pruning_error(self) -> float | None:
        """``|W - m W|^2 / |W|^2`` over what was pruned, None if nothing was."""
        if not self._norm:
            return None
        norm = math.fsum(self._norm)
        return math.fsum(self._dropped) / norm if norm else 0.0

    @property
    def mask_iou(self) -> float | None:
        return self._overlap / self._union if self._union else None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
