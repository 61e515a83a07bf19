"""Timing calls in turns, and ratios of calls of the same turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

_RESAMPLES = 2000
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """The median ratio of paired times, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def in_turns(calls: Mapping[_Key, Callable[[], Any]], repeats: int, *, burst: float = 0.0) -> dict[_Key, list[float]]:
    """Seconds of every call, `repeats` times, one round after the other; the first of a round moves on each time.

    Args:
        calls: To be timed, warm already.
        burst: At least so many seconds are timed at a time, if a call takes less: its time is then their mean.
    """
    names = list(calls)
    counts = dict.fromkeys(names, 1)
    if burst:
        for name in names:
            counts[name] = max(1, round(burst / max(1e-7, _seconds(calls[name], 3))))
    times: dict[_Key, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            if burst:
                calls[name]()  # the others have been in the caches
            times[name].append(_seconds(calls[name], counts[name]))
    return times


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """How many times as long the first took as the second in the same turn."""
    return spread(np.asarray(first) / np.asarray(second))


def spread(values: np.ndarray | Sequence[float]) -> Ratio:
    """The median of some figures and its 95 % bootstrap interval."""
    array = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).choice(array, size=(_RESAMPLES, len(array)))
    low, high = np.percentile(np.median(chosen, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(array)), float(low), float(high))
