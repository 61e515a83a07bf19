"""Tables and plots of the quality benchmark, from its result files alone.

    python benchmarks/quality/report.py benchmarks/quality/tiers/tiny.yaml

Writes docs/quality/TIER.md, TIER.json and TIER-*.png. Runs that are missing are shown as missing. How p is computed is
at the top of _quality/bootstrap.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(path) for path in (HERE, ROOT / "scripts", ROOT) if str(path) not in sys.path]

from _quality.plots import draw  # noqa: E402
from _quality.results import write_json  # noqa: E402
from _quality.rows import build  # noqa: E402
from _quality.tables import markdown  # noqa: E402
from _quality.tier import load_tier  # noqa: E402

from gap_hf.errors import GaPError  # noqa: E402
from gap_hf.recipe import one_line  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", type=Path, help="such as benchmarks/quality/tiers/tiny.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "quality", help="folder to write to")
    args = parser.parse_args(argv)
    try:
        tier = load_tier(args.tier)
        report = build(tier, args.results)
    except GaPError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    plots = draw(report, args.output)
    write_json(args.output / f"{tier.name}.json", report)
    text = markdown(report, plots)
    (args.output / f"{tier.name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
