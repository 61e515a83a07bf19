"""`gap-hf verify`: whether a folder's weights, masks and digests belong together."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gap_hf.errors import GaPError
from gap_hf.recorded import verify_folder


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Check that a sparse model's folder is what it says: digests of its files, counts of its masks, and that every "
        "masked weight is exactly 0. The exit code is 2 at the first thing that is wrong."
    )
    parser.add_argument("folder", type=Path, help="a saved model with masks, in either form")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, and print what was found. Returns the exit code."""
    if not args.folder.is_dir():
        raise GaPError(f"{args.folder}: is no folder; expected one of a saved model")
    found = verify_folder(args.folder)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    share = 1 - found["live"] / found["weights"] if found["weights"] else 0.0
    print(
        f"{args.folder}: {found['form']}; {found['tensors']} masked tensors, {found['weights']:,} weights in them, "
        f"{found['live']:,} live ({share:.2%} are zero); everything agrees"
    )
    return 0
