"""Saving a sparse model for others in the packed form."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gap_hf.config import Pattern, parse_pattern
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.packed.layout import PackedError, pack
from gap_hf.packed.loading import METHOD, SUFFIX, VERSION
from gap_hf.sparsifier import Sparsifier

_CONFIG = "config.json"


def save_packed(
    model: PreTrainedModel, folder: str | Path, masks: Sparsifier | Mapping[str, Tensor], **kwargs: Any
) -> None:
    """Save a model in the packed form (docs/format.md): the values of live weights, and a coded bit for each weight.

    ``import gap_hf`` and the usual ``from_pretrained`` load it; without that import it fails on the shapes.

    Args:
        model: Whole, in this process.
        folder: Made if need be; weight files of an earlier save in it are replaced.
        masks: What trained it (`trainer.gap`), or masks by parameter name: of the parameter's shape, not 0 is live.
        **kwargs: For `model.save_pretrained`, such as ``max_shard_size``.

    Raises:
        GaPError: if a mask is of no parameter, or a masked weight is not 0. Nothing is written then.
    """
    pattern = parse_pattern(masks.config.pattern) if isinstance(masks, Sparsifier) else None
    named = {name: masks.masks[name] for name in masks.weights} if isinstance(masks, Sparsifier) else dict(masks)
    sparse = {name: mask for name, mask in named.items() if mask is not None}
    params = dict(model.named_parameters())
    for name, mask in sparse.items():
        if name not in params:
            raise GaPError(f"masks: '{name}' is no parameter of the model{did_you_mean(name, params)}")
        if mask.shape != params[name].shape:
            raise GaPError(f"masks: '{name}' has shape {tuple(mask.shape)}, expected {tuple(params[name].shape)}")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        dense, bits = Path(scratch) / "dense", Path(scratch) / "masks"
        model.save_pretrained(dense, **kwargs)
        # transformers renames and splits the masks as it does the weights, so that they are under the file's own keys.
        model.save_pretrained(bits, state_dict={n: m.to(params[n].device, params[n].dtype) for n, m in sparse.items()})
        with _tensors(bits) as masks_by_key:
            files = {path.name: _pack_file(path, masks_by_key, pattern) for path in sorted(dense.glob("*.safetensors"))}
        _fix_index(dense)
        config = json.loads((dense / _CONFIG).read_text(encoding="utf-8"))
        config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "files": files}
        (dense / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        for path in dense.iterdir():
            shutil.move(path, folder / path.name)


@contextmanager
def _tensors(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Every tensor of a folder by key, each read when it is asked for."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    try:
        yield {key: file for file in files for key in file.keys()}  # noqa: SIM118
    finally:
        del files


def _pack_file(path: Path, masks: Mapping[str, Any], pattern: Pattern | None) -> dict[str, Any]:
    """Replace a dense file by its packed form. Returns what config.json records of it."""
    out: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if key not in masks:
                out[key] = tensor.clone()
                continue
            try:
                out[key], out[key + SUFFIX] = _pack(tensor, masks[key].get_tensor(key), pattern)
            except PackedError as error:
                raise GaPError(f"'{key}': {error}") from None
    part = path.with_suffix(".part")
    save_file(out, part, metadata={"format": "pt"})
    os.replace(part, path)
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _pack(tensor: Tensor, mask: Tensor, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """By blocks where the pattern has them and the mask is made of them, in whichever orientation the tensor has."""
    if pattern is not None and pattern.kind == "block" and tensor.ndim >= 2:
        sizes = (pattern.rows, pattern.cols)
        lead = (1,) * (tensor.ndim - 2)
        for block in ((*lead, *sizes), (*lead, *reversed(sizes)), (*sizes, *lead)):
            try:
                return pack(tensor, mask, block=block)
            except PackedError:
                continue
    return pack(tensor, mask)


def _fix_index(folder: Path) -> None:
    """Name the masks in a sharded model's index, and count the bytes that there are now."""
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                weight_map |= dict.fromkeys(tensors.keys(), file.name)
        index["weight_map"] = weight_map
        index["metadata"]["total_size"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
