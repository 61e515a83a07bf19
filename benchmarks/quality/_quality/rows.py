"""The report's figures, from result files: one row for each method at each sparsity, length and variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from _quality.bootstrap import RESAMPLES, SEED, p_value, resampled_bleu
from _quality.cell import Cell
from _quality.results import difference, read_result, result_path, unpack
from _quality.tier import Tier
from _quality.trials import setting_rows, trial_rows
from gap_hf.errors import GaPError

Key = tuple[str, float | None, float, str]  # method, sparsity, multiple of the steps, variant


def build(tier: Tier, results: Path, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Everything the report shows, as plain data.

    Raises:
        GaPError: if no cell has a result, or results do not go together.
    """
    found: dict[str, dict[str, Any]] = {}
    others: dict[str, str] = {}
    for cell in tier.cells:
        result = read_result(result_path(results, cell))
        if result is None:
            continue
        if differs := difference(result["identity"], cell.identity()):
            others[cell.name] = differs
        else:
            found[cell.name] = result
    if not found:
        raise GaPError(f"{results / tier.name}: no result of tier {tier.name}; expected some, from run.py")
    names = list(found)
    draws = resampled_bleu([unpack(found[n]["sentence_statistics"]) for n in names], resamples=resamples)
    resampled = dict(zip(names, draws, strict=True))

    groups: dict[Key, list[Cell]] = {}
    for cell in tier.cells:
        groups.setdefault((cell.method, cell.sparsity, cell.steps, cell.variant), []).append(cell)
    rows = [_row(tier, key, cells, found) for key, cells in groups.items()]
    means = {
        key: np.mean([resampled[cell.name] for cell in cells if cell.name in found], axis=0)
        for key, cells in groups.items()
        if any(cell.name in found for cell in cells)
    }
    _compare(rows, list(groups), means)
    first = found[names[0]]
    trials = trial_rows(tier, results)
    return {
        "tier": tier.name,
        "title": tier.title,
        "hardware": tier.hardware,
        "recipe": tier.recipe,
        "sentences": first["scored_pairs"],
        "signatures": first["signatures"],
        "training": {
            key: first["identity"]["resolved"]["training"].get(key)
            for key in ("max_steps", "num_train_epochs", "generation_num_beams", "load_best_model_at_end")
        },
        "eval_num_beams": first["identity"]["resolved"]["data"].get("eval_num_beams", 1),
        "threads": tier.threads,
        "planned": len(tier.cells),
        "finished": len(found),
        "missing": [cell.name for cell in tier.cells if cell.name not in found and cell.name not in others],
        "of_other_settings": others,
        "cpu_hours": sum(_cpu_seconds(r, tier.threads) for r in found.values()) / 3600,
        "versions": sorted({" ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in found.values()}),
        "code_sha256": sorted({code for r in found.values() for code in r["code_sha256"]}),
        "bootstrap": {"resamples": resamples, "seed": SEED},
        "rows": rows,
        "settings": setting_rows(tier, trials),
        "trials": trials,
    }


def _row(tier: Tier, key: Key, cells: Sequence[Cell], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    method, sparsity, steps, variant = key
    mine = [found[cell.name] for cell in cells if cell.name in found]
    bleu = [r["bleu"] for r in mine]
    whole = [r["seconds"] for r in mine if r.get("resumed_from") is None]
    costs = [r["cost"] for r in mine if r.get("cost")]
    return {
        "method": method,
        "label": tier.methods[method].label,
        "sparsity": sparsity,
        "steps_multiple": steps,
        "variant": variant,
        "planned": len(cells),
        "n": len(mine),
        "seeds": [cell.seed for cell in cells if cell.name in found],
        "bleu": bleu,
        "bleu_mean": _mean(bleu),
        "bleu_sd": stdev(bleu) if len(bleu) > 1 else None,
        "chrf_mean": _mean([r["chrf"] for r in mine]),
        "dev_bleu": _mean([r["dev"][-1]["bleu"] for r in mine if r["dev"] and "bleu" in r["dev"][-1]]),
        "steps": mine[0]["steps"] if mine else None,
        "found_sparsity": _mean([r["sparsity"] for r in mine]),
        "seconds": _mean(whole),
        "average_density": _mean([c["average_density"] for c in costs]),
        # Of a dense run of the recipe's own length.
        "training_flops": _mean([c["training_flops_of_model"] * steps for c in costs]),
        "difference_to_dense": None,
        "p_dense": None,
        "best_other": None,
        "p_best_other": None,
    }


def _compare(rows: list[dict[str, Any]], keys: list[Key], means: dict[Key, np.ndarray]) -> None:
    """Fill in the comparisons, each among runs of the same length: with dense, and with the best other sparse method."""
    by_key = dict(zip(keys, rows, strict=True))
    dense = {key[2]: key for key in means if key[1] is None and not key[3]}
    for key in means:
        row = by_key[key]
        if key[1] is None:
            continue
        if (base := dense.get(key[2])) is not None:
            row["difference_to_dense"] = row["bleu_mean"] - by_key[base]["bleu_mean"]
            row["p_dense"] = p_value(row["difference_to_dense"], means[key] - means[base])
        rivals = [other for other in means if other[1:] == key[1:] and other[0] != key[0]]
        if rivals:
            best = max(rivals, key=lambda other: by_key[other]["bleu_mean"])
            row["best_other"] = by_key[best]["label"]
            row["p_best_other"] = p_value(row["bleu_mean"] - by_key[best]["bleu_mean"], means[key] - means[best])


def _whole_seconds(result: dict[str, Any]) -> float:
    """A resumed run timed its last part; the rest is taken to have gone at the same pace."""
    resumed = result.get("resumed_from") or 0
    return result["seconds"] * result["steps"] / max(1, result["steps"] - resumed)


def _cpu_seconds(result: dict[str, Any], threads: int) -> float:
    """As the process counted them if it ran in one go; else what its threads had at most."""
    if "cpu_seconds" in result and result.get("resumed_from") is None:
        return result["cpu_seconds"]
    return _whole_seconds(result) * result.get("threads", threads)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
