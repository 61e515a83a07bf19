"""From one form of a sparse model's folder to the other.

A folder is in the dense form (ordinary safetensors with zeros, `gap_config.json` and `gap_masks.safetensors`) or in the packed
one (docs/format.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from gap_hf import checkpoint
from gap_hf.card_loading import change_form
from gap_hf.errors import GaPError
from gap_hf.folder_files import (
    CONFIG,
    READER_FILES,
    check_packed,
    copy,
    fix_index,
    is_packed,
    keys_of,
    one_sentence,
    read_config,
    replaced,
    save,
    unpacked,
    weight_files,
    write_json,
)
from gap_hf.packed.layout import PackedError, pack
from gap_hf.packed.loading import METHOD, SUFFIX, VERSION, sha256
from gap_hf.packed.reader_files import AUTO_MAP, write_reader
from gap_hf.pattern_names import Pattern, parse_pattern
from gap_hf.recorded import load_masks


def pack_in_place(folder: Path, mask_of: Callable[[str, Tensor], Tensor | None], pattern: Pattern | None) -> None:
    """Turn a dense folder into a packed one.

    Args:
        mask_of: The mask of a file's key and its tensor, None for what stays dense.
        pattern: Of the masks; blocks are then a bit each.

    Raises:
        GaPError: if a masked weight is not 0.
    """
    files = {path.name: _pack_file(path, mask_of, pattern) for path in weight_files(folder)}
    fix_index(folder)
    config = read_config(folder)
    config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "files": files}
    # A model with code of its own keeps it; gap_hf has to be imported for that one.
    if "AutoConfig" not in config.setdefault("auto_map", {}):
        config["auto_map"].update(AUTO_MAP)
        write_reader(folder)
    write_json(folder / CONFIG, config)
    if (folder / checkpoint.CONFIG_NAME).is_file():
        header = json.loads((folder / checkpoint.CONFIG_NAME).read_text(encoding="utf-8"))
        header["masks_sha256"] = None  # they are in the weight files
        write_json(folder / checkpoint.CONFIG_NAME, header)
        (folder / checkpoint.MASKS_NAME).unlink(missing_ok=True)


def pack_folder(source: Path, target: Path, *, from_zeros: bool = False) -> None:
    """Write the packed form of a dense folder.

    Args:
        from_zeros: Take the zeros of every matrix that is at least half zeros for its mask, where none were recorded.

    Raises:
        GaPError: if it is packed already, has no masks, or they do not fit the weights. `target` is untouched then.
    """
    if is_packed(source):
        raise GaPError(f"{source}: is packed already")
    pattern = None
    if from_zeros:
        mask_of = _mask_of_zeros
    else:
        recorded = checkpoint.load_masks(source)
        masks = recorded.masks
        pattern = parse_pattern(recorded.pattern) if recorded.pattern else None
        keys = {key for path in weight_files(source) for key in keys_of(path)}
        if unknown := sorted(masks.keys() - keys):
            raise GaPError(
                f"{source}: its files hold '{unknown[0]}' under another name; load the model and call gap_hf.save_pretrained, "
                "which transformers can name it for"
            )

        def mask_of(key: str, tensor: Tensor) -> Tensor | None:
            return masks.get(key)

    with replaced(target) as made:
        copy(source, made)
        pack_in_place(made, mask_of, pattern)
        change_form(made, packed=True)


def _pack_file(path: Path, mask_of: Callable[[str, Tensor], Tensor | None], pattern: Pattern | None) -> dict[str, Any]:
    """Replace a dense file by its packed form. Returns what config.json records of it."""
    out: dict[str, Tensor] = {}
    with one_sentence(path), safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            mask = mask_of(key, tensor)
            if mask is None:
                out[key] = tensor
                continue
            if key + SUFFIX in file.keys():  # noqa: SIM118
                raise PackedError(f"holds '{key}{SUFFIX}', which is the name that the mask of '{key}' needs")
            try:
                out[key], out[key + SUFFIX] = _pack(tensor, mask, pattern)
            except PackedError as error:
                raise GaPError(f"'{key}': {error}") from None
        save(out, path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


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


def _mask_of_zeros(key: str, tensor: Tensor) -> Tensor | None:
    if tensor.ndim < 2 or not tensor.numel():
        return None
    # Products with a mask leave -0 too, which is as good a zero; of one byte, torch compares integers only.
    mask = (tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor) != 0
    return mask if int(mask.sum()) * 2 <= mask.numel() else None


def unpack_folder(source: Path, target: Path) -> None:
    """Write the dense form of a packed folder, with its masks beside it where they were recorded by parameter.

    Raises:
        GaPError: if it is not packed or was changed. `target` is untouched then.
    """
    check_packed(source)
    with replaced(target) as made:
        copy(source, made)
        for name in READER_FILES:
            (made / name).unlink(missing_ok=True)
        for path in weight_files(made):
            with one_sentence(source / path.name):
                save(dict(unpacked(path)), path)
        fix_index(made)
        config = read_config(made)
        del config["quantization_config"]
        auto_map = {k: v for k, v in config.pop("auto_map", {}).items() if AUTO_MAP.get(k) != v}
        write_json(made / CONFIG, config | ({"auto_map": auto_map} if auto_map else {}))
        if (made / checkpoint.CONFIG_NAME).is_file():
            checkpoint.write_masks(made, load_masks(source))
        change_form(made, packed=False)
