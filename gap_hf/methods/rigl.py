"""RigL (Evci et al. 2020, arXiv 1911.11134): drop the smallest live weights, grow where the gradient is largest.

The gradient is the dense one of the optimizer step at hand, accumulated over its micro-batches and looked at before it
is masked, so nothing is kept for it. That step is then taken with the new masks; the authors' code skips it.
"""

from __future__ import annotations

import math

from gap_hf.config import GaPConfig
from gap_hf.phases import Run, Schedule, Update
from gap_hf.ramps import fine_tune_start, name_phases, rewiring_points

GROUPS = "all"
USES = {"drop_fraction", "fine_tune_share", "update_steps"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """Every `update_steps` (100) until 75 % of training; the share falls from `drop_fraction` (0.3) as a cosine."""
    end = fine_tune_start(config, run)
    alpha = config.drop_fraction or 0.3
    updates = tuple(
        Update(t, (0,), drop=alpha / 2 * (1 + math.cos(math.pi * t / end)), grow_to=1.0, grow_by="gradient")
        for t in rewiring_points(config, end, config.update_steps or 100)
    )
    return Schedule(name_phases([("rigl", end), ("fine-tune", run.total_steps)]), updates, (1.0,))
