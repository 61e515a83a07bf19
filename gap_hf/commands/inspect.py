"""`gap-hf inspect`: where the zeros of anybody's checkpoint are, and which patterns they hold to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gap_hf.inspection import TensorFacts, by_kind, inspect_model, to_dict, totals
from gap_hf.stored_model import StoredModel, open_model
from gap_hf.tables import plot_bars, size_text, text_table

HEAD = ("layer", "tensors", "shape", "dtype", "weights", "zeros", "pattern", "stored", "packed")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Count the zeros of a saved model, tensor by tensor, and tell which patterns they hold to. It need not be one of gap_hf's. "
        "It is read a piece at a time and never loaded. `packed` is the size that the packed form has, or would have by the "
        "entropy of the zeros."
    )
    parser.add_argument("model", help="a folder, a safetensors file, or a repository's id on the Hub")
    parser.add_argument("--all", action="store_true", help="a line for every tensor, not for every kind of layer")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the zeros of what is listed; the suffix sets the format"
    )
    parser.add_argument("--revision", help="branch or commit on the Hub")
    parser.add_argument("--token", help="for the Hub; if left out, that of `hf auth login` or HF_TOKEN")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Inspect and print. Returns the exit code."""
    model = open_model(args.model, revision=args.revision, token=args.token)
    facts = inspect_model(model)
    listed = {fact.name: [fact] for fact in facts} if args.all else by_kind(facts)
    if args.plot is not None:
        shown = {name: group for name, group in listed.items() if max(len(fact.shape) for fact in group) > 1}
        plot_bars(list(shown), [_share(group) for group in shown.values()], args.plot, label="zeros, %")
    print(json.dumps(to_dict(model, facts), indent=2) if args.json else report(model, facts, listed))
    return 0


def report(model: StoredModel, facts: Sequence[TensorFacts], listed: dict[str, list[TensorFacts]]) -> str:
    """The table of what is listed, and what holds for the whole model."""
    table = text_table(HEAD, [_row(name, group) for name, group in listed.items()])
    total = totals(facts)
    lines = [table, ""]
    lines.append(
        f"{model.source}: {model.form}; {total['tensors']} tensors, {total['weights']:,} weights, {total['sparsity']:.2%} zero; "
        f"{size_text(total['bytes_stored'])} stored, {size_text(total['bytes_dense'])} dense, {size_text(total['bytes_packed'])} packed"
        f"{'' if model.form == 'packed' else ' (estimate)'}"
    )
    if total["masked_tensors"]:
        pattern = f", recorded as {model.pattern}" if model.pattern else ""
        lines.append(
            f"prunable set: {total['masked_tensors']} tensors with a recorded mask, {total['prunable_weights']:,} weights, "
            f"{total['prunable_sparsity']:.2%} pruned{pattern}"
        )
        wrong = total["disobeying"]
        lines.append(f"{wrong:,} masked weights are not 0" if wrong else "every masked weight is 0")
    else:
        lines.append("no masks are recorded" if total["zeros"] else "no masks are recorded, and nothing is zero")
    if model.unmatched:
        lines.append(
            f"{len(model.unmatched)} recorded masks are of names that the files do not have, such as '{model.unmatched[0]}'"
        )
    return "\n".join(lines)


def _share(group: Sequence[TensorFacts]) -> float:
    return sum(fact.zeros or 0 for fact in group) / max(1, sum(fact.weights for fact in group))


def _row(name: str, group: Sequence[TensorFacts]) -> list[str]:
    shapes = list(dict.fromkeys("x".join(map(str, fact.shape)) or "scalar" for fact in group))
    dtypes = list(dict.fromkeys(fact.dtype for fact in group))
    patterns = list(dict.fromkeys(", ".join(fact.patterns) for fact in group))
    return [
        name,
        str(len(group)),
        shapes[0] if len(shapes) == 1 else "several",
        dtypes[0] if len(dtypes) == 1 else "several",
        f"{sum(fact.weights for fact in group):,}",
        "not read" if any(fact.zeros is None for fact in group) else f"{_share(group):.2%}",
        patterns[0] if len(patterns) == 1 else "several",
        size_text(sum(fact.bytes_stored for fact in group)),
        size_text(sum(fact.bytes_packed for fact in group)),
    ]
