"""Masks by name: which weights are live, kept as uint8 in memory and as bits on disk. No schedule, no files.

Of a sharded weight each process holds the part of the mask that belongs to its part of the weight. Counts are of the whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gap_hf.errors import GaPError, did_you_mean
from gap_hf.shards import Part, local, part_of, total_counts


class Masks:
    """A mask, or None for a tensor that is dense now, for every prunable weight of a model.

    uint8 multiplies as fast as float at a quarter of its memory, and twice as fast as bool (measured on CPU).

    Raises:
        GaPError: if a weight is sharded in a way that is not supported.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.params = dict(params)
        self.parts: dict[str, Part] = {name: part_of(p, name) for name, p in self.params.items()}
        # Counted when a mask is set, which is on all ranks; to ask is not.
        self._live = {name: p.numel() for name, p in self.params.items()}
        self._masks: dict[str, Tensor | None] = dict.fromkeys(self.params)
        self._sparse: list[tuple[nn.Parameter, Tensor]] | None = None  # made when it is asked for
        # Counted up where others may have written weights by ways that torch does not count, such as `.data`.
        self.writes = 0

    def __getitem__(self, name: str) -> Tensor | None:
        mask = self._masks[name]
        if mask is not None and mask.device != (place := local(self.params[name]).device):
            mask = self._masks[name] = mask.to(place)
        return mask

    def __iter__(self):
        return iter(self._masks)

    def set(self, name: str, mask: Tensor | None) -> None:
        """Replace one mask and, if there is one, set the masked weights to +0. On all ranks; `mask` is of the local part.

        `masked_fill_` and not a product: it removes NaN and gives no negative zero.
        """
        param = local(self.params[name])
        if mask is not None:
            assert mask.shape == param.shape and mask.dtype == torch.uint8, name
            mask = mask.to(param.device)
            with torch.no_grad():
                param.masked_fill_(mask == 0, 0)
        self._masks[name] = mask
        # A sum of uint8 accumulates in int64.
        count = param.numel() if mask is None else int(mask.sum())
        self._live[name] = total_counts([count], [self.parts[name]])[0]
        self._sparse = None

    def adopted(self, given: Masks | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Masks of an earlier run for these weights, as the parts that lie here.

        Args:
            given: Of weights of the same model on the same processes; or, by name, of whole weights, where not 0 is live.

        Raises:
            GaPError: if one is of no prunable weight, or of another shape.
        """
        if given is None or isinstance(given, Masks):
            return {} if given is None else {n: m for n in self if n in given.params and (m := given[n]) is not None}
        out = {}
        for name, mask in given.items():
            if name not in self.params:
                raise GaPError(f"masks: '{name}' is no prunable weight here{did_you_mean(name, self.params)}")
            part = self.parts[name]
            if tuple(mask.shape) != tuple(part.shape):
                raise GaPError(f"masks: '{name}' has shape {tuple(mask.shape)}, expected {tuple(part.shape)}")
            out[name] = part.cut((mask != 0).to(torch.uint8))
        return out

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Set every masked weight to 0, in place."""
        for param, mask in self.sparse_params():
            local(param).mul_(mask)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradient of every masked weight to 0, in place; parameters without a gradient are left out."""
        for param, mask in self.sparse_params():
            if param.grad is not None:
                local(param.grad).mul_(mask)

    def sparse_params(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that have a mask now, with it, on their device: a model may be moved after its masks were set."""
        pairs = self._sparse
        if pairs is None or (pairs and pairs[0][1].device != local(pairs[0][0]).device):
            pairs = self._sparse = [(self.params[n], m) for n in self._masks if (m := self[n]) is not None]
        return pairs

    def live(self, name: str) -> int:
        """How many weights of one tensor are live, on all processes together."""
        return self._live[name]

    def counts(self, name: str) -> dict[str, Any]:
        """One tensor's ``numel``, ``live`` and ``sparsity``, on all processes together."""
        numel, live = self.parts[name].numel, self.live(name)
        return {"numel": numel, "live": live, "sparsity": 1 - live / numel}

    def sparsity(self, names: Sequence[str] | None = None) -> float:
        """Share of masked weights of the named tensors together (all by default)."""
        names = list(self._masks) if names is None else names
        total = sum(self.params[n].numel() for n in names)
        return 1.0 - sum(self.live(n) for n in names) / total

    def digest(self, names: Sequence[str] | None = None) -> str:
        """SHA-256 over names, shapes and bits of the named tensors (all by default): equal on two machines exactly if their
        masks are equal. On all ranks.
        """
        sha = hashlib.sha256()
        for name in sorted(self._masks if names is None else names):
            mask = self[name]
            sha.update(f"{name}:{tuple(self.params[name].shape)}:{'dense' if mask is None else 'sparse'};".encode())
            if mask is not None:
                sha.update(pack_bits(self.parts[name].gather(mask)).numpy().tobytes())
        return sha.hexdigest()


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 mask of any shape to 1-D uint8 of ceil(numel / 8) bytes, lowest bit first, row-major."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Undo `pack_bits`.

    Raises:
        GaPError: if `bits` is not 1-D uint8 of exactly the length that `shape` needs, or pads with ones.
    """
    numel = math.prod(shape)  # of any size: what a file says of it need not be true
    length = (numel + 7) // 8
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (length,):
        raise GaPError(
            f"{name}: its mask holds {tuple(bits.shape)} of {bits.dtype}, expected ({length},) of torch.uint8 for shape "
            f"{tuple(shape)}"
        )
    flat = np.unpackbits(bits.numpy(), bitorder="little")
    if flat[numel:].any():
        raise GaPError(f"{name}: its mask has ones beyond its {numel} weights; expected zeros there")
    return torch.from_numpy(flat[:numel].reshape(tuple(shape)).copy())
