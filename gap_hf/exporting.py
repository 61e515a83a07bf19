"""Weights of a saved model under the names that another library gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from gap_hf.errors import GaPError
from gap_hf.folder_files import (
    check_packed,
    is_packed,
    keys_of,
    one_sentence,
    read_config,
    save,
    unpacked,
    weight_files,
)

FORMATS = ("timm",)
_TIMM = "timm_model."


def export(folder: Path, output: Path, format: str) -> str:
    """Write one safetensors file; masked weights are zeros in it.

    Args:
        folder: A saved model, in either form.
        output: The file.
        format: One of `FORMATS`.

    Returns:
        A line that says how it is loaded.

    Raises:
        GaPError: if the model is none of that library's, was changed, or `output` cannot be written.
    """
    assert format in FORMATS
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise GaPError(f"{output}: expected a .safetensors file in a folder that exists")
    config = read_config(folder)
    if config.get("model_type") != "timm_wrapper":
        raise GaPError(
            f"{folder}: is a model of type '{config.get('model_type')}', expected timm_wrapper, whose weights have timm's names"
        )
    # What a head without classes would be named lies beside timm's own names, not under them.
    tensors = {name.removeprefix(_TIMM): tensor for name, tensor in _tensors(folder) if name.startswith(_TIMM)}
    save(tensors, output)
    args = {
        "num_classes": len(config.get("id2label", {})) or config.get("num_labels", 2),
        **(config.get("model_args") or {}),
    }
    shown = "".join(f", {key}={value!r}" for key, value in args.items())
    return f'timm.create_model("{config.get("architecture")}", checkpoint_path="{output}"{shown})'


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    packed = is_packed(folder)
    if packed:
        check_packed(folder)
    for path in weight_files(folder):
        with one_sentence(path):
            if packed:
                yield from unpacked(path)
                continue
            with safe_open(path, "pt") as file:
                for key in keys_of(path):
                    yield key, file.get_tensor(key)
