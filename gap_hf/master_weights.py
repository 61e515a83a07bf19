"""fp32 masters of low-precision weights, of live entries only: training in bf16 without its updates being rounded away.

A bf16 weight has 8 bits of precision, so an update of less than a 256th of it is lost. With masters an optimizer's step is
done in fp32, on a copy of the weight that was never rounded, and the weight is its rounding. The moments are fp32 too. Of a
sparse weight the copy, as all else, is of its live entries; a dense one has a whole copy, and so do biases and norms.

    sparsifier = Sparsifier(model.bfloat16(), GaPConfig(sparsity=0.9, live_state=True, master_weights=True), …)

What somebody else writes into a weight between two steps is taken over where it differs from the master's rounding, but not what
is written through ``.data``, which torch does not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gap_hf.live_state import PREFIX, LiveState, _Swap, put, tensors_of
from gap_hf.masks import Masks

_LOW = (torch.bfloat16, torch.float16)
_MASTER = "master"
# load_state_dict casts state to the weight's type, but for what is called so.
_NOT_CAST = "step"


class _Master(NamedTuple):
    """fp32: live entries of a sparse weight, all of a dense one; and the weight's version when it was written."""

    values: Tensor
    version: int | None


class MasterState(LiveState):
    """A `LiveState` that updates bf16 and fp16 weights in fp32.

    Args:
        optimizer: As of `LiveState`. Its `state_dict` holds the masters too.
        masks: As of `LiveState`.

    Raises:
        GaPError: as `LiveState`.
    """

    def __init__(self, optimizer: Any, masks: Masks) -> None:
        super().__init__(optimizer, masks)
        self._masters: dict[nn.Parameter, _Master] = {}
        self._is_read = False

    def detach(self) -> None:
        """As of `LiveState`; moments of low-precision weights get their type, and the masters are forgotten."""
        as_loaded = self._is_as_loaded
        super().detach()
        self._masters.clear()
        if as_loaded:
            return
        for param in self._low():
            state = self.optimizer.state.get(param, {})
            state.update({key: value.to(param.dtype) for key, value in tensors_of(state)})

    def num_bytes(self) -> int:
        prunable = self._masks.params.values()
        return super().num_bytes() + sum(4 * self._masters[p].values.numel() for p in prunable if p in self._masters)

    def sync(self) -> None:
        if not self._is_read:
            self._is_read = True
            for param in self._low():
                self._read(param)
        super().sync()

    # --- around a step -----------------------------------------------------------------------------------------------

    def _stand_in(self, param: nn.Parameter) -> tuple[nn.Parameter, Tensor | None] | None:
        found = super()._stand_in(param)
        if param.dtype not in _LOW:
            return found
        if found is None:
            if param.grad is None or param in self._places:
                return None
            now, gradient, at = param.detach(), param.grad, None
        else:
            now, gradient, at = found[0].detach(), found[0].grad, found[1]
        master = nn.Parameter(self._values(param, now))
        master.grad = None if gradient is None else gradient.float()
        return master, at

    def _values(self, param: nn.Parameter, now: Tensor) -> Tensor:
        """The master of `now`, which is what the weight has in the master's form."""
        if (master := self._masters.get(param)) is None:
            return now.float()
        if master.version == param._version:
            return master.values
        return torch.where(master.values.to(now.dtype) == now, master.values, now.float())

    def _write(self, swap: _Swap) -> None:
        if swap.param.dtype not in _LOW:
            super()._write(swap)
            return
        values = swap.live.detach()
        if swap.at is None:
            swap.param.copy_(values)
        else:
            put(swap.param, swap.at, values.to(swap.param.dtype))
        self._masters[swap.param] = _Master(values, swap.param._version)

    # --- when masks change -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _pack(self, param: nn.Parameter, mask: Tensor) -> None:
        super()._pack(param, mask)
        master = self._masters.get(param)
        if master is not None and master.values.shape == param.shape:
            places = self._places[param]
            self._masters[param] = master._replace(values=places.take(master.values, places.positions()))

    @torch.no_grad()
    def _unpack(self, param: nn.Parameter) -> None:
        places, master = self._places.get(param), self._masters.get(param)
        super()._unpack(param)
        if places is not None and master is not None and master.values.shape == (places.length,):
            whole = torch.zeros_like(param, dtype=torch.float32)
            put(whole, places.positions(), master.values)
            self._masters[param] = master._replace(values=whole)

    # --- files -------------------------------------------------------------------------------------------------------

    def _low(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.dtype in _LOW]

    def _rename(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Masters are saved with the rest, and all that is fp32 of a low-precision weight where it is not cast."""
        saved = super()._rename(optimizer, saved)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for i, param in enumerate(params):
            if param.dtype not in _LOW:
                continue
            state = dict(saved["state"].get(i, {}))
            if (master := self._masters.get(param)) is not None:
                state[_MASTER] = master.values
            for key, value in list(tensors_of(state)):
                del state[key]
                state[PREFIX + key.removeprefix(PREFIX)] = {_NOT_CAST: value}
            if state:
                saved["state"][i] = state
        return saved

    def _was_loaded(self, optimizer: Optimizer) -> None:
        super()._was_loaded(optimizer)
        self._is_read = False
        self._masters.clear()

    @torch.no_grad()
    def _read(self, param: nn.Parameter) -> None:
        """Take what was loaded for a weight, by whomever it was written, as fp32."""
        state = self.optimizer.state.get(param, {})
        for key, value in list(state.items()):
            if isinstance(value, dict):
                state[key.removeprefix(PREFIX)] = state.pop(key)[_NOT_CAST].to(param.device)
        for key, value in tensors_of(state):
            state[key] = value.float()
        if _MASTER in state:
            self._masters[param] = _Master(state.pop(_MASTER), None)
        if not state:
            self.optimizer.state.pop(param, None)
