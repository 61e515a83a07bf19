"""Which weights of a model live at a level: counts, pools, structure, and what a drop and regrowth leaves.

Between the patterns, which know one tensor or one pool, and the sparsifier, which knows the run. Of a sharded weight, masks
are of the part that lies here, counts of the whole, and every choice is made on all ranks: it is the one that a single
process would make.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from gap_hf.allocation import keep_counts
from gap_hf.config import GaPConfig
from gap_hf.masks import Masks
from gap_hf.methods import get_method
from gap_hf.pattern_names import Pattern, parse_pattern
from gap_hf.patterns import magnitude_mask, num_kept, num_units, pooled_masks, random_mask
from gap_hf.phases import Update, round_half_up
from gap_hf.shards import exchange, local, part_of, total_counts
from gap_hf.targets import Targets

# A survivor's score in a regrowth, where what may grow has at most 1. More than the 8 that a 4x4 tile can gain by
# growing, so that no choice of a transposable mask trades a survivor away.
_SURVIVOR = 16.0


class Selection:
    """Masks for the prunable weights of a model, all of the config's pattern, distribution and target.

    Args:
        targets: The prunable weights.
        config: Pattern, distribution, target and overrides.
        params: The parameter of each prunable weight by name; read, never changed.
        seed: Of random masks.

    Raises:
        GaPError: if the pattern does not divide a weight.
    """

    def __init__(self, targets: Targets, config: GaPConfig, params: Mapping[str, nn.Parameter], *, seed: int) -> None:
        self.config, self.params, self.seed = config, params, seed
        self.parts = {n: part_of(p, n) for n, p in params.items()}
        # What magnitudes are taken of: the part of a weight that lies here, in more digits where there are some.
        self.value_of: Callable[[nn.Parameter], Tensor] = lambda param: local(param).detach()
        self.pattern = parse_pattern(config.pattern)
        self.weights = {w.name: w for w in targets.weights}
        self._counts = keep_counts(targets, config)
        self._draws_from_one_pool = config.distribution == "global" and get_method(config.method).GROUPS == "tensor"

    def by_magnitude(
        self,
        names: Sequence[str],
        level: float = 1.0,
        *,
        masks: Mapping[str, Tensor | None] | None = None,
        pool_target: int | None = None,
    ) -> dict[str, Tensor]:
        """Masks that keep the largest weights at a level, pooled where the distribution says so.

        Args:
            masks: Masks in force, None for a dense tensor. Live weights are kept before masked ones, even those of 0.
            pool_target: Units that the pool keeps at the target, if not its own share of them.
        """
        values = {n: self.value_of(self.params[n]) for n in names}
        out: dict[str, Tensor] = {}
        for pool in self._pools(names):
            within = [m for n in pool if masks is not None and (m := masks[n]) is not None]
            keep = self._keep(pool, level, pool_target if self.is_pooled(pool[0]) else None)
            out.update(self._largest(values, pool, keep, self.pattern, within if len(within) == len(pool) else None))
        return out

    def at_random(self, name: str, level: float = 1.0) -> Tensor:
        """A first mask, from (seed, name) and a generator of its own: equal on every rank, and no draw from the global one."""
        weight = self.weights[name]
        keep = self._keep([name], level, self._counts[name])
        # Drawn whole by every process, which then keeps its part.
        mask = random_mask(weight.shape, self.pattern, keep, weight.layout, self._generator(name, "initial mask"))
        return self.parts[name].cut(mask)

    def regrown(self, masks: Mapping[str, Tensor], update: Update) -> dict[str, Tensor]:
        """New masks after the drop and the growth of an update.

        What was dropped may grow again, and then it has lost nothing. Structure is kept: a block grows whole, and in
        a group of an N:M pattern as many weights grow as the drop has taken from it.

        Args:
            masks: Of every tensor of the update; all sparse.
            update: Its `grow_by` ``gradient`` reads ``param.grad``, which has to be there and finite.
        """
        assert update.grow_to is not None
        names = list(masks)
        survivors = self._dropped(masks, update.drop) if update.drop else dict(masks)
        out: dict[str, Tensor] = {}
        for pool in self._pools(names):
            scores = {n: self._growth_scores(n, update) for n in pool}
            tops = [float(s.max()) if s.numel() else 0.0 for s in scores.values()]
            largest = max(max(ranks) for ranks in exchange(tops, [self.parts[n] for n in pool]))
            for name, score in scores.items():
                score.div_(largest or 1.0).masked_fill_(survivors[name] == 1, _SURVIVOR)
            # An exchange leaves as many as there were; a pool's own share of the target may be another number.
            keep = self.live_units({n: masks[n] for n in pool}) if update.drop else self._keep(pool, update.grow_to)
            out.update(self._largest(scores, pool, keep, self.pattern))
        return out

    # --- parts -------------------------------------------------------------------------------------------------------

    def _pools(self, names: Sequence[str]) -> list[list[str]]:
        """What shares one threshold: everything without an override under ``global``, else each tensor alone."""
        pooled = [n for n in names if self.is_pooled(n)]
        return ([pooled] if pooled else []) + [[n] for n in names if not self.is_pooled(n)]

    def _keep(self, pool: Sequence[str], level: float, target: int | None = None) -> int:
        """Units that a pool keeps at a level: N - round(level * (N - k))."""
        units = sum(num_units(self.weights[n].shape, self.pattern) for n in pool)
        if target is None:
            target = self.total_units(pool) if self.is_pooled(pool[0]) else self._counts[pool[0]]
        return units - round_half_up(Fraction(str(level)) * (units - target))

    def total_units(self, names: Sequence[str]) -> int:
        """Units that these tensors keep together at the target, under one threshold."""
        return num_kept(self.config.target, sum(num_units(self.weights[n].shape, self.pattern) for n in names))

    def live_units(self, masks: Mapping[str, Tensor]) -> int:
        """Live units of masks of this pattern: weights, or blocks."""
        live = total_counts([int(m.sum()) for m in masks.values()], [self.parts[n] for n in masks])
        shares = [num_units(self.weights[n].shape, self.pattern) / Fraction(self.weights[n].numel) for n in masks]
        return int(sum(count * share for count, share in zip(live, shares, strict=True)))

    def rest_of_the_pool(
        self, names: Sequence[str], masks: Mapping[str, Tensor | None] | Masks, level_of: Mapping[str, float]
    ) -> int | None:
        """What tensors drawn one by one from a global pool keep for it to meet its total, once all the others are there.

        Each draw shares its own total out anew, so a tensor may hold more or less than its share when it is drawn again.
        None where groups are fixed, or some of the others are not at their target.
        """
        if not self._draws_from_one_pool:
            return None
        pool = [n for n in self.weights if self.is_pooled(n)]
        rest = {n: masks[n] for n in pool if n not in set(names)}
        if any(mask is None or level_of[n] < 1 for n, mask in rest.items()):
            return None
        return self.total_units(pool) - self.live_units({n: m for n, m in rest.items() if m is not None})

    def is_pooled(self, name: str) -> bool:
        """True if a tensor shares a threshold with others: under ``global``, unless an override gives it its own."""
        return self.config.distribution == "global" and self.weights[name].override is None

    def _largest(
        self,
        values: Mapping[str, Tensor],
        pool: Sequence[str],
        keep: int,
        pattern: Pattern,
        within: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        if pattern.kind in ("n:m", "transposable"):
            (name,) = pool
            layout = self.weights[name].layout
            return {name: magnitude_mask(values[name], pattern, keep, layout, name, self.parts[name])}
        layouts = [self.weights[n].layout for n in pool]
        parts = [self.parts[n] for n in pool]
        found = pooled_masks([values[n] for n in pool], pattern, keep, layouts, pool, within, parts)
        return dict(zip(pool, found, strict=True))

    def _dropped(self, masks: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """The masks without the smallest `share` of their live units, which are weights unless blocks are."""
        pattern = self.pattern if self.pattern.kind == "block" else Pattern("unstructured")
        values = {n: self.value_of(self.params[n]) for n in masks}
        out: dict[str, Tensor] = {}
        for pool in self._pools(list(masks)):
            within = {n: masks[n] for n in pool}
            # Under N:M single weights are dropped, and single weights are its units.
            live = self.live_units(within)
            keep = live - round_half_up(Fraction(str(share)) * live)
            out.update(self._largest(values, pool, keep, pattern, list(within.values())))
        return out

    def _growth_scores(self, name: str, update: Update) -> Tensor:
        param = self.params[name]
        if update.grow_by == "gradient":
            assert param.grad is not None, name
            return local(param.grad).detach().abs().float()
        generator = self._generator(name, f"growth at step {update.step}")
        draw = torch.rand(tuple(param.shape), generator=generator, device="cpu")
        return self.parts[name].cut(draw).to(param.device)

    def _generator(self, name: str, draw: str) -> torch.Generator:
        digest = hashlib.sha256(f"gap_hf {draw} {self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
