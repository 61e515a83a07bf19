"""DeepSpeed's ZeRO stages 1 and 2: masks for gradients that no one sees, and for the fp32 masters and moments in its partitions.

The only importer of deepspeed, and imported itself only where DeepSpeed is on. The engine reduces gradients, clips them and
steps inside `accelerator.backward`, so gradients are masked in autograd, before the engine takes them. A masked weight then
has gradient 0, and once its master and its moments are 0 an Adam leaves them exactly there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import (  # pyright: ignore[reportMissingImports]  # an extra, which no check installs
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from gap_hf.errors import GaPError
from gap_hf.optimizer_state import OwnState, unwrap

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"


class ZeroState(OwnState):
    """An engine's masters and moments, for `Sparsifier.optimizer`. All its methods are for all ranks.

    A whole fp32 tensor is gathered at a time, on every rank, and only where a mask changes.

    Args:
        engine: The DeepSpeedEngine of ZeRO stage 1 or 2 whose module the sparsifier masks.
        replaces: Of an earlier training, whose sparsifier is to leave gradients alone.

    Raises:
        GaPError: if its optimizer is not an Adam.
    """

    def __init__(self, engine: Any, *, replaces: ZeroState | None = None) -> None:
        self.engine = engine
        # Before its first step an engine has no moments, and after loading a checkpoint they are linked by the next one.
        self._first_step = engine.global_steps
        self._hooks: list[Any] = []
        for hook in replaces._hooks if replaces is not None else ():
            hook.remove()
        inner = unwrap(engine.optimizer)
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and type(inner).__name__ != "FusedAdam":
            raise GaPError(
                f"DeepSpeed with {type(inner).__name__}: its state under masks is not known; expected Adam or AdamW, such as "
                "training.optim: adamw_torch_fused"
            )

    def attach(self, sparsifier: Sparsifier) -> None:
        """Mask the gradients of its weights from now on, and let it choose by the masters."""
        for name, param in sparsifier.masks.params.items():
            self._hooks.append(param.register_hook(_gradient_mask(sparsifier, name)))
        sparsifier.selection.value_of = self.master

    @torch.no_grad()
    def master(self, param: nn.Parameter) -> Tensor:
        """The fp32 weight, whole: the parameter itself unless that is a rounded copy."""
        return param.detach() if param.dtype == torch.float32 else self._master(param)

    @torch.no_grad()
    def sync(self) -> None:
        """DeepSpeed loads its state by itself, as it was."""

    def follow_growth(self, param: nn.Parameter, mask: Tensor, policy: str) -> None:
        """First moment 0 and second moment at the survivors' mean: one step count serves a whole partition of tensors."""
        grown = mask == 0
        self._edit(param, _FIRST, grown, lambda moment: 0.0)
        if mask.any():
            self._edit(param, _SECOND, grown, lambda moment: float(moment[~grown].mean(dtype=torch.float64)))
        else:
            self._edit(param, _SECOND, grown, lambda moment: 0.0)

    @torch.no_grad()
    def follow_mask(self, param: nn.Parameter, mask: Tensor, policy: str) -> None:
        dead = mask == 0
        safe_set_full_fp32_param(param, self._master(param).masked_fill_(dead, 0))
        for key in (_FIRST, _SECOND):
            self._edit(param, key, dead, lambda moment: 0.0)

    def follow_restart(self, policy: str) -> None:
        assert policy == "changed", "refused by check_setup"

    def mask_weight_copies(self, sparse: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Nothing to do after a step: gradient, moments and master of a masked weight are 0, so no step moves it."""

    def _master(self, param: nn.Parameter) -> Tensor:
        found = safe_get_full_fp32_param(param)
        assert found is not None and found.shape == param.shape, "the parameter is in none of the engine's groups"
        return found

    def _edit(self, param: nn.Parameter, key: str, where: Tensor, value: Any) -> None:
        if self.engine.global_steps == 0:
            return
        assert self.engine.global_steps > self._first_step, (
            "masks are loaded, not changed, before a resumed run's first step"
        )
        moment = safe_get_full_optimizer_state(param, key)
        assert moment is not None and moment.shape == param.shape, key
        safe_set_full_optimizer_state(param, moment.masked_fill_(where, value(moment)), key)


def _gradient_mask(sparsifier: Sparsifier, name: str) -> Any:
    def masked(grad: Tensor) -> Tensor:
        # Looked up at each call, because masks are replaced.
        mask = sparsifier.masks[name]
        return grad if mask is None else grad * mask

    return masked
