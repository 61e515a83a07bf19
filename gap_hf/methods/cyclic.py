"""C-GaP (Ma et al., ICLR 2022, algorithm 1): the groups are grown in turn, in network order, round after round."""

from __future__ import annotations

from fractions import Fraction

from gap_hf.config import GaPConfig
from gap_hf.phases import Phase, phase_ends

PER_TENSOR = False


def build_phases(
    config: GaPConfig, *, num_groups: int, total_steps: int, steps_per_epoch: Fraction | None, seed: int
) -> tuple[Phase, ...]:
    """P_1 is dense in the initial phase; then P_i is pruned and P_(i mod kappa)+1 grown, R times around."""
    ends = phase_ends(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    draws = [(i % num_groups,) for i in range(len(ends))]
    return chain_phases("cyclic", draws, ends, total_steps, phases_per_round=config.num_partitions)


def chain_phases(
    kind: str, draws: list[tuple[int, ...]], ends: list[int], total_steps: int, *, phases_per_round: int
) -> tuple[Phase, ...]:
    """Phases in which ``draws[i]`` is dense until ``ends[i]``, then the fine-tune with nothing dense."""
    phases: list[Phase] = []
    for i, (start, end) in enumerate(zip([0, *ends], [*ends, total_steps], strict=True)):
        grown = draws[i] if i < len(draws) else ()
        phases.append(
            Phase(
                index=i,
                kind="initial" if i == 0 else kind if i < len(ends) else "fine-tune",
                round=min(-(-i // phases_per_round), (len(ends) - 1) // phases_per_round),
                start=start,
                end=end,
                prune=draws[i - 1] if i > 0 else (),
                grow=grown,
                grown=grown,
            )
        )
    return tuple(phases)
