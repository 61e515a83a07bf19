"""The masks that a folder holds, in either form, and whether its weights obey them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gap_hf import checkpoint
from gap_hf.errors import GaPError
from gap_hf.folder_files import check_packed, is_packed, one_sentence, unpacked, weight_files
from gap_hf.hub import fetch
from gap_hf.packed.layout import dense_mask
from gap_hf.packed.loading import SUFFIX, packed_keys


def load_masks(source: str | Path, *, revision: str | None = None, token: str | None = None) -> dict[str, Tensor]:
    """Masks of a saved sparse model, from either form, to train on with: ``GaPTrainer(…, gap_masks=load_masks(…))``.

    Args:
        source: A folder, or a repository's id on the Hub.
        revision, token: For the Hub.

    Returns:
        By parameter name, of the parameter's shape, uint8, 1 is live; what was dense has none.

    Raises:
        GaPError: if there are none, they were changed, or the repository cannot be had.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = fetch(str(source), ("config.json", "gap_config.json", "gap_masks.safetensors"), revision, token)
        if is_packed(folder):
            folder = fetch(str(source), ("*.json", "*.safetensors"), revision, token)
    if not is_packed(folder):
        return checkpoint.load_masks(folder).masks
    check_packed(folder)
    masks: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with one_sentence(path), safe_open(path, "pt") as file:
            for key in sorted(packed_keys(path)):
                num_values = math.prod(file.get_slice(key).get_shape())
                mask = dense_mask(file.get_tensor(key + SUFFIX).numpy(), num_values)
                masks[key] = torch.from_numpy(mask).to(torch.uint8)
    if not (folder / checkpoint.CONFIG_NAME).is_file():
        return masks
    names = set(checkpoint.live_counts(folder))
    if names <= masks.keys():
        return {name: masks[name] for name in names}
    return _by_parameter(folder, masks, names)


def _by_parameter(folder: Path, masks: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Masks under a file's keys to masks of parameters: transformers merges and renames them as it does weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    delattr(config, "quantization_config")
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise GaPError(f"{folder}: transformers has no {config.architectures}, so its masks cannot be named")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn of every weight that has no mask
    try:
        state = {key: mask.to(torch.float32) for key, mask in masks.items()}
        model, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(level)
    if missing := sorted(names & info["missing_keys"]):
        raise GaPError(
            f"{folder}: {checkpoint.CONFIG_NAME} records a mask of '{missing[0]}', which its files do not hold"
        )
    return {name: model.get_parameter(name).detach().to(torch.uint8) for name in sorted(names)}


def verify_folder(folder: Path) -> dict[str, Any]:
    """Check that a folder is what it says: digests, counts, and that every masked weight is exactly 0.

    Returns:
        ``form`` (``dense`` or ``packed``), ``tensors`` with a mask, ``weights`` in them, and how many of these are ``live``.

    Raises:
        GaPError: naming the file or tensor, at the first thing that is wrong.
    """
    if is_packed(folder):
        check_packed(folder)
        for path in weight_files(folder):
            with one_sentence(path):
                for _ in unpacked(path):
                    pass
        masks = load_masks(folder)
        _check_counts(folder, masks)
    else:
        masks = checkpoint.load_masks(folder).masks
        found = 0
        for path in weight_files(folder):
            with one_sentence(path), safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if key in masks:
                        found += 1
                        _check_zeros(path, key, file.get_tensor(key), masks[key])
        if found < len(masks):
            raise GaPError(
                f"{folder}: {len(masks) - found} of {len(masks)} masks are of tensors that its files do not name"
            )
    return {
        "form": "packed" if is_packed(folder) else "dense",
        "tensors": len(masks),
        "weights": sum(mask.numel() for mask in masks.values()),
        "live": sum(int(mask.sum()) for mask in masks.values()),
    }


def _check_counts(folder: Path, masks: Mapping[str, Tensor]) -> None:
    if not (folder / checkpoint.CONFIG_NAME).is_file():
        return
    for name, live in checkpoint.live_counts(folder).items():
        if name not in masks or int(masks[name].sum()) != live:
            found = int(masks[name].sum()) if name in masks else "no mask"
            raise GaPError(f"{folder}: the mask of '{name}' has {found}, expected {live} live weights")


def _check_zeros(path: Path, key: str, tensor: Tensor, mask: Tensor) -> None:
    if tensor.shape != mask.shape:
        raise GaPError(f"{path}: '{key}' has shape {tuple(tensor.shape)}, its mask {tuple(mask.shape)}")
    if wrong := int(((tensor != 0) & (mask == 0)).sum()):
        raise GaPError(f"{path}: '{key}' has {wrong} masked weights that are not 0")
