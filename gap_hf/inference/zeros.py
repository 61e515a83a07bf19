"""Which structure the zeros of a weight have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Sizes that are looked for, the largest first; a kernel takes 32, 16 or 8 outputs at a time.
BLOCK_ROWS = (128, 64, 32, 16, 8)
N_OF_M = ((1, 4), (2, 4), (4, 8))


@dataclass(frozen=True)
class Structure:
    """What the zeros of an (N, K) weight hold to.

    Attributes:
        pattern: ``block:RxC`` with C = 1, ``N:M`` or ``unstructured``, as in `GaPConfig.pattern`.
        rows: R, 1 where there are no blocks.
        density: Live weights by all weights.
    """

    pattern: str
    rows: int
    density: float


def structure_of(live: Tensor) -> Structure:
    """Structure of an (N, K) bool matrix, True is live. Blocks go before N:M, which any sparse enough matrix may hold to."""
    num_out, num_in = live.shape
    density = int(torch.count_nonzero(live)) / max(1, live.numel())
    for rows in BLOCK_ROWS:
        if num_out % rows == 0:
            blocks = live.view(num_out // rows, rows, num_in)
            # The first block row tells most matrices that hold to nothing, and soon.
            if all(bool((part == part[:, :1]).all()) for part in (blocks[:1], blocks)):
                return Structure(f"block:{rows}x1", rows, density)
    for n, m in N_OF_M:
        if num_in % m == 0 and int(live.view(num_out, num_in // m, m).sum(dim=2).max()) <= n:
            return Structure(f"{n}:{m}", 1, density)
    return Structure("unstructured", 1, density)
