"""What `GaPConfig.pattern` may be. No torch, but for the pattern that asks what the machine can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from gap_hf.errors import GaPError, did_you_mean


@dataclass(frozen=True)
class Pattern:
    """A parsed `GaPConfig.pattern`.

    `kind` is ``"unstructured"``, ``"n:m"`` (`n` of `m` consecutive inputs kept), ``"block"`` (`rows` outputs
    by `cols` inputs live or die together) or ``"transposable"`` (2 of 4 along rows and columns at once).
    """

    kind: str
    n: int = 0
    m: int = 0
    rows: int = 1
    cols: int = 1

    @property
    def fixed_sparsity(self) -> Fraction | None:
        """The only sparsity an N:M pattern can have, or None where any is possible."""
        return Fraction(self.m - self.n, self.m) if self.kind in ("n:m", "transposable") else None


def parse_pattern(text: str) -> Pattern:
    """Parse ``"unstructured"``, ``"N:M"``, ``"block:RxC"`` or ``"transposable:2:4"``.

    Raises:
        GaPError: if `text` is none of these, or N:M is not 0 < N < M.
    """
    if text == "unstructured":
        return Pattern("unstructured")
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, cols = int(match[1]), int(match[2])
        if rows < 1 or cols < 1:
            raise GaPError(f"gap.pattern: '{text}' has an empty block; expected block:RxC with R and C of at least 1")
        return Pattern("block", rows=rows, cols=cols)
    if match := re.fullmatch(r"(transposable:)?(\d+):(\d+)", text):
        n, m = int(match[2]), int(match[3])
        if not 0 < n < m:
            raise GaPError(f"gap.pattern: '{text}' keeps {n} of every {m} weights; expected N:M with 0 < N < M")
        if match[1] and (n, m) != (2, 4):
            raise GaPError(f"gap.pattern: '{text}' is not supported; the transposable pattern is 'transposable:2:4'")
        return Pattern("transposable" if match[1] else "n:m", n=n, m=m)
    raise GaPError(
        f"gap.pattern: found '{text}', expected 'unstructured', 'N:M' such as '2:4', 'block:RxC' such as "
        f"'block:16x1', 'transposable:2:4' or 'cpu'{did_you_mean(text, ['unstructured', 'block:16x1', 'transposable:2:4', 'cpu'])}"
    )


def cpu_pattern() -> str:
    """Blocks whose outputs fill a vector register of this machine: ``block:16x1`` with AVX-512, else ``block:8x1``.

    Eight also with NEON, whose registers hold four: kernels take no narrower blocks. A run goes on with the pattern that it
    began with, on any machine.
    """
    import torch

    return "block:16x1" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "block:8x1"
