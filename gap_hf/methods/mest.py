"""Random growth to an upper bound, pruning to a lower one: in the manner of MEST (Yuan et al. 2021, arXiv 2110.14032).

More weights than the target allows train between two updates, so that a new one is compared with an old one before
either goes ("soft memory bound"). Of MEST only this is here: it prunes by magnitude alone, where MEST adds a share of
the gradient's, and the data selection is left out.
"""

from __future__ import annotations

from gap_hf.config import GaPConfig
from gap_hf.phases import Run, Schedule, Update
from gap_hf.ramps import fine_tune_start, name_phases, rewiring_points

GROUPS = "all"
USES = {"drop_fraction", "fine_tune_share", "update_steps"}


def build(config: GaPConfig, run: Run) -> Schedule:
    """Every `update_steps` (100): prune to the target, grow `drop_fraction` (0.3) of that number of weights at random.

    The extra share falls linearly to 0 at the fine-tune (0.25). These numbers are ours.
    """
    end = fine_tune_start(config, run)
    extra = config.drop_fraction or 0.3
    density = float(1 - config.target)

    def upper(step: int) -> float:
        return max(0.0, 1.0 - extra * (1 - step / end) * density / (1 - density))

    points = rewiring_points(config, end, config.update_steps or 100)
    updates = [Update(t, (0,), prune_to=1.0, grow_to=upper(t)) for t in points]
    phases = name_phases([("mest", end), ("fine-tune", run.total_steps)])
    return Schedule(phases, (*updates, Update(end, (0,), prune_to=1.0)), (upper(0),))
