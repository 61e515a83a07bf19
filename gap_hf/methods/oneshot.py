"""One-shot magnitude pruning: dense training, one prune to the target, fine-tune (after Han et al. 2015, 1506.02626)."""

from __future__ import annotations

from gap_hf.config import GaPConfig
from gap_hf.phases import Run, Schedule, Update
from gap_hf.ramps import fine_tune_start, name_phases

GROUPS = "all"
USES = {"fine_tune_share"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """Dense until the fine-tune, which begins with the prune. The share of it is ours: the paper gives none."""
    end = fine_tune_start(config, run)
    return Schedule(
        name_phases([("dense", end), ("fine-tune", run.total_steps)]), (Update(end, (0,), prune_to=1.0),), (0.0,)
    )
