"""Anybody's saved model, as far as its files tell: tensors, recorded masks, and the form of each. No torch, no model class."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gap_hf.errors import GaPError
from gap_hf.hub import fetch
from gap_hf.packed.layout import MAGIC, MaskHeader, PackedError, dense_mask, parse_mask
from gap_hf.tensor_files import PIECE, TensorEntry, entries

CONFIG, MASKS, SUFFIX, METHOD = "gap_config.json", "gap_masks.safetensors", "_mask", "gap_hf"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a saved model.

    Attributes:
        name: Its key.
        dtype: As safetensors writes it.
        shape: Of the dense tensor.
        values: Where its elements lie; of a packed one, the live ones.
        packed: Where the coded mask of a packed one lies.
        bits: Where the mask of a dense one lies, a bit per weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: TensorEntry
    packed: TensorEntry | None = None
    bits: TensorEntry | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_stored(self) -> int:
        return self.values.size + sum(entry.size for entry in (self.packed, self.bits) if entry is not None)

    @property
    def has_mask(self) -> bool:
        return self.packed is not None or self.bits is not None

    def pieces(self, count: int = PIECE) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Elements of the dense tensor in row-major order, `count` at a time: as unsigned integers, and which are live.

        Raises:
            GaPError: if a packed one is damaged.
        """
        if self.packed is None:
            for first, raw in self.values.pieces(count):
                yield raw, self._mask_bits(first, raw.size)
            return
        mask = self._packed_mask()
        first = 0
        for begin in range(0, mask.size, count):
            live = mask[begin : begin + count]
            raw = np.zeros(live.size, np.dtype(f"<u{self.values.width}"))
            num_live = int(live.sum())
            raw[live] = self.values.read(first, num_live)
            first += num_live
            yield raw, live

    def _mask_bits(self, first: int, count: int) -> np.ndarray | None:
        if self.bits is None:
            return None
        begin = first // 8
        raw = self.bits.read(begin, (first + count + 7) // 8 - begin)
        return np.unpackbits(raw, bitorder="little")[first - 8 * begin :][:count].view(bool)

    def _packed_mask(self) -> np.ndarray:
        assert self.packed is not None
        try:
            return dense_mask(self.packed.read()).reshape(-1)
        except PackedError as error:
            raise GaPError(f"{self.packed.path}: '{self.name}': {error}") from None


@dataclass(frozen=True)
class StoredModel:
    """What a source holds.

    Attributes:
        source: As it was named.
        tensors: By name, in order of the files.
        form: ``dense`` or ``packed``.
        files: The weight files.
        pattern: Of the recorded masks, or None.
        unmatched: Recorded masks of names that the files do not have.
        recorded: What `gap_config.json` says, or nothing.
    """

    source: str
    tensors: dict[str, StoredTensor]
    form: str
    files: list[Path]
    pattern: str | None = None
    unmatched: list[str] = field(default_factory=list)
    recorded: dict[str, Any] = field(default_factory=dict)


def open_model(source: str, *, revision: str | None = None, token: str | None = None) -> StoredModel:
    """Read the headers of a folder, a safetensors file, or a repository on the Hub.

    Raises:
        GaPError: if there is no such thing, it has no safetensors weights, or they are damaged.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise GaPError(f"{path}: expected a safetensors file or a folder with some; other formats are not read")
        return _model(source, path.parent, [path], single=True)
    if not path.is_dir():
        path = fetch(source, ("*.json", "*.safetensors"), revision, token)
    return _model(source, path, _weight_files(path), single=False)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise GaPError(f"{index}: has no weight_map of keys to files")
        files = [folder / Path(name).name for name in sorted(set(shards.values()))]
        if missing := [path.name for path in files if not path.is_file()]:
            raise GaPError(f"{folder}: lacks {missing[0]}, which its index names")
        return files
    files = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(("gap_", "."))]
    files = [path for path in files if path.name.startswith("model")] or files  # and not an average beside them
    if not files:
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
        what = f"only {others[0]}, which is not read" if others else "no weights"
        raise GaPError(f"{folder}: has {what}; expected model.safetensors or its shards")
    return files


def _model(source: str, folder: Path, files: list[Path], *, single: bool) -> StoredModel:
    found: dict[str, TensorEntry] = {}
    for path in files:
        for key, entry in entries(path).items():
            if key in found:
                raise GaPError(
                    f"{folder}: '{key}' is in {found[key].path.name} and in {path.name}, expected one of them"
                )
            found[key] = entry
    masks: dict[str, TensorEntry] = {}
    recorded = read_object(folder / CONFIG) if not single and (folder / CONFIG).is_file() else {}
    if recorded and (folder / MASKS).is_file():
        masks = {k.removeprefix("mask/"): e for k, e in entries(folder / MASKS).items() if k.startswith("mask/")}
    tensors: dict[str, StoredTensor] = {}
    for key, entry in found.items():
        coded = found.get(key + SUFFIX)
        if coded is not None and (header := _packed_header(coded)) is not None:
            tensors[key] = _packed(entry, coded, header)
        elif not (key.endswith(SUFFIX) and key.removesuffix(SUFFIX) in found and _packed_header(entry) is not None):
            tensors[key] = _dense(entry, masks.pop(key, None))
    config = recorded.get("config")
    return StoredModel(
        source,
        tensors,
        "packed" if any(tensor.packed for tensor in tensors.values()) else "dense",
        files,
        config.get("pattern") if isinstance(config, dict) else None,
        sorted(masks),
        recorded,
    )


def _packed_header(entry: TensorEntry) -> MaskHeader | None:
    """The head of a coded mask, or None if it is none."""
    if entry.dtype != "U8" or len(entry.shape) != 1 or entry.read(0, 4).tobytes() != MAGIC:
        return None
    try:
        return parse_mask(entry.read())
    except PackedError as error:
        raise GaPError(f"{entry.path}: '{entry.key}': {error}") from None


def _packed(values: TensorEntry, coded: TensorEntry, header: MaskHeader) -> StoredTensor:
    if values.shape != (header.count,) or not values.is_known:
        raise GaPError(
            f"{values.path}: '{values.key}' has shape {values.shape}, expected ({header.count},), the live weights of its mask"
        )
    return StoredTensor(values.key, values.dtype, header.shape, values, packed=coded)


def _dense(entry: TensorEntry, bits: TensorEntry | None) -> StoredTensor:
    if bits is not None and (bits.dtype != "U8" or bits.shape != ((entry.numel + 7) // 8,)):
        raise GaPError(
            f"{bits.path}: the mask of '{entry.key}' has {bits.size} bytes, expected a bit for {entry.numel} weights"
        )
    return StoredTensor(entry.key, entry.dtype, entry.shape, entry, bits=bits)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises GaPError if the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GaPError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise GaPError(f"{path}: holds {type(value).__name__}, expected an object")
    return value
