"""Tables and plots of a run, from its data. Changes nothing; matplotlib is imported only to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gap_hf.change import Change
from gap_hf.phases import PARALLEL, Phase
from gap_hf.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP@[.5:.95]",
    "map_50": "mAP@50",
    "point_accuracy": "point accuracy",
    "instance_miou": "instance mIoU",
}
_SHADES = {"initial": "#F0E442", "fine-tune": "#56B4E9"}


def describe(change: Change, plan: Plan) -> str:
    """A change as one line for people."""
    phase = change.phase
    done = []
    if change.pruned:
        error = "" if change.pruning_error is None else f" (error {change.pruning_error:.4f}"
        error += "" if change.mask_iou is None else f", IoU {change.mask_iou:.3f}"
        done.append(f"pruned {_groups(change.pruned)}{error + ')' if error else ''}")
    if change.grown and phase.kind == PARALLEL:
        done.append(f"each of {plan.num_workers} workers grew its own group")
    elif change.grown:
        done.append(f"grew {_groups(change.grown)}")
    return (
        f"step {change.step}/{plan.total_steps}, phase {phase.index + 1}/{len(plan.phases)} ({phase.kind}): "
        f"{', '.join(done) or 'no change'}; sparsity {change.sparsity:.2%} of the prunable set, {change.model_sparsity:.2%} of the model"
    )


def unfinished(step: int, plan: Plan, sparsity: float, target: float) -> str:
    """What to say where training ended before its fine-tune."""
    return (
        f"Training ended at step {step}, before the fine-tune that begins at step {plan.fine_tune.start}: the prunable set is at a "
        f"sparsity of {sparsity:.4f}, not the target of {target:.4g}. Call trainer.prune_to_target(), or set prune_if_stopped."
    )


def _groups(groups: tuple[int, ...]) -> str:
    return f"group{'s' if len(groups) > 1 else ''} {', '.join(str(g + 1) for g in groups)}"


def results_table(results: Mapping[str, Any], *, reference: Mapping[str, Any] | None = None) -> str:
    """The figures of a translation run as text, beside those of a recorded one if there is one.

    Args:
        results: `bleu`, `chrf`, `sparsity`, `model_sparsity`, `steps`, `seconds`, and optionally `signatures`,
            `test_pairs` (or `dev_pairs`) and `bleu_by_origin`.
        reference: The same of another run, such as dense training of the same length.
    """
    rows = [["", "this run", *(["recorded", "share"] if reference else [])]]
    for label, key, show in (
        ("BLEU", "bleu", "{:.2f}"),
        ("chrF", "chrf", "{:.2f}"),
        ("sparsity of the prunable set", "sparsity", "{:.2%}"),
        ("sparsity of the whole model", "model_sparsity", "{:.2%}"),
        ("optimizer steps", "steps", "{:,}"),
        ("training time", "seconds", "{:,.0f} s"),
    ):
        row = [label, show.format(results[key])]
        if reference:
            row.append(show.format(reference[key]) if key in reference else "")
            is_score = key in ("bleu", "chrf") and reference[key] > 0
            row.append(f"{results[key] / reference[key]:.2f}" if is_score else "")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    for origin, scores in results.get("bleu_by_origin", {}).items():
        lines.append(f"  {origin}: BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f} ({scores['pairs']:,} pairs)")
    for split in ("test", "dev"):
        if (pairs := results.get(f"{split}_pairs")) is not None:
            lines.append(f"on {pairs:,} {split} pairs; " + "; ".join(results.get("signatures", {}).values()))
    if reference and "command" in reference:
        lines.append(f"recorded: {reference['command']}")
    return "\n".join(line.rstrip() for line in lines)


def plot_run(log_history: Sequence[Mapping[str, Any]], plan: Plan | None, path: str | Path) -> None:
    """Draw sparsity, loss and BLEU over optimizer steps, with the phases shaded; write it to `path`.

    Args:
        log_history: `trainer.state.log_history`. Panels for which it has no data are left out.
        plan: `trainer.gap.plan`, or None for a dense run.
        path: File to write; its suffix sets the format.
    """
    run_figure(log_history, plan, scores=("bleu",)).savefig(path, dpi=130)


def run_figure(log_history: Sequence[Mapping[str, Any]], plan: Plan | None, *, scores: Sequence[str]) -> Figure:
    """Panels of sparsity, loss and the `scores` (``eval_bleu`` is ``bleu``) over optimizer steps, with the phases shaded."""
    from matplotlib.figure import Figure

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        return [x for x, _ in points], [y for _, y in points]

    keys = {"sparsity": "gap_sparsity", "loss": "loss"} | {name: f"eval_{name}" for name in scores}
    panels = [name for name, key in keys.items() if series(key)[0]]
    phases = plan.phases if plan is not None else ()
    last = max([p.end for p in phases] + [int(entry.get("step", 0)) for entry in log_history] + [1])
    # A Figure of its own, not pyplot: no window, no global state.
    figure = Figure(figsize=(9, 1.2 + 2.1 * max(1, len(panels))), layout="constrained")
    axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, panels, strict=False):
        shade_phases(axis, phases)
        if name == "sparsity":
            for key, colour, label in (
                ("gap_sparsity", _BLUE, "prunable weights"),
                ("gap_model_sparsity", _GREY, "all parameters"),
            ):
                x, y = series(key)
                # Masks are fixed between changes, so a step curve is what happened, to the end of training.
                axis.step([*x, last], [100 * v for v in (*y, y[-1])], where="post", color=colour, label=label, lw=2)
            axis.set_ylabel("zeros, %")
            axis.set_ylim(0, 100)
        elif name == "loss":
            x, y = series("loss")
            axis.plot(x, y, color=_ORANGE, label="training (as optimized)", lw=1.5)
            x, y = series("eval_loss")
            if x:
                axis.plot(x, y, color=_BLUE, label="dev", marker="o", ms=4, lw=1.5)
            axis.set_ylabel("loss")
        else:
            x, y = series(keys[name])
            axis.plot(x, y, color=_GREEN, marker="o", ms=4, lw=1.5)
            axis.annotate(
                f"{y[-1]:.{1 if abs(y[-1]) >= 1 else 3}f}",
                (x[-1], y[-1]),
                xytext=(-4, -14),
                textcoords="offset points",
                ha="right",
                color=_GREEN,
            )
            axis.set_ylabel(f"{_NAMES.get(name, name)} on dev")
            axis.set_ylim(bottom=min(0, *y))
        if axis.get_legend_handles_labels()[0]:
            corner = "lower right" if name == "sparsity" else "upper right"
            axis.legend(loc=corner, frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, last)
    if plan is not None:
        label_phases(axes[0], plan, last)
    return figure


def shade_phases(axis: Any, phases: Sequence[Phase]) -> None:
    """Shade a panel by phase."""
    for phase in phases:
        shade = _SHADES.get(phase.kind, "#EEEEEE" if phase.index % 2 else "#FFFFFF")
        axis.axvspan(phase.start, phase.end, color=shade, alpha=0.25 if phase.kind in _SHADES else 0.9, lw=0, zorder=0)


def label_phases(axis: Any, plan: Plan, last: int) -> None:
    """Which group is dense, above each phase; left out where phases are too narrow to write in."""
    for phase in plan.phases:
        grown = plan.grown(phase)
        if phase.kind in _SHADES or phase.round == 0:
            text = phase.kind
        elif plan.num_groups > 1 and len(grown) == 1:
            text = f"round {phase.round}\ndense: {grown[0] + 1}"
        else:
            text = f"round {phase.round}"
        if phase.num_steps / last >= 0.06:
            axis.text(
                (phase.start + phase.end) / 2,
                1.03,
                text,
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color="#444444",
            )
