"""A saved model for other software: ONNX and CTranslate2 files, or weights under timm's names."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from gap_hf.errors import GaPError, NotInstalled
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
from gap_hf.loaded import load_model, load_tokenizer

_TIMM = "timm_model."


def export(folder: Path, output: Path, format: str) -> str:
    """Write a saved model for other software; masked weights are zeros in it.

    Args:
        folder: A saved model, in either form.
        output: The file (timm) or the folder (ONNX, CTranslate2). A folder must be new or empty.
        format: One of `FORMATS`.

    Returns:
        Lines that say how it is loaded, and how far it was checked.

    Raises:
        GaPError: if the model cannot be written so, was changed, or `output` cannot be written. There is no `output` then.
    """
    assert format in FORMATS
    try:
        return FORMATS[format](folder, output)
    except OSError as error:
        raise GaPError(f"{output}: cannot be written: {error}") from None


def _timm(folder: Path, output: Path) -> str:
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


def _onnx(folder: Path, output: Path) -> str:
    from gap_hf.onnx_files import compare_with_torch, write_onnx

    def write(made: Path) -> str:
        model = load_model(folder)
        graphs = write_onnx(model, made)
        try:
            difference = compare_with_torch(graphs, made)
        except NotInstalled:
            checked = "not checked: onnxruntime is not installed"
        else:
            checked = f"checked: ONNX Runtime's outputs are torch's but for {difference:.1e} of the largest"
        for path in (folder / name for name in _BESIDE if (folder / name).is_file()):
            shutil.copy2(path, made / path.name)
        return "\n".join(
            [*(f'onnxruntime.InferenceSession("{output / graph.name}.onnx")' for graph in graphs), checked]
        )

    return _into(output, write)


def _ctranslate2(folder: Path, output: Path) -> str:
    from gap_hf.ctranslate2_files import compare_with_torch, write_ctranslate2

    def write(made: Path) -> str:
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        # CTranslate2 quantises when it loads, if it is told to: fp32 serves all.
        write_ctranslate2(model, made, tokenizer)
        rows = compare_with_torch(model, made, tokenizer)
        kind = "Translator" if model.config.is_encoder_decoder else "Generator"
        return "\n".join(
            [
                f'ctranslate2.{kind}("{output}", compute_type="int8")',
                f"checked: in fp32 it gives transformers' tokens for {rows} random sources, greedily",
            ]
        )

    return _into(output, write)


def _into(output: Path, write: Callable[[Path], str]) -> str:
    is_taken = output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir())))
    if is_taken or not output.parent.is_dir():
        raise GaPError(f"{output}: expected a new or empty folder, no link, in one that exists")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        said = write(made)
        if output.exists():
            output.rmdir()
        made.rename(output)
    return said


FORMATS: dict[str, Callable[[Path, Path], str]] = {"timm": _timm, "onnx": _onnx, "ctranslate2": _ctranslate2}
# What others read beside the graphs.
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)


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
