"""`gap-hf report`: one HTML file about a run, from what it left on disk."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gap_hf.errors import GaPError
from gap_hf.run_html import run_html
from gap_hf.run_record import read_run


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Write one HTML file, to be opened offline, about a run with GaP on: phases, sparsity, loss and scores over time, mask churn, "
        "pruning error, zeros of every layer, sizes. Reads the trainer's log and the masks of every checkpoint that is there."
    )
    parser.add_argument("folder", type=Path, help="the output_dir of a run, finished or stopped")
    parser.add_argument("--output", type=Path, metavar="FILE", help="report.html in the folder if left out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, draw, write, and print where. Returns the exit code."""
    output = args.output or args.folder / "report.html"
    if output.is_dir() or (args.output is not None and not output.parent.is_dir()):
        raise GaPError(f"--output: {output} is no place for a file")
    record = read_run(args.folder)
    try:
        text = run_html(record)
    except ImportError:
        raise GaPError("reports need matplotlib; install it with: pip install 'gap_hf[report]'") from None
    part = output.with_name(f".{output.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, output)
    print(f"written: {output} ({len(record.saves)} saves, {len(record.log)} log entries)")
    return 0
