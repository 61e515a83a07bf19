"""Which weights to keep: exact magnitude masks for each pattern, and how a target is spread over tensors.

`gap_hf.largest` says which scores are the largest; here is what is scored, and what lives or dies as one.

Weights may be sharded: then the part that lies here is given, and so is its mask. Unstructured masks gather nothing. Where
the rows that a process holds may cut a structure, or do not follow the order of structures that settles ties, one weight
at a time is gathered whole on every process: N:M, blocks and tiles of GPT-2's Conv1D and of convolutions, and blocks and
tiles of rows that do not divide the rows of a process. Of a pool of such weights each process keeps its share of the scores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gap_hf.errors import GaPError
from gap_hf.largest import CHUNK, Scores, largest, refuse_nan
from gap_hf.pattern_names import Pattern
from gap_hf.phases import round_half_up
from gap_hf.shards import Part, whole


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


def magnitude_mask(
    weight: Tensor,
    pattern: Pattern,
    keep: int,
    layout: str = "out_in",
    name: str = "weight",
    part: Part | None = None,
) -> Tensor:
    """Keep the `keep` units of largest magnitude of one weight. On all ranks, if it is sharded.

    Args:
        weight: Any float dtype and device; what lies here of it.
        pattern: What lives or dies together.
        keep: Units to keep (weights; blocks for a block pattern, scored by the sum of their magnitudes).
            ``n:m`` and ``transposable`` prune whole groups of weights, in each of which they keep what the pattern
            says, and as many groups as fit: all of them at the pattern's own count, fewer above it.
        layout: How the tensor reads as outputs by inputs, see `gap_hf.targets`.
        name: Used in errors.
        part: Where `weight` lies in the whole; by default it is the whole.

    Returns:
        uint8 mask of `weight`'s shape and device: 1 is live.

    Raises:
        GaPError: if the weight holds NaN.
    """
    part = part or whole(weight.shape)
    if pattern.kind not in ("n:m", "transposable"):
        return pooled_masks([weight], pattern, keep, [layout], [name], parts=[part])[0]
    if _is_cut(part, pattern, layout):
        return part.cut(magnitude_mask(part.gather(weight), pattern, keep, layout, name))
    refuse_nan([Scores(weight.reshape(-1), part.units(1), name)])
    if pattern.kind == "n:m":
        return _n_of_m_mask(weight, pattern, keep, layout, part)
    return _transposable_mask(weight, keep, layout, part)


def pooled_masks(
    weights: Sequence[Tensor],
    pattern: Pattern,
    keep: int,
    layouts: Sequence[str],
    names: Sequence[str],
    within: Sequence[Tensor] | None = None,
    parts: Sequence[Part] | None = None,
) -> list[Tensor]:
    """Keep the `keep` units of largest magnitude of several weights together, under one threshold.

    Unstructured and block patterns only. Ties go to the earlier tensor, then to the lower index. On all ranks, if a
    weight is sharded.

    Args:
        within: Masks whose live units go before all others, so that a live weight of 0 is kept before a masked one.
        parts: Where the weights (and masks) lie in the whole ones; by default they are these.

    Returns:
        One uint8 mask per weight, of its shape and device; together they keep exactly `keep` units.
    """
    parts = parts or [whole(w.shape) for w in weights]
    flags = within if within is not None else [None] * len(weights)
    pool = [_unit_scores(*each, pattern) for each in zip(weights, flags, parts, layouts, names, strict=True)]
    masks = largest(pool, keep)
    if pattern.kind != "block":
        return [m.view(w.shape) for m, w in zip(masks, weights, strict=True)]
    return [
        _expand_blocks(m, s.part, pattern, layout, part)
        for m, s, layout, part in zip(masks, pool, layouts, parts, strict=True)
    ]


def random_mask(shape: Sequence[int], pattern: Pattern, keep: int, layout: str, generator: torch.Generator) -> Tensor:
    """A mask of the same form and count with random places; drawn on the CPU, so alike on every device."""
    return magnitude_mask(torch.rand(tuple(shape), generator=generator, device="cpu"), pattern, keep, layout)


def erk_counts(shapes: Sequence[tuple[Sequence[int], int, int]], units: Sequence[int], sparsity: Fraction) -> list[int]:
    """Units kept per tensor under Erdős–Rényi-Kernel (Evci et al. 2020), summing to round((1 - s) N) exactly.

    Density goes as (outputs + inputs + kernel sides) / (outputs * inputs * kernel positions); tensors that would exceed
    density 1 stay dense and the rest shares what is left. Fractions are settled by largest remainder.

    Args:
        shapes: (kernel sides, outputs, inputs) per tensor; a matrix has no sides.
        units: Units (weights or blocks) per tensor.
        sparsity: Of all tensors together.
    """
    total = num_kept(sparsity, sum(units))
    raw = [Fraction(o + i + sum(sides), math.prod(sides) * o * i) for sides, o, i in shapes]
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


def _is_cut(part: Part, pattern: Pattern, layout: str) -> bool:
    """Whether a structure may lie on two processes, or their order is not that of the structures."""
    if part.peers.num_ranks == 1 or pattern.kind == "unstructured" or layout.startswith("expert"):
        return False
    if layout == "in_out" or matrix_shape(part.shape, layout)[0] > 1:
        return True
    return part.step % {"block": pattern.rows, "transposable": 4}.get(pattern.kind, 1) != 0


def _unit_scores(weight: Tensor, mask: Tensor | None, part: Part, layout: str, name: str, pattern: Pattern) -> Scores:
    """What each unit of this process' share weighs, and whether it is live: a block is if any weight of it is."""
    if pattern.kind != "block":
        return Scores(weight.detach().reshape(-1), part.units(1), name, None if mask is None else mask.reshape(-1))
    if not _is_cut(part, pattern, layout):
        units = part.units(pattern.rows * pattern.cols)
        live = None if mask is None else _block_scores(mask.float(), pattern, layout) > 0
        return Scores(_block_scores(weight, pattern, layout), units, name, live)
    units = part.dealt(num_units(part.shape, pattern))
    scores = units.cut(_block_scores(part.gather(weight.detach()), pattern, layout))
    live = None if mask is None else units.cut(_block_scores(part.gather(mask).float(), pattern, layout) > 0)
    return Scores(scores, units, name, live)


def _block_scores(weight: Tensor, pattern: Pattern, layout: str) -> Tensor:
    """Sum of magnitudes of each R x C block, 1-D, in order of batch, block row, block column."""
    blocks = _split_blocks(_to_matrix(weight.detach(), layout), pattern)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(blocks, ord=1, dim=(2, 4), dtype=dtype).reshape(-1)


def _split_blocks(matrix: Tensor, pattern: Pattern) -> Tensor:
    batch, outputs, inputs = matrix.shape
    return matrix.reshape(batch, outputs // pattern.rows, pattern.rows, inputs // pattern.cols, pattern.cols)


def _expand_blocks(mask: Tensor, units: Part, pattern: Pattern, layout: str, part: Part) -> Tensor:
    """A mask of weights from one of blocks; both are what lies here."""
    is_cut = _is_cut(part, pattern, layout)
    shape = part.shape if is_cut else part.local_shape
    batch, outputs, inputs = matrix_shape(shape, layout)
    grid = units.gather(mask) if is_cut else mask
    grid = grid.view(batch, outputs // pattern.rows, 1, inputs // pattern.cols, 1)
    full = grid.expand(-1, -1, pattern.rows, -1, pattern.cols).reshape(batch, outputs, inputs)
    expanded = _from_matrix(full, layout, shape)
    return part.cut(expanded) if is_cut else expanded


def _n_of_m_mask(weight: Tensor, pattern: Pattern, keep: int, layout: str, part: Part) -> Tensor:
    """Of every M consecutive inputs keep the N largest; ties to the lower index by a stable sort."""
    groups = _to_matrix(weight.detach(), layout).reshape(-1, pattern.m)
    mask = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK // pattern.m)
    for i in range(0, groups.shape[0], rows):
        order = torch.sort(groups[i : i + rows].abs(), dim=1, descending=True, stable=True).indices
        mask[i : i + rows].scatter_(1, order[:, : pattern.n], 1)
    _fill_costly_groups(mask, groups, (part.numel - keep) // (pattern.m - pattern.n), part.units(pattern.m))
    return _from_matrix(mask.view(matrix_shape(weight.shape, layout)), layout, weight.shape)


def _fill_costly_groups(mask: Tensor, groups: Tensor, num_pruned: int, units: Part) -> None:
    """Leave only `num_pruned` groups (rows) pruned, those that lose least; make the others dense, in place."""
    if num_pruned < units.numel:
        losses = (groups.abs().double() * (1 - mask)).sum(dim=1)
        dense = largest([Scores(losses, units, "losses")], units.numel - num_pruned)[0]
        mask.masked_fill_(dense.bool().unsqueeze(1), 1)


# All ninety 4x4 masks with two ones in every row and every column, in lexicographic order (Hubara et al. 2021).
_PAIRS = [tuple(1 if c in pair else 0 for c in range(4)) for pair in itertools.combinations(range(4), 2)]
_TRANSPOSABLE = [
    sum(rows, ())
    for rows in itertools.product(_PAIRS, repeat=4)
    if all(sum(column) == 2 for column in zip(*rows, strict=True))
]


def _transposable_mask(weight: Tensor, keep: int, layout: str, part: Part) -> Tensor:
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
        # An infinite weight would make 0 * inf of every mask that drops it.
        kept = flat[i : i + rows].abs().double().clamp(max=1e300) @ choices.double().t()
        # argmax may return any of several maxima; the first True of an equality test is always the lowest.
        best = (kept == kept.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)
        mask[i : i + rows] = choices[best]
    _fill_costly_groups(mask, flat, (part.numel - keep) // 8, part.units(16))
    batch, outputs, inputs = matrix_shape(weight.shape, layout)
    matrix = mask.view(*grid, 4, 4).permute(0, 1, 3, 2, 4).reshape(batch, outputs, inputs)
    return _from_matrix(matrix, layout, weight.shape)
