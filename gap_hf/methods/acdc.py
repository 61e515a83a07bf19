"""AC/DC (Peste et al. 2021, arXiv 2106.12379): the whole model alternates between dense and sparse. GaP with kappa = 1.

Unlike `cyclic` with one partition it trains sparse between two dense phases, with masks frozen.
"""

from __future__ import annotations

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.phases import Phase, Run, Schedule, Update
from gap_hf.ramps import fine_tune_start, share_of

GROUPS = "all"
USES = {"dense_share", "num_rounds", "fine_tune_share"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """Dense for `dense_share` (0.1), `num_rounds` (7) times sparse and dense, then the fine-tune (0.15).

    All phases are equally long but the last dense one, which is twice as long. These defaults are the paper's 100
    epochs on ImageNet: 10 dense, phases of 5, a last dense one of 10, and 15 at the end.
    """
    dense_share = 0.1 if config.dense_share is None else config.dense_share
    warm_up, end = share_of(dense_share, run.total_steps), fine_tune_start(config, run, default=0.15)
    if not 1 <= warm_up < end:
        raise GaPError(
            f"gap.dense_share: found {dense_share:g}, which is {warm_up} of {run.total_steps} optimizer steps; expected at "
            f"least 1 step, and fewer than the {end} before the fine-tune"
        )
    num_rounds = config.num_rounds or 7
    units = 2 * num_rounds + 1
    if end - warm_up < units:
        fitting = (end - warm_up - 1) // 2
        instead = f", or use num_rounds: {fitting}" if fitting >= 1 else ""
        raise GaPError(
            f"gap.num_rounds: {num_rounds} rounds of AC/DC need {units} optimizer steps between the dense start and the "
            f"fine-tune, but there are {end - warm_up}; train longer{instead}"
        )
    cuts = [warm_up + (end - warm_up) * i // units for i in range(units)]
    phases = [Phase(0, "initial", 0, 0, warm_up)]
    updates: list[Update] = []
    for i, (start, stop) in enumerate(zip(cuts[:-1], [*cuts[1:-1], end], strict=True)):
        sparse = i % 2 == 0
        phases.append(Phase(len(phases), "sparse" if sparse else "dense", i // 2 + 1, start, stop))
        updates.append(Update(start, (0,), prune_to=1.0) if sparse else Update(start, (0,), grow_to=0.0))
    phases.append(Phase(len(phases), "fine-tune", num_rounds, end, run.total_steps))
    return Schedule(tuple(phases), (*updates, Update(end, (0,), prune_to=1.0)), (0.0,))
