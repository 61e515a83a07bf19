"""What a mask change does to the optimizer: moments, Adam's step count, second copies of weights.

Works on any `torch.optim.Optimizer`, bare or wrapped by Accelerate, by the names torch's own optimizers use. State of a
sharded parameter is sharded as it is, and masks are of the part that lies here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gap_hf.shards import exchange, local, part_of, total_counts

if TYPE_CHECKING:
    from gap_hf.masks import Masks

# Copies of the weights themselves, not moments: schedule-free optimizers step on `z`.
WEIGHT_COPIES = ("z",)
# Schedule-free optimizers count in the group. Moments of 0 under an old `k` would make the first update up to
# 1 / sqrt(1 - b2) learning rates long, and the average would go on from weights that no longer count.
_SCHEDULE_FREE_COUNTS = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's wrapper, if there is one."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class OwnState(ABC):
    """Stands for an optimizer whose state does not lie parameter by parameter, as large as these; see `gap_hf.zero` and
    `gap_hf.live_state`.

    """

    @abstractmethod
    def sync(self) -> None:
        """After masks were loaded."""

    @abstractmethod
    def follow_growth(self, param: nn.Parameter, mask: Tensor, policy: str) -> None:
        """As the function of this name."""

    @abstractmethod
    def follow_mask(self, param: nn.Parameter, mask: Tensor, policy: str) -> None:
        """As the function of this name."""

    @abstractmethod
    def follow_restart(self, policy: str) -> None:
        """As the function of this name."""

    def mask_weights(self, masks: Masks) -> None:
        """As the function of this name."""
        masks.apply_to_weights()

    @abstractmethod
    def mask_weight_copies(self, sparse: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """As the function of this name."""


def weight_copies(optimizer: Optimizer, param: nn.Parameter) -> list[Tensor]:
    """Second copies of a parameter that the optimizer keeps; they obey the mask as the parameter does."""
    state = optimizer.state.get(param, {})
    return [local(state[key]) for key in WEIGHT_COPIES if key in state]


def follow_growth(optimizer: Any, param: nn.Parameter, mask: Tensor, policy: str) -> None:
    """After weights were grown that `mask` had at 0; `policy` is `GaPConfig.optimizer_reset`, and there may be no optimizer."""
    if isinstance(optimizer, OwnState):
        optimizer.follow_growth(param, mask, policy)
    elif optimizer is not None and policy != "none":
        clear_grown(unwrap(optimizer), param, mask)


def follow_mask(optimizer: Any, param: nn.Parameter, mask: Tensor, policy: str) -> None:
    """After a parameter was given a mask."""
    if isinstance(optimizer, OwnState):
        optimizer.follow_mask(param, mask, policy)
        return
    if optimizer is not None and policy != "none":
        clear_pruned(unwrap(optimizer), param, mask)
    mask_weight_copies(optimizer, [(param, mask)])


def mask_weights(optimizer: Any, masks: Masks) -> None:
    """Zero masked weights after a step; of an optimizer that never touches them, where somebody else has written."""
    if isinstance(optimizer, OwnState):
        optimizer.mask_weights(masks)
    else:
        masks.apply_to_weights()


def follow_restart(optimizer: Any, policy: str) -> None:
    """Where a phase begins."""
    if isinstance(optimizer, OwnState):
        optimizer.follow_restart(policy)
    elif optimizer is not None and policy == "all":
        reset_all(unwrap(optimizer))


@torch.no_grad()
def mask_weight_copies(optimizer: Any, sparse: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Zero masked weights in the optimizer's own copies of them."""
    if isinstance(optimizer, OwnState):
        optimizer.mask_weight_copies(sparse)
        return
    for param, mask in sparse if optimizer is not None else ():
        for copy in weight_copies(unwrap(optimizer), param):
            copy.mul_(mask)


@torch.no_grad()
def reset_all(optimizer: Optimizer) -> None:
    """Forget every moment and step count of every parameter, as the authors do at each phase change."""
    if isinstance(optimizer, torch.optim.Adagrad):
        # Before torch 2.12 or so its state is made with the optimizer, and a missing one is not made again.
        for group in optimizer.param_groups:
            for param in group["params"]:
                if state := optimizer.state.get(param):
                    state["step"].zero_()
                    state["sum"].fill_(group["initial_accumulator_value"])
        return
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for key, first in _SCHEDULE_FREE_COUNTS.items():
            if key in group:
                group[key] = first


@torch.no_grad()
def clear_pruned(optimizer: Optimizer, param: nn.Parameter, mask: Tensor) -> None:
    """Zero the moments of weights that were pruned (mask 0); survivors keep theirs and the count goes on."""
    for value in _elementwise(optimizer.state.get(param, {}), param):
        value.masked_fill_(mask == 0, 0)


@torch.no_grad()
def clear_grown(optimizer: Optimizer, param: nn.Parameter, mask: Tensor) -> None:
    """Zero the moments of weights that were grown (old mask 0) and restart the tensor's Adam count at 1.

    With a moment of 0 under an old count t, Adam's bias corrections are 1 and the first update of a grown weight is
    (1 - b1) / sqrt(1 - b2) learning rates long: 3.2 at b2 = 0.999, then up to 6.5. So the count restarts at 1 and
    the survivors' moments are rescaled by (1 - b) / (1 - b^t), which leaves their bias-corrected values as they
    were. A grown weight's updates are then at most 1.3 % longer than a fresh Adam's (the first is 0.74 of it).

    That is for torch's Adam and AdamW (amsgrad too). Other counts mean other things: RAdam's early steps are not
    normalised, schedule-free counts for the whole group. With them a grown weight's second moment starts from the
    mean of its tensor's survivors. State that is not plain floating-point (8-bit optimizers) cannot be edited by
    entry: the tensor's whole state is forgotten, and the optimizer makes it anew. On all ranks.
    """
    state = optimizer.state.get(param)
    if not state:
        return
    if any(_is_packed(value, param) for value in state.values()):
        del optimizer.state[param]
        return
    grown = mask == 0
    for value in _elementwise(state, param):
        value.masked_fill_(grown, 0)
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        second = state.get("exp_avg_sq")
        if isinstance(second, Tensor) and second.shape == param.shape:
            part = part_of(param, "optimizer state")
            total = math.fsum(exchange([float(local(second).sum())], [part])[0])
            if survivors := total_counts([int(mask.sum())], [part])[0]:
                local(second).masked_fill_(grown, total / survivors)
        return
    count = float(state["step"])
    if count <= 1:
        return
    beta1, beta2 = (float(b) for b in _group_of(optimizer, param)["betas"])
    local(state["exp_avg"]).mul_((1 - beta1) / (1 - beta1**count))
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        if key in state:
            local(state[key]).mul_((1 - beta2) / (1 - beta2**count))
    if isinstance(state["step"], Tensor):
        state["step"].fill_(1)
    else:
        state["step"] = 1


def _elementwise(state: dict[str, Any], param: nn.Parameter) -> list[Tensor]:
    """State with one entry per weight, what lies here of it. Factored state (Adafactor's rows and columns) has none to clear.

    Weight copies are among them on purpose: a pruned or grown weight restarts at 0 in them too.
    """
    return [
        local(value)
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == param.shape and value.ndim > 0 and not _is_packed(value, param)
    ]


def _is_packed(value: Any, param: nn.Parameter) -> bool:
    """True for quantised moments: bitsandbytes' codes are uint8 of the parameter's shape, torchao's a subclass."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    part = local(value)
    return type(part) is not Tensor or (value.shape == param.shape and not part.is_floating_point())


def _group_of(optimizer: Optimizer, param: nn.Parameter) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(p is param for p in group["params"]):
            return group
    raise ValueError("the parameter is not in any of the optimizer's groups")
