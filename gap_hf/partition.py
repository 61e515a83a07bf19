"""The prunable weights split into ordered groups, which are grown and pruned in turn. No torch, no steps."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError, nearest

if TYPE_CHECKING:
    from gap_hf.targets import PrunableWeight, Targets


@dataclass(frozen=True)
class Group:
    """Weights that are dense at the same time: P_i of the paper. All in network order.

    `blocks` are the owners of the weights; `numel` counts weights, zeros included.
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    numel: int


def make_partition(targets: Targets, config: GaPConfig, *, seed: int = 0) -> tuple[Group, ...]:
    """Split the prunable weights into `config.num_partitions` groups.

    ``balanced`` keeps blocks whole and in order; ``random`` shuffles tensors with `seed`, which nothing else uses;
    explicit groups list globs over parameter names and over the paths of the modules above them.

    Raises:
        GaPError: if there are more groups than blocks (tensors, for ``random``), or explicit groups do not hold
            each prunable tensor exactly once.
    """
    if not isinstance(config.partition, str):
        return _explicit(targets, config.partition)
    if config.partition == "random":
        _check_enough("prunable tensors", len(targets.weights), config.num_partitions)
        shuffled = random.Random(seed).sample(targets.weights, len(targets.weights))
        units = [[weight] for weight in shuffled]
    else:
        _check_enough("blocks with prunable weights", len(targets.blocks), config.num_partitions)
        units = [[w for w in targets.weights if w.block == block] for block in targets.blocks]
    sizes = [sum(weight.numel for weight in unit) for unit in units]
    split = best_contiguous_split(sizes, config.num_partitions)
    return tuple(_group(targets, {w.name for i in part for w in units[i]}) for part in split)


def best_contiguous_split(sizes: Sequence[int], num_groups: int) -> list[range]:
    """Indices of `sizes` cut into `num_groups` runs, none empty.

    Minimises the largest sum of a run; among those the sum of the squared sums; ties go to the earliest cuts.

    Raises:
        GaPError: if there are fewer sizes than groups.
    """
    _check_enough("sizes", len(sizes), num_groups)
    n = len(sizes)
    sums = list(accumulate(sizes, initial=0))
    cap = _smallest_cap(sums, num_groups)
    # Under the cap a cut can lie in few places: not before `earliest`, or the rest is too large; not after
    # `latest`, or what lies before it is.
    latest = list(accumulate(range(num_groups), lambda end, _: bisect_right(sums, sums[end] + cap) - 1, initial=0))
    cost: dict[int, int] = {n: 0}  # start of a tail -> least sum of squares of its groups
    ends: list[dict[int, int]] = []
    for done in reversed(range(num_groups)):
        shorter, cost, end = cost, {}, {}
        earliest = max(done, bisect_left(sums, sums[n] - (num_groups - done) * cap))
        for start in range(earliest, min(latest[done], n - 1) + 1):
            longest = bisect_right(sums, sums[start] + cap) - 1
            options = (
                (shorter[e] + (sums[e] - sums[start]) ** 2, e) for e in range(start + 1, longest + 1) if e in shorter
            )
            if (best := min(options, default=None)) is not None:
                cost[start], end[start] = best
        ends.append(end)
    cuts = [0]
    for end in reversed(ends):
        cuts.append(end[cuts[-1]])
    return [range(a, b) for a, b in pairwise(cuts)]


def _smallest_cap(sums: Sequence[int], num_groups: int) -> int:
    """The least value that the largest of `num_groups` contiguous groups can have, from prefix sums."""

    def fits(cap: int) -> bool:
        end = 0
        for _ in range(num_groups):
            end = bisect_right(sums, sums[end] + cap) - 1
        return end == len(sums) - 1

    low, high = 0, sums[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _check_enough(what: str, num_found: int, num_partitions: int) -> None:
    if num_partitions > num_found:
        raise GaPError(
            f"gap.num_partitions: found {num_partitions}, but there are only {num_found} {what}; "
            f"the largest that works is {num_found}"
        )


def _explicit(targets: Targets, partition: tuple[tuple[str, ...], ...]) -> tuple[Group, ...]:
    group_of: dict[str, int] = {}
    groups: list[set[str]] = []
    for i, globs in enumerate(partition):
        groups.append(set())
        for j, glob in enumerate(globs):
            key = f"gap.partition[{i}][{j}]"
            names = [weight.name for weight in targets.weights if _matches(glob, weight)]
            if not names:
                raise GaPError(f"{key}: '{glob}' matches no prunable weight{_nearest(glob, targets)}")
            for name in names:
                if group_of.setdefault(name, i) != i:
                    raise GaPError(
                        f"{key}: '{glob}' matches '{name}', which is in gap.partition[{group_of[name]}] already; "
                        "expected it in one group only"
                    )
            groups[i].update(names)
        if not groups[i]:
            raise GaPError(f"gap.partition[{i}]: the group is empty; expected at least one glob")
    missing = [weight.name for weight in targets.weights if weight.name not in group_of]
    if missing:
        more = f" nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise GaPError(f"gap.partition: '{missing[0]}' is in no group{more}; add it to one, or to gap.exclude")
    return tuple(_group(targets, group) for group in groups)


def _matches(glob: str, weight: PrunableWeight) -> bool:
    return any(fnmatchcase(path, glob) for path in _prefixes(weight.name))


def _prefixes(name: str) -> list[str]:
    """``a.b.weight`` -> ``a``, ``a.b``, ``a.b.weight``: a module's path stands for all that is in it."""
    return list(accumulate(name.split("."), lambda head, part: f"{head}.{part}"))


def _nearest(glob: str, targets: Targets) -> str:
    paths = {path for weight in targets.weights for path in _prefixes(weight.name)}
    return nearest(glob, paths) or f"; expected a glob such as '{targets.blocks[0]}'"


def _group(targets: Targets, names: set[str]) -> Group:
    weights = [weight for weight in targets.weights if weight.name in names]
    return Group(
        names=tuple(weight.name for weight in weights),
        blocks=tuple(dict.fromkeys(weight.block for weight in weights)),
        numel=sum(weight.numel for weight in weights),
    )
