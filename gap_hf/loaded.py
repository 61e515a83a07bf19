"""A saved model in memory, in fp32, with whatever is wrong with its folder said in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from gap_hf.errors import GaPError, first_line
from gap_hf.folder_files import check_packed, is_packed, read_config, weight_files
from gap_hf.quiet import quiet


def load_model(folder: Path) -> Any:
    """The model of a folder in either form, in eval mode, on the CPU.

    Raises:
        GaPError: if the folder is none of a model, damaged, incomplete, or of a class that transformers has not.
    """
    if not folder.is_dir():
        raise GaPError(f"{folder}: is no folder; expected one of a saved model")
    import gap_hf.packed.loading  # noqa: F401 - a packed folder loads with it

    config = read_config(folder)
    if is_packed(folder):
        check_packed(folder)
    weight_files(folder)
    architecture = (config.get("architectures") or [""])[0]
    cls = getattr(transformers, str(architecture), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise GaPError(f"{folder}: transformers has no class '{architecture}', which config.json names")
    try:
        with quiet():
            model, info = cls.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise GaPError(f"{folder}: cannot be loaded as {architecture}: {first_line(error)}") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        name = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))[0]
        raise GaPError(f"{folder}: the files do not have '{name}' as {architecture} expects it")
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        GaPError: if there is none that loads.
    """
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # with files missing, some tokenizers raise whatever they stumble over
        raise GaPError(f"{folder}: has no tokenizer that loads: {first_line(error)}") from None
    if len(tokenizer.get_vocab()) < 2:  # others are made of nothing
        raise GaPError(f"{folder}: has no tokenizer that loads: its vocabulary is empty")
    return tokenizer
