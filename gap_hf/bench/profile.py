"""Where the time of `generate` goes: in sparse layers, the output layer, attention, or Python around them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gap_hf.bench.results import Part
from gap_hf.bench.subject import SPARSE
from gap_hf.inference.decoding import DecodesExported, modules_of_step

SPARSE_LAYERS = "sparse layers"
OUTPUT_LAYER = "output layer"
DENSE_LAYERS = "other linear layers"
SMALL = "norms, embeddings, activations"
ATTENTION = "attention between its layers"
PYTHON = "transformers' modules, outside of those in them"
LOOP = "generate, outside of the model"
EXPORTED = "decoder, its steps exported"
_RUNS = 5


def where_time_goes(model: nn.Module, original: nn.Module, call: Callable[[], Any]) -> list[Part]:
    """Time that each kind of module takes itself, without the modules in it, in the fastest of a few calls. A decoder whose steps
    are exported is one kind: with hooks in it, its modules would run.

    Args:
        model: Runs in `call`.
        original: The same before it was optimised, whose zeros tell which layers are sparse.
        call: Generates once.

    Returns:
        Largest first; their sum is the call's time, a few microseconds for each module's two hooks included.
    """
    kinds = _kinds(model, original)
    best: list[Part] = []
    for _ in range(_RUNS):
        clock = _Clock()
        handles = [
            handle
            for name, module in model.named_modules()
            if name in kinds
            for handle in (
                module.register_forward_pre_hook(lambda m, a, kind=kinds[name], clock=clock: clock.enter(kind)),
                module.register_forward_hook(lambda m, a, o, clock=clock: clock.leave()),
            )
        ]
        try:
            clock.enter(LOOP)
            call()
            clock.leave()
        finally:
            for handle in handles:
                handle.remove()
        total = sum(clock.seconds.values())
        parts = [Part(k, 1e3 * s, s / total, clock.calls[k]) for k, s in clock.seconds.items()]
        if not best or total < sum(part.ms for part in best) / 1e3:
            best = sorted(parts, key=lambda part: -part.ms)
    return best


class _Clock:
    """Seconds by kind, of what is on top of a stack of modules that are running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.stack: list[str] = []
        self.since = 0.0

    def enter(self, kind: str) -> None:
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.calls[kind] += 1
        self.stack.append(kind)
        self.since = time.perf_counter()

    def leave(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stack.pop()] += now - self.since
        self.since = time.perf_counter()


def _kinds(model: Any, original: Any) -> dict[str, str]:
    """What each module counts as, by name; what is inside a sparse layer counts as it."""
    before = dict(original.named_modules())
    output = original.get_output_embeddings()
    of_step = set(modules_of_step(model)) if issubclass(type(model), DecodesExported) else set()
    kinds: dict[str, str] = {}
    opaque: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if opaque and name.startswith(opaque):
            continue
        if module in of_step:
            if module is model:
                kinds[name] = EXPORTED
            continue
        was = before.get(name)
        if was is not None and was is output:
            kinds[name] = OUTPUT_LAYER
        elif isinstance(was, nn.Linear | Conv1D):
            sparse = float((was.weight == 0).float().mean()) >= SPARSE
            kinds[name] = SPARSE_LAYERS if sparse else DENSE_LAYERS
        elif "attention" in type(module).__name__.lower():
            kinds[name] = ATTENTION
        else:
            kinds[name] = PYTHON if any(True for _ in module.children()) else SMALL
        if kinds[name] in (OUTPUT_LAYER, SPARSE_LAYERS, DENSE_LAYERS):
            opaque = (*opaque, f"{name}.")
    return kinds
