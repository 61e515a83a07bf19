"""Processes: which one this is, and what they send each other. No grow-and-prune here.

With `gap_hf.reduction` and `gap_hf.shards` the only importer of torch.distributed. Everything works, and sends nothing, where
there is one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gap_hf.errors import GaPError
from gap_hf.masks import Masks


def num_processes() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """What every process passed, in order of rank."""
    if num_processes() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def broadcast(tensor: Tensor, source: int) -> None:
    """Fill a contiguous `tensor` on every process with that of rank `source`."""
    if num_processes() > 1:
        dist.broadcast(tensor, src=source)


def check_same_masks(masks: Masks, group: ProcessGroup | None = None) -> None:
    """Stop if the processes of `group` (all if None) do not hold the same masks. They all have to call it.

    32 bytes a process are exchanged, and one digest a tensor where they differ.

    Raises:
        GaPError: on every process, naming the first tensor whose masks differ and who holds which.
    """
    # Of a sharded tensor each process has rows of its own, so there is nothing to compare.
    if any(part.peers.num_ranks > 1 for part in masks.parts.values()):
        return
    if num_processes() == 1 or len(set(all_objects(masks.digest(), group))) == 1:
        return
    digests = all_objects({name: masks.digest([name]) for name in masks}, group)
    for name in digests[0]:
        found = [of_rank.get(name, "none") for of_rank in digests]
        if len(set(found)) > 1:
            shown = ", ".join(f"{digest[:8]} on process {i}" for i, digest in enumerate(found))
            raise GaPError(
                f"{name}: the processes hold different masks ({shown}), expected the same on all; their weights differ, so "
                "gradients are not reduced over all of them"
            )


@dataclass(frozen=True)
class WorkerGroups:
    """Processes in order of rank, cut into equal groups: one for each worker of P-GaP.

    Attributes:
        num: Workers.
        index: The worker that this process belongs to.
        group: Its process group.
    """

    num: int
    index: int
    group: ProcessGroup

    @property
    def is_leader(self) -> bool:
        """True on the first process of each group."""
        return rank() == self.leader(self.index)

    def leader(self, worker: int) -> int:
        """The rank that speaks for a worker."""
        return worker * (num_processes() // self.num)


def make_worker_groups(num: int) -> WorkerGroups:
    """All processes have to call it. Their number is a multiple of `num`."""
    size = num_processes() // num
    assert size * num == num_processes(), (num, num_processes())
    groups = [dist.new_group(list(range(w * size, (w + 1) * size))) for w in range(num)]
    index = rank() // size
    found = groups[index]
    assert isinstance(found, ProcessGroup)
    return WorkerGroups(num, index, found)
