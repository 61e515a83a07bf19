"""Fewer bytes in DDP: a communication hook whose all-reduce sends the live gradients and leaves out the masked ones.

Every rank holds the same masks, so all know which entries are missing and nothing but gradients is sent. In a plain loop:

    ddp = DistributedDataParallel(model)
    sparsifier = Sparsifier(model, config, total_steps=1000)
    ddp.register_comm_hook(GradientReducer(sparsifier), reduce_live_gradients)

The mean is DDP's own: each rank divides first, then the group adds. Two ranks give its bits, because a + b is b + a. With
more, an all-reduce adds in an order that depends on where in the buffer an entry lies, so the last bits may differ.
"""

# No `from __future__ import annotations` here: DDP reads the annotations of a hook and takes no strings.
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError, first_line
from gap_hf.sparsifier import Sparsifier

# torch documents it under this name, but does not list it among its exports.
GradBucket = dist.GradBucket  # pyright: ignore[reportPrivateImportUsage]

# A tensor is packed below this live share. Over loopback, where sending is work of the same cores, packing pays below 0.3
# to 0.5; between nodes up to 0.9 by docs/scaling.md's formulas. 0.6 stands between, and bounds the index's memory.
PACK_BELOW = 0.6


@dataclass(frozen=True)
class _Packing:
    """What of one bucket is sent: what `index` names, then the stretches that go whole.

    The index costs 4 bytes for a live entry of a packed tensor: 0.4 bytes a weight at 90 %, 2.4 at most (`PACK_BELOW`).
    int64 would cost twice that and gathers no faster; only the scatter needs it, widened for one bucket at a time. Boolean
    selection needs no index, and took 15 to 45 times as long on a CPU and a synchronisation on a GPU.
    """

    params: list[Tensor]
    masks: list[Tensor | None]
    index: Tensor | None  # int32, ascending positions in the bucket; None: the bucket goes as it is
    whole: list[tuple[int, int]]  # (start, length), of dense tensors and those above PACK_BELOW
    num_sent: int


class GradientReducer:
    """State of the hook `reduce_live_gradients`; one for each DDP module.

    Masked entries of what was packed come back as 0. What goes whole comes back as from DDP, and
    `Sparsifier.mask_gradients` zeroes its masked entries as it does without the hook. A NaN or infinity that one rank
    has in a masked place is not sent, and so does no harm.

    Args:
        sparsifier: Whose masks count, and whose plan says at which steps gradients have to be whole.
        group: Ranks to average over. None is all of them.
        packs: Leave out masked gradients. False: send everything, as DDP does, but over `group`.

    Attributes:
        sparsifier: May be replaced between steps, by one for the same model.
        group: May be replaced between steps; the mean is over this group's size. All ranks of a group hold the same masks.
        num_sent: Entries given to all-reduces since it was made; set it to 0 at will.
        num_dense: Entries that DDP alone would have given to them.
    """

    def __init__(self, sparsifier: Sparsifier, *, group: dist.ProcessGroup | None = None, packs: bool = True) -> None:
        self.sparsifier = sparsifier
        self.group, self.packs = group, packs
        self._module: DistributedDataParallel | None = None
        self.num_sent = self.num_dense = 0
        self._packings: dict[int, _Packing] = {}

    @property
    def sparsifier(self) -> Sparsifier:
        return self._sparsifier

    @sparsifier.setter
    def sparsifier(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._names: dict[Tensor, str] = {param: name for name, param in sparsifier.masks.params.items()}

    def register(self, module: DistributedDataParallel) -> None:
        """Become the hook of a DDP module, for as long as it lives."""
        module.register_comm_hook(self, reduce_live_gradients)
        self._module, self._broadcasts_buffers = module, module.broadcast_buffers

    def switch(self, group: dist.ProcessGroup | None) -> None:
        """From the next step on average over this group. While it is not all, buffers are not copied from rank 0 either."""
        self.group = group
        if self._module is not None:
            self._module.broadcast_buffers = self._broadcasts_buffers and group is None

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Begin the mean of a bucket over the group; the future holds the bucket's buffer."""
        buffer = bucket.buffer()
        whole = not self.packs or self.sparsifier.needs_dense_gradients
        packing = None if whole else self._packing(bucket)
        self.num_dense += buffer.numel()
        if packing is None or packing.index is None:
            self.num_sent += buffer.numel()
            return self._begin_mean(buffer).then(lambda done: done.value()[0])
        self.num_sent += packing.num_sent

        def unpack(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            _unpack(done.value()[0], buffer, packing)
            return buffer

        return self._begin_mean(_pack(buffer, packing)).then(unpack)

    def _begin_mean(self, tensor: Tensor) -> torch.futures.Future[list[Tensor]]:
        # Before adding, as DDP does, so that fp16 does not overflow; and by its factor, for its bits.
        tensor.mul_(1 / dist.get_world_size(self.group))
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None, "a rank reduces over a group that it is not in"
        return work.get_future()

    def _packing(self, bucket: GradBucket) -> _Packing:
        """The cached packing of a bucket; made anew when DDP has moved its parameters or one of them has a new mask."""
        params = bucket.parameters()
        masks = [self.sparsifier.masks[self._names[p]] if p in self._names else None for p in params]
        cached = self._packings.get(bucket.index())
        if cached is not None and not _same(cached.params, params):
            # DDP rebuilds all buckets at once, after its first backward, and there may be fewer of them now.
            self._packings.clear()
            cached = None
        if cached is None or not _same(cached.masks, masks):
            cached = self._packings[bucket.index()] = _make_packing(bucket, params, masks)
        return cached


def reduce_live_gradients(state: GradientReducer, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The hook: ``ddp.register_comm_hook(GradientReducer(sparsifier), reduce_live_gradients)``."""
    return state.reduce(bucket)


def attach(model: nn.Module, sparsifier: Sparsifier, reducer: GradientReducer | None = None) -> GradientReducer | None:
    """Register the hook on a DDP module, which `torch.compile` may have wrapped, if `live_gradients` or P-GaP wants it there.

    Args:
        model: The wrapped model. Nothing is registered if there is no DDP in it, or only one process.
        sparsifier: Of the model inside.
        reducer: Of an earlier call. A DDP module takes one hook in its life, so that one goes on with `sparsifier`.

    Raises:
        GaPError: if the DDP module has another hook already.
    """
    inner = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
    if not isinstance(inner, DistributedDataParallel):
        return None
    packs = _is_wanted(sparsifier.config, inner)
    # P-GaP needs the hook to keep gradients inside its groups of processes, whatever they send.
    if not packs and sparsifier.plan.num_workers == 1:
        return None
    if reducer is not None and any(state is reducer for _, state in inner._comm_hooks):
        reducer.sparsifier = sparsifier
        return reducer
    reducer = GradientReducer(sparsifier, packs=packs)
    try:
        reducer.register(inner)
    except RuntimeError as error:
        raise GaPError(
            f"gap.live_gradients: the DDP module takes no communication hook ({first_line(error)}); expected one "
            "without a hook of its own, or live_gradients: false"
        ) from None
    return reducer


def _is_wanted(config: GaPConfig, ddp: DistributedDataParallel) -> bool:
    if dist.get_world_size(ddp.process_group) == 1 or config.live_gradients is False:
        return False
    return config.live_gradients is True or 1 - config.target < PACK_BELOW


def _make_packing(bucket: GradBucket, params: list[Tensor], masks: list[Tensor | None]) -> _Packing:
    buffer = bucket.buffer()
    if not any(mask is not None and _is_packed(mask) for mask in masks):
        return _Packing(params, masks, None, [], buffer.numel())
    flags = torch.zeros(buffer.numel(), dtype=torch.uint8, device=buffer.device)
    whole: list[tuple[int, int]] = []
    for param, gradient, mask in zip(params, bucket.gradients(), masks, strict=True):
        start, length = int(gradient.storage_offset() - buffer.storage_offset()), gradient.numel()
        if mask is not None and _is_packed(mask):
            flags.as_strided(param.shape, _strides_in_bucket(param), start).copy_(mask)
        elif whole and sum(whole[-1]) == start:
            whole[-1] = (whole[-1][0], whole[-1][1] + length)
        else:
            whole.append((start, length))
    index = flags.nonzero().squeeze(1).int()
    return _Packing(params, masks, index, whole, index.numel() + sum(length for _, length in whole))


def _strides_in_bucket(param: Tensor) -> tuple[int, ...]:
    """DDP keeps the parameter's own strides (channels_last) if it has no gaps; `GradBucket.gradients` shows rows always."""
    dense = torch.empty_like(param, device="meta")  # has the parameter's strides exactly if they leave no gap
    return dense.stride() if dense.stride() == param.stride() else torch.empty(param.shape, device="meta").stride()


def _is_packed(mask: Tensor) -> bool:
    return int(mask.sum()) < PACK_BELOW * mask.numel()


def _pack(buffer: Tensor, packing: _Packing) -> Tensor:
    assert packing.index is not None
    packed = buffer.new_empty(packing.num_sent)
    at = packing.index.numel()
    torch.index_select(buffer, 0, packing.index, out=packed[:at])
    for start, length in packing.whole:
        packed[at : at + length] = buffer[start : start + length]
        at += length
    return packed


def _unpack(packed: Tensor, buffer: Tensor, packing: _Packing) -> None:
    assert packing.index is not None
    at = packing.index.numel()
    buffer.zero_().index_copy_(0, packing.index.long(), packed[:at])
    for start, length in packing.whole:
        buffer[start : start + length] = packed[at : at + length]
        at += length


def _same(old: list[Tensor] | list[Tensor | None], new: list[Tensor] | list[Tensor | None]) -> bool:
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
