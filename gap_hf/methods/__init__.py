"""One file per method. A method says when each group is pruned and grown; adding one means adding a file.

A method module has:

- ``PER_TENSOR``: True if its groups are single tensors, False if they are the partition's groups;
- ``build_phases(config, *, num_groups, total_steps, steps_per_epoch, seed)``: its phases, the fine-tune last.

`gap_hf.config.METHODS` lists the files of this folder, so a new one needs no registration.
"""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Protocol, cast

from gap_hf.config import GaPConfig
from gap_hf.phases import Phase


class Method(Protocol):
    """What a module of this folder provides."""

    PER_TENSOR: bool

    def build_phases(
        self,
        config: GaPConfig,
        *,
        num_groups: int,
        total_steps: int,
        steps_per_epoch: Fraction | None,
        seed: int,
    ) -> tuple[Phase, ...]: ...


def get_method(name: str) -> Method:
    """The module of a method by its name in `GaPConfig.method` (already validated there)."""
    return cast(Method, importlib.import_module(f"gap_hf.methods.{name}"))
