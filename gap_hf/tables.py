"""Tables as text, and bars of shares, for what a command prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gap_hf.errors import GaPError

_MOST_BARS = 60


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns as wide as they need be; the first `left` of them to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def show(line: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([show(lines[0]), rule, *map(show, lines[1:])])


def size_text(size: float) -> str:
    """Bytes with a decimal unit, as files are listed on the Hub."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def time_text(seconds: float) -> str:
    """A duration in the two units that say it best."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def plot_bars(names: Sequence[str], shares: Sequence[float], path: Path, *, label: str) -> None:
    """A bar for each name, in order from the top, from 0 to 100 %. Of more than 60 names, only some are written.

    Raises:
        GaPError: if matplotlib is not installed or cannot write such a file.
    """
    every = -(-len(names) // _MOST_BARS)
    figure = new_figure(9, 1.3 + 0.22 * min(_MOST_BARS, max(4, len(names))))
    axis = figure.subplots()
    axis.barh(range(len(names)), [100 * share for share in shares], color="#0072B2", height=0.7)
    for place, share in enumerate(shares if every <= 1 else ()):
        axis.annotate(
            f"{share:.1%}", (100 * share, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axis.set_yticks(range(0, len(names), max(1, every)), names[:: max(1, every)], fontsize=7, family="monospace")
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 110)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel(label)
    axis.grid(axis="x", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches; its own and not pyplot's: no window, no global state.

    Raises:
        GaPError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GaPError("plots need matplotlib; install it with: pip install 'gap_hf[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_plot(path: Path) -> None:
    """Before minutes of work whose figures are to be drawn there.

    Raises:
        GaPError: if matplotlib is not installed or does not know the suffix.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if (suffix := path.suffix[1:].lower()) not in known:
        raise GaPError(f"{path}: found the suffix '{suffix}', expected one of {', '.join(sorted(known))}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the suffix sets the format.

    Raises:
        GaPError: if matplotlib cannot write such a file.
    """
    try:
        figure.savefig(path, dpi=130)
    except (ValueError, OSError) as error:
        raise GaPError(f"{path}: the plot cannot be written: {error}") from None
