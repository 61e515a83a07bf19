"""Phases on the optimizer-step axis, and where their ends fall. Integers only, no torch.

A phase covers the optimizer steps ``start <= step < end``, counted as `Trainer.state.global_step` counts
them: step 0 is the first update.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor

from gap_hf.config import DEFAULT_FINE_TUNE_SHARE, DEFAULT_NUM_ROUNDS, GaPConfig
from gap_hf.errors import GaPError

# In a phase of this kind every worker trains a replica of its own, with its own group dense.
PARALLEL = "parallel"


@dataclass(frozen=True)
class Phase:
    """A named stretch of training. Where masks change inside it, the plan's updates say so."""

    index: int
    kind: str  # such as "initial" or "fine-tune"; a method names its own
    round: int  # 0 before the first round; the fine-tune carries the number of the last round
    start: int
    end: int

    @property
    def num_steps(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Update:
    """A change of masks between two optimizer steps: prune, then drop, then grow.

    A *level* is how far a tensor is on its way to its own target: 0 is dense, 1 the target, and a tensor of N units
    that shall keep k keeps N - round(level * (N - k)). So one number speaks for tensors of different targets.

    Attributes:
        step: Optimizer steps done before it.
        groups: Groups that it changes.
        prune_to: Prune by magnitude to this level.
        drop: Then drop this share of the live weights, the smallest first.
        grow_to: Then grow back to this level; 0 makes the groups dense.
        grow_by: Which weights grow, unless all: ``random``, or those of the largest ``gradient``.
        worker: The one worker whose replica it changes; None for all of them.
        merge: Do nothing of that but make one model of the workers' replicas, each group at its own worker's level.
    """

    step: int
    groups: tuple[int, ...]
    prune_to: float | None = None
    drop: float = 0.0
    grow_to: float | None = None
    grow_by: str = "random"
    worker: int | None = None
    merge: bool = False

    @property
    def level(self) -> float:
        """The level after it; a merge has none of its own."""
        level = self.prune_to if self.grow_to is None else self.grow_to
        assert level is not None
        return level


@dataclass(frozen=True)
class Run:
    """What a method needs to know of a run to lay itself out over it.

    Attributes:
        num_groups: Groups that its updates count.
        total_steps: Length of training in optimizer steps.
        steps_per_epoch: None where it is not known.
        seed: Of whatever it draws at random.
    """

    num_groups: int
    total_steps: int
    steps_per_epoch: Fraction | None = None
    seed: int = 0


@dataclass(frozen=True)
class Schedule:
    """What a method answers: its phases, the fine-tune last; its updates, in order; the levels before step 0."""

    phases: tuple[Phase, ...]
    updates: tuple[Update, ...]
    first_levels: tuple[float, ...]


def round_half_up(value: Fraction) -> int:
    """Nearest integer, halves upwards; Python's own `round` goes to even, which no user expects of a count."""
    return floor(value + Fraction(1, 2))


@dataclass(frozen=True)
class Layout:
    """How many phases a method has before its fine-tune: ``fixed + per_round * num_rounds``.

    `shape` says so in words, for errors, with `{rounds}` in it.
    """

    fixed: int
    per_round: int
    shape: str

    def num_phases(self, num_rounds: int) -> int:
        return self.fixed + self.per_round * num_rounds

    def num_rounds(self, num_phases: int) -> int:
        """The rounds that so many phases hold; below 1 if they hold none."""
        return (num_phases - self.fixed) // self.per_round

    def words(self, num_rounds: int) -> str:
        return self.shape.format(rounds=f"{num_rounds} round{'s' if num_rounds > 1 else ''}")


def cyclic_layout(config: GaPConfig) -> Layout:
    """One phase, then `num_partitions` a round."""
    return Layout(1, config.num_partitions, f"one phase, {{rounds}} of {config.num_partitions} phases")


def phase_ends(
    config: GaPConfig, layout: Layout, *, total_steps: int, steps_per_epoch: Fraction | None = None
) -> list[int]:
    """Ends of the phases before the fine-tune, which runs on to `total_steps`.

    Rounds and share given: the share is rounded to steps and the rest is cut into phases that differ by at most
    one step. A length given: phases have it (to within the rounding of fractional epochs) and what is left over
    goes to the fine-tune.

    Raises:
        GaPError: if a phase or the fine-tune would be empty; says the shortest training that works.
    """
    length = _phase_length(config, steps_per_epoch)
    share = Fraction(str(DEFAULT_FINE_TUNE_SHARE if config.fine_tune_share is None else config.fine_tune_share))
    if length is None:
        return _even_ends(layout, config.num_rounds or DEFAULT_NUM_ROUNDS, share, total_steps)
    if config.num_rounds is not None:
        return _ends_of_length(config, layout, config.num_rounds, length, total_steps)
    num_rounds = layout.num_rounds(_count_phases(length, _budget(share, total_steps)))
    if num_rounds < 1:
        needed = round_half_up(length * layout.num_phases(1))
        raise GaPError(
            f"gap.{_length_key(config)}: {layout.words(1)} of {_show(length)} steps and a fine-tune of "
            f"{float(share):g} need at least {_shortest(share, needed)} optimizer steps, but training has {total_steps}"
        )
    return [round_half_up(length * (i + 1)) for i in range(layout.num_phases(num_rounds))]


def _even_ends(layout: Layout, num_rounds: int, share: Fraction, total_steps: int) -> list[int]:
    count = layout.num_phases(num_rounds)
    budget = _budget(share, total_steps)
    if budget < count:
        fitting = layout.num_rounds(budget)
        instead = f", or use num_rounds: {fitting}" if fitting >= 1 else ""
        raise GaPError(
            f"gap.num_rounds: {layout.words(num_rounds)} and a fine-tune of {float(share):g} need at least "
            f"{_shortest(share, count)} optimizer steps, but training has {total_steps}; train longer{instead}"
        )
    return [budget * (i + 1) // count for i in range(count)]


def _ends_of_length(
    config: GaPConfig, layout: Layout, num_rounds: int, length: Fraction, total_steps: int
) -> list[int]:
    ends = [round_half_up(length * (i + 1)) for i in range(layout.num_phases(num_rounds))]
    if ends[-1] >= total_steps:
        fitting = layout.num_rounds(_count_phases(length, total_steps - 1))
        instead = f", or use num_rounds: {fitting}" if fitting >= 1 else ""
        raise GaPError(
            f"gap.{_length_key(config)}: {len(ends)} phases of {_show(length)} steps and a fine-tune need at least "
            f"{ends[-1] + 1} optimizer steps, but training has {total_steps}; train longer{instead}"
        )
    return ends


def _phase_length(config: GaPConfig, steps_per_epoch: Fraction | None) -> Fraction | None:
    if config.phase_steps is not None:
        return Fraction(config.phase_steps)
    if config.phase_epochs is None:
        return None
    if steps_per_epoch is None:
        raise GaPError(
            "gap.phase_epochs: the number of optimizer steps in an epoch is not known, because training is set by "
            "max_steps or the dataset has no length; expected phase_steps"
        )
    length = Fraction(str(config.phase_epochs)) * steps_per_epoch
    if length < 1:
        raise GaPError(
            f"gap.phase_epochs: {config.phase_epochs} epochs are {float(length):g} optimizer steps; expected at least 1"
        )
    return length


def _budget(share: Fraction, total_steps: int) -> int:
    """Steps before the fine-tune, which has at least one step."""
    return total_steps - max(1, round_half_up(share * total_steps))


def _shortest(share: Fraction, needed: int) -> int:
    """The fewest total steps that leave `needed` steps before the fine-tune."""
    total = max(needed + 1, floor(needed / (1 - share)) - 2)
    while _budget(share, total) < needed:
        total += 1
    while total > needed + 1 and _budget(share, total - 1) >= needed:
        total -= 1
    return total


def _count_phases(length: Fraction, budget: int) -> int:
    """How many phases end at or before `budget`."""
    count = floor(budget / length) + 1
    while count > 0 and round_half_up(length * count) > budget:
        count -= 1
    return count


def _length_key(config: GaPConfig) -> str:
    return "phase_steps" if config.phase_steps is not None else "phase_epochs"


def _show(length: Fraction) -> str:
    return f"{float(length):g}"
