"""Which weights to keep: exact magnitude masks for each pattern, and how a target is spread over tensors.

Selection never sorts a whole tensor. The k-th largest magnitude is found by counting the bit patterns of
``|w|`` in passes of 16 bits over chunks: for non-negative IEEE floats, larger means larger bits. That is exact,
needs memory for one chunk beside the mask, works alike on CPU and GPU, and pools any number of tensors under one
threshold. Ties at the threshold are kept in order of tensor, then of index, until the count is met.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gap_hf.config import Pattern
from gap_hf.errors import GaPError
from gap_hf.phases import round_half_up

CHUNK = 1 << 22  # elements looked at together: 32 MiB of int64 counts' input at most


def num_kept(sparsity: Fraction | float, num_units: int) -> int:
    """k = round((1 - s) N), halves up, with a decimal `sparsity` taken as written (0.9 is nine tenths)."""
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))
    return round_half_up((1 - exact) * num_units)


def num_units(shape: Sequence[int], pattern: Pattern) -> int:
    """How many things of this pattern live or die as one: weights, or blocks."""
    numel = 1
    for size in shape:
        numel *= size
    return numel // (pattern.rows * pattern.cols) if pattern.kind == "block" else numel


def matrix_shape(shape: Sequence[int], layout: str) -> tuple[int, int, int]:
    """(batch, outputs, inputs) of a weight: kernel positions or experts are the batch."""
    if layout == "out_in":
        return 1, shape[0], shape[1]
    if layout == "in_out":
        return 1, shape[1], shape[0]
    if layout == "expert_out_in":
        return shape[0], shape[1], shape[2]
    if layout == "expert_in_out":
        return shape[0], shape[2], shape[1]
    assert layout == "conv", layout
    positions = 1
    for size in shape[2:]:
        positions *= size
    return positions, shape[0], shape[1]


def check_fits(name: str, shape: Sequence[int], layout: str, pattern: Pattern) -> None:
    """Refuse a weight that a structured pattern does not divide.

    Raises:
        GaPError: naming the weight, its size and what would have to divide it.
    """
    if pattern.kind == "unstructured":
        return
    _, outputs, inputs = matrix_shape(shape, layout)
    need_out = {"block": pattern.rows, "transposable": 4}.get(pattern.kind, 1)
    need_in = {"block": pattern.cols, "transposable": 4}.get(pattern.kind, pattern.m)
    for side, size, need in (("outputs", outputs, need_out), ("inputs", inputs, need_in)):
        if size % need:
            raise GaPError(
                f"gap.pattern: '{name}' has {size} {side}, which {need} does not divide; expected a pattern that fits, "
                "or name the weight in gap.exclude"
            )


def magnitude_mask(weight: Tensor, pattern: Pattern, keep: int, layout: str = "out_in", name: str = "weight") -> Tensor:
    """Keep the `keep` units of largest magnitude of one weight.

    Args:
        weight: Any float dtype and device.
        pattern: What lives or dies together.
        keep: Units to keep (weights; blocks for a block pattern, scored by the sum of their magnitudes).
            ``n:m`` and ``transposable`` prune whole groups of weights, in each of which they keep what the pattern
            says, and as many groups as fit: all of them at the pattern's own count, fewer above it.
        layout: How the tensor reads as outputs by inputs, see `gap_hf.targets`.
        name: Used in errors.

    Returns:
        uint8 mask of `weight`'s shape and device: 1 is live.

    Raises:
        GaPError: if the weight holds NaN.
    """
    if pattern.kind == "n:m":
        return _n_of_m_mask(weight, pattern, keep, layout, name)
    if pattern.kind == "transposable":
        return _transposable_mask(weight, keep, layout, name)
    return pooled_masks([weight], pattern, keep, [layout], [name])[0]


def pooled_masks(
    weights: Sequence[Tensor],
    pattern: Pattern,
    keep: int,
    layouts: Sequence[str],
    names: Sequence[str],
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Keep the `keep` units of largest magnitude of several weights together, under one threshold.

    Unstructured and block patterns only. Ties go to the earlier tensor, then to the lower index.

    Args:
        within: Masks whose live units go before all others, so that a live weight of 0 is kept before a masked one.

    Returns:
        One uint8 mask per weight, of its shape and device; together they keep exactly `keep` units.
    """
    if pattern.kind == "block":
        scores = [_block_scores(w, pattern, layout) for w, layout in zip(weights, layouts, strict=True)]
    else:
        scores = [w.detach().reshape(-1) for w in weights]
    live = None
    if within is not None:
        # A block is live if any weight of it is.
        units = zip(within, layouts, strict=True)
        live = (
            [_block_scores(m.float(), pattern, layout) > 0 for m, layout in units]
            if pattern.kind == "block"
            else [m.reshape(-1) for m in within]
        )
    masks = _largest(scores, keep, names, live)
    if pattern.kind == "block":
        return [_expand_blocks(m, w, pattern, layout) for m, w, layout in zip(masks, weights, layouts, strict=True)]
    return [m.view(w.shape) for m, w in zip(masks, weights, strict=True)]


def random_mask(shape: Sequence[int], pattern: Pattern, keep: int, layout: str, generator: torch.Generator) -> Tensor:
    """A mask of the same form and count with random places; drawn on the CPU, so alike on every device."""
    return magnitude_mask(torch.rand(tuple(shape), generator=generator), pattern, keep, layout)


def erk_counts(shapes: Sequence[tuple[int, int, int]], units: Sequence[int], sparsity: Fraction) -> list[int]:
    """Units kept per tensor under Erdős–Rényi-Kernel (Evci et al. 2020), summing to round((1 - s) N) exactly.

    Density goes as (outputs + inputs [+ kernel sides]) / (outputs * inputs * kernel); tensors that would exceed
    density 1 stay dense and the rest shares what is left. Fractions are settled by largest remainder.

    Args:
        shapes: (kernel positions or 1, outputs, inputs) per tensor.
        units: Units (weights or blocks) per tensor.
        sparsity: Of all tensors together.
    """
    total = num_kept(sparsity, sum(units))
    raw = [Fraction(o + i + (b if b > 1 else 0), b * o * i) for b, o, i in shapes]
    dense: set[int] = set()
    scale = Fraction(0)
    while len(dense) < len(units):
        rest = [j for j in range(len(units)) if j not in dense]
        scale = Fraction(total - sum(units[j] for j in dense)) / sum(raw[j] * units[j] for j in rest)
        over = [j for j in rest if raw[j] * scale > 1]
        if not over:
            break
        dense.add(max(over, key=lambda j: (raw[j], -j)))
    return spread(total, [Fraction(n) if j in dense else raw[j] * scale * n for j, n in enumerate(units)])


def spread(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers near `shares` that sum to `total`, by largest remainder; the first of equal ones goes up."""
    counts = [int(x) for x in shares]
    by_remainder = sorted(range(len(shares)), key=lambda j: (counts[j] - shares[j], j))
    for j in by_remainder[: total - sum(counts)]:
        counts[j] += 1
    return counts


# --- selection -------------------------------------------------------------------------------------------------------


def _largest(
    scores: Sequence[Tensor], keep: int, names: Sequence[str], live: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """uint8 masks of the `keep` entries of largest magnitude over all the 1-D `scores`, live ones before others."""
    total = sum(s.numel() for s in scores)
    assert 0 <= keep <= total, (keep, total)
    # 64 bits only if someone trains in float64: a float32 cast would make ties of different weights.
    num_bits = 64 if any(s.dtype == torch.float64 for s in scores) else 32
    if keep == 0:
        return [torch.zeros(s.numel(), dtype=torch.uint8, device=s.device) for s in scores]
    flags = live if live is not None else [None] * len(scores)
    threshold, num_above = _kth_largest_bits(scores, flags, keep, num_bits, names)
    ties_left = keep - num_above
    masks = []
    for score, flag in zip(scores, flags, strict=True):
        mask = torch.empty(score.numel(), dtype=torch.uint8, device=score.device)
        for (part, flag_part), out in zip(_chunks(score, flag), mask.split(CHUNK), strict=True):
            bits = _magnitude_bits(part, flag_part, num_bits)
            out.copy_(bits > threshold)
            tied = (bits == threshold).nonzero().squeeze(1)[:ties_left] if ties_left else None
            if tied is not None:
                out[tied] = 1
                ties_left -= tied.numel()
        masks.append(mask)
    return masks


def _kth_largest_bits(
    scores: Sequence[Tensor], flags: Sequence[Tensor | None], k: int, num_bits: int, names: Sequence[str]
) -> tuple[int, int]:
    """Bit pattern of the k-th largest magnitude (k from 1), and how many entries are strictly above it."""
    prefix, num_above = 0, 0
    for shift in range(num_bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score, flag, name in zip(scores, flags, names, strict=True):
            for part, flag_part in _chunks(score, flag):
                bits = _magnitude_bits(part, flag_part, num_bits)
                if shift == num_bits - 16:
                    _refuse_nan(part, name)
                else:
                    bits = bits[(bits >> (shift + 16)) == prefix]
                counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        at_least = counts.flip(0).cumsum(0)  # entry i: how many have a digit of at least 65535 - i
        position = int(torch.searchsorted(at_least, k - num_above))
        num_above += int(at_least[position - 1]) if position else 0
        prefix = (prefix << 16) | (0xFFFF - position)
    return prefix, num_above


def _magnitude_bits(part: Tensor, live: Tensor | None, num_bits: int) -> Tensor:
    """|w| as integers that order as the magnitudes do; bf16 and fp16 widen exactly. What is not live comes below 0."""
    bits = part.abs().double().view(torch.int64) if num_bits == 64 else part.abs().float().view(torch.int32)
    return bits if live is None else bits.add_(1).mul_(live)


def _chunks(flat: Tensor, live: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for i in range(0, flat.numel(), CHUNK):
        yield flat[i : i + CHUNK], None if live is None else live[i : i + CHUNK]


def _refuse_nan(part: Tensor, name: str) -> None:
    if bool(torch.isnan(part).any()):
        raise GaPError(f"{name}: holds NaN, expected finite weights to prune by magnitude; training has diverged")


# --- structure -------------------------------------------------------------------------------------------------------


def _to_matrix(tensor: Tensor, layout: str) -> Tensor:
    """View (or copy, for convolutions) as (batch, outputs, inputs)."""
    if layout == "out_in":
        return tensor.unsqueeze(0)
    if layout == "in_out":
        return tensor.t().unsqueeze(0)
    if layout == "expert_out_in":
        return tensor
    if layout == "expert_in_out":
        return tensor.transpose(1, 2)
    return tensor.reshape(tensor.shape[0], tensor.shape[1], -1).permute(2, 0, 1)


def _from_matrix(matrix: Tensor, layout: str, shape: Sequence[int]) -> Tensor:
    """Undo `_to_matrix`; contiguous in the tensor's own shape."""
    if layout == "out_in":
        return matrix.squeeze(0).contiguous()
    if layout == "in_out":
        return matrix.squeeze(0).t().contiguous()
    if layout == "expert_out_in":
        return matrix.contiguous()
    if layout == "expert_in_out":
        return matrix.transpose(1, 2).contiguous()
    return matrix.permute(1, 2, 0).reshape(tuple(shape)).contiguous()


def _block_scores(weight: Tensor, pattern: Pattern, layout: str) -> Tensor:
    """Sum of magnitudes of each R x C block, 1-D, in order of batch, block row, block column."""
    blocks = _split_blocks(_to_matrix(weight.detach(), layout), pattern)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(blocks, ord=1, dim=(2, 4), dtype=dtype).reshape(-1)


def _split_blocks(matrix: Tensor, pattern: Pattern) -> Tensor:
    batch, outputs, inputs = matrix.shape
    return matrix.reshape(batch, outputs // pattern.rows, pattern.rows, inputs // pattern.cols, pattern.cols)


def _expand_blocks(mask: Tensor, weight: Tensor, pattern: Pattern, layout: str) -> Tensor:
    batch, outputs, inputs = matrix_shape(weight.shape, layout)
    grid = mask.view(batch, outputs // pattern.rows, 1, inputs // pattern.cols, 1)
    full = grid.expand(-1, -1, pattern.rows, -1, pattern.cols).reshape(batch, outputs, inputs)
    return _from_matrix(full, layout, weight.shape)


def _n_of_m_mask(weight: Tensor, pattern: Pattern, keep: int, layout: str, name: str) -> Tensor:
    """Of every M consecutive inputs keep the N largest; ties to the lower index by a stable sort."""
    groups = _to_matrix(weight.detach(), layout).reshape(-1, pattern.m)
    mask = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK // pattern.m)
    for i in range(0, groups.shape[0], rows):
        part = groups[i : i + rows]
        _refuse_nan(part, name)
        order = torch.sort(part.abs(), dim=1, descending=True, stable=True).indices
        mask[i : i + rows].scatter_(1, order[:, : pattern.n], 1)
    _fill_costly_groups(mask, groups, (weight.numel() - keep) // (pattern.m - pattern.n))
    return _from_matrix(mask.view(matrix_shape(weight.shape, layout)), layout, weight.shape)


def _fill_costly_groups(mask: Tensor, groups: Tensor, num_pruned: int) -> None:
    """Leave only `num_pruned` groups (rows) pruned, those that lose least; make the others dense, in place."""
    if num_pruned < groups.shape[0]:
        losses = (groups.abs().double() * (1 - mask)).sum(dim=1)
        dense = _largest([losses], groups.shape[0] - num_pruned, ["losses"])[0]
        mask.masked_fill_(dense.bool().unsqueeze(1), 1)


# All ninety 4x4 masks with two ones in every row and every column, in lexicographic order (Hubara et al. 2021).
_PAIRS = [tuple(1 if c in pair else 0 for c in range(4)) for pair in itertools.combinations(range(4), 2)]
_TRANSPOSABLE = [
    sum(rows, ())
    for rows in itertools.product(_PAIRS, repeat=4)
    if all(sum(column) == 2 for column in zip(*rows, strict=True))
]


def _transposable_mask(weight: Tensor, keep: int, layout: str, name: str) -> Tensor:
    """The best of the ninety masks for each 4x4 block, by kept magnitude; ties to the first of them."""
    tiles = _split_blocks(_to_matrix(weight.detach(), layout), Pattern("block", rows=4, cols=4))
    tiles = tiles.permute(0, 1, 3, 2, 4)
    grid = tiles.shape[:3]
    flat = tiles.reshape(-1, 16)
    # Sums of eight in float64 are exact for lower precisions, so CPU and GPU agree and TF32 has no say.
    choices = torch.tensor(_TRANSPOSABLE, dtype=torch.uint8, device=weight.device)
    mask = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK // 128)
    for i in range(0, flat.shape[0], rows):
        part = flat[i : i + rows]
        _refuse_nan(part, name)
        # An infinite weight would make 0 * inf of every mask that drops it.
        kept = part.abs().double().clamp(max=1e300) @ choices.double().t()
        # argmax may return any of several maxima; the first True of an equality test is always the lowest.
        best = (kept == kept.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)
        mask[i : i + rows] = choices[best]
    _fill_costly_groups(mask, flat, (weight.numel() - keep) // 8)
    batch, outputs, inputs = matrix_shape(weight.shape, layout)
    matrix = mask.view(*grid, 4, 4).permute(0, 1, 3, 2, 4).reshape(batch, outputs, inputs)
    return _from_matrix(matrix, layout, weight.shape)
