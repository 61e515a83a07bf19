"""Where updates fall inside a stretch of training, and how a level rises over it. Integers and floats, no torch."""

from __future__ import annotations

from fractions import Fraction

from gap_hf.config import DEFAULT_FINE_TUNE_SHARE, GaPConfig
from gap_hf.errors import GaPError
from gap_hf.phases import Phase, Run, Update, round_half_up


def share_of(share: float, total_steps: int) -> int:
    """A share in optimizer steps, to the nearest."""
    return round_half_up(Fraction(str(share)) * total_steps)


def fine_tune_start(config: GaPConfig, run: Run, default: float = DEFAULT_FINE_TUNE_SHARE) -> int:
    """The first step with masks frozen at the target; there is at least one.

    Raises:
        GaPError: if nothing is left before it.
    """
    share = default if config.fine_tune_share is None else config.fine_tune_share
    start = run.total_steps - max(1, share_of(share, run.total_steps))
    if start < 1:
        raise GaPError(
            f"gap.fine_tune_share: {share:g} of {run.total_steps} optimizer steps leaves none before the fine-tune; "
            "expected a smaller share or longer training"
        )
    return start


def interval(config: GaPConfig, run: Run) -> int:
    """Steps between the prunes of a ramp: `update_steps`, else 100, but at least forty prunes in the run."""
    return config.update_steps or max(1, min(100, run.total_steps // 40))


def update_points(start: int, end: int, every: int) -> range:
    """Steps ``start + every, start + 2 * every, …`` before `end`."""
    return range(start + every, end, every)


def rewiring_points(config: GaPConfig, end: int, every: int) -> range:
    """Steps at which a method of fixed sparsity exchanges weights, before `end`.

    Raises:
        GaPError: if there is none, so that the method would be a static mask.
    """
    points = update_points(0, end, every)
    if not points:
        raise GaPError(
            f"gap.update_steps: method '{config.method}' changes masks every {every} steps, but masks are frozen from "
            f"step {end} on; expected at most {end - 1}, or longer training"
        )
    return points


def cubic(progress: float) -> float:
    """Level after this share of a ramp: ``1 - (1 - x)^3`` (Zhu and Gupta 2017, arXiv 1710.01878), 1 at its end."""
    rest = max(0.0, 1.0 - progress)
    return 1.0 - rest * rest * rest


def ramp(groups: tuple[int, ...], start: int, end: int, every: int) -> list[Update]:
    """Prunes that take groups from dense at `start` to their target at `end`, cubically."""
    points = [*update_points(start, end, every), end]
    return [Update(t, groups, prune_to=cubic((t - start) / (end - start))) for t in points]


def name_phases(ends: list[tuple[str, int]]) -> tuple[Phase, ...]:
    """Phases from their names and ends; those without a step are left out."""
    phases: list[Phase] = []
    start = 0
    for kind, end in ends:
        if end > start:
            phases.append(Phase(len(phases), kind, 0, start, end))
            start = end
    return tuple(phases)
