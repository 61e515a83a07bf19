"""Pictures and tables of a run on point clouds. matplotlib is imported only to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gap_hf.tables import text_table

SCORES = {"point_accuracy": "point accuracy", "instance_miou": "instance mIoU", "class_miou": "class mIoU"}
# Okabe and Ito's palette, told apart by colour-blind readers, and paler ones of it for the few clouds with more parts.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#555555", "#7FB8D8", "#EAAE80")


@dataclass(frozen=True)
class Drawn:
    """A cloud to draw: coordinates (n, 3), and parts (n,) by column title."""

    title: str
    points: np.ndarray
    parts: Mapping[str, np.ndarray]


def draw_clouds(clouds: Sequence[Drawn], part_names: Sequence[str], path: Path, *, up: str = "z") -> None:
    """One row per cloud and one column per labelling, seen from the side and a little from above; parts have colours."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = list(clouds[0].parts)
    # A Figure of its own, not pyplot: no window, no global state.
    figure = Figure(figsize=(3.2 * len(columns) + 1.8, 3.0 * len(clouds)), layout="constrained")
    axes = figure.subplots(len(clouds), len(columns), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=10, pad=16)
    for row, cloud in zip(axes, clouds, strict=True):
        x, y, depth = project(cloud.points, up)
        order = np.argsort(depth)  # what is near is drawn last
        used = sorted({int(part) for parts in cloud.parts.values() for part in parts})
        colour = {part: COLOURS[i % len(COLOURS)] for i, part in enumerate(used)}
        for axis, column in zip(row, columns, strict=True):
            shades = [colour[int(part)] for part in cloud.parts[column][order]]
            axis.scatter(x[order], y[order], s=5, c=shades, linewidths=0)
            axis.set_aspect("equal")
            axis.set_axis_off()
        row[0].text(0, 1.02, cloud.title, transform=row[0].transAxes, fontsize=8, color="#444444")
        handles = [Line2D([], [], marker="o", ls="", ms=5, color=colour[part], label=part_names[part]) for part in used]
        row[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def project(points: np.ndarray, up: str = "z") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, up and towards the viewer (each (n,)) of points (n, 3), turned by 35 degrees and seen from 20 above."""
    axis = "xyz".index(up)
    side, front, height = points[:, (axis + 1) % 3], points[:, (axis + 2) % 3], points[:, axis]
    turn, tilt = np.radians(35), np.radians(20)
    right = np.cos(turn) * side - np.sin(turn) * front
    away = np.sin(turn) * side + np.cos(turn) * front
    return right, np.cos(tilt) * height + np.sin(tilt) * away, np.sin(tilt) * height - np.cos(tilt) * away


def table(results: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> str:
    """Figures of a run as text, beside those of its baseline and of a recorded run, if there are such."""
    baseline = results.get("baseline")
    head = ["", "this run", *(["1-NN"] if baseline else []), *(["recorded"] if reference else [])]
    rows = []
    for key, label in SCORES.items():
        columns = [results, *([baseline] if baseline else []), *([reference] if reference else [])]
        rows.append([label, *(f"{column[key]:.2%}" if key in column else "" for column in columns)])
    for key, label, show in (
        ("sparsity", "sparsity of the prunable set", "{:.2%}"),
        ("model_sparsity", "sparsity of the whole model", "{:.2%}"),
        ("steps", "optimizer steps", "{:,}"),
        ("seconds", "training time", "{:,.0f} s"),
    ):
        row = [label, show.format(results[key]), *([""] if baseline else [])]
        if reference:
            row.append(show.format(reference[key]) if key in reference else "")
        rows.append(row)
    scored = results["scored"]
    lines = [text_table(head, rows), f"on {results['num_clouds']:,} clouds of {scored}"]
    if baseline:
        lines[-1] += f"; 1-NN looks among {baseline['num_examples']:,} training clouds, category known"
    if reference and "command" in reference:
        lines.append(f"recorded: {reference['command']}")
    return "\n".join(lines)
