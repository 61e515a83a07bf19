"""How two saved models differ: in which tensors, by how much, and in which weights live."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gap_hf.stored_model import StoredModel, StoredTensor
from gap_hf.tensor_files import as_numbers, is_not_zero


@dataclass(frozen=True)
class Difference:
    """Of a tensor of both models.

    Attributes:
        name: Of it.
        comparable: None, or why its elements cannot be compared.
        weights: Elements.
        unequal: Of them, those whose bits differ.
        largest: Largest absolute difference, None where there are no numbers.
        relative: Norm of the difference over the norm of the first one's.
        masks: ``recorded`` if both have masks; else ``zeros``, which then stand for them.
        iou: Weights live in both over those live in either; 1 if none is.
        common, born, died: Weights live in both, in the second only, and in the first only.
    """

    name: str
    comparable: str | None
    weights: int = 0
    unequal: int = 0
    largest: float | None = None
    relative: float | None = None
    masks: str = "zeros"
    iou: float | None = None
    common: int = 0
    born: int = 0
    died: int = 0

    @property
    def is_equal(self) -> bool:
        return self.comparable is None and not self.unequal and not self.born and not self.died


@dataclass(frozen=True)
class Comparison:
    """Of two models: names in one only, and what differs in the others."""

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    tensors: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        return not self.only_first and not self.only_second and all(tensor.is_equal for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "equal": self.is_equal,
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            **overall(self.tensors),
            "layers": [{**asdict(tensor), "equal": tensor.is_equal} for tensor in self.tensors],
        }


def compare(first: StoredModel, second: StoredModel) -> Comparison:
    """Read two models side by side, a piece at a time.

    Raises:
        GaPError: if a file is damaged.
    """
    both = [name for name in first.tensors if name in second.tensors]
    return Comparison(
        tuple(name for name in first.tensors if name not in second.tensors),
        tuple(name for name in second.tensors if name not in first.tensors),
        tuple(_compare(first.tensors[name], second.tensors[name]) for name in both),
    )


def _compare(a: StoredTensor, b: StoredTensor) -> Difference:
    if a.shape != b.shape:
        return Difference(a.name, f"shape {'x'.join(map(str, a.shape))}, then {'x'.join(map(str, b.shape))}")
    if a.dtype != b.dtype:
        return Difference(a.name, f"dtype {a.dtype}, then {b.dtype}")
    if not a.values.is_known:
        return Difference(a.name, f"dtype {a.dtype}, which is not read")
    recorded = a.has_mask and b.has_mask
    unequal = common = born = died = 0
    largest, square, norm, numbers = 0.0, 0.0, 0.0, True
    for (raw_a, mask_a), (raw_b, mask_b) in zip(a.pieces(), b.pieces(), strict=True):
        differ = raw_a != raw_b
        if num_differ := int(np.count_nonzero(differ)):
            unequal += num_differ
            x, y = as_numbers(raw_a[differ], a.dtype), as_numbers(raw_b[differ], a.dtype)
            numbers = x is not None
            if x is not None and y is not None:
                with np.errstate(invalid="ignore"):
                    gap = np.abs(y - x)
                largest = max(largest, float(gap.max()))
                square += float(np.square(gap).sum())
        whole = as_numbers(raw_a, a.dtype)
        norm += 0.0 if whole is None else float(np.square(whole).sum())
        if recorded and mask_a is not None and mask_b is not None:
            live_a, live_b = mask_a, mask_b
        else:
            live_a, live_b = is_not_zero(raw_a, a.dtype), is_not_zero(raw_b, b.dtype)
        common += int(np.count_nonzero(live_a & live_b))
        born += int(np.count_nonzero(live_b & ~live_a))
        died += int(np.count_nonzero(live_a & ~live_b))
    either = common + born + died
    return Difference(
        a.name,
        None,
        a.numel,
        unequal,
        largest if numbers else None,
        math.sqrt(square / norm) if numbers and norm else (0.0 if not unequal else None),
        "recorded" if recorded else "zeros",
        common / either if either else 1.0,
        common,
        born,
        died,
    )


def overall(tensors: Sequence[Difference]) -> dict[str, Any]:
    """Sums over tensors, and the IoU of all masks that are recorded on both sides."""
    masked = [tensor for tensor in tensors if tensor.masks == "recorded" and tensor.comparable is None]
    moved = sum(tensor.born + tensor.died for tensor in masked)
    common = sum(tensor.common for tensor in masked)
    return {
        "tensors": len(tensors),
        "equal_tensors": sum(tensor.is_equal for tensor in tensors),
        "weights": sum(tensor.weights for tensor in tensors),
        "unequal_weights": sum(tensor.unequal for tensor in tensors),
        "masked_tensors": len(masked),
        "mask_iou": (common / (common + moved) if common + moved else 1.0) if masked else None,
        "born": sum(tensor.born for tensor in masked),
        "died": sum(tensor.died for tensor in masked),
    }
