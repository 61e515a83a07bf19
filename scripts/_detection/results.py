"""The figures of a detection run: beside its weights as JSON, and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gap_hf.tables import text_table

SCORES = {"map": "mAP@[.5:.95]", "map_50": "mAP@50"}


def results_table(results: Mapping[str, Any], *, reference: Mapping[str, Any] | None = None) -> str:
    """The figures as text, beside those of a recorded run if there is one.

    Args:
        results: `map`, `map_50`, `per_class`, `sparsity`, `model_sparsity`, `steps`, `seconds`, `scored` (the name of a
            split) and `dev_images` or `test_images`.
        reference: The same of another run, such as dense training of the same length.
    """
    rows = []
    for label, key, show in (
        *((label, key, "{:.4f}") for key, label in SCORES.items()),
        ("sparsity of the prunable set", "sparsity", "{:.2%}"),
        ("sparsity of the whole model", "model_sparsity", "{:.2%}"),
        ("optimizer steps", "steps", "{:,}"),
        ("training time", "seconds", "{:,.0f} s"),
    ):
        row = [label, show.format(results[key])]
        if reference:
            row.append(show.format(reference[key]) if key in reference else "")
            is_score = key in SCORES and reference[key] > 0
            row.append(f"{results[key] / reference[key]:.2f}" if is_score else "")
        rows.append(row)
    lines = [text_table(["", "this run", *(["recorded", "share"] if reference else [])], rows)]
    classes = [f"{name} {score['map_50']:.3f}" for name, score in results["per_class"].items()]
    split = results["scored"]
    lines.append(f"on {results[f'{split}_images']:,} {split} images; mAP@50 by class: {', '.join(classes) or 'none'}")
    if reference and any(reference.get(key, results[key]) != results[key] for key in ("scored", f"{split}_images")):
        lines.append(f"recorded on other images: {reference.get('scored', 'unknown')}")
    if reference and "command" in reference:
        lines.append(f"recorded: {reference['command']}")
    return "\n".join(lines)
