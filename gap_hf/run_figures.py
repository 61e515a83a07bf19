"""Figures of a run, as SVG: the same data give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gap_hf.plan import Plan
from gap_hf.report import label_phases, run_figure, shade_phases
from gap_hf.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE = "#0072B2", "#D55E00"
_MOST_ROWS = 96  # of names written beside a heat map
_MOST_CELLS = 3000  # that are drawn as shapes; of more, a picture is embedded


def svg(figure: Figure) -> str:
    """A figure as text, without a date and with names that do not change from run to run."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "gap_hf"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def over_time(run: RunRecord) -> Figure:
    """Sparsity, loss and scores over optimizer steps, phases shaded."""
    return run_figure(run.log, run.plan, scores=run.scores()[:4])


def groups(plan: Plan, sparsity: float) -> Figure:
    """Sparsity of every group over optimizer steps, as planned: which one is dense when."""
    times = [*sorted({0, *(u.step for u in plan.updates), *(p.start for p in plan.phases)}), plan.total_steps]
    times = [t for t in dict.fromkeys(times) if t <= plan.total_steps]
    if len(times) < 2:
        times = [0, max(1, plan.total_steps)]
    levels = [
        [sum(plan.levels_at(t, w)[g] for w in range(plan.num_workers)) / plan.num_workers for t in times[:-1]]
        for g in range(plan.num_groups)
    ]
    figure, axis = _new(9, 1.5 + 0.35 * plan.num_groups)
    image = _cells(axis, times, [[100 * sparsity * v for v in row] for row in levels], high=100 * sparsity)
    axis.set_yticks([g + 0.5 for g in range(plan.num_groups)], [f"group {g + 1}" for g in range(plan.num_groups)])
    for phase in plan.phases[1:]:
        axis.axvline(phase.start, color="#666666", lw=0.6)
    axis.set_xlabel("optimizer step")
    label_phases(axis, plan, plan.total_steps)
    figure.colorbar(image, ax=axis, label="zeros, %", pad=0.01)
    return figure


def layers(run: RunRecord) -> Figure:
    """Zeros of every layer in every save."""
    names = list(run.saves[-1].live)
    values = [[100 * (1 - save.live[name]) if name in save.live else math.nan for save in run.saves] for name in names]
    return _heat_map(names, [f"{save.step:,}" for save in run.saves], values, "zeros, %", high=100)


def churn_of_layers(run: RunRecord) -> Figure | None:
    """1 - IoU of every layer's mask with that of the last save in which it was sparse; None without two to compare."""
    saves = [save for save in run.saves if save.iou]
    if not saves:
        return None
    names = [name for name in run.saves[-1].live if any(name in save.iou for save in saves)]
    values = [[1 - save.iou[name] if name in save.iou else math.nan for save in saves] for name in names]
    return _heat_map(names, [f"{save.step:,}" for save in saves], values, "1 - IoU", high=None)


def prunes(run: RunRecord) -> Figure | None:
    """Mask churn and pruning error of every prune; None where nothing was pruned."""
    panels: list[tuple[str, str, list[tuple[float, float]]]] = []
    churn = [(step, 1 - iou) for step, iou in run.series("gap_mask_iou")]
    error = [(step, value) for step, value in run.series("gap_pruning_error") if value > 0]
    panels += [("mask churn, 1 - IoU", _BLUE, churn)] if churn else []
    panels += [("pruning error", _ORANGE, error)] if error else []
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 2.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, colour, points) in zip(axes, panels, strict=True):
        shade_phases(axis, run.plan.phases if run.plan else ())
        axis.plot([x for x, _ in points], [y for _, y in points], color=colour, marker="o", ms=4, lw=1)
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if colour == _ORANGE:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("optimizer step")
    if run.plan is not None:
        axes[-1].set_xlim(0, run.plan.total_steps)
        label_phases(axes[0], run.plan, run.plan.total_steps)
    return figure


def _new(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _heat_map(
    names: Sequence[str], columns: Sequence[str], values: list[list[float]], label: str, *, high: float | None
) -> Figure:
    """A row for each name; a value that is not known is grey."""
    every = max(1, -(-len(names) // _MOST_ROWS))
    figure, axis = _new(9, 1.6 + 0.19 * min(_MOST_ROWS, max(4, len(names))))
    image = _cells(axis, list(range(len(columns) + 1)), values, high=high)
    if len(columns) * len(names) <= 240 and len(columns) <= 12:
        top = high or max((v for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    colour = "white" if value > 0.55 * top else "black"
                    text = f"{value:.1f}" if high else f"{value:.3f}"
                    axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6.5, color=colour)
    rows = range(0, len(names), every)
    axis.set_yticks([y + 0.5 for y in rows], [names[y] for y in rows], fontsize=6.5, family="monospace")
    step = max(1, -(-len(columns) // 12))
    shown = range(0, len(columns), step)
    axis.set_xticks([x + 0.5 for x in shown], [columns[x] for x in shown], fontsize=8)
    axis.set_xlabel("saved at step")
    figure.colorbar(image, ax=axis, label=label, pad=0.01, aspect=40)
    return figure


def _cells(axis: Any, edges: Sequence[float], values: list[list[float]], *, high: float | None) -> Any:
    many = len(values) * (len(edges) - 1) > _MOST_CELLS
    axis.set_facecolor("#dddddd")
    mesh = axis.pcolormesh(edges, range(len(values) + 1), values, cmap="Blues", vmin=0, vmax=high, rasterized=many)
    axis.set_ylim(len(values), 0)
    axis.set_xlim(edges[0], edges[-1])
    axis.tick_params(left=False)
    axis.spines[:].set_visible(False)
    return mesh
