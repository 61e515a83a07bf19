"""Sparse Hugging Face transformers by scheduled grow-and-prune (GaP).

Names are imported when they are used, so that what needs no torch (``gap-hf inspect``) does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gap_hf.after_import import import_after

if TYPE_CHECKING:
    from gap_hf.config import GaPConfig
    from gap_hf.errors import GaPError
    from gap_hf.inference.optimize import inference_report, optimize_for_inference, restore
    from gap_hf.partition import make_partition
    from gap_hf.plan import Plan, make_plan
    from gap_hf.recorded import load_masks
    from gap_hf.saving import save_pretrained
    from gap_hf.sparse_layers import sparse_compute
    from gap_hf.sparsifier import Sparsifier
    from gap_hf.targets import find_targets
    from gap_hf.trainer import GaPMixin, GaPSeq2SeqTrainer, GaPTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "GaPConfig",
    "GaPError",
    "GaPMixin",
    "GaPSeq2SeqTrainer",
    "GaPTrainer",
    "Plan",
    "Sparsifier",
    "find_targets",
    "inference_report",
    "load_masks",
    "make_partition",
    "make_plan",
    "optimize_for_inference",
    "restore",
    "save_pretrained",
    "sparse_compute",
]

_HOMES = {
    "GaPConfig": "config",
    "GaPError": "errors",
    "GaPMixin": "trainer",
    "GaPSeq2SeqTrainer": "trainer",
    "GaPTrainer": "trainer",
    "Plan": "plan",
    "Sparsifier": "sparsifier",
    "find_targets": "targets",
    "inference_report": "inference.optimize",
    "load_masks": "recorded",
    "make_partition": "partition",
    "make_plan": "plan",
    "optimize_for_inference": "inference.optimize",
    "restore": "inference.optimize",
    "save_pretrained": "saving",
    "sparse_compute": "sparse_layers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gap_hf' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"gap_hf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# With this `import gap_hf` is all that a packed model needs, whichever of the two libraries is imported first.
import_after("transformers.modeling_utils", "gap_hf.packed.loading")
