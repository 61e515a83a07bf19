"""The `gap-hf` command: finds the command's module and turns errors into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gap_hf.commands import pack, plan, push, unpack, verify
from gap_hf.errors import GaPError

COMMANDS = (plan, pack, unpack, verify, push)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for bad input, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="gap-hf", description="Tools for sparse training by grow-and-prune.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
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
