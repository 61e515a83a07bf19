"""The plan of a run: which groups are pruned and grown when. Integers and floats, no torch; printable beforehand."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.methods import check_uses, get_method
from gap_hf.phases import PARALLEL, Phase, Run, Update


@dataclass(frozen=True)
class Plan:
    """Phases that cover the optimizer steps 0 … `total_steps`, the last the fine-tune, and the updates in them.

    Attributes:
        phases: Without gap or overlap.
        updates: In order of step; those of one step are done in this order.
        first_levels: Level of each group before step 0 (`Update` says what a level is).
    """

    phases: tuple[Phase, ...]
    updates: tuple[Update, ...]
    first_levels: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.phases and self.phases[0].start == 0 and self.first_levels
        assert all(a.end == b.start for a, b in zip(self.phases, self.phases[1:], strict=False))
        assert all(phase.num_steps > 0 for phase in self.phases)
        steps = [u.step for u in self.updates]
        assert steps == sorted(steps)
        # Masks before the first step are the first levels', but for what one worker alone does to its replica.
        assert all((u.step > 0 or u.worker is not None) and u.step <= self.fine_tune.start for u in self.updates)
        assert all(g in range(self.num_groups) for u in self.updates for g in u.groups)
        assert all(0 <= level <= 1 for level in (*self.first_levels, *(u.level for u in self.updates if not u.merge)))
        assert all(level == 1 for level in self.levels_at(self.fine_tune.start)), "the fine-tune is at the target"
        assert self.num_workers in (1, self.num_groups), "each worker has the group of its number"

    @property
    def num_groups(self) -> int:
        return len(self.first_levels)

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end

    @property
    def fine_tune(self) -> Phase:
        return self.phases[-1]

    def phase_at(self, step: int) -> Phase:
        """The phase that optimizer step `step` (0-based) belongs to; the end of training belongs to the last."""
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        return self.phases[max(0, bisect.bisect_right([p.start for p in self.phases], step) - 1)]

    def begins_at(self, step: int) -> Phase | None:
        """The phase whose first optimizer step is `step`, if there is one."""
        phase = self.phase_at(step)
        return phase if phase.start == step else None

    @cached_property
    def num_workers(self) -> int:
        """Workers that train replicas of their own in the parallel phases; 1 where there are none."""
        return self.num_groups if any(phase.kind == PARALLEL for phase in self.phases) else 1

    def levels_at(self, step: int, worker: int = 0) -> tuple[float, ...]:
        """Level of each group in optimizer step `step`, all updates up to it done, in the replica of `worker`."""
        return self._levels[max(0, bisect.bisect_right(self._times, step) - 1)][worker]

    @cached_property
    def _times(self) -> list[int]:
        return [0, *sorted({u.step for u in self.updates})]

    @cached_property
    def _levels(self) -> list[list[tuple[float, ...]]]:
        """Levels of every worker's replica from each of `_times` on."""
        replicas = [list(self.first_levels) for _ in range(self.num_workers)]
        out: list[list[tuple[float, ...]]] = []
        done = 0
        for time in self._times:
            while done < len(self.updates) and self.updates[done].step <= time:
                update = self.updates[done]
                if update.merge:
                    own = [replicas[group][group] for group in range(self.num_groups)]
                    replicas = [list(own) for _ in replicas]
                for levels in replicas if update.worker is None else [replicas[update.worker]]:
                    for group in () if update.merge else update.groups:
                        levels[group] = update.level
                done += 1
            out.append([tuple(levels) for levels in replicas])
        return out

    def grown(self, phase: Phase) -> tuple[int, ...]:
        """The groups that are dense when a phase begins, in the replica of some worker."""
        levels = [self.levels_at(phase.start, worker) for worker in range(self.num_workers)]
        return tuple(g for g in range(self.num_groups) if any(of_worker[g] == 0 for of_worker in levels))

    def live_share(self, phase: Phase, sizes: Sequence[int], densities: Sequence[float]) -> float:
        """Share of live prunable weights, averaged over a phase and the workers' replicas, from each group's size and its
        density at the target.
        """

        def share(step: int) -> float:
            replicas = [self.levels_at(step, worker) for worker in range(self.num_workers)]
            live = sum(
                n * (1 - level * (1 - d))
                for levels in replicas
                for n, level, d in zip(sizes, levels, densities, strict=True)
            )
            return live / (len(replicas) * sum(sizes))

        times = [phase.start, *(t for t in self._times if phase.start < t < phase.end), phase.end]
        return sum(share(a) * (b - a) for a, b in itertools.pairwise(times)) / phase.num_steps

    def average_live_share(self, sizes: Sequence[int], densities: Sequence[float]) -> float:
        """Live share averaged over all optimizer steps: the training density of the prunable set."""
        return sum(self.live_share(p, sizes, densities) * p.num_steps for p in self.phases) / self.total_steps

    def with_total_steps(self, total_steps: int) -> Plan:
        """The same phases with the fine-tune ending at `total_steps`: a resumed run may be longer or shorter.

        Raises:
            GaPError: if the fine-tune would be empty.
        """
        if total_steps == self.total_steps:
            return self
        if total_steps <= self.fine_tune.start:
            raise GaPError(
                f"max_steps: the resumed run has {total_steps} optimizer steps, but its recorded plan reaches the "
                f"fine-tune at step {self.fine_tune.start}; expected at least {self.fine_tune.start + 1}"
            )
        phases = (*self.phases[:-1], dataclasses.replace(self.fine_tune, end=total_steps))
        return dataclasses.replace(self, phases=phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives an equal plan. Defaults of an update are left out."""
        return {
            "phases": [dataclasses.asdict(p) for p in self.phases],
            "updates": [
                {f.name: getattr(u, f.name) for f in dataclasses.fields(u) if getattr(u, f.name) != f.default}
                for u in self.updates
            ],
            "first_levels": list(self.first_levels),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild from `to_dict`'s data. Raises GaPError if it is not such data."""
        try:
            phases = tuple(Phase(**values) for values in data["phases"])
            updates = tuple(Update(**{**values, "groups": tuple(values["groups"])}) for values in data["updates"])
            return cls(phases, updates, tuple(float(level) for level in data["first_levels"]))
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise GaPError(f"plan: not a recorded plan ({error!r})") from None


def make_plan(
    config: GaPConfig,
    *,
    num_groups: int,
    total_steps: int,
    steps_per_epoch: Fraction | float | None = None,
    seed: int = 0,
) -> Plan:
    """Lay a config out over `total_steps` optimizer steps.

    Args:
        config: Any method but ``dense``.
        num_groups: Groups that the method counts (`gap_hf.allocation.make_groups` makes them).
        total_steps: Length of training in optimizer steps, from `TrainingArguments`.
        steps_per_epoch: Needed for `phase_epochs`, and for methods that change masks once an epoch.
        seed: Seed of a method that draws at random.

    Raises:
        GaPError: if training is too short, naming the shortest that works, or a key is set that the method ignores.
    """
    if config.is_off:
        raise ValueError("method 'dense' has no plan")
    check_uses(config)
    if isinstance(steps_per_epoch, int | float):
        steps_per_epoch = Fraction(steps_per_epoch).limit_denominator(10**6)
    schedule = get_method(config.method).build(config, Run(num_groups, total_steps, steps_per_epoch, seed))
    return Plan(schedule.phases, schedule.updates, schedule.first_levels)


def peak_factor(plan: Plan, phase: Phase, peaks: str) -> float:
    """Factor on the peak learning rate of a phase under ``lr_schedule: restart``.

    Over the n phases before the fine-tune: ``linear`` is 1 - i/n, ``cosine`` is (1 + cos(pi i/n)) / 2, ``step`` halves it
    in each round. The fine-tune is a schedule of its own and starts from the full peak.
    """
    if peaks == "constant" or phase is plan.fine_tune:
        return 1.0
    progress = phase.index / (len(plan.phases) - 1)
    if peaks == "linear":
        return 1.0 - progress
    if peaks == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2
    return 0.5 ** max(0, phase.round - 1)
