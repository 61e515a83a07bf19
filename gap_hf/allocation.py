"""How a config falls out on a model's targets: which groups there are, and how much each tensor keeps."""

from __future__ import annotations

from collections.abc import Sequence

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.methods import get_method
from gap_hf.partition import Group, make_partition
from gap_hf.pattern_names import parse_pattern
from gap_hf.patterns import check_fits, erk_counts, matrix_shape, num_kept, num_units, spread
from gap_hf.targets import PrunableWeight, Targets


def make_groups(targets: Targets, config: GaPConfig, *, seed: int) -> tuple[Group, ...]:
    """The groups that a method's plan counts: of the partition, one of everything, or one per tensor."""
    kind = get_method(config.method).GROUPS
    if kind == "partition":
        return make_partition(targets, config, seed=seed)
    if config.partition != "balanced":
        how = "draws single tensors in each phase" if kind == "tensor" else "changes the masks of all tensors together"
        raise GaPError(
            f"gap.partition: method '{config.method}' {how} and has no fixed groups; leave partition out, or use "
            "method: cyclic"
        )
    if kind == "all":
        weights = targets.weights
        blocks = tuple(dict.fromkeys(w.block for w in weights))
        return (Group(tuple(w.name for w in weights), blocks, sum(w.numel for w in weights)),)
    if config.num_partitions > len(targets.weights):
        raise GaPError(
            f"gap.num_partitions: found {config.num_partitions}, but the model has {len(targets.weights)} prunable "
            f"tensors; expected at most {len(targets.weights)}"
        )
    return tuple(Group((w.name,), (w.block,), w.numel) for w in targets.weights)


def keep_counts(targets: Targets, config: GaPConfig) -> dict[str, int]:
    """Units (weights, or blocks of a block pattern) that each tensor keeps when it is sparse.

    Under ``global`` these are the counts of random first masks, which together meet the pool's total; a prune settles
    them anew.

    Raises:
        GaPError: if the pattern does not divide a weight.
    """
    pattern = parse_pattern(config.pattern)
    units: dict[str, int] = {}
    for weight in targets.weights:
        check_fits(weight.name, weight.shape, weight.layout, pattern)
        units[weight.name] = num_units(weight.shape, pattern)
    # An N:M pattern has one sparsity; an override of it is that one, but perhaps rounded (0.666667).
    fixed = pattern.fixed_sparsity is not None
    counts = {
        w.name: num_kept(config.target if fixed or w.override is None else w.override, units[w.name])
        for w in targets.weights
    }
    free = [w for w in targets.weights if w.override is None]
    if config.distribution == "global":
        shares = [(1 - config.target) * units[w.name] for w in free]
        total = num_kept(config.target, sum(units[w.name] for w in free))
        counts.update(zip((w.name for w in free), spread(total, shares), strict=True))
    if config.distribution == "erk":
        found = erk_counts([_sides_and_matrix(w) for w in free], [units[w.name] for w in free], config.target)
        counts.update(zip((w.name for w in free), found, strict=True))
    return counts


def _sides_and_matrix(weight: PrunableWeight) -> tuple[Sequence[int], int, int]:
    _, outputs, inputs = matrix_shape(weight.shape, weight.layout)
    return weight.shape[2:] if weight.layout == "conv" else (), outputs, inputs
