"""The `gap-hf` command: finds the command's module and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from gap_hf.errors import GaPError

# A module of gap_hf.commands each, imported if it is the one that is wanted: some need no torch, which takes seconds.
COMMANDS = {
    "plan": "print targets, groups, phases and cost of a recipe, before any training",
    "pack": "write a sparse model in the packed form: live values and a coded bit per weight",
    "unpack": "write a packed model as ordinary safetensors with zeros, and its masks beside them",
    "verify": "check digests, counts, and that every masked weight is exactly 0",
    "inspect": "count the zeros of anybody's checkpoint, and tell which patterns they hold to",
    "diff": "compare two saved models: weights to the bit, and masks",
    "card": "write the model card of a sparse model, from what is measured of it",
    "report": "write one HTML file about a run: phases, sparsity, scores, mask churn, layers, sizes",
    "bench": "time a sparse model on this machine against the best that its dense form can be run with",
    "export": "write a saved model for ONNX Runtime, CTranslate2 or timm",
    "push": "verify a sparse model's folder and publish it on the Hub, in either form",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for bad input, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="gap-hf", description="Tools for sparse training by grow-and-prune.")
    commands = parser.add_subparsers(dest="command", required=True)
    words = sys.argv[1:] if argv is None else argv
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name == wanted:
            importlib.import_module(f"gap_hf.commands.{name}").add(command)
    # Only some commands take --section.key=value, which argparse does not know; to the others they are errors.
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `gap-hf … | head`: what is left would be written to nobody, at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except GaPError as error:
        print(f"gap-hf: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
