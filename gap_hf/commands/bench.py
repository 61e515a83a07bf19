"""`gap-hf bench`: how fast a sparse model is on this machine, against the best that its dense form can be run with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from gap_hf.errors import GaPError

# As gap_hf.bench.rivals.KINDS has them; importing it takes seconds.
_RIVALS = "bf16,int8,onnx,onnx-int8,ctranslate2-int8"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Time a saved model, in either form, as gap_hf runs it (optimize_for_inference) and as torch, ONNX Runtime and CTranslate2 "
        "run its dense form, on the CPU. All of them take turns in one process. Each output is compared with torch fp32's first. "
        "A sentence says for each comparison whether there is a gain over the fastest of them."
    )
    parser.add_argument("folder", type=Path, help="a saved model that generates, classifies or encodes")
    parser.add_argument("--batch", type=_numbers, default=(1, 16), metavar="N,…", help="rows (default: 1,16)")
    parser.add_argument("--beams", type=_numbers, default=(1,), metavar="N,…", help="1 is greedy search (default: 1)")
    parser.add_argument("--threads", type=_numbers, default=(1,), metavar="N,…", help="default: 1")
    parser.add_argument(
        "--rivals",
        default=_RIVALS,
        metavar="NAME,…",
        help=f"default: {_RIVALS}; there is ctranslate2 too, and fp32 and ours are always among them",
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="turns that are timed (default: 9)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="generated in each row (default: 32)")
    parser.add_argument("--length", type=int, default=32, metavar="N", help="of a source, in tokens (default: 32)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="sources, one a line, instead of random tokens; what is generated from them may end early",
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, metavar="SECONDS", help="leave out a rival whose call takes longer (20)"
    )
    parser.add_argument(
        "--output-layer", choices=["int8"], help="ours runs its dense output layer in int8, the best outputs exactly"
    )
    parser.add_argument(
        "--decode-step", choices=["exported"], help="ours runs its decoding steps without transformers' modules"
    )
    parser.add_argument("--no-layers", action="store_true", help="whole models only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speeds; the suffix sets the format")
    parser.add_argument("--quiet", action="store_true", help="no lines about progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for. Returns the exit code."""
    for name, least in (("repeats", 3), ("tokens", 2), ("length", 2)):
        if (found := getattr(args, name)) < least:
            raise GaPError(f"--{name}: found {found}, expected at least {least}")
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path is not None and not path.parent.is_dir():
            raise GaPError(f"--{option}: {path.parent} is no folder that exists")
        if path is not None and path.is_dir():
            raise GaPError(f"--{option}: {path} is a folder, expected a file")
    if args.plot is not None:
        from gap_hf.tables import check_plot

        check_plot(args.plot)
    lines = _lines(args.text)
    from gap_hf.bench.measure import Settings, measure
    from gap_hf.bench.rivals import check_names
    from gap_hf.bench.show import as_text, plot
    from gap_hf.bench.subject import load_subject

    names = check_names([name.strip() for name in args.rivals.split(",") if name.strip()])
    settings = Settings(
        batches=args.batch,
        beams=args.beams,
        threads=args.threads,
        repeats=args.repeats,
        tokens=args.tokens,
        length=args.length,
        limit=args.limit,
        stop=lines is not None,
        layers=not args.no_layers,
        output_layer=args.output_layer,
        decode_step=args.decode_step,
    )
    report = measure(load_subject(args.folder), names, settings, lines=lines, say=_progress(args.quiet))
    print(as_text(report), flush=True)
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise GaPError(f"--json: {args.json} cannot be written: {error}") from None
    if args.plot is not None:
        plot(report, args.plot)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found '{text}', expected numbers such as 1,4") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', expected numbers from 1 on")
    return numbers


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise GaPError(f"--text: {path} cannot be read: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise GaPError(f"--text: {path} has no line of text")
    return lines


def _progress(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: print(f"gap-hf: {line}", file=sys.stderr, flush=True))
