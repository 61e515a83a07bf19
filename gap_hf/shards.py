"""Where the rows of a sharded tensor lie (FSDP2's DTensors), and what the processes that hold them tell one another.

Masks, scores and optimizer state are handled part by part, as ordinary tensors. A tensor that is not sharded is one part,
and every question below then has its answer without anyone being asked: a single process is not a second code path.
Whatever is said to call on all ranks waits for the other processes where a tensor is sharded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from gap_hf.errors import GaPError


@dataclass(frozen=True)
class Peers:
    """The processes that hold the parts of a tensor, in order of its rows; one alone by default.

    Attributes:
        group: Their process group.
        device: Kind of device that the group sends from. Under CPU offload it is not the one that the parts lie on.
        rank: This process' place among them.
        num_ranks: How many they are.
    """

    group: dist.ProcessGroup | None = None
    device: str = "cpu"
    rank: int = 0
    num_ranks: int = 1

    @torch.no_grad()
    def add_up(self, counts: Tensor) -> Tensor:
        """Sum of every process' `counts`, on the CPU. On all ranks."""
        if self.group is None:
            return counts.cpu()
        counts = counts.to(self.device, copy=True)
        dist.all_reduce(counts, group=self.group)
        return counts.cpu()

    @torch.no_grad()
    def gather(self, mine: Tensor) -> Tensor:
        """Every process' tensor, (num_ranks, *shape) of `mine`'s dtype and device; the shapes are equal. On all ranks."""
        if self.group is None:
            return mine.unsqueeze(0)
        # As bytes: what is sent needs no arithmetic, and not every backend knows every dtype.
        sent = mine.to(self.device).contiguous().reshape(-1).view(torch.uint8)
        received = sent.new_empty((self.num_ranks, sent.numel()))
        dist.all_gather(list(received.unbind(0)), sent, group=self.group)
        return received.view(mine.dtype).view(self.num_ranks, *mine.shape).to(mine.device)


@dataclass(frozen=True)
class Part:
    """The rows (first dimension) of a tensor that lie here: `step` of them on each process, fewer or none on the last ones.

    Attributes:
        shape: Of the whole tensor.
        step: Rows on a process that is not among the last.
        peers: Who holds the other rows.
    """

    shape: tuple[int, ...]
    step: int
    peers: Peers = dataclasses.field(default_factory=Peers)

    @property
    def numel(self) -> int:
        """Entries of the whole tensor."""
        return prod(self.shape)

    @property
    def rows(self) -> range:
        """The rows that lie here."""
        start, end = (min(self.step * rank, self.shape[0]) for rank in (self.peers.rank, self.peers.rank + 1))
        return range(start, end)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.shape[1:])

    def cut(self, whole: Tensor) -> Tensor:
        """The rows of a whole tensor that lie here; a copy, so that the rest can be freed, unless nothing is cut."""
        assert tuple(whole.shape) == self.shape, (whole.shape, self.shape)
        if self.peers.group is None:
            return whole
        return whole[self.rows.start : self.rows.stop].clone()

    def gather(self, part: Tensor) -> Tensor:
        """The whole tensor, from everybody's rows, on every process and on `part`'s device. On all ranks.

        Needs memory for up to three copies of it for the moment.
        """
        assert tuple(part.shape) == self.local_shape, (part.shape, self.local_shape)
        if self.peers.group is None:
            return part
        padded = part.new_zeros((self.step, *self.shape[1:]))
        padded[: len(self.rows)] = part
        # Only the last processes hold fewer rows than `step`, so all that was padded is at the end.
        return self.peers.gather(padded).flatten(0, 1)[: self.shape[0]]

    def units(self, size: int) -> Part:
        """This part counted in units of `size` consecutive entries, none of which is cut: 1-D."""
        per_row = prod(self.shape[1:])
        assert self.peers.num_ranks == 1 or self.step * per_row % size == 0, (self.shape, self.step, size)
        return Part((self.numel // size,), self.step * per_row // size, self.peers)

    def dealt(self, num_units: int) -> Part:
        """`num_units` things, dealt out evenly to the same processes: 1-D."""
        return Part((num_units,), -(-num_units // self.peers.num_ranks), self.peers)


def whole(shape: Sequence[int]) -> Part:
    """The part that is everything."""
    return Part(tuple(shape), shape[0] if shape else 1)


def part_of(tensor: Tensor, name: str) -> Part:
    """Which rows of a tensor this process holds.

    Raises:
        GaPError: if it is a DTensor that is not sharded by rows over one dimension of its mesh, naming the weight.
    """
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    # Replicas hold the same rows and choose alike, as under DDP.
    if len(sharded) != 1 or placements[sharded[0]] != Shard(0):
        raise GaPError(
            f"{name}: is placed as {tuple(placements)} over a mesh of {tuple(mesh.shape)}; expected rows (Shard(0)) over one "
            "dimension and replicas over the others, as FSDP2's fully_shard gives by default, without tensor parallelism"
        )
    dim = sharded[0]
    peers = Peers(mesh.get_group(dim), mesh.device_type, mesh.get_local_rank(dim), mesh.size(dim))
    part = Part(tuple(tensor.shape), -(-tensor.shape[0] // peers.num_ranks), peers)
    assert tuple(local(tensor).shape) == part.local_shape, (name, local(tensor).shape, part)
    return part


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a parameter, gradient or optimizer state that lies here, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def exchange(values: Sequence[float], parts: Sequence[Part]) -> list[list[float]]:
    """Each value as every process that holds a part has it, in order of rows. On all ranks.

    Args:
        values: One per part: all int (kept exact) or all float (float64).
    """
    out: list[list[float]] = [[] for _ in parts]
    for peers in dict.fromkeys(part.peers for part in parts):
        places = [i for i, part in enumerate(parts) if part.peers == peers]
        kind = torch.int64 if all(isinstance(v, int) for v in values) else torch.float64
        table = peers.gather(torch.tensor([values[i] for i in places], dtype=kind, device="cpu")).tolist()
        for column, i in enumerate(places):
            out[i] = [row[column] for row in table]
    return out


def total_counts(counts: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Each count summed over the processes that hold a part. On all ranks."""
    return [int(sum(values)) for values in exchange(counts, parts)]


def is_sharded(model: nn.Module | None) -> bool:
    """True if some of its parameters lie in parts on several processes."""
    return model is not None and any(isinstance(param, DTensor) for param in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered for a forward pass, so that parameters are the sharded ones and no copy goes stale.

    An evaluation leaves the root's parameters gathered; masks that change then would not reach the copy.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module was made of: fully_shard puts one of its own, such as FSDPGPT2Block, before it."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
