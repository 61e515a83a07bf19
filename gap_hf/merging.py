"""Where each parameter and buffer of a P-GaP merge comes from. Exactly one place for every one of them.

- A prunable weight: the worker that had its group dense.
- Another parameter or buffer of a module that holds a prunable weight (a bias): that weight's worker.
- One of a block whose prunable weights are all of one group (norms, with their running statistics): that group's worker.
- All else (embeddings, final norms, heads, blocks cut by the partition): the mean over the workers; if it is not trained or
  not floating-point, and so has no mean, the first worker.

The optimizer's state goes with its parameter. (The authors' merge left parameters out, and reset the final norms.)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gap_hf.partition import Group
from gap_hf.targets import Targets, clean_name


def merge_rules(model: nn.Module, targets: Targets, groups: Sequence[Group]) -> dict[str, int | None]:
    """Number of the worker that each parameter and buffer comes from, or None for the mean over all.

    Tied parameters are there once, by their first name.
    """
    group_of = {name: i for i, group in enumerate(groups) for name in group.names}
    of_module: dict[str, set[int]] = {}
    of_block: dict[str, set[int]] = {}
    for weight in targets.weights:
        of_module.setdefault(_module_of(weight.name), set()).add(group_of[weight.name])
        of_block.setdefault(weight.block, set()).add(group_of[weight.name])

    def owner(name: str) -> int | None:
        blocks = [block for block in of_block if name.startswith(f"{block}.")]
        found = of_module.get(_module_of(name)) or of_block.get(max(blocks, key=len, default=""), set())
        return next(iter(found)) if len(found) == 1 else None

    rules: dict[str, int | None] = {}
    for raw, param in model.named_parameters():
        name = clean_name(raw)
        rules[name] = group_of.get(name, owner(name))
        if rules[name] is None and not param.requires_grad:
            rules[name] = 0
    for raw, buffer in model.named_buffers():
        name = clean_name(raw)
        rules[name] = owner(name)
        if rules[name] is None and not buffer.is_floating_point():
            rules[name] = 0
    return rules


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
