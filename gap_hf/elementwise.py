"""Which optimizers update each weight by itself, so that they may be given live entries alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gap_hf.errors import GaPError, first_line

_KNOWN = {
    getattr(torch.optim, name)
    for name in ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "SGD", "ASGD"]
}
# Optimizers that work on the weights outside their step, where these have their own shape again.
_SCHEDULE_FREE_KEYS = {"train_mode", "weight_sum", "lr_max"}
_PROBE_STEPS = 3


def is_schedule_free(optimizer: Optimizer) -> bool:
    return any(_SCHEDULE_FREE_KEYS & group.keys() for group in optimizer.param_groups)


def check_elementwise(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose update of a weight depends on others, by a trial of its class if torch's own are unlike it.

    Raises:
        GaPError: if the trial does not give the weights of masked dense training, or cannot be made.
    """
    if type(optimizer) in _KNOWN:
        return
    if is_schedule_free(optimizer):
        why = "moves weights outside its step"
    else:
        try:
            why = None if _trial(optimizer) else "does not update each weight by itself"
        except Exception as error:  # whatever a stranger's constructor raises
            why = f"could not be tried ({first_line(error)})"
    if why is not None:
        raise GaPError(
            f"gap.live_state: {type(optimizer).__name__} {why}; expected one such as adamw_torch_fused or sgd, or "
            "live_state: false"
        )


def _trial(optimizer: Optimizer) -> bool:
    """A few steps of a new optimizer of this class: of a masked matrix, and of the vector of its live entries."""
    generator = torch.Generator().manual_seed(0)
    device = next(p for group in optimizer.param_groups for p in group["params"]).device  # some work on a GPU only
    mask = (torch.rand(6, 8, generator=generator, device="cpu") < 0.4).to(device)
    weight = torch.randn(6, 8, generator=generator, device="cpu").to(device) * mask
    dense, live = nn.Parameter(weight.clone()), nn.Parameter(weight[mask])
    kind: Any = type(optimizer)
    settings = dict(optimizer.defaults)
    if isinstance(optimizer, torch.optim.AdamW):
        settings.pop("decoupled_weight_decay", None)  # which it gives its parent, and does not take itself
    both = kind([dense], **settings), kind([live], **settings)
    for _ in range(_PROBE_STEPS):
        gradient = torch.randn(6, 8, generator=generator, device="cpu").to(device) * mask
        dense.grad, live.grad = gradient, gradient[mask]
        for one in both:
            one.step()
        with torch.no_grad():
            dense.mul_(mask)
    return torch.allclose(dense.detach()[mask], live.detach(), rtol=1e-6, atol=1e-7)
