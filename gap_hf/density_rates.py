"""Learning rates by density: a sparse weight tensor is stepped with the learning rate times ``density ** -power``.

An update of Adam's kind moves every live weight by about the learning rate, whatever its gradient's size, so an output that sums over
a tenth of its inputs moves about a tenth as far in a step. Dey, Bergsma and Hestness (NeurIPS 2024, arXiv 2405.15743) give
sparse layers a learning rate of 1 / density, for random masks that do not change; that is a power of 1. Weight decay is divided by
what the rate is multiplied by, so that decay shrinks all weights alike.

    sparsifier = Sparsifier(model, GaPConfig(sparsity=0.9, lr_density_power=0.5), total_steps=1000, optimizer=optimizer)

Only for the length of a step are a group's weights in several groups: schedulers, logs and saved states know of none of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim import Optimizer

from gap_hf.errors import GaPError
from gap_hf.masks import Masks

_EXPECTED = "expected an optimizer such as adamw_torch_fused, or lr_density_power: null"
_attached: WeakKeyDictionary[Optimizer, DensityRates] = WeakKeyDictionary()


def set_rates(optimizer: Optimizer, masks: Masks, power: float | None) -> None:
    """Let an optimizer step `masks`' weights with rates by their density from now on; with no power, as it does by itself.

    Raises:
        GaPError: if its groups cannot be split, or hold none of these weights.
    """
    rates = _attached.get(optimizer)
    if rates is None and power:
        rates = _attached[optimizer] = DensityRates(optimizer)
    if rates is not None and not rates.follow(masks, power):
        _attached.pop(optimizer).detach()


def join_groups(optimizer: Optimizer) -> None:
    """Put groups together that a step which raised has left apart."""
    if (rates := _attached.get(optimizer)) is not None:
        rates.put_back(optimizer)


class _Source(NamedTuple):
    masks: ref[Masks]
    names: Mapping[int, str]  # of a parameter's id
    power: float


class _Part(NamedTuple):
    """A group for the length of a step, and what was written in it."""

    group: dict[str, Any]
    written: dict[str, Any]


class DensityRates:
    """Hooks around an optimizer's step that split its groups by density and put them together again.

    Args:
        optimizer: A torch optimizer, not wrapped, that takes its steps itself and changes nothing in its groups by them.

    Raises:
        GaPError: if it is known to be another: one that torch's hooks do not know of, that steps through one of its own,
            or that finds its settings by places in the groups (bitsandbytes).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        why = None
        if not getattr(type(optimizer).step, "hooked", False):
            why = "steps past torch's hooks"
        elif any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
            why = "steps through another optimizer"
        elif type(optimizer).__module__.startswith("bitsandbytes"):
            why = "finds its settings by places in its groups"
        if why is not None:
            raise GaPError(f"gap.lr_density_power: {type(optimizer).__name__} {why}; {_EXPECTED}")
        self._optimizer = ref(optimizer)
        self._sources: list[_Source] = []
        self._whole: list[dict[str, Any]] | None = None
        self._parts: list[_Part] = []  # during a step
        # A compiler has nothing to gain here, and would not see that the groups are others.
        split: Any = torch.compiler.disable(self._split)
        join: Any = torch.compiler.disable(self._join)
        self._handles = [
            optimizer.register_step_pre_hook(split),
            optimizer.register_step_post_hook(join),
            optimizer.register_state_dict_pre_hook(self.put_back),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: self.put_back(optimizer)),
        ]

    def follow(self, masks: Masks, power: float | None) -> bool:
        """Take these masks in place of any of the same weights, as long as someone else keeps them. False if none are left."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self.put_back(optimizer)
        names = {id(param): name for name, param in masks.params.items()}
        self._sources = [s for s in self._sources if s.masks() is not None and not (s.names.keys() & names.keys())]
        if power:
            if not any(id(param) in names for group in optimizer.param_groups for param in group["params"]):
                raise GaPError(
                    f"gap.lr_density_power: {type(optimizer).__name__} holds none of the prunable weights; {_EXPECTED}"
                )
            self._sources.append(_Source(ref(masks), names, power))
        return bool(self._sources)

    def detach(self) -> None:
        """Remove the hooks."""
        if (optimizer := self._optimizer()) is not None:
            self.put_back(optimizer)
        for handle in self._handles:
            handle.remove()

    def put_back(self, optimizer: Optimizer) -> None:
        """End a split, if there is one."""
        if self._whole is not None:
            optimizer.param_groups, self._whole = self._whole, None

    def _scale(self, param: nn.Parameter) -> float:
        """What a weight's learning rate is multiplied by now: 1 where it is not prunable, dense, or has no live weight.

        Of the density to three digits, so that tensors of one target go in one group: one launch of a fused kernel, not many.
        """
        for source in self._sources:
            if (name := source.names.get(id(param))) is not None and (masks := source.masks()) is not None:
                density = float(f"{masks.live(name) / masks.parts[name].numel:.3g}")
                return density**-source.power if density else 1.0
        return 1.0

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._join(optimizer, (), {})  # of a step that raised, or whose class calls its parent's, which has hooks too
        self._parts = []
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise GaPError(
                    f"gap.lr_density_power: {type(optimizer).__name__} has no learning rate to multiply; {_EXPECTED}"
                )
            by_scale: dict[float, list[nn.Parameter]] = {}
            for param in group["params"]:
                by_scale.setdefault(self._scale(param), []).append(param)
            for scale, params in by_scale.items():
                part = {**group, "params": params}
                if scale != 1:
                    part["lr"] = group["lr"] * scale
                    if group.get("weight_decay"):
                        part["weight_decay"] = group["weight_decay"] / scale
                self._parts.append(_Part(part, dict(part)))
        self._whole, optimizer.param_groups = optimizer.param_groups, [part.group for part in self._parts]

    def _join(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._whole is None:
            return
        self.put_back(optimizer)
        parts, self._parts = self._parts, []
        for part, written in parts:
            if changed := [key for key in part if part[key] is not written.get(key)]:
                raise GaPError(
                    f"gap.lr_density_power: {type(optimizer).__name__} keeps '{changed[0]}' in its groups and changes it in a step; "
                    f"{_EXPECTED}"
                )
