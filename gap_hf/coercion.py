"""Values from YAML as the types that a dataclass annotates, or an error that says which was expected."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gap_hf.errors import GaPError, nearest


def number(value: Any) -> Any:
    """A float from a string that reads as one (5e-4 is a string in YAML 1.1), else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def coerce(name: str, value: Any, hint: Any, folder: Path) -> Any:
    """`value` as the annotation `hint` wants it, or a GaPError that says what was expected."""
    options = _options(hint)
    if value is None:
        if type(None) in options:
            return None
        raise GaPError(f"{name}: found nothing, expected {describe(hint)}")
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return _choice(name, value, [str(member.value) for member in option])
        if typing.get_origin(option) is typing.Literal:
            return _choice(name, value, list(typing.get_args(option)))
    if set(options) >= {str, Path} and isinstance(value, str):
        return folder / value if value and (folder / value).exists() else value
    for option in options:
        ok, result = _as_type(name, value, option, folder)
        if ok:
            return result
    raise GaPError(f"{name}: found {show(value)}, expected {describe(hint)}")


def _as_type(name: str, value: Any, option: Any, folder: Path) -> tuple[bool, Any]:
    origin = typing.get_origin(option) or option
    if origin is bool:
        return isinstance(value, bool), value
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is float:
        found = number(value)
        # Whole numbers stay int: in TrainingArguments 100 steps and 100.0 are not always the same.
        return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found), found
    if origin is str:
        return isinstance(value, str), value
    if origin is Path:
        return isinstance(value, str | Path) and bool(str(value)), folder / value if isinstance(value, str) else value
    if origin in (list, tuple) and isinstance(value, list):
        inner = (typing.get_args(option) or (Any,))[0]
        items = [coerce(f"{name}[{i}]", item, inner, folder) for i, item in enumerate(value)]
        return True, tuple(items) if origin is tuple else items
    if origin is dict:
        inner = (typing.get_args(option) or (Any, Any))[1]
        if not isinstance(value, Mapping):
            return False, None
        return True, {str(k): coerce(f"{name}.{k}", v, inner, folder) for k, v in value.items()}
    return origin is Any, value


def _choice(name: str, value: Any, valid: list[Any]) -> Any:
    if value is False and "no" in valid:
        return "no"  # a bare `no` is false in YAML 1.1
    if value not in valid:
        shown = ", ".join(str(v) for v in valid)
        hint = nearest(str(value), [str(v) for v in valid])
        raise GaPError(f"{name}: found {show(value)}, expected one of {shown}{hint}")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (type(None), Any) if hint is Any else (hint,)


def describe(hint: Any) -> str:
    words: list[str] = []
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        word = {
            bool: "true or false",
            int: "a whole number",
            float: "a finite number",
            str: "a string",
            Path: "a path",
            list: "a list",
            tuple: "a list",
            dict: "a mapping",
        }.get(origin)
        if word and word not in words:
            words.append(word)
    return " or ".join(words) or "another value"


def show(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


def one_line(error: object) -> str:
    """The text of an error from a library, on one line."""
    return " ".join(str(error).split())


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value
