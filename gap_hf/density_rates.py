"""Learning rates by density: a sparse weight tensor is stepped with the learning rate times ``density ** -power``.

An update of Adam's kind moves every live weight by about the learning rate, whatever its gradient's size, so an output that sums over
a tenth of its inputs moves about a tenth as far in a step. Dey, Bergsma and Hestness (NeurIPS 2024, arXiv 2405.15743) give
sparse layers a learning rate of 1 / density, for random masks that do not change; that is a power of 1. Weight decay is divided by
what the rate is multiplied by, so that decay shrinks all weights alike.

    sparsifier = Sparsifier(model, GaPConfig(sparsity=0.9, lr_density_power=0.5), total_steps=1000, optimizer=optimizer)

Only for the length of a step are a group's weights in several groups: schedulers, logs and saved states know of none of this.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from gap_hf.errors import GaPError
from gap_hf.masks import Masks

# Weights whose densities are equal to three digits go in one group: one launch of a fused kernel instead of many.
_DIGITS = 3
_EXPECTED = "expected an optimizer such as adamw_torch_fused, or lr_density_power: null"
_attached: WeakKeyDictionary[Optimizer, DensityRates] = WeakKeyDictionary()


def set_rates(optimizer: Optimizer, masks: Masks, power: float | None) -> None:
    """Let an optimizer step `masks`' weights with rates by their density from now on; with no power, as it does by itself."""
    if (earlier := _attached.pop(optimizer, None)) is not None:
        earlier.detach()
    if power:
        _attached[optimizer] = DensityRates(optimizer, masks, power)


class DensityRates:
    """Hooks around an optimizer's step that split its groups by density and put them together again.

    Args:
        optimizer: A torch optimizer, not wrapped. It may not change its groups in a step, nor have a learning rate of its own.
        masks: Whose densities count; as long as someone else keeps them.
        power: Of ``1 / density``.

    Raises:
        GaPError: if its step is one that torch's hooks do not know of, such as of a wrapper that is an optimizer by name only.
    """

    def __init__(self, optimizer: Optimizer, masks: Masks, power: float) -> None:
        if not getattr(type(optimizer).step, "hooked", False):
            raise GaPError(f"gap.lr_density_power: {type(optimizer).__name__} steps past torch's hooks; {_EXPECTED}")
        self._optimizer, self._masks, self._power = ref(optimizer), ref(masks), power
        self._names = {id(param): name for name, param in masks.params.items()}
        self._whole: list[dict[str, Any]] | None = None
        self._origins: list[dict[str, Any]] = []  # of each part, during a step
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._join),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        if (optimizer := self._optimizer()) is not None:
            self._put_back(optimizer)
        for handle in self._handles:
            handle.remove()

    def _scale(self, masks: Masks, param: nn.Parameter) -> float:
        """What a weight's learning rate is multiplied by now: 1 where it is not prunable, dense, or has no live weight."""
        if (name := self._names.get(id(param))) is None:
            return 1.0
        density = round(masks.live(name) / masks.parts[name].numel, _DIGITS)
        return density**-self._power if density else 1.0

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back(optimizer)  # after a step that raised
        if (masks := self._masks()) is None:
            return
        split, self._origins = [], []
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise GaPError(
                    f"gap.lr_density_power: {type(optimizer).__name__} has no learning rate to multiply; {_EXPECTED}"
                )
            parts: dict[float, list[nn.Parameter]] = {}
            for param in group["params"]:
                parts.setdefault(self._scale(masks, param), []).append(param)
            for scale, params in parts.items():
                part = {**group, "params": params, "lr": group["lr"] * scale}
                if group.get("weight_decay"):
                    part["weight_decay"] = group["weight_decay"] / scale
                split.append(group if len(parts) == 1 and scale == 1 else part)
                self._origins.append(group)
        self._whole, optimizer.param_groups = optimizer.param_groups, split

    def _join(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._whole is None:
            return
        parts = optimizer.param_groups
        self._put_back(optimizer)
        for part, group in zip(parts, self._origins, strict=True):
            for key in part.keys() - {"params", "lr", "weight_decay"}:
                if part[key] is not group.get(key):
                    raise GaPError(
                        f"gap.lr_density_power: {type(optimizer).__name__} keeps '{key}' in its groups and changes it in a step; "
                        f"{_EXPECTED}"
                    )

    def _put_back(self, optimizer: Optimizer) -> None:
        if self._whole is not None:
            optimizer.param_groups, self._whole = self._whole, None
