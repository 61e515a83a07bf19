"""The plan of a run: which group is dense when. Integers only, no torch; printable before any training."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.methods import get_method
from gap_hf.phases import Phase


@dataclass(frozen=True)
class Plan:
    """Phases that cover the optimizer steps 0 … `total_steps` without gap or overlap; the last is the fine-tune."""

    phases: tuple[Phase, ...]
    num_groups: int

    def __post_init__(self) -> None:
        assert self.phases and self.phases[0].start == 0
        assert all(a.end == b.start for a, b in zip(self.phases, self.phases[1:], strict=False))
        assert all(phase.num_steps > 0 for phase in self.phases)

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

    def live_share(self, phase: Phase, sizes: Sequence[int], densities: Sequence[float]) -> float:
        """Share of live prunable weights in a phase, from each group's size and its density when sparse."""
        live = sum(n if g in phase.grown else n * densities[g] for g, n in enumerate(sizes))
        return live / sum(sizes)

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
        return Plan((*self.phases[:-1], dataclasses.replace(self.fine_tune, end=total_steps)), self.num_groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives an equal plan."""
        return {"num_groups": self.num_groups, "phases": [dataclasses.asdict(p) for p in self.phases]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild from `to_dict`'s data. Raises GaPError if it is not such data."""
        try:
            fields: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in phase.items()} for phase in data["phases"]
            ]
            return cls(tuple(Phase(**values) for values in fields), int(data["num_groups"]))
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
        num_groups: Groups of the partition, or tensors for a method that draws single tensors.
        total_steps: Length of training in optimizer steps, from `TrainingArguments`.
        steps_per_epoch: Needed for `phase_epochs` only.
        seed: Seed of a method that draws at random.

    Raises:
        GaPError: if training is too short, naming the shortest that works.
    """
    if config.is_off:
        raise ValueError("method 'dense' has no plan")
    if isinstance(steps_per_epoch, int | float):
        steps_per_epoch = Fraction(steps_per_epoch).limit_denominator(10**6)
    phases = get_method(config.method).build_phases(
        config, num_groups=num_groups, total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=seed
    )
    return Plan(phases, num_groups)


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
