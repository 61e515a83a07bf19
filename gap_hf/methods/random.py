"""Random GaP (the authors' random partition): each phase draws its tensors among those not dense in the last one."""

from __future__ import annotations

import random

from gap_hf.config import GaPConfig
from gap_hf.methods import cyclic
from gap_hf.phases import Run, Schedule, cyclic_layout, phase_ends

GROUPS = "tensor"
USES = cyclic.USES


def build(config: GaPConfig, run: Run) -> Schedule:
    """Draws ``num_groups // num_partitions`` tensors (at least one) per phase; the same seed, the same draws.

    With one partition every tensor is drawn each time, since none is left that was not dense.
    """
    layout = cyclic_layout(config)
    ends = phase_ends(config, layout, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch)
    size = max(1, run.num_groups // config.num_partitions)
    rng = random.Random(f"gap_hf random partition {run.seed}")
    draws: list[tuple[int, ...]] = []
    for _ in ends:
        last = set(draws[-1]) if draws else set()
        pool = [g for g in range(run.num_groups) if g not in last]
        pool = pool if len(pool) >= size else list(range(run.num_groups))
        draws.append(tuple(sorted(rng.sample(pool, size))))
    return cyclic.chain(config, run, ends, draws, one_pool=True)
