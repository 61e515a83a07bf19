"""A report as text and as a plot."""

from __future__ import annotations

from pathlib import Path

from gap_hf.bench.results import LAYERS, Cell, Report, Row, verdict
from gap_hf.bench.rivals import BASE, OURS
from gap_hf.tables import new_figure, save_figure, text_table

_COLORS = ("#999999", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#F0E442", "#009E73", "#D55E00")


def as_text(report: Report) -> str:
    """Tables of layers, whole models, outputs and time; what could not run; a sentence for each comparison."""
    versions = ", ".join(f"{name} {version}" for name, version in report.machine["versions"].items() if version)
    lines = [
        f"{report.model}: {report.task}, {report.sparse_layers} sparse layers",
        f"{report.machine['processor']}, {report.machine['cores']} cores, {report.machine['vectors']}; {versions}",
        *([f"everything runs on this CPU; {gpu} takes no part"] if (gpu := report.machine.get("unused_gpu")) else []),
        "",
    ]
    layers = [cell for cell in report.shown() if cell.level == LAYERS]
    whole = [cell for cell in report.shown() if cell.level != LAYERS]
    if layers:
        head = ("tokens", "threads", "all sparse layers", "ms", "95 %", "shortest", f"against {BASE}", "ours is")
        rows = [[str(c.batch), str(c.threads), r.rival, *_times(r), *_ratios(r)] for c in layers for r in c.rows]
        lines += [text_table(head, rows, left=3), ""]
    head = (
        "batch",
        "beams",
        "threads",
        "rival",
        "ms",
        "95 %",
        "shortest",
        "first token",
        "each after",
        f"against {BASE}",
        "ours is",
    )
    rows = [_whole(cell, row) for cell in whole for row in cell.rows]
    lines += [text_table(head, rows, left=4), ""]
    if report.agreement:
        head = ("output", "beams", "equal tokens", "logits off by at most")
        compared = [
            [
                a.rival,
                str(a.beams),
                "" if a.tokens is None else f"{a.tokens:.1%}",
                "" if a.logits is None else f"{a.logits:.1e}",
            ]
            for a in report.agreement
        ]
        lines += [text_table(head, compared), f"against {BASE}; logits of the same tokens, relative to the largest", ""]
    for name, parts in report.profile.items():
        head = (f"time of one generate: {name}", "ms", "share", "calls")
        shown = [[part.name, f"{part.ms:.1f}", f"{part.share:.1%}", f"{part.calls:,}"] for part in parts]
        lines += [text_table(head, shown), ""]
    lines += [f"{name}: {why}" for name, why in report.missing.items()]
    lines += [f"{name}, {cell.what}: {why}" for cell in whole for name, why in cell.left_out.items()]
    return "\n".join([*lines, *(verdict(cell, report.agreement) for cell in report.shown())])


def _times(row: Row) -> list[str]:
    return [_ms(row.ms.median), f"{_ms(row.ms.low)}–{_ms(row.ms.high)}", _ms(row.shortest_ms)]


def _ms(value: float) -> str:
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
    )


def _ratios(row: Row) -> list[str]:
    ours = "" if row.ours is None else f"{row.ours.median:.2f} × ({row.ours.low:.2f}–{row.ours.high:.2f})"
    return [f"{row.speed.median:.2f} ×", ours]


def _whole(cell: Cell, row: Row) -> list[str]:
    first, each = ("" if ms is None else _ms(ms) for ms in (row.first_ms, row.token_ms))
    return [
        str(cell.batch),
        str(cell.beams),
        str(cell.threads),
        row.rival,
        *_times(row),
        first,
        each,
        *_ratios(row),
    ]


def plot(report: Report, path: Path) -> None:
    """Bars of speed against torch fp32, a panel for layers and one for whole models, a group for each cell.

    Raises:
        GaPError: if matplotlib is not installed or cannot write such a file.
    """
    panels = [
        (title, cells)
        for title, cells in (
            ("sparse layers alone", [c for c in report.shown() if c.level == LAYERS]),
            ("whole model", [c for c in report.shown() if c.level != LAYERS]),
        )
        if cells
    ]
    names = list(dict.fromkeys(row.rival for _, cells in panels for cell in cells for row in cell.rows))
    height = sum(0.5 + 0.17 * sum(len(cell.rows) + 1 for cell in cells) for _, cells in panels)
    figure = new_figure(8, 1.2 + height)
    axes = figure.subplots(
        len(panels), squeeze=False, height_ratios=[sum(len(c.rows) + 1 for c in cells) for _, cells in panels]
    )
    for axis, (title, cells) in zip(axes[:, 0], panels, strict=True):
        place, ticks = 0.0, []
        for cell in cells:
            start = place
            for row in cell.rows:
                color = "#D55E00" if row.rival == OURS else _COLORS[names.index(row.rival) % (len(_COLORS) - 1)]
                error = [[row.speed.median - row.speed.low], [row.speed.high - row.speed.median]]
                label = row.rival if cell is cells[0] else None
                axis.barh(place, row.speed.median, xerr=error, color=color, height=0.85, label=label, ecolor="#333333")
                place += 1
            ticks.append(((start + place - 1) / 2, cell.what.removeprefix("sparse layers, ")))
            place += 1
        axis.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="#333333", lw=0.8)
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(f"times as fast as {BASE}, with the 95 % interval of the median", fontsize=8)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(figure, path)
