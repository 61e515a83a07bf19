"""`gap-hf diff`: in which tensors, and in which live weights, two saved models differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gap_hf.comparison import Comparison, Difference, compare, overall
from gap_hf.stored_model import open_model
from gap_hf.tables import plot_bars, text_table

HEAD = ("tensor", "unequal weights", "largest", "relative", "IoU", "born", "died", "masks")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Compare two saved models tensor by tensor, in either form: bits, sizes of the differences, and intersection over union of "
        "the live weights, by their recorded masks or else by their zeros. The exit code is 0 if they are equal, 1 if "
        "they differ, 2 for bad input."
    )
    parser.add_argument("first", help="a folder, a safetensors file, or a repository's id on the Hub")
    parser.add_argument("second", help="what it is compared with")
    parser.add_argument("--all", action="store_true", help="list equal tensors too")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the IoU of every matrix; the suffix sets the format"
    )
    parser.add_argument("--token", help="for the Hub; if left out, that of `hf auth login` or HF_TOKEN")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare and print. Returns the exit code: 0 if equal, 1 if not."""
    found = compare(open_model(args.first, token=args.token), open_model(args.second, token=args.token))
    if args.plot is not None:
        masked = [tensor for tensor in found.tensors if tensor.masks == "recorded" and tensor.iou is not None]
        shown = masked or [tensor for tensor in found.tensors if tensor.iou is not None]
        plot_bars([t.name for t in shown], [t.iou or 0.0 for t in shown], args.plot, label="IoU of live weights, %")
    print(json.dumps(found.to_dict(), indent=2) if args.json else report(found, everything=args.all))
    return 0 if found.is_equal else 1


def report(found: Comparison, *, everything: bool) -> str:
    """What differs, and sums."""
    total = overall(found.tensors)
    shown = [tensor for tensor in found.tensors if everything or not tensor.is_equal]
    lines = [text_table(HEAD, [_row(tensor) for tensor in shown]), ""] if shown else []
    lines += [f"only in the first: {name}" for name in found.only_first]
    lines += [f"only in the second: {name}" for name in found.only_second]
    lines.append(f"{total['equal_tensors']} of {total['tensors']} tensors that both have are equal to the bit")
    if total["mask_iou"] is not None:
        lines.append(
            f"recorded masks of {total['masked_tensors']} tensors: IoU {total['mask_iou']:.4f}, "
            f"{total['born']:,} weights live in the second only, {total['died']:,} in the first only"
        )
    return "\n".join(lines)


def _row(tensor: Difference) -> list[str]:
    if tensor.comparable is not None:
        return [tensor.name, tensor.comparable, "", "", "", "", "", ""]
    return [
        tensor.name,
        f"{tensor.unequal:,} of {tensor.weights:,}",
        "" if tensor.largest is None else f"{tensor.largest:.3g}",
        "" if tensor.relative is None else f"{tensor.relative:.3g}",
        "" if tensor.iou is None else f"{tensor.iou:.4f}",
        f"{tensor.born:,}",
        f"{tensor.died:,}",
        tensor.masks,
    ]
