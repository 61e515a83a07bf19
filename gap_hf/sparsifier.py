"""`Sparsifier`: grow-and-prune on a model, in any PyTorch loop. No Trainer, no files.

sparsifier = Sparsifier(model, GaPConfig(sparsity=0.9), total_steps=len(batches), optimizer=optimizer)
sparsifier.start()
for step, batch in enumerate(batches):
    loss_of(model, batch).backward()
    sparsifier.mask_gradients()          # before clipping, so that the norm is of live gradients
    optimizer.step()
    sparsifier.mask_weights()
    optimizer.zero_grad()
    sparsifier.advance(step + 1)         # grows and prunes where a phase begins
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from gap_hf.allocation import keep_counts, make_groups
from gap_hf.config import GaPConfig, parse_pattern
from gap_hf.masks import Masks
from gap_hf.optimizer_state import clear_grown, clear_pruned, reset_all, unwrap, weight_copies
from gap_hf.patterns import (
    CHUNK,
    magnitude_mask,
    num_kept,
    num_units,
    pooled_masks,
    random_mask,
)
from gap_hf.phases import Phase
from gap_hf.plan import Plan, make_plan
from gap_hf.targets import PrunableWeight, clean_name, find_targets


@dataclass(frozen=True)
class Change:
    """What happened where a phase began.

    Attributes:
        step: Optimizer steps done before it.
        phase: The phase that begins.
        sparsity: Share of zeros of the prunable set after the change.
        model_sparsity: The same over all parameters of the model.
        pruning_error: ``|W - m W|^2 / |W|^2`` over the weights just pruned (method.md section 8), None if none were.
        mask_iou: Intersection over union of the new masks with those of the groups' last prune, None without one.
    """

    step: int
    phase: Phase
    sparsity: float
    model_sparsity: float
    pruning_error: float | None
    mask_iou: float | None


class Sparsifier:
    """Masks on a model, changed on a plan.

    Args:
        model: Any module; weights are found by `gap_hf.targets` and keyed by name.
        config: Any method but ``dense``.
        total_steps: Length of training in optimizer steps.
        steps_per_epoch: Needed for `phase_epochs` only.
        optimizer: Whose moments follow the masks; may be set later through `self.optimizer`.
        seed: Used where `config.seed` is None.
        plan: A recorded plan, to continue a run; otherwise it is made.

    Raises:
        GaPError: if nothing is prunable, the pattern does not divide a weight, or training is too short.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GaPConfig,
        *,
        total_steps: int,
        steps_per_epoch: Fraction | float | None = None,
        optimizer: Any = None,
        seed: int = 0,
        plan: Plan | None = None,
    ) -> None:
        self.model, self.config, self.optimizer = model, config, optimizer
        self.seed = config.seed if config.seed is not None else seed
        self.pattern = parse_pattern(config.pattern)
        self.targets = find_targets(model, config)
        self.weights: dict[str, PrunableWeight] = {w.name: w for w in self.targets.weights}
        self.groups = make_groups(self.targets, config, seed=self.seed)
        self.plan = plan or make_plan(
            config,
            num_groups=len(self.groups),
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            seed=self.seed,
        )
        self._counts = keep_counts(self.targets, config)
        params = {clean_name(n): p for n, p in model.named_parameters()}
        self.masks = Masks({name: params[name] for name in self.weights})
        self.num_params = sum(p.numel() for p in model.parameters())
        # Masks of the last prune of tensors that are dense now, only to measure how much the next one differs.
        self.previous: dict[str, Tensor] = {}
        self.phase = self.plan.phases[0]

    # --- the run -----------------------------------------------------------------------------------------------------

    def start(self, *, masks: Masks | None = None) -> Change:
        """Give every group its first masks: the groups of phase 0 dense, the others sparse.

        Args:
            masks: Those of an earlier run on the same weights; they are kept where they exist and trained dense
                tensors are pruned by magnitude, because random masks would destroy what was learned.
        """
        self.phase = self.plan.phases[0]
        for index, group in enumerate(self.groups):
            if index in self.phase.grown:
                continue
            fresh = [n for n in group.names if masks is None or masks[n] is None]
            for name in group.names:
                if name not in fresh and masks is not None:
                    self._set_mask(name, masks[name])
            if masks is not None or self.config.initial_mask == "magnitude":
                self._prune(fresh)
            else:
                for name in fresh:
                    self._set_mask(name, self._random_mask(name))
        for index in self.phase.grow:
            for name in self.groups[index].names:
                if masks is not None and masks[name] is not None:
                    self.masks.set(name, masks[name])
                self._grow(name)
        return self._change(0, None, None)

    def advance(self, step: int) -> Change | None:
        """Prune and grow if a phase begins after `step` optimizer steps; otherwise do nothing.

        Call it after each step with the number of steps done. Returns what changed, or None.
        """
        phase = self.plan.begins_at(step)
        if phase is None or step == 0:
            return None
        if self.config.optimizer_reset == "all" and self.optimizer is not None:
            reset_all(unwrap(self.optimizer))
        self.phase = phase
        error, iou = self._prune([name for g in phase.prune for name in self.groups[g].names])
        for g in phase.grow:
            for name in self.groups[g].names:
                self._grow(name)
        return self._change(step, error, iou)

    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights. Call before clipping, on fully accumulated gradients."""
        self.masks.apply_to_gradients()

    def mask_weights(self) -> None:
        """Zero masked weights, and the optimizer's own copies of them. Call after every optimizer step."""
        self.masks.apply_to_weights()
        if self.optimizer is not None:
            self._mask_copies()

    def prune_to_target(self) -> float | None:
        """Prune whatever is dense now, for a run that ends before its fine-tune. Returns the pruning error."""
        dense = [name for name in self.weights if self.masks[name] is None]
        return self._prune(dense)[0]

    @property
    def at_target(self) -> bool:
        """True if every prunable tensor has its mask, as from the start of the fine-tune on."""
        return all(self.masks[name] is not None for name in self.weights)

    def load(self, step: int, masks: dict[str, Tensor | None], previous: dict[str, Tensor]) -> None:
        """Continue at `step` with recorded masks (uint8, None for dense) and last-prune masks of dense tensors."""
        assert masks.keys() == self.weights.keys()
        self.phase = self.plan.phase_at(step)
        for name, mask in masks.items():
            self.masks.set(name, mask)
        self.previous = {n: m.to(self.masks.params[n].device) for n, m in previous.items()}

    # --- what a report needs -----------------------------------------------------------------------------------------

    def sparsity(self) -> float:
        """Share of masked weights of the prunable set, now."""
        return self.masks.sparsity()

    def model_sparsity(self) -> float:
        """Share of masked weights among all parameters of the model, now."""
        masked = sum(w.numel - self.masks.live(w.name) for w in self.weights.values())
        return masked / self.num_params

    def report(self) -> dict[str, Any]:
        """Counts per layer and in all, from the masks: plain data."""
        layers = []
        for weight in self.weights.values():
            live = self.masks.live(weight.name)
            layers.append(
                {
                    "name": weight.name,
                    "shape": list(weight.shape),
                    "numel": weight.numel,
                    "live": live,
                    "sparsity": 1 - live / weight.numel,
                }
            )
        return {
            "sparsity": self.sparsity(),
            "model_sparsity": self.model_sparsity(),
            "num_prunable": sum(w.numel for w in self.weights.values()),
            "num_params": self.num_params,
            "at_target": self.at_target,
            "layers": layers,
        }

    # --- one tensor at a time ----------------------------------------------------------------------------------------

    def _grow(self, name: str) -> None:
        """Make a tensor dense. No value changes: what was pruned goes on from exactly 0."""
        mask = self.masks[name]
        if mask is None:
            return
        if self.optimizer is not None and self.config.optimizer_reset == "changed":
            clear_grown(unwrap(self.optimizer), self.masks.params[name], mask)
        self.previous[name] = mask
        self.masks.set(name, None)

    def _prune(self, names: Sequence[str]) -> tuple[float | None, float | None]:
        """Prune dense tensors to their target, pooled where the distribution says so.

        Returns the pruning error and the IoU with the tensors' last masks, None where there is nothing to measure.
        """
        if not names:
            return None, None
        before = self._norm_squared(names)
        new = self._magnitude_masks(names)
        dropped = 0.0
        overlap = union = 0
        for name in names:
            dropped += _dropped_norm_squared(self.masks.params[name].detach(), new[name])
            if (last := self.previous.pop(name, None)) is not None:
                overlap += int((last & new[name]).sum())
                union += int((last | new[name]).sum())
            self._set_mask(name, new[name])
        return (dropped / before if before else 0.0), (overlap / union if union else None)

    def _set_mask(self, name: str, mask: Tensor | None) -> None:
        self.masks.set(name, mask)
        mask = self.masks[name]
        if mask is None or self.optimizer is None:
            return
        if self.config.optimizer_reset == "changed":
            clear_pruned(unwrap(self.optimizer), self.masks.params[name], mask)
        self._mask_copies()

    @torch.no_grad()
    def _mask_copies(self) -> None:
        optimizer = unwrap(self.optimizer)
        for param, mask in self.masks.sparse_params():
            for copy in weight_copies(optimizer, param):
                copy.mul_(mask)

    def _magnitude_masks(self, names: Sequence[str]) -> dict[str, Tensor]:
        pooled = [n for n in names if self.config.distribution == "global" and self.weights[n].override is None]
        masks: dict[str, Tensor] = {}
        if pooled:
            units = sum(num_units(self.weights[n].shape, self.pattern) for n in pooled)
            found = pooled_masks(
                [self.masks.params[n] for n in pooled],
                self.pattern,
                num_kept(self.config.target, units),
                [self.weights[n].layout for n in pooled],
                pooled,
            )
            masks.update(zip(pooled, found, strict=True))
        for name in names:
            if name not in masks:
                weight = self.weights[name]
                param = self.masks.params[name].detach()
                masks[name] = magnitude_mask(param, self.pattern, self._counts[name], weight.layout, name)
        return masks

    def _random_mask(self, name: str) -> Tensor:
        """From (seed, name) and a generator of its own: equal on every rank, and no draw from the global one."""
        weight = self.weights[name]
        digest = hashlib.sha256(f"gap_hf initial mask {self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return random_mask(weight.shape, self.pattern, self._counts[name], weight.layout, generator)

    def _norm_squared(self, names: Sequence[str]) -> float:
        params = [self.masks.params[n].detach() for n in names]
        return math.fsum(float(torch.linalg.vector_norm(p, dtype=_sum_dtype(p))) ** 2 for p in params)

    def _change(self, step: int, error: float | None, iou: float | None) -> Change:
        return Change(step, self.phase, self.sparsity(), self.model_sparsity(), error, iou)


def _dropped_norm_squared(param: Tensor, mask: Tensor) -> float:
    """|W - m W|^2, in chunks: a masked copy of the whole would double what a prune of bf16 weights needs."""
    parts = zip(param.reshape(-1).split(CHUNK), mask.reshape(-1).split(CHUNK), strict=True)
    norms = (torch.linalg.vector_norm(p.masked_fill(m == 1, 0), dtype=_sum_dtype(p)) for p, m in parts)
    return math.fsum(float(norm) ** 2 for norm in norms)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
