"""Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878): one cubic ramp from dense to the target."""

from __future__ import annotations

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.phases import Run, Schedule
from gap_hf.ramps import fine_tune_start, interval, name_phases, ramp, share_of

GROUPS = "all"
USES = {"dense_share", "fine_tune_share", "update_steps"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """Dense for `dense_share` (0), then a prune every `update_steps` (100 at most) until the fine-tune (0.25).

    Pruned weights stay pruned: at each prune they are the smallest. Where the ramp begins and ends is left to the
    user by the paper; these shares are ours.
    """
    start, end = share_of(config.dense_share or 0.0, run.total_steps), fine_tune_start(config, run)
    if start >= end:
        raise GaPError(
            f"gap.dense_share: the ramp would begin at step {start}, but the fine-tune begins at step {end}; expected a "
            "smaller dense_share or fine_tune_share"
        )
    return Schedule(
        name_phases([("dense", start), ("gmp", end), ("fine-tune", run.total_steps)]),
        tuple(ramp((0,), start, end, interval(config, run))),
        (0.0,),
    )
