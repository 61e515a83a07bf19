"""The one error users see: bad input, said in one sentence. No torch."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class GaPError(ValueError):
    """Bad input: names the key or layer, what was found, what was expected and the nearest valid name.

    The command line prints it as one line and exits with code 2.
    """


class NotInstalled(GaPError):
    """A package is missing that only this needs."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause such as ``"; did you mean 'sparsity'?"``, or nothing when none is near."""
    near = difflib.get_close_matches(name, sorted(set(valid)), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The nearest valid name as a clause, or the list of valid names when none is near."""
    names = sorted(set(valid))
    if near := nearest(name, names):
        return near
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"; valid names: {shown}" if names else ""


def first_line(error: BaseException) -> str:
    """Of what an error of another library says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(*modules: str) -> None:
    """Raise a NotInstalled that names the first of `modules` that is not there, and how it is installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise NotInstalled(f"not installed: pip install {module}")
