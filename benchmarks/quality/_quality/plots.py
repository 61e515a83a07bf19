"""The report's plots: BLEU over sparsity, over the number of steps, and over training FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, as in gap_hf.report, without its yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
GREY = "#999999"
Style = tuple[str, str, str]  # colour, marker, dashes


def draw(report: dict[str, Any], folder: Path) -> list[str]:
    """Write the plots there is data for; their file names."""
    rows = [row for row in report["rows"] if row["n"] and not row["variant"]]
    base = [row for row in rows if row["steps_multiple"] == 1]
    methods = list(dict.fromkeys(row["method"] for row in report["rows"] if row["sparsity"] is not None))
    # Where the colours begin again, lines are dashed.
    styles = {
        m: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], "-" if i < len(COLOURS) else "--")
        for i, m in enumerate(methods)
    }
    out = []
    for kind, plot, data in (
        ("sparsity", _sparsity, base),
        ("budget", _budget, rows if len(rows) > len(base) else []),
        ("flops", _flops, [row for row in rows if row["training_flops"] is not None]),
    ):
        if any(row["sparsity"] is not None for row in data):
            name = f"{report['tier']}-{kind}.png"
            plot(data, styles, folder / name, report)
            out.append(name)
    return out


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: no window, no global state.
    figure = Figure(figsize=(4.2 * panels + 2.4, 4.4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def _finish(figure: Any, axes: Sequence[Any], path: Path, report: dict[str, Any]) -> None:
    for axis in axes:
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("BLEU on test, mean and range of seeds")
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False, fontsize=9)
    if report["finished"] < report["planned"]:
        figure.suptitle(f"{report['finished']} of {report['planned']} runs", fontsize=9, color="#444444")
    figure.savefig(path, dpi=130)


def _points(axis: Any, x: Sequence[float], rows: Sequence[dict[str, Any]], style: Style) -> None:
    y = [row["bleu_mean"] for row in rows]
    spread = [
        [m - min(r["bleu"]) for m, r in zip(y, rows, strict=True)],
        [max(r["bleu"]) - m for m, r in zip(y, rows, strict=True)],
    ]
    colour, marker, dashes = style
    axis.errorbar(
        x,
        y,
        yerr=spread,
        color=colour,
        marker=marker,
        ms=6,
        lw=1.5,
        elinewidth=1,
        capsize=2.5,
        label=rows[0]["label"],
        ls=dashes,
    )


def _sparsity(rows: list[dict[str, Any]], styles: Any, path: Path, report: dict[str, Any]) -> None:
    figure, axes = _figure(1)
    figure.set_size_inches(8.2, 4.8)
    axis = axes[0]
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})
    for row in rows:
        if row["sparsity"] is None:
            axis.axhspan(min(row["bleu"]), max(row["bleu"]), color=GREY, alpha=0.25, lw=0)
            axis.axhline(row["bleu_mean"], color=GREY, lw=1.5, ls="--", label=row["label"])
    for i, (method, style) in enumerate(styles.items()):
        mine = {row["sparsity"]: row for row in rows if row["method"] == method}
        # Side by side within each sparsity, so that no mark hides another.
        shift = 0.6 * ((i + 0.5) / len(styles) - 0.5)
        at = [k for k, s in enumerate(sparsities) if s in mine]
        if at:
            _points(axis, [k + shift for k in at], [mine[sparsities[k]] for k in at], style)
    axis.set_xticks(range(len(sparsities)), [f"{100 * s:g} %" for s in sparsities])
    axis.set_xlim(-0.5, len(sparsities) - 0.5)
    axis.set_xlabel("zeros of the prunable weights")
    _finish(figure, axes, path, report)


def _budget(rows: list[dict[str, Any]], styles: Any, path: Path, report: dict[str, Any]) -> None:
    longer = {row["method"] for row in rows if row["steps_multiple"] != 1}
    sparsities = sorted({r["sparsity"] for r in rows if r["steps_multiple"] != 1 and r["sparsity"] is not None})
    _over(
        [row for row in rows if row["method"] in longer], styles, path, report, sparsities, "steps_multiple",
        "optimizer steps, × the recipe's",
    )  # fmt: skip


def _flops(rows: list[dict[str, Any]], styles: Any, path: Path, report: dict[str, Any]) -> None:
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})
    _over(rows, styles, path, report, sparsities, "training_flops", "training FLOPs, × the recipe's dense run")


def _over(
    rows: list[dict[str, Any]],
    styles: Any,
    path: Path,
    report: dict[str, Any],
    sparsities: Sequence[float],
    key: str,
    label: str,
) -> None:
    """A panel for each sparsity, with dense in all of them."""
    figure, axes = _figure(max(1, len(sparsities)))
    for axis, sparsity in zip(axes, sparsities, strict=False):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method and row["sparsity"] in (None, sparsity)]
            mine.sort(key=lambda row: row[key])
            if mine:
                _points(axis, [row[key] for row in mine], mine, styles.get(method, (GREY, "o", "-")))
        if any(row["steps_multiple"] != 1 for row in rows):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(f"{100 * sparsity:g} % zeros", fontsize=10)
        axis.set_xlabel(label)
    _finish(figure, axes, path, report)
