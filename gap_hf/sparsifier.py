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

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from gap_hf import optimizer_state
from gap_hf.allocation import make_groups
from gap_hf.change import Change, Tally
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.kept_state import follow_load, own_state
from gap_hf.masks import Masks
from gap_hf.phases import PARALLEL, Update
from gap_hf.plan import Plan, make_plan
from gap_hf.selection import Selection
from gap_hf.shards import local, reshard, total_counts
from gap_hf.targets import PrunableWeight, clean_name, find_targets
from gap_hf.workers import OneWorker


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
        workers: Who trains the replicas of method ``parallel``.

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
        workers: OneWorker | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.seed = config.seed if config.seed is not None else seed
        reshard(model)
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
        self.workers = workers or OneWorker()
        if self.workers.num != self.plan.num_workers:
            raise GaPError(
                f"gap.method: '{config.method}' with {self.plan.num_workers} groups needs as many workers, found "
                f"{self.workers.num}; use GaPTrainer, or pass workers="
            )
        params = {clean_name(n): p for n, p in model.named_parameters()}
        self.masks = Masks({name: params[name] for name in self.weights})
        self.optimizer = optimizer
        self.selection = Selection(self.targets, config, self.masks.params, seed=self.seed)
        self.num_params = sum(p.numel() for p in model.parameters())
        # Masks of the last prune of tensors that were grown since, only to measure how much the next one differs.
        self.previous: dict[str, Tensor] = {}
        self.phase, self.step = self.plan.phases[0], 0  # optimizer steps done
        # Updates of the plan that are done; one that needs gradients waits for the next backward.
        self.levels, self.num_done = list(self.plan.first_levels), 0

    @property
    def optimizer(self) -> Any:
        """The optimizer, or what stands for it, such as a `LiveState`."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self._optimizer = own_state(optimizer, self.config, self.masks)

    # --- the run -----------------------------------------------------------------------------------------------------

    def start(self, *, masks: Masks | Mapping[str, Tensor] | None = None) -> Change:
        """Give every group its first masks, those of its first level: none for a group that starts dense.

        Args:
            masks: Those of an earlier run on the same weights, such as `gap_hf.load_masks` gives; they are kept where they exist
                and other tensors are pruned by magnitude, because random masks would destroy what was learned.
        """
        self.phase, self.step = self.plan.phases[0], 0
        self.levels, self.num_done = list(self.plan.first_levels), 0
        earlier = self.masks.adopted(masks)
        for group, level in zip(self.groups, self.levels, strict=True):
            fresh = [n for n in group.names if n not in earlier]
            for name in group.names:
                if name in earlier:
                    self._set_mask(name, earlier[name])
            if level == 0:
                continue
            if masks is not None or self.config.initial_mask == "magnitude":
                for name, mask in self.selection.by_magnitude(fresh, level).items():
                    self._set_mask(name, mask)
            else:
                for name in fresh:
                    self._set_mask(name, self.selection.at_random(name, level))
        tally = Tally()
        for g in (g for g, level in enumerate(self.levels) if level == 0):
            tally.grown.add(g)
            for name in self.groups[g].names:
                self._grow(name)
        self._do_due(0, tally, begins=True)
        return self._change(0, tally, begins_phase=True)

    def advance(self, step: int) -> Change | None:
        """Do what the plan has between optimizer steps `step` - 1 and `step`: prune, grow, begin a phase.

        Call it after each step with the number of steps done. Updates that need gradients follow in the next
        `mask_gradients`. Returns what changed, or None.
        """
        if step == 0:
            return None
        begins, tally = self.plan.begins_at(step) is not None, Tally()
        self.phase, self.step = self.plan.phase_at(step), step
        self._do_due(step, tally, begins=begins)
        if begins:
            optimizer_state.follow_restart(self.optimizer, self.config.optimizer_reset)
        if not begins and not tally.pruned and not tally.grown:
            return None
        return self._change(step, tally, begins_phase=begins)

    def mask_gradients(self) -> Change | None:
        """Zero the gradients of masked weights. Call before clipping, on fully accumulated gradients.

        Masks that change by gradient change here, where it is still dense, if the plan has that for the step at hand;
        if a gradient is not finite they wait for the next step. Returns what changed, or None.
        """
        change = None
        if (update := self._overdue()) is not None and self._gradients_are_finite(update):
            tally = Tally()
            self._apply(update, tally, final=False)
            tally.note(update)
            self.num_done += 1
            change = self._change(self.step, tally, begins_phase=False)
        self.masks.apply_to_gradients()
        return change

    def mask_weights(self) -> None:
        """Zero masked weights, and the optimizer's own copies of them. Call after every optimizer step."""
        optimizer_state.mask_weights(self.optimizer, self.masks)
        optimizer_state.mask_weight_copies(self.optimizer, self.masks.sparse_params())

    def prune_to_target(self) -> float | None:
        """Prune whatever is not at its target, for a run that ends before its fine-tune. Returns the pruning error."""
        reshard(self.model)
        tally = Tally()
        for group, level in enumerate(self.levels):
            if level < 1:
                self._prune(self.groups[group].names, 1.0, tally, compare=True)
                self.levels[group] = 1.0
        return tally.pruning_error

    @property
    def needs_dense_gradients(self) -> bool:
        """True if the step at hand chooses what grows by gradient, so that masked weights' gradients must be whole."""
        return self._overdue() is not None

    @property
    def at_target(self) -> bool:
        """True if every group is at its target, as from the start of the fine-tune on."""
        return all(level == 1 for level in self.levels)

    def load(
        self,
        step: int,
        masks: Mapping[str, Tensor | None],
        previous: Mapping[str, Tensor],
        *,
        levels: Sequence[float],
        num_done: int,
    ) -> None:
        """Continue at `step` with what a checkpoint recorded: whole masks (uint8, None for dense) and the attributes."""
        assert masks.keys() == self.weights.keys() and len(levels) == len(self.groups)
        self.phase, self.step = self.plan.phase_at(step), step
        self.levels, self.num_done = list(levels), num_done
        reshard(self.model)
        parts, params = self.masks.parts, self.masks.params
        for name, mask in masks.items():
            self.masks.set(name, None if mask is None else parts[name].cut(mask))
        self.previous = {n: parts[n].cut(m).to(params[n].device) for n, m in previous.items()}
        follow_load(self.optimizer, self.masks)

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
        return {
            "sparsity": self.sparsity(),
            "model_sparsity": self.model_sparsity(),
            "num_prunable": sum(w.numel for w in self.weights.values()),
            "num_params": self.num_params,
            "at_target": self.at_target,
            "layers": [{"name": n, "shape": list(w.shape), **self.masks.counts(n)} for n, w in self.weights.items()],
        }

    # --- one update at a time ----------------------------------------------------------------------------------------

    def _due(self, step: int) -> Update | None:
        """The next update of the plan, if it belongs before optimizer step `step`."""
        updates = self.plan.updates
        return updates[self.num_done] if self.num_done < len(updates) and updates[self.num_done].step <= step else None

    def _overdue(self) -> Update | None:
        """The update by gradient that is due now; of several that had to wait the last, and none in the fine-tune."""
        while (update := self._due(self.step)) is not None and update.grow_by == "gradient":
            replaced = any(u.step <= self.step for u in self.plan.updates[self.num_done + 1 : self.num_done + 2])
            if self.step < self.plan.fine_tune.start and not replaced:
                return update
            self.num_done += 1
        return None

    def _do_due(self, step: int, tally: Tally, *, begins: bool) -> None:
        """Do the updates before optimizer step `step`, but for one by gradient; in a parallel phase, in each replica."""
        workers = self.workers
        while (update := self._due(step)) is not None and update.grow_by != "gradient":
            if update.merge:
                workers.merge(self)
                optimizer_state.follow_restart(self.optimizer, self.config.optimizer_reset)
            else:
                if update.worker is not None and not workers.apart:
                    workers.fork(self)
                for worker in workers.each(self, update):
                    self._apply(update, tally if worker == workers.reporter else Tally(), final=begins)
                tally.note(update)  # other workers' own groups too, though not how it came out
            self.num_done += 1
        if self.phase.kind == PARALLEL and not workers.apart:
            workers.fork(self)
        workers.activate(self, workers.reporter)

    def _apply(self, update: Update, tally: Tally, *, final: bool) -> None:
        """Do one update. `final` prunes are compared with the last ones; those inside a phase are on their way."""
        names = [n for g in update.groups for n in self.groups[g].names]
        exchanges = update.grow_to is not None and update.grow_to > 0
        before = {n: self.masks[n] for n in names} if exchanges else {}
        if update.prune_to is not None:
            self._prune(names, update.prune_to, tally, compare=final and not exchanges)
        if exchanges:
            self._regrow(names, update, tally)
        elif update.grow_to == 0:
            for name in names:
                self._grow(name)
        for name, old in before.items():
            if old is not None and (new := self.masks[name]) is not None:
                tally.compare(old, new, self.masks.parts[name])
        for group in update.groups:
            self.levels[group] = update.level

    def _grow(self, name: str) -> None:
        """Make a tensor dense. No value changes: what was pruned goes on from exactly 0."""
        mask = self.masks[name]
        if mask is None:
            return
        optimizer_state.follow_growth(self.optimizer, self.masks.params[name], mask, self.config.optimizer_reset)
        self.previous[name] = mask
        self.masks.set(name, None)

    def _prune(self, names: Sequence[str], level: float, tally: Tally, *, compare: bool) -> None:
        """Prune tensors to a level, pooled where the distribution says so."""
        level_of = {n: group_level for g, group_level in zip(self.groups, self.levels, strict=True) for n in g.names}
        new = self.selection.by_magnitude(
            names,
            level,
            masks={n: self.masks[n] for n in names},
            pool_target=self.selection.rest_of_the_pool(names, self.masks, level_of),
        )
        for name in names:
            tally.drop(local(self.masks.params[name]).detach(), new[name], self.masks.parts[name])
            if compare and (last := self.previous.pop(name, self.masks[name])) is not None:
                tally.compare(last, new[name], self.masks.parts[name])
            self._set_mask(name, new[name])

    def _regrow(self, names: Sequence[str], update: Update, tally: Tally) -> None:
        """Grow weights of sparse tensors, after a drop if there is one. No value changes but of what was dropped."""
        # A tensor that the loss did not reach has no gradient to choose by.
        params = self.masks.params
        known = [n for n in names if update.grow_by != "gradient" or params[n].grad is not None]
        old = {n: mask for n in known if (mask := self.masks[n]) is not None}
        for name, mask in self.selection.regrown(old, update).items():
            if update.drop:
                tally.drop(local(params[name]).detach(), mask, self.masks.parts[name])
            # Survivors and what grows now: everything that was masked starts from fresh moments.
            optimizer_state.follow_growth(self.optimizer, params[name], old[name], self.config.optimizer_reset)
            self._set_mask(name, mask)

    def _gradients_are_finite(self, update: Update) -> bool:
        params = {n: self.masks.params[n] for g in update.groups for n in self.groups[g].names}
        bad = {n: int(not local(p.grad).isfinite().all()) for n, p in params.items() if p.grad is not None}
        return not any(total_counts(list(bad.values()), [self.masks.parts[n] for n in bad]))

    def _set_mask(self, name: str, mask: Tensor | None) -> None:
        self.masks.set(name, mask)
        if (mask := self.masks[name]) is not None:
            optimizer_state.follow_mask(self.optimizer, self.masks.params[name], mask, self.config.optimizer_reset)

    def _change(self, step: int, tally: Tally, *, begins_phase: bool) -> Change:
        reshard(self.model)
        return Change(
            step=step,
            phase=self.phase,
            begins_phase=begins_phase,
            pruned=tuple(sorted(tally.pruned)),
            grown=tuple(sorted(tally.grown)),
            sparsity=self.sparsity(),
            model_sparsity=self.model_sparsity(),
            pruning_error=tally.pruning_error,
            mask_iou=tally.mask_iou,
        )
