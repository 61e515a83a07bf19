"""What was measured: cells of rivals timed in the same turns, and what is concluded from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gap_hf.bench.rivals import BASE, OURS
from gap_hf.bench.timing import Ratio, ratio, spread

LAYERS, FORWARD, GENERATE = "layers", "forward", "generate"
# A rival that gives fewer of torch fp32's tokens than this is named with its share.
_SAME = 0.99


@dataclass(frozen=True)
class Agreement:
    """How a rival's output compares with torch fp32's.

    `tokens` is the share of equal tokens (or classes), place by place; `logits` the largest difference of logits for the same
    tokens, relative to the largest logit. None where there is nothing to compare.
    """

    beams: int
    rival: str
    tokens: float | None
    logits: float | None


@dataclass(frozen=True)
class Row:
    """One rival in one cell. Times in milliseconds: of a call, the shortest of them (of use where other programs run), of
    generating its first token, of each token after it.
    """

    rival: str
    ms: Ratio
    shortest_ms: float
    first_ms: float | None
    token_ms: float | None
    speed: Ratio  # how many times as fast as torch fp32
    ours: Ratio | None  # how many times as fast as this one ours is


@dataclass(frozen=True)
class Cell:
    """Rivals that were timed in turns: `batch` rows (of layers: tokens), `shape` of layers, None for all of them in sum."""

    level: str
    batch: int
    beams: int
    threads: int
    shape: str | None
    rows: tuple[Row, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """Of the measurement, for a sentence."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.level == LAYERS:
            return f"sparse layers, {self.batch} token{'s' if self.batch > 1 else ''}, {threads}"
        search = "" if self.level == FORWARD else "greedy, " if self.beams == 1 else f"{self.beams} beams, "
        return f"batch {self.batch}, {search}{threads}"


@dataclass(frozen=True)
class Part:
    """A share of a run's time."""

    name: str
    ms: float
    share: float
    calls: int


@dataclass(frozen=True)
class Report:
    """All of it; `machine` and `settings` as they were."""

    model: str
    task: str
    sparse_layers: int
    machine: dict[str, Any]
    settings: dict[str, Any]
    missing: dict[str, str]
    agreement: tuple[Agreement, ...]
    cells: tuple[Cell, ...]
    profile: dict[str, tuple[Part, ...]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": [verdict(cell, self.agreement) for cell in self.shown()]}

    def shown(self) -> list[Cell]:
        """Cells that are concluded from: all but those of one shape of layers."""
        return [cell for cell in self.cells if cell.shape is None]


def make_cell(
    level: str,
    batch: int,
    beams: int,
    threads: int,
    times: dict[str, list[float]],
    *,
    first: dict[str, list[float]] | None = None,
    tokens: int = 1,
    shape: str | None = None,
    left_out: dict[str, str] | None = None,
) -> Cell:
    """A cell of seconds by rival, of the same turns; `first` of calls that gave one token of `tokens`."""
    rows = []
    for name, seconds in times.items():
        start = [] if first is None else first[name]
        steps = (
            [(whole - part) / (tokens - 1) for whole, part in zip(seconds, start, strict=False)] if tokens > 1 else []
        )
        rows.append(
            Row(
                rival=name,
                ms=_scaled(spread(seconds)),
                shortest_ms=1e3 * min(seconds),
                first_ms=1e3 * spread(start).median if start else None,
                token_ms=1e3 * spread(steps).median if steps else None,
                speed=ratio(times[BASE], seconds),
                ours=ratio(seconds, times[OURS]) if OURS in times and name != OURS else None,
            )
        )
    return Cell(level, batch, beams, threads, shape, tuple(rows), left_out or {})


def _scaled(seconds: Ratio) -> Ratio:
    return Ratio(1e3 * seconds.median, 1e3 * seconds.low, 1e3 * seconds.high)


def best_dense(cell: Cell) -> Row | None:
    """The fastest rival of ours."""
    return min((row for row in cell.rows if row.rival != OURS), key=lambda row: row.ms.median, default=None)


def verdict(cell: Cell, agreement: Sequence[Agreement] = ()) -> str:
    """Whether ours is faster than the best dense alternative, in a sentence."""
    best = best_dense(cell)
    if best is None or best.ours is None:
        return f"{cell.what}: ours was not timed"
    shares = [a.tokens for a in agreement if a.rival == best.rival and a.beams == cell.beams and a.tokens is not None]
    name = best.rival
    if cell.level != LAYERS and shares and shares[0] < _SAME:
        name += f" (which gives {shares[0]:.0%} of torch fp32's tokens)"
    r = best.ours
    if r.low > 1:
        return (
            f"{cell.what}: ours is {r.median:.2f} × as fast as the best dense alternative, {name} (95 %: {r.low:.2f}–{r.high:.2f}), "
            f"{_speed_of_ours(cell):.2f} × as fast as {BASE}"
        )
    if r.high < 1:
        return (
            f"{cell.what}: no gain: the best dense alternative, {name}, is {1 / r.median:.2f} × as fast as ours "
            f"(95 %: {1 / r.high:.2f}–{1 / r.low:.2f}), which is {_speed_of_ours(cell):.2f} × as fast as {BASE}"
        )
    return (
        f"{cell.what}: no gain that can be told: ours is {r.median:.2f} × as fast as the best dense alternative, {name} "
        f"(95 %: {r.low:.2f}–{r.high:.2f})"
    )


def _speed_of_ours(cell: Cell) -> float:
    return next(row.speed.median for row in cell.rows if row.rival == OURS)
