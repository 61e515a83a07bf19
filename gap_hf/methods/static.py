"""A static mask: random at the target before the first step, and never changed. What any schedule must beat."""

from __future__ import annotations

from collections.abc import Set

from gap_hf.config import GaPConfig
from gap_hf.phases import Phase, Run, Schedule

GROUPS = "all"
USES: Set[str] = frozenset()


def build(config: GaPConfig, run: Run) -> Schedule:
    """One phase, in which everything has its first mask."""
    return Schedule((Phase(0, "fine-tune", 0, 0, run.total_steps),), (), (1.0,) * run.num_groups)
