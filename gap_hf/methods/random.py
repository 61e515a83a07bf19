"""Random GaP (the authors' random partition): each phase draws its tensors among those not dense in the last one."""

from __future__ import annotations

import random
from fractions import Fraction

from gap_hf.config import GaPConfig
from gap_hf.methods.cyclic import chain_phases
from gap_hf.phases import Phase, phase_ends

PER_TENSOR = True


def build_phases(
    config: GaPConfig, *, num_groups: int, total_steps: int, steps_per_epoch: Fraction | None, seed: int
) -> tuple[Phase, ...]:
    """Draws ``num_groups // num_partitions`` tensors (at least one) per phase; the same seed, the same draws.

    With one partition every tensor is drawn each time, since none is left that was not dense.
    """
    ends = phase_ends(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    size = max(1, num_groups // config.num_partitions)
    rng = random.Random(f"gap_hf random partition {seed}")
    draws: list[tuple[int, ...]] = []
    for _ in ends:
        last = set(draws[-1]) if draws else set()
        pool = [g for g in range(num_groups) if g not in last]
        pool = pool if len(pool) >= size else list(range(num_groups))
        draws.append(tuple(sorted(rng.sample(pool, size))))
    return chain_phases("random", draws, ends, total_steps, phases_per_round=config.num_partitions)
