"""`gap-hf export`: a saved model's weights under the names that another library gives them."""

from __future__ import annotations

import argparse
from pathlib import Path

from gap_hf.errors import GaPError
from gap_hf.exporting import FORMATS, export


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Write the weights of a saved model, in either form, as another library names them. timm: one safetensors file for "
        "timm.create_model(name, checkpoint_path=FILE), of a model that transformers wraps (TimmWrapper)."
    )
    parser.add_argument("folder", type=Path, help="a saved model")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--format", choices=FORMATS, default="timm", help="whose names (default: timm)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write, and print how it is loaded. Returns the exit code."""
    if not args.folder.is_dir():
        raise GaPError(f"{args.folder}: is no folder; expected one of a saved model")
    print(export(args.folder, args.output, args.format))
    return 0
