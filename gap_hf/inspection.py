"""What a saved model's zeros are: how many, where, and which patterns they hold to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gap_hf.stored_model import StoredModel, StoredTensor
from gap_hf.tensor_files import is_not_zero

# n of every m along an axis, and blocks of rows by columns of the matrix (first axis, all others).
N_OF_M = ((1, 4), (2, 4), (4, 8))
BLOCKS = ((32, 32), (8, 8), (4, 4), (16, 1), (1, 16))
_ROWS = 32  # all of the above divide it
_PIECE = 1 << 22


@dataclass(frozen=True)
class TensorFacts:
    """What was found in a tensor.

    Attributes:
        name, dtype, shape: Of it.
        weights: Elements.
        zeros: Of them, those that are 0 (-0 too); None for a dtype that is not read.
        live: Kept by the recorded mask, None where there is none.
        disobeying: Weights that are not 0 and that the recorded mask says are.
        patterns: Those that its zeros hold to, such as ``2:4`` or ``16x1 blocks``; along the first axis they say so.
        bytes_stored: In its files, masks included.
        bytes_dense, bytes_packed: As ordinary and as packed; of a dense tensor the latter is an estimate from the mask's entropy.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    zeros: int | None
    live: int | None
    disobeying: int
    patterns: tuple[str, ...]
    bytes_stored: int
    bytes_dense: int
    bytes_packed: int

    @property
    def kind(self) -> str:
        """Its name without the numbers of blocks."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", self.name)


def inspect_tensor(tensor: StoredTensor) -> TensorFacts:
    """Read a tensor once, a piece at a time.

    Raises:
        GaPError: if its file is damaged.
    """
    if not tensor.values.is_known:
        size = tensor.values.size
        return TensorFacts(tensor.name, tensor.dtype, tensor.shape, tensor.numel, None, None, 0, (), size, size, size)
    checks = _Patterns(tensor.shape)
    zeros = disobeying = live = 0
    for raw, mask in tensor.pieces(checks.piece):
        set_ = is_not_zero(raw, tensor.dtype)
        zeros += raw.size - int(np.count_nonzero(set_))
        if mask is not None:
            live += int(np.count_nonzero(mask))
            disobeying += int(np.count_nonzero(set_ & ~mask))
        # A live weight that happens to be 0 belongs to its block.
        checks.look(set_ if mask is None else set_ | mask)
    kept = live if tensor.has_mask else tensor.numel - zeros
    dense = tensor.numel * tensor.values.width
    return TensorFacts(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        weights=tensor.numel,
        zeros=zeros,
        live=live if tensor.has_mask else None,
        disobeying=disobeying,
        patterns=checks.held(kept),
        bytes_stored=tensor.bytes_stored,
        bytes_dense=dense,
        bytes_packed=tensor.bytes_stored if tensor.packed else min(dense, _estimate(tensor, kept)),
    )


def _estimate(tensor: StoredTensor, live: int) -> int:
    if len(tensor.shape) < 2 or not 0 < live < tensor.numel:
        return tensor.numel * tensor.values.width
    p = live / tensor.numel
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    return live * tensor.values.width + math.ceil(tensor.numel * entropy / 8) + 16 + 12 * len(tensor.shape)


class _Patterns:
    """Which patterns a matrix still holds to, told row by row; convolutions are read as outputs by everything else."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.rows, self.cols = (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)
        # A whole number of rows of blocks at a time; of rows too long for that no pattern is told.
        is_matrix = min(self.rows, self.cols) > 1 and self.cols * _ROWS <= 2 * _PIECE
        self.piece = max(1, _PIECE // max(1, self.cols * _ROWS)) * self.cols * _ROWS if is_matrix else _PIECE
        across = [(n, m, 1) for n, m in N_OF_M if self.cols % m == 0]
        down = [(n, m, 0) for n, m in N_OF_M if self.rows % m == 0]
        self.n_of_m = across + down if is_matrix else []
        self.blocks = [(r, c) for r, c in BLOCKS if self.rows % r == 0 and self.cols % c == 0] if is_matrix else []

    def look(self, live: np.ndarray) -> None:
        if not self.n_of_m and not self.blocks:
            return
        live = live.reshape(-1, self.cols)
        self.n_of_m = [(n, m, axis) for n, m, axis in self.n_of_m if _count(live, m, axis) <= n]
        self.blocks = [block for block in self.blocks if _are_whole(live, *block)]

    def held(self, kept: int) -> tuple[str, ...]:
        numel = self.rows * self.cols
        # Of the patterns along an axis the strictest; of blocks the largest, as they hold to those inside them too.
        names = []
        for axis, where in ((1, ""), (0, " along the first axis")):
            if found := [(n, m) for n, m, a in self.n_of_m if a == axis]:
                n, m = min(found, key=lambda nm: nm[0] / nm[1])
                names.append(f"{n}:{m}{where}")
        if 0 < kept < numel and self.blocks:
            largest = max(r * c for r, c in self.blocks)
            names += [f"{r}x{c} blocks" for r, c in self.blocks if r * c == largest]
        return tuple(names) if kept else ()


def _count(live: np.ndarray, m: int, axis: int) -> int:
    """The most live weights in m that follow each other along an axis."""
    rows, cols = live.shape
    parts = live.reshape(rows, cols // m, m) if axis else live.reshape(rows // m, m, cols)
    return int(parts.sum(axis=2 if axis else 1, dtype=np.uint8).max(initial=0))


def _are_whole(live: np.ndarray, r: int, c: int) -> bool:
    rows, cols = live.shape
    parts = live.reshape(rows // r, r, cols // c, c).sum(axis=(1, 3), dtype=np.uint16)
    return bool(((parts == 0) | (parts == r * c)).all())


def inspect_model(model: StoredModel) -> list[TensorFacts]:
    """All tensors of a model, each read once."""
    return [inspect_tensor(tensor) for tensor in model.tensors.values()]


def totals(facts: Sequence[TensorFacts]) -> dict[str, Any]:
    """Sums over tensors: of all of them, and of the prunable set, which is what has a recorded mask."""
    masked = [fact for fact in facts if fact.live is not None]
    weights, prunable = sum(f.weights for f in facts), sum(f.weights for f in masked)
    zeros, dead = sum(f.zeros or 0 for f in facts), prunable - sum(f.live or 0 for f in masked)
    return {
        "tensors": len(facts),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else 0.0,
        "masked_tensors": len(masked),
        "prunable_weights": prunable,
        "prunable_sparsity": dead / prunable if prunable else None,
        "disobeying": sum(f.disobeying for f in facts),
        "bytes_stored": sum(f.bytes_stored for f in facts),
        "bytes_dense": sum(f.bytes_dense for f in facts),
        "bytes_packed": sum(f.bytes_packed for f in facts),
    }


def by_kind(facts: Sequence[TensorFacts]) -> dict[str, list[TensorFacts]]:
    """Tensors of one name but for the numbers of their blocks, in order of the first."""
    kinds: dict[str, list[TensorFacts]] = {}
    for fact in facts:
        kinds.setdefault(fact.kind, []).append(fact)
    return kinds


def to_dict(model: StoredModel, facts: Sequence[TensorFacts]) -> Mapping[str, Any]:
    """All of it as plain data for JSON."""
    return {
        "source": model.source,
        "form": model.form,
        "files": [path.name for path in model.files],
        "recorded_pattern": model.pattern,
        "masks_of_other_names": model.unmatched,
        **totals(facts),
        "layers": [asdict(fact) for fact in facts],
    }
