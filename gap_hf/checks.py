"""Checks of single values of `GaPConfig`, each a `GaPError` with the key, what was found and what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from gap_hf.errors import GaPError, nearest


def check_choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in valid:
        raise GaPError(f"gap.{name}: found {value!r}, expected one of {', '.join(valid)}{nearest(str(value), valid)}")


def check_int(name: str, value: Any, *, low: int, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise GaPError(f"gap.{name}: found {value!r}, expected a whole number of at least {low}")
    if value < low:
        raise GaPError(f"gap.{name}: found {value}, expected at least {low}")


def check_number(
    name: str, value: Any, low: float, high: float, *, closed_low: bool = False, closed_high: bool = False
) -> None:
    if value is None:
        return
    lower = f"{'at least' if closed_low else 'above'} {low}"
    bounds = lower if high == math.inf else f"{lower} and {'at most' if closed_high else 'below'} {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise GaPError(f"gap.{name}: found {value!r}, expected a number {bounds}")
    number = float(value)
    if not (low < number < high or (closed_low and number == low) or (closed_high and number == high)):
        raise GaPError(f"gap.{name}: found {value}, expected a number {bounds}")


def to_strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise GaPError(f"gap.{name}: found {value!r}, expected a list of strings")
    return tuple(value)


def to_overrides(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping | Sequence) or isinstance(value, str):
        raise GaPError(f"gap.overrides: found {value!r}, expected a mapping of glob to sparsity")
    pairs = list(value.items()) if isinstance(value, Mapping) else list(value)
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str):
            raise GaPError(f"gap.overrides: found {pair!r}, expected a glob and its sparsity")
        if pair[0] in (earlier[0] for earlier in pairs[:i]):
            raise GaPError(f"gap.overrides['{pair[0]}']: given twice; expected each glob once, the first match counts")
        check_number(f"overrides['{pair[0]}']", 0.0 if pair[1] is None else pair[1], 0, 1, closed_low=True)
        if pair[1] is None:
            raise GaPError(f"gap.overrides['{pair[0]}']: no sparsity given; expected a number from 0 to below 1")
    return tuple((pattern, sparsity) for pattern, sparsity in pairs)


def to_partition(value: Any, num_partitions: int, valid: tuple[str, ...]) -> str | tuple[tuple[str, ...], ...]:
    if isinstance(value, str):
        check_choice("partition", value, valid)
        return value
    if not isinstance(value, Sequence) or not value:
        raise GaPError(
            f"gap.partition: found {value!r}, expected one of {', '.join(valid)} or a list of lists of globs"
        )
    groups = tuple(to_strings(f"partition[{i}]", group) for i, group in enumerate(value))
    if len(groups) != num_partitions:
        raise GaPError(f"gap.partition: lists {len(groups)} groups, but num_partitions is {num_partitions}")
    return groups
