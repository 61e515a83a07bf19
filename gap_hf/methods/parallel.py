"""P-GaP (Ma et al., ICLR 2022, algorithm 2): each worker grows a group of its own at the same time, then they are merged.

In a round, worker i trains a replica in which group i is dense and the others are sparse, on its own share of the data and
without exchanging gradients with the other workers. The merged model takes each group from its own worker, and is pruned
with no training in between. `cyclic_rounds` of C-GaP may follow (the authors' "P then C"), then the fine-tune.

Ramps are those of C-GaP: with `ramp_share` and `prune_share` at 0 it is the paper's schedule.
"""

from __future__ import annotations

from gap_hf.config import GaPConfig
from gap_hf.methods import cyclic
from gap_hf.methods.cyclic import chain, prune_ramp, waiting_level
from gap_hf.phases import PARALLEL, Layout, Phase, Run, Schedule, Update, phase_ends
from gap_hf.ramps import interval, update_points

GROUPS = "partition"
USES = cyclic.USES | {"cyclic_rounds", "workers"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """`num_rounds` parallel phases, each with a merge and a prune at its end, `cyclic_rounds` of kappa phases, fine-tune."""
    tail = (config.cyclic_rounds or 0) * config.num_partitions
    shape = f"{{rounds}} of one phase{f' and {tail} phases of C-GaP' if tail else ''}"
    layout = Layout(tail, 1, shape)
    ends = phase_ends(config, layout, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch)
    schedule = _rounds(config, run, ends[: len(ends) - tail], waiting_end=ends[-1])
    if tail:
        draws = [(i % run.num_groups,) for i in range(tail)]
        return chain(config, run, ends[len(ends) - tail :], draws, before=schedule)
    fine_tune = Phase(len(ends), "fine-tune", schedule.phases[-1].round, ends[-1], run.total_steps)
    return Schedule((*schedule.phases, fine_tune), schedule.updates, schedule.first_levels)


def _rounds(config: GaPConfig, run: Run, ends: list[int], *, waiting_end: int) -> Schedule:
    every = interval(config, run)
    level = waiting_level(config, waiting_end)
    groups = tuple(range(run.num_groups))
    phases: list[Phase] = []
    updates: list[Update] = []
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        phases.append(Phase(number, PARALLEL, number + 1, start, end))
        if level(start) > 0:
            updates += [Update(start, (w,), grow_to=0.0, worker=w) for w in groups]
        part, last = prune_ramp(config, start, end), level(start)
        for step in update_points(start, end, every):
            if level(step) > last:
                last = level(step)
                updates += [Update(step, (g,), prune_to=last, worker=w) for w in groups for g in groups if g != w]
            if part(step) > 0:
                updates += [Update(step, (w,), prune_to=level(end) * part(step), worker=w) for w in groups]
        updates.append(Update(end, groups, merge=True))
        updates += [Update(end, (g,), prune_to=level(end)) for g in groups]
    return Schedule(tuple(phases), tuple(updates), (level(0),) * run.num_groups)
