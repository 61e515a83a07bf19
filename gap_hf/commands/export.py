"""`gap-hf export`: a saved model for ONNX Runtime, CTranslate2 or timm."""

from __future__ import annotations

import argparse
from pathlib import Path

from gap_hf.errors import GaPError
from gap_hf.exporting import FORMATS, export


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Write a saved model, in either form, for other software; what was pruned is zeros in it. onnx: graphs with keys and values as "
        "inputs and outputs, named as optimum names them, compared with torch. ctranslate2: a folder for its Translator or Generator, "
        "compared too. timm: one safetensors file for timm.create_model(name, checkpoint_path=FILE), of a TimmWrapper model."
    )
    parser.add_argument("folder", type=Path, help="a saved model")
    parser.add_argument("output", type=Path, help="the folder to write, new or empty; for timm the file")
    parser.add_argument("--to", "--format", dest="format", choices=FORMATS, default="timm", help="default: timm")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write, and print how it is loaded. Returns the exit code."""
    if not args.folder.is_dir():
        raise GaPError(f"{args.folder}: is no folder; expected one of a saved model")
    print(export(args.folder, args.output, args.format))
    return 0
