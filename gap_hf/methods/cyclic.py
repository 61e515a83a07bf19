"""C-GaP (Ma et al., ICLR 2022, algorithm 1): the groups are grown in turn, in network order, round after round.

The groups that wait for their turn come down from dense to the target over `ramp_share` (1) of the time before the
fine-tune, and a grown group comes down over the last `prune_share` (0.5) of its phase. Both ramps are cubic, as in gradual
magnitude pruning. With both shares at 0 it is the paper's schedule: waiting groups are at the target from the first step
on, and a grown group is pruned all at once when its phase ends. docs/lab-notebook.md has what the ramps are worth.
"""

from __future__ import annotations

from collections.abc import Callable

from gap_hf.config import GaPConfig
from gap_hf.phases import Phase, Run, Schedule, Update, cyclic_layout, phase_ends
from gap_hf.ramps import cubic, interval, share_of, update_points

GROUPS = "partition"
USES = {
    "num_rounds",
    "phase_steps",
    "phase_epochs",
    "fine_tune_share",
    "ramp_share",
    "prune_share",
    "update_steps",
}
DEFAULT_RAMP_SHARE = 1.0
DEFAULT_PRUNE_SHARE = 0.5


def build(config: GaPConfig, run: Run) -> Schedule:
    """P_1 is dense in the initial phase; then P_i is pruned and P_(i mod kappa)+1 grown, R times around."""
    layout = cyclic_layout(config)
    ends = phase_ends(config, layout, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch)
    return chain(config, run, ends, [(i % run.num_groups,) for i in range(len(ends))])


def waiting_level(config: GaPConfig, end: int) -> Callable[[int], float]:
    """Level over the steps of the groups that wait for their turn, where the fine-tune begins at step `end`."""
    ramp_end = share_of(DEFAULT_RAMP_SHARE if config.ramp_share is None else config.ramp_share, end)
    return lambda step: cubic(step / ramp_end) if step < ramp_end else 1.0


def prune_ramp(config: GaPConfig, start: int, end: int) -> Callable[[int], float]:
    """Level over the steps of a phase of the group that is grown in it, as a share of where it has to come to."""
    share = DEFAULT_PRUNE_SHARE if config.prune_share is None else config.prune_share
    prune_start = end - share_of(share, end - start)
    return lambda step: cubic((step - prune_start) / (end - prune_start)) if step > prune_start else 0.0


def chain(
    config: GaPConfig,
    run: Run,
    ends: list[int],
    draws: list[tuple[int, ...]],
    *,
    one_pool: bool = False,
    before: Schedule | None = None,
) -> Schedule:
    """Phases in which ``draws[i]`` is grown until ``ends[i]``, then the fine-tune with nothing grown.

    Groups that wait on a ramp are pruned each by itself, or with `one_pool` together. The phases come after those of
    `before`, which has left every group at its waiting level; without it the first phase is one before the rounds.
    """
    every = interval(config, run)
    level = waiting_level(config, ends[-1])
    phases = list(before.phases) if before else []
    updates = list(before.updates) if before else []
    begin = phases[-1].end if before else 0
    levels = [level(begin)] * run.num_groups
    for g in () if before else draws[0]:
        levels[g] = 0.0
    first_levels = before.first_levels if before else tuple(levels)
    rounds_before = phases[-1].round + 1 if before else 0

    def prune_waiting(step: int, waiting: set[int]) -> list[Update]:
        above = tuple(g for g in sorted(waiting) if levels[g] < level(step))
        for g in above:
            levels[g] = level(step)
        return [
            Update(step, pool, prune_to=level(step))
            for pool in ([above] if one_pool else [(g,) for g in above])
            if pool
        ]

    for i, (start, end) in enumerate(zip([begin, *ends], [*ends, run.total_steps], strict=True)):
        kind = (
            "fine-tune"
            if i == len(ends)
            else "initial"
            if i == 0 and not before
            else "cyclic"
            if before
            else config.method
        )
        number = min(i, len(ends) - 1)
        round_ = rounds_before + (number // config.num_partitions if before else -(-number // config.num_partitions))
        phases.append(Phase(len(phases), kind, round_, start, end))
        grown = draws[i] if i < len(draws) else ()
        waiting = set(range(run.num_groups)) - set(grown)
        if i > 0:
            updates.append(Update(start, draws[i - 1], prune_to=level(start)))
            for g in draws[i - 1]:
                levels[g] = level(start)
            updates += prune_waiting(start, waiting)
        if grown and (i > 0 or before):
            updates.append(Update(start, grown, grow_to=0.0))
        if not grown:
            continue
        part = prune_ramp(config, start, end)
        for step in update_points(start, end, every):
            updates += prune_waiting(step, waiting)
            if part(step) > 0:
                updates.append(Update(step, grown, prune_to=level(end) * part(step)))
    return Schedule(tuple(phases), tuple(updates), first_levels)
