"""Reading safetensors files piece by piece with numpy alone: memory does not grow with a tensor, and nothing is taken on trust."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gap_hf.errors import GaPError

_MAX_HEADER = 100_000_000
PIECE = 1 << 21  # weights read at a time
# Bytes of an element, and whether it is a float: then its sign bit says nothing about being 0.
DTYPES = {
    "F64": (8, True),
    "F32": (4, True),
    "F16": (2, True),
    "BF16": (2, True),
    "F8_E4M3": (1, True),
    "F8_E5M2": (1, True),
    "BOOL": (1, False),
    **{f"{sign}{8 * width}": (width, False) for sign in "IU" for width in (1, 2, 4, 8)},
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file.

    Attributes:
        key: Its name.
        dtype: As safetensors writes it, such as ``F32``.
        shape: Elements per axis.
        path: The file.
        start: Its first byte there.
        size: Its bytes.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_known(self) -> bool:
        """Whether its elements are whole bytes of a dtype that can be read here."""
        return self.dtype in DTYPES

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][0]

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Elements as unsigned integers of their width, 1-D.

        Raises:
            GaPError: if the file ends before them.
        """
        count = self.numel - first if count is None else min(count, self.numel - first)
        raw = np.empty(count, np.dtype(f"<u{self.width}"))
        with open(self.path, "rb") as file:
            file.seek(self.start + first * self.width)
            if file.readinto(memoryview(raw).cast("B")) != raw.nbytes:  # type: ignore[attr-defined]
                raise GaPError(f"{self.path}: ends in the middle of '{self.key}'")
        return raw

    def pieces(self, count: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
        """All elements, `count` at a time, each piece after the place of its first one."""
        for first in range(0, self.numel, count):
            yield first, self.read(first, count)


def is_not_zero(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Which elements are not 0; -0 of a float is 0."""
    width, is_float = DTYPES[dtype]
    return (raw & np.array((1 << (8 * width - 1)) - 1, raw.dtype)) != 0 if is_float else raw != 0


def as_numbers(raw: np.ndarray, dtype: str) -> np.ndarray | None:
    """Elements as float64, or None for what numpy has no numbers for (8-bit floats)."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "u1"}
    if dtype[0] in "IU":
        kinds[dtype] = f"<{dtype[0].lower()}{DTYPES[dtype][0]}"
    return raw.view(kinds[dtype]).astype(np.float64) if dtype in kinds else None


def entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order in which they lie there.

    Raises:
        GaPError: if the file is not one, or its header says what cannot be.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise GaPError(f"{path}: is not a safetensors file; its header would have {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise GaPError(f"{path}: is not a safetensors file; its header is not JSON") from None
    if not isinstance(header, dict):
        raise GaPError(f"{path}: its header is {type(header).__name__}, expected an object")
    begin = 8 + length
    found = [_entry(path, key, value, begin) for key, value in header.items() if key != "__metadata__"]
    found.sort(key=lambda entry: (entry.start, entry.size))
    end = begin
    for entry in found:
        if entry.start != end:
            raise GaPError(f"{path}: '{entry.key}' begins at byte {entry.start}, expected {end}")
        end += entry.size
    if end != size:
        raise GaPError(f"{path}: has {size} bytes, expected {end} by its header")
    return {entry.key: entry for entry in found}


def _entry(path: Path, key: str, value: Any, begin: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise GaPError(f"{path}: the header of '{key}' is {str(value)[:80]}, expected dtype, shape and data_offsets")
    entry = TensorEntry(key, dtype, shape, path, begin + offsets[0], offsets[1] - offsets[0])
    if entry.is_known and entry.size != entry.numel * entry.width:
        raise GaPError(
            f"{path}: '{key}' has {entry.size} bytes, expected {entry.numel * entry.width} for {dtype} {list(shape)}"
        )
    return entry


def _sizes(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None
