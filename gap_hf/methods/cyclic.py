"""C-GaP (Ma et al., ICLR 2022, algorithm 1): the groups are grown in turn, in network order, round after round.

The groups that wait for their turn come down from dense to the target over `ramp_share` (1) of the time before the
fine-tune, and a grown group comes down over the last `prune_share` (0.5) of its phase. Both ramps are cubic, as in gradual
magnitude pruning. With both shares at 0 it is the paper's schedule: waiting groups are at the target from the first step
on, and a grown group is pruned all at once when its phase ends. docs/lab-notebook.md has what the ramps are worth.
"""

from __future__ import annotations

from gap_hf.config import GaPConfig
from gap_hf.phases import Phase, Run, Schedule, Update, phase_ends
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
    ends = phase_ends(config, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch)
    return chain(config, run, ends, [(i % run.num_groups,) for i in range(len(ends))])


def chain(
    config: GaPConfig, run: Run, ends: list[int], draws: list[tuple[int, ...]], *, one_pool: bool = False
) -> Schedule:
    """Phases in which ``draws[i]`` is grown until ``ends[i]``, then the fine-tune with nothing grown.

    Groups that wait on a ramp are pruned each by itself, or with `one_pool` together.
    """
    every = interval(config, run)
    ramp_end = share_of(DEFAULT_RAMP_SHARE if config.ramp_share is None else config.ramp_share, ends[-1])
    prune_share = DEFAULT_PRUNE_SHARE if config.prune_share is None else config.prune_share

    def level(step: int) -> float:
        return cubic(step / ramp_end) if step < ramp_end else 1.0

    levels = [0.0 if g in draws[0] else level(0) for g in range(run.num_groups)]
    first_levels = tuple(levels)

    def prune_waiting(step: int, waiting: set[int]) -> list[Update]:
        above = tuple(g for g in sorted(waiting) if levels[g] < level(step))
        for g in above:
            levels[g] = level(step)
        return [
            Update(step, pool, prune_to=level(step))
            for pool in ([above] if one_pool else [(g,) for g in above])
            if pool
        ]

    phases: list[Phase] = []
    updates: list[Update] = []
    last_round = (len(ends) - 1) // config.num_partitions
    for i, (start, end) in enumerate(zip([0, *ends], [*ends, run.total_steps], strict=True)):
        kind = "initial" if i == 0 else config.method if i < len(ends) else "fine-tune"
        phases.append(Phase(i, kind, min(-(-i // config.num_partitions), last_round), start, end))
        grown = draws[i] if i < len(draws) else ()
        waiting = set(range(run.num_groups)) - set(grown)
        if i > 0:
            updates.append(Update(start, draws[i - 1], prune_to=level(start)))
            for g in draws[i - 1]:
                levels[g] = level(start)
            updates += prune_waiting(start, waiting)
            if grown:
                updates.append(Update(start, grown, grow_to=0.0))
        if not grown:
            continue
        prune_start = end - share_of(prune_share, end - start)
        for step in update_points(start, end, every):
            updates += prune_waiting(step, waiting)
            if step > prune_start:
                part = cubic((step - prune_start) / (end - prune_start))
                updates.append(Update(step, grown, prune_to=level(end) * part))
    return Schedule(tuple(phases), tuple(updates), first_levels)
