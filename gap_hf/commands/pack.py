"""`gap-hf pack`: the packed form of a folder in the dense one."""

from __future__ import annotations

import argparse
from pathlib import Path

from gap_hf.errors import GaPError
from gap_hf.folder_files import weight_files
from gap_hf.folders import pack_folder


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Write a folder of a sparse model in the packed form, with everything else that is in it. The result is "
        "read back with `import gap_hf` or trust_remote_code=True, bit for bit."
    )
    parser.add_argument("folder", type=Path, help="a saved model with gap_config.json and gap_masks.safetensors")
    parser.add_argument("output", type=Path, help="where to write the packed one")
    parser.add_argument(
        "--from-zeros",
        action="store_true",
        help="for a model without recorded masks: take the zeros of every matrix that is half zeros or more for its mask",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Pack, and print the bytes of both. Returns the exit code."""
    refuse_same(args.folder, args.output)
    pack_folder(args.folder, args.output, from_zeros=args.from_zeros)
    print_sizes(args.folder, args.output)
    return 0


def refuse_same(folder: Path, output: Path) -> None:
    """Refuse to write a folder over itself.

    Raises:
        GaPError: if the two are one, or `folder` is none.
    """
    if not folder.is_dir():
        raise GaPError(f"{folder}: is no folder; expected one of a saved model")
    if output.resolve() == folder.resolve():
        raise GaPError(f"{output}: is the folder that is read; expected another one to write")
    if output.exists() and not output.is_dir():
        raise GaPError(f"{output}: is a file, expected a folder or nothing")


def print_sizes(before: Path, after: Path) -> None:
    """Weights of two folders in bytes, and their ratio."""
    old, new = (sum(path.stat().st_size for path in weight_files(folder)) for folder in (before, after))
    print(f"{before}: {old:,} bytes of weights\n{after}: {new:,} bytes, {new / old:.3f} of that")
