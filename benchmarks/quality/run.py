"""The quality benchmark: methods × sparsities × seeds on one recipe, all with the same number of steps.

    python benchmarks/quality/run.py benchmarks/quality/tiers/tiny.yaml [--jobs 2] [--only GLOB] [--list] [--tune]

Each cell is a run of scripts/translate.py under runs/quality/TIER, and ends as one small file in
benchmarks/quality/results/TIER. Cells that have theirs are skipped, so the same call goes on after any stop.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from types import FrameType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(path) for path in (HERE, ROOT / "scripts", ROOT) if str(path) not in sys.path]

from _quality.cell import Cell  # noqa: E402
from _quality.results import is_done, read_result, result_path  # noqa: E402
from _quality.runner import Runner  # noqa: E402
from _quality.tier import Tier, load_tier  # noqa: E402

from gap_hf.errors import GaPError  # noqa: E402
from gap_hf.recipe import one_line  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every selected cell has its result, 1 if some failed or are left, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", type=Path, help="such as benchmarks/quality/tiers/tiny.yaml")
    parser.add_argument("--jobs", type=int, help="runs at the same time; the tier's own number if left out")
    parser.add_argument("--only", metavar="GLOB", help="only cells whose name matches, such as 'cyclic-s90-*'")
    parser.add_argument("--list", action="store_true", help="print the cells and what is left to do, and stop")
    parser.add_argument(
        "--tune", action="store_true", help="the trials under `tune`, scored on dev, instead of the cells"
    )
    parser.add_argument("--redo", action="store_true", help="replace results that are of other settings")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="begin nothing that takes longer, stop what does"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="folder of models and logs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    args = parser.parse_args(argv)
    try:
        tier = load_tier(args.tier)
        cells = select(tier, tune=args.tune, only=args.only)
        jobs = tier.jobs if args.jobs is None else args.jobs
        for name, value in (("--jobs", jobs), ("--time-limit", args.time_limit)):
            if value is not None and value <= 0:
                raise GaPError(f"{name}: found {value}, expected a number above 0")
        if args.list:
            # A list also shows what a run would refuse.
            print_list(tier, cells, args.results, jobs)
            return 0
        pending = [cell for cell in cells if not is_done(args.results, cell, redo=args.redo)]
        pending.sort(key=lambda cell: cell.seed)  # every method once before any of them again
        for cell in pending:
            cell.identity()  # every recipe is checked before the first run
    except GaPError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    runner = Runner(tier, args.runs.resolve(), args.results.resolve(), jobs)
    runner.longest = max((wall_seconds(args.results, cell) for cell in cells), default=0.0)
    if args.time_limit is not None:
        runner.deadline = time.monotonic() + args.time_limit
    return execute(runner, pending, done=len(cells) - len(pending))


def execute(runner: Runner, pending: Sequence[Cell], *, done: int) -> int:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    print(f"{done} cells done, {len(pending)} to do, {runner.jobs} at a time", flush=True)
    try:
        runner.run(pending, done=done)
    except KeyboardInterrupt:
        print(f"stopped; {len(runner.left)} cells left, the same call goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    for cell, why in runner.failed:
        print(f"failed: {cell.name}: {why}", file=sys.stderr)
    if runner.left:
        names = ", ".join(cell.name for cell in runner.left[:3]) + (", …" if len(runner.left) > 3 else "")
        print(f"{len(runner.left)} cells left for want of time: {names}; the same call goes on", file=sys.stderr)
    return 1 if runner.failed or runner.left else 0


def select(tier: Tier, *, tune: bool, only: str | None) -> list[Cell]:
    cells = tier.trials if tune else tier.cells
    if not cells:
        raise GaPError(f"tune: tier {tier.name} has no trials; expected some under tune.trials")
    chosen = [cell for cell in cells if only is None or fnmatchcase(cell.name, only)]
    if not chosen:
        raise GaPError(f"--only: '{only}' matches no cell; expected one such as '{cells[-1].name}'")
    return chosen


def wall_seconds(results: Path, cell: Cell) -> float:
    found = read_result(result_path(results, cell))
    return 0.0 if found is None else float(found.get("wall_seconds") or found["seconds"])


def print_list(tier: Tier, cells: Sequence[Cell], results: Path, jobs: int) -> None:
    """Every cell with its state, and an estimate of what is left from the cells that are done."""
    states: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for cell in cells:
        try:
            states[cell.name] = "done" if is_done(results, cell) else "pending"
        except GaPError as error:
            states[cell.name] = f"refused: {one_line(error)}"
        if states[cell.name] == "done":
            seconds[cell.name] = wall_seconds(results, cell)
    width = max(len(cell.name) for cell in cells)
    for cell in cells:
        time_taken = f", {seconds[cell.name]:,.0f} s" if cell.name in seconds else ""
        print(f"{cell.name:{width}}  {states[cell.name]}{time_taken}")
    per_step = {cell.method: [] for cell in cells}
    for cell in cells:
        if cell.name in seconds:
            per_step[cell.method].append(seconds[cell.name] / cell.steps)
    pending = [cell for cell in cells if cell.name not in seconds]
    line = f"{len(seconds)} of {len(cells)} done"
    if pending and seconds:
        known = {method: mean(values) for method, values in per_step.items() if values}
        usual = mean(known.values())
        left = sum(known.get(cell.method, usual) * cell.steps for cell in pending) / min(jobs, len(pending))
        line += f", about {left / 3600:.1f} h left with {jobs} at a time"
    elif pending:
        line += "; no cell is done, so the time left is not known"
    print(line)


if __name__ == "__main__":
    sys.exit(main())
