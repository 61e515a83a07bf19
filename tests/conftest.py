"""Set before anything else is imported: tests never reach for the network, and one thread makes runs repeatable."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run, and no time limit for one of them: machines differ and are shared.
settings.register_profile("gap_hf", deadline=None, derandomize=True)
settings.load_profile("gap_hf")
