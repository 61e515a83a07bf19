"""`gap-hf push`: a sparse model's folder to the Hub, in one commit."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from gap_hf.errors import GaPError
from gap_hf.folder_files import is_packed
from gap_hf.folders import pack_folder, unpack_folder
from gap_hf.recorded import verify_folder
from gap_hf.uploads import create, files_of, publish


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Verify a sparse model's folder and publish it on the Hub in one commit, which also takes away the weights and masks "
        "of an earlier one. What only a resumed run needs (optimizer, random state, training_args.bin) is left out."
    )
    parser.add_argument("folder", type=Path, help="a saved model with masks, in either form")
    parser.add_argument("repo", help="such as user/model; made if there is none")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--packed", action="store_true", help="publish the packed form, whichever the folder has")
    form.add_argument("--dense", action="store_true", help="publish ordinary safetensors with zeros, whichever it has")
    parser.add_argument("--private", action="store_true", help="if the repository is made, make it a private one")
    parser.add_argument("--revision", help="an existing branch; the main one if left out")
    parser.add_argument("--message", default="Upload sparse model", help="of the commit")
    parser.add_argument("--token", help="if left out, that of `hf auth login` or HF_TOKEN")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, push, and print where it is. Returns the exit code."""
    if not args.folder.is_dir():
        raise GaPError(f"{args.folder}: is no folder; expected one of a saved model")
    verify_folder(args.folder)
    api = HfApi(token=args.token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if (args.packed or args.dense) and args.packed != is_packed(folder):
            folder = Path(scratch) / "other"
            (pack_folder if args.packed else unpack_folder)(args.folder, folder)
        repo = create(api, args.repo, private=args.private or None)
        commit = publish(api, repo, files_of(folder), message=args.message, revision=args.revision)
    print(f"{args.folder} is published: {commit.commit_url}")
    return 0
