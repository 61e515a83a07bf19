"""The trials that settings are chosen by, and what each method runs with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _quality.cell import Settings
from _quality.results import difference, read_result, result_path
from _quality.tier import Tier

# What tells trials from cells, and is no setting of a method.
NO_SETTING = ("gap.sparsity", "data.score", "training.seed")


def trial_rows(tier: Tier, results: Path) -> list[dict[str, Any]]:
    """One row a trial: what it changes, its last loss on dev and its BLEU there; None where it was not run.

    `choice` is "chosen" for the lowest loss of a method whose trials are all done (the first of equal ones), and
    "lowest so far" where some are left. A loss that is not finite, or is not there, is None and never the lowest.
    """
    rows: list[dict[str, Any]] = []
    for cell in tier.trials:
        found = read_result(result_path(results, cell))
        if found is not None and difference(found["identity"], cell.identity()) is not None:
            found = None
        loss = found["dev"][-1].get("loss") if found is not None and found["dev"] else None
        rows.append(
            {
                "method": cell.method,
                "trial": cell.name,
                "changes": _changes(tier.methods[cell.method].settings, cell.overrides),
                "dev_loss": loss if loss is not None and math.isfinite(loss) else None,
                "dev_bleu": None if found is None else found["bleu"],
                "choice": None,
            }
        )
    for method in tier.methods:
        mine = [row for row in rows if row["method"] == method]
        if (lowest := _lowest(mine)) is not None:
            lowest["choice"] = "chosen" if _done(mine) == len(mine) else "lowest so far"
    return rows


def setting_rows(tier: Tier, trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: what the tier sets, what stands there as chosen, and whether that is what the trials choose.

    `is_lowest` is None as long as trials are missing.
    """
    out = []
    for name, method in tier.methods.items():
        mine = [row for row in trials if row["method"] == name]
        chosen = _changes(method.settings, method.chosen)
        lowest = _lowest(mine) if _done(mine) == len(mine) else None
        out.append(
            {
                "method": name,
                "label": method.label,
                "own": _changes({}, method.own),
                "chosen": chosen,
                "trials": len(mine),
                "done": _done(mine),
                "lowest": None if lowest is None else lowest["trial"],
                "lowest_changes": None if lowest is None else lowest["changes"],
                "is_lowest": None if lowest is None else lowest["changes"] == chosen,
            }
        )
    return out


def _lowest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return min((row for row in rows if row["dev_loss"] is not None), key=lambda row: row["dev_loss"], default=None)


def _done(rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["dev_bleu"] is not None for row in rows)


def _changes(base: Mapping[str, Mapping[str, Any]], settings: Settings) -> dict[str, Any]:
    """What `settings` have that `base` has not, as section.key."""
    missing = object()
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        for key, value in values.items()
        if base.get(section, {}).get(key, missing) != value and f"{section}.{key}" not in NO_SETTING
    }
