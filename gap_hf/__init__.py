"""Sparse Hugging Face transformers by scheduled grow-and-prune (GaP)."""

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.partition import make_partition
from gap_hf.plan import Plan, make_plan
from gap_hf.recorded import load_masks
from gap_hf.saving import save_pretrained
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
    "load_masks",
    "make_partition",
    "make_plan",
    "save_pretrained",
]
