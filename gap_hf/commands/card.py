"""`gap-hf card`: the model card of a sparse model, from what is measured of its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from gap_hf.card import write_card
from gap_hf.card_facts import facts_of, scores_of
from gap_hf.card_section import CardOptions
from gap_hf.errors import GaPError


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Write README.md and sparsity.png of a sparse model's folder: zeros counted in its files, its size in both forms, its scores "
        "beside a dense run's, how to load it. What a card says already stays, outside of gap_hf's own section."
    )
    parser.add_argument("folder", type=Path, help="a saved model with masks, in either form")
    parser.add_argument(
        "--dense", type=Path, metavar="RESULTS", help="a dense run's results.json, or the folder that has it"
    )
    parser.add_argument("--speed", action="store_true", help="time it beside the same model with its zeros filled")
    parser.add_argument("--repo", help="where it will be on the Hub, for the lines that load it")
    parser.add_argument("--license", help="such as apache-2.0")
    parser.add_argument("--language", help="such as en")
    parser.add_argument("--pipeline-tag", help="what it is for, such as translation")
    parser.add_argument("--base-model", help="the model on the Hub that it was trained from")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="NAME", help="what it was trained and scored on"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write, and print where. Returns the exit code."""
    if not args.folder.is_dir():
        raise GaPError(f"{args.folder}: is no folder; expected one of a saved model")
    dense = {}
    if args.dense is not None:
        if not args.dense.exists():
            raise GaPError(f"--dense: {args.dense} is not there; expected a results.json or a folder that has one")
        dense, _ = scores_of(args.dense)
        if not dense:
            raise GaPError(f"--dense: {args.dense} has no scores")
    facts = facts_of(args.folder)
    speed = None
    if args.speed:
        from gap_hf.card_speed import measure_speed

        speed = measure_speed(args.folder)
    options = CardOptions(
        dense=dense,
        license=args.license,
        language=args.language,
        pipeline_tag=args.pipeline_tag,
        base_model=args.base_model,
        datasets=args.dataset,
        speed=speed,
        repo=args.repo,
    )
    print(f"written: {write_card(args.folder, facts, options)}")
    return 0
