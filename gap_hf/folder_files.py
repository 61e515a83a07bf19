"""The files of a saved model's folder: which form it has, its weights, and how it is replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gap_hf import checkpoint
from gap_hf.errors import GaPError, first_line
from gap_hf.packed.layout import PackedError, unpack
from gap_hf.packed.loading import METHOD, SUFFIX, VERSION, PackedConfig, check_files, packed_keys
from gap_hf.packed.reader_files import LAYOUT, READER

CONFIG = "config.json"
READER_FILES = (READER, LAYOUT)


def is_packed(folder: Path) -> bool:
    """Whether config.json says that the weights are packed.

    Raises:
        GaPError: if there is no config.json that can be read.
    """
    found = read_config(folder).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def read_config(folder: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        GaPError: if it is missing or not a JSON object.
    """
    if not (folder / CONFIG).exists():
        raise GaPError(f"{folder}: has no {CONFIG}; expected the folder of a saved model")
    return _read_object(folder / CONFIG)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GaPError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise GaPError(f"{path}: holds {type(found).__name__}, expected an object")
    return found


def has_weights(folder: Path) -> bool:
    """Whether `weight_files` would find any: the folder of a checkpoint that another node's disk has holds ours at most."""
    return bool(_not_ours(folder))


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files, in order of name; those of masks and of P-GaP's workers are none, and where some have
    transformers' names, others, such as an average of the weights, are none.

    Raises:
        GaPError: if there are none.
    """
    files = _not_ours(folder)
    files = [path for path in files if path.name.startswith("model")] or files
    if not files:
        raise GaPError(f"{folder}: has no safetensors weights; expected model.safetensors or its shards")
    return files


def _not_ours(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(("gap_", "."))]


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """What a reader says of a file, as an error that names it."""
    try:
        yield
    except (PackedError, SafetensorError) as error:
        raise GaPError(f"{path}: {error}") from None


def check_packed(folder: Path) -> PackedConfig:
    """Compare every weight file with what config.json records.

    Raises:
        GaPError: if the folder is not packed, or a file is missing, one too many, or changed.
    """
    if not is_packed(folder):
        raise GaPError(f"{folder}: is not packed; {CONFIG} has no quantization_config of gap_hf")
    recorded = read_config(folder)["quantization_config"]
    with one_sentence(folder):
        config = PackedConfig(recorded.get("version", VERSION), recorded.get("files"))
        check_files(weight_files(folder), config)
    return config


def unpacked(path: Path) -> Iterator[tuple[str, Tensor]]:
    keys = packed_keys(path)
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key in keys:
                try:
                    yield key, unpack(file.get_tensor(key), file.get_tensor(key + SUFFIX))
                except PackedError as error:
                    raise PackedError(f"'{key}': {error}") from None
            elif not (key.endswith(SUFFIX) and key.removesuffix(SUFFIX) in keys):
                yield key, file.get_tensor(key)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files, if all goes well, replace those of the same name in `folder` and its weights.

    It lies hidden inside `folder`, which may be a mount: files are only moved within one file system. New ones come before old
    ones go.

    Raises:
        GaPError: if a file cannot be written or moved.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".gap_new.") as scratch:
            made = Path(scratch) / "new"
            made.mkdir()
            yield made
            stale = [*folder.glob("model*.safetensors*"), folder / checkpoint.MASKS_NAME]
            stale += [folder / name for name in (checkpoint.CONFIG_NAME, *READER_FILES)]
            moved = {folder / path.name: path for path in made.iterdir()}
            for path, new in moved.items():
                os.replace(new, path)
            for path in stale:
                if path not in moved:
                    path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise GaPError(f"{folder}: cannot be written: {first_line(error)}") from error
    finally:
        if is_new:
            with suppress(OSError):  # it holds what was saved
                folder.rmdir()


def copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, target / path.name)


def keys_of(path: Path) -> list[str]:
    with one_sentence(path), safe_open(path, "pt") as file:
        return list(file.keys())


def fix_index(folder: Path) -> None:
    """Name the tensors that there are now in a sharded model's index, and count their bytes."""
    for path in folder.glob("*.safetensors.index.json"):
        index = _read_object(path)
        if not isinstance(index.get("metadata"), dict):
            raise GaPError(f"{path.name}: has no metadata, expected a sharded model's index with its total_size")
        files = weight_files(folder)
        index["weight_map"] = {key: file.name for file in files for key in keys_of(file)}
        index["metadata"]["total_size"] = sum(file.stat().st_size for file in files)
        write_json(path, index)


def save(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
