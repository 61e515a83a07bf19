"""`gap-hf unpack`: the dense form of a packed folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from gap_hf.commands.pack import print_sizes, refuse_same
from gap_hf.folders import unpack_folder


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Write a packed model as ordinary safetensors with zeros, which load anywhere, and its masks beside them."
    )
    parser.add_argument("folder", type=Path, help="a packed model")
    parser.add_argument("output", type=Path, help="where to write the dense one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unpack, and print the bytes of both. Returns the exit code."""
    refuse_same(args.folder, args.output)
    unpack_folder(args.folder, args.output)
    print_sizes(args.folder, args.output)
    return 0
