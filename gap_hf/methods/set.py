"""SET (Mocanu et al. 2018, arXiv 1707.04780): after each epoch drop the smallest live weights, grow as many at random.

The smallest are those of least magnitude; the paper takes the share of the smallest positive and of the largest negative
weights each. New weights start at 0, as everywhere in gap_hf, where the paper draws them anew, and one that is dropped
and drawn again at once keeps its value.
"""

from __future__ import annotations

from math import floor

from gap_hf.config import GaPConfig
from gap_hf.phases import Run, Schedule, Update
from gap_hf.ramps import fine_tune_start, name_phases, rewiring_points

GROUPS = "all"
USES = {"drop_fraction", "fine_tune_share", "update_steps"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """Every `update_steps` (an epoch; 100 where its length is not known) with `drop_fraction` (0.3) to the last."""
    every = config.update_steps or (floor(run.steps_per_epoch) if run.steps_per_epoch else 100)
    end = run.total_steps if config.fine_tune_share is None else fine_tune_start(config, run)
    points = rewiring_points(config, end, every)
    drop = config.drop_fraction or 0.3
    updates = tuple(Update(t, (0,), drop=drop, grow_to=1.0) for t in points)
    return Schedule(name_phases([("set", points[-1]), ("fine-tune", run.total_steps)]), updates, (1.0,))
