"""One file per method. A method says when which groups are pruned and grown; adding one means adding a file.

A method module has:

- ``GROUPS``: what its updates count: ``"partition"`` (the groups of the partition), ``"tensor"`` (each tensor by
  itself) or ``"all"`` (one group of everything);
- ``USES``: the keys of `SCHEDULE_KEYS` that it follows; a config that sets another is refused;
- ``build(config, run)``: its `Schedule` over the steps of a run, the fine-tune last.

`gap_hf.config.METHODS` lists the files of this folder, so a new one needs no registration.
"""

from __future__ import annotations

import importlib
from collections.abc import Set
from typing import Protocol, cast

from gap_hf.config import SCHEDULE_KEYS, GaPConfig
from gap_hf.errors import GaPError
from gap_hf.phases import Run, Schedule


class Method(Protocol):
    """What a module of this folder provides."""

    GROUPS: str
    USES: Set[str]

    def build(self, config: GaPConfig, run: Run) -> Schedule: ...


def get_method(name: str) -> Method:
    """The module of a method by its name in `GaPConfig.method` (already validated there)."""
    return cast(Method, importlib.import_module(f"gap_hf.methods.{name}"))


def check_uses(config: GaPConfig) -> None:
    """Refuse a config that sets what its method does not follow.

    Raises:
        GaPError: naming the key and what the method does follow.
    """
    uses = get_method(config.method).USES
    for key in SCHEDULE_KEYS:
        if getattr(config, key) is not None and key not in uses:
            raise GaPError(
                f"gap.{key}: found {getattr(config, key)!r}, but method '{config.method}' does not use it; expected it "
                f"left out (the method uses {', '.join(sorted(uses)) or 'no schedule keys'})"
            )
