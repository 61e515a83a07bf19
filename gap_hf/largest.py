"""The k largest magnitudes of any number of tensors, exactly, wherever their parts lie.

Nothing is sorted. The k-th largest magnitude is found by counting the bit patterns of ``|w|`` in passes of 16 bits over
chunks: for non-negative IEEE floats, larger means larger bits. That is exact, needs memory for one chunk beside the mask,
works alike on CPU and GPU, and pools any number of tensors under one threshold. Of sharded tensors only the counts are
added up (512 KB a pass). Ties at the threshold are kept in order of tensor, then of index in the whole tensor, until the
count is met; only if some of them have to go do processes tell one another how many they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gap_hf.errors import GaPError
from gap_hf.shards import Part, Peers, exchange, total_counts

CHUNK = 1 << 22  # elements looked at together: 32 MiB of int64 counts' input at most
_DIGITS = 1 << 16


class Scores(NamedTuple):
    """One tensor of a pool.

    Attributes:
        values: 1-D, any float dtype: what lies here.
        part: Where it lies in the whole, 1-D.
        name: Used in errors.
        live: Flags (0 or 1) of the entries that go before all others, if there are such.
    """

    values: Tensor
    part: Part
    name: str
    live: Tensor | None = None


def largest(pool: Sequence[Scores], keep: int) -> list[Tensor]:
    """uint8 masks, 1-D, of the `keep` entries of largest magnitude over all of `pool`, live ones before others.

    On all ranks, with the same pool in the same order.

    Raises:
        GaPError: if a score is NaN.
    """
    total = sum(s.part.numel for s in pool)
    assert 0 <= keep <= total, (keep, total)
    # 64 bits only if someone trains in float64: a float32 cast would make ties of different weights.
    num_bits = 64 if any(s.values.dtype == torch.float64 for s in pool) else 32
    if keep == 0:
        return [torch.zeros(s.values.numel(), dtype=torch.uint8, device=s.values.device) for s in pool]
    threshold, num_above, num_tied = _kth_largest_bits(pool, keep, num_bits)
    masks = [torch.empty(s.values.numel(), dtype=torch.uint8, device=s.values.device) for s in pool]
    ties_left = _ties_here(pool, threshold, keep - num_above, num_tied, num_bits)
    for scores, mask, num_left in zip(pool, masks, ties_left, strict=True):
        for start, bits in _bits(scores, num_bits):
            out = mask[start : start + bits.numel()]
            if num_left is None:
                out.copy_(bits >= threshold)
                continue
            out.copy_(bits > threshold)
            if num_left:
                tied = (bits == threshold).nonzero().squeeze(1)[:num_left]
                out[tied] = 1
                num_left -= tied.numel()
    return masks


def refuse_nan(pool: Sequence[Scores]) -> None:
    """On all ranks, since all of them have to stop.

    Raises:
        GaPError: naming the first tensor of which any part holds NaN.
    """
    counts = [sum(int(torch.isnan(part).sum()) for part in s.values.split(CHUNK)) for s in pool]
    for scores, count in zip(pool, total_counts(counts, [s.part for s in pool]), strict=True):
        if count:
            raise GaPError(
                f"{scores.name}: holds NaN, expected finite weights to prune by magnitude; training has diverged"
            )


def _kth_largest_bits(pool: Sequence[Scores], k: int, num_bits: int) -> tuple[int, int, int]:
    """Bit pattern of the k-th largest magnitude (k from 1); how many entries are strictly above it, and how many at it."""
    prefix, num_above, num_tied = 0, 0, 0
    for shift in range(num_bits - 16, -1, -16):
        first = shift == num_bits - 16
        by_peers: dict[Peers, Tensor] = {}
        for scores in pool:
            # The last place counts NaN.
            counts = by_peers.setdefault(scores.part.peers, torch.zeros(_DIGITS + 1, dtype=torch.int64, device="cpu"))
            for start, bits in _bits(scores, num_bits):
                if first:
                    counts[-1] += torch.isnan(scores.values[start : start + bits.numel()]).sum().cpu()
                else:
                    bits = bits[(bits >> (shift + 16)) == prefix]
                counts[:-1] += torch.bincount((bits >> shift) & (_DIGITS - 1), minlength=_DIGITS).cpu()
        counts = torch.stack([peers.add_up(counts) for peers, counts in by_peers.items()]).sum(dim=0)
        if counts[-1]:
            refuse_nan(pool)
        at_least = counts[:-1].flip(0).cumsum(0)  # entry i: how many have a digit of at least 65535 - i
        position = int(torch.searchsorted(at_least, k - num_above))
        num_tied = int(counts[_DIGITS - 1 - position])
        num_above += int(at_least[position - 1]) if position else 0
        prefix = (prefix << 16) | (_DIGITS - 1 - position)
    return prefix, num_above, num_tied


def _ties_here(
    pool: Sequence[Scores], threshold: int, num_kept: int, num_tied: int, num_bits: int
) -> Sequence[int | None]:
    """How many of the ties of each tensor that lie here are kept, the first ones; None for all of them."""
    if num_kept == num_tied:
        return [None] * len(pool)
    here = [sum(int((bits == threshold).sum()) for _, bits in _bits(scores, num_bits)) for scores in pool]
    kept = []
    for scores, counts in zip(pool, exchange(here, [s.part for s in pool]), strict=True):
        before = int(sum(counts[: scores.part.peers.rank]))
        kept.append(min(max(num_kept - before, 0), int(counts[scores.part.peers.rank])))
        num_kept = max(num_kept - int(sum(counts)), 0)
    return kept


def _bits(scores: Scores, num_bits: int) -> Iterator[tuple[int, Tensor]]:
    """Chunks of |w| as integers that order as the magnitudes do, each with the index where it starts.

    bf16 and fp16 widen exactly. What is not live comes below 0.
    """
    for start in range(0, scores.values.numel(), CHUNK):
        part = scores.values[start : start + CHUNK].abs()
        bits = part.double().view(torch.int64) if num_bits == 64 else part.float().view(torch.int32)
        yield start, bits if scores.live is None else bits.add_(1).mul_(scores.live[start : start + CHUNK])
