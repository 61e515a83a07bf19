"""Gradients of live weights only: packed as soon as a weight's backward is done, so that its dense gradient is freed there.

A part of `live_state` in GaPTrainer, on one process. What then has no ``.grad`` is clipped through stand-ins that do.
The norm of a packed gradient is that of the dense one but for the order of the sum: where gradients are clipped, weights
agree with masked dense training to rounding, and to the bit where they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gap_hf.errors import GaPError
from gap_hf.live_state import LiveState

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier

_Base = Trainer if TYPE_CHECKING else object


class PackedGradients:
    """Packs gradients while it is open, and hands them to the `LiveState` at its next step.

    Args:
        sparsifier: Its optimizer is a `LiveState`, and its weights are whole.
        clips: A step without `was_clipped` before it is refused: somebody else's clipping would have missed these gradients.
    """

    def __init__(self, sparsifier: Sparsifier, *, clips: bool) -> None:
        self.live: LiveState = sparsifier.optimizer
        self.clips = clips
        self._open = self._clipped = False
        self._packed: dict[nn.Parameter, Tensor] = {}
        self._handles = [
            param.register_post_accumulate_grad_hook(partial(self._pack, name))
            for name, param in sparsifier.masks.params.items()
            if param.requires_grad
        ]
        self.live.gradients = self

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self.live.gradients = None

    @contextmanager
    def packing(self) -> Iterator[None]:
        """For a backward whose gradients no update of masks needs whole."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def clear(self) -> None:
        """Forget what was not stepped with, as `zero_grad` does."""
        self._packed.clear()
        self._clipped = False

    def take(self, param: nn.Parameter) -> Tensor | None:
        """The packed gradient of a weight, once.

        Raises:
            GaPError: if it should have been clipped and was not.
        """
        if param in self._packed and self.clips and not self._clipped:
            raise GaPError(
                "gap.live_state: max_grad_norm is set and gradients were not clipped by Trainer's _clip_grad_norm; "
                "set live_state: false where a trainer clips by itself"
            )
        return self._packed.pop(param, None)

    def give_back(self, taken: Mapping[nn.Parameter, Tensor]) -> None:
        """Gradients of a step that did not come to its end, for the one that is taken in its place."""
        for param, gradient in taken.items():
            self._packed.setdefault(param, gradient)

    def stand_ins(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters, with another for each that has a packed gradient: its ``.grad`` is that."""
        return [self._stand_in(param) if param in self._packed else param for param in params]

    def was_clipped(self) -> None:
        """Trainer has clipped what `stand_ins` gave it."""
        self._clipped = True

    def _stand_in(self, param: nn.Parameter) -> nn.Parameter:
        one = nn.Parameter(self._packed[param], requires_grad=False)
        one.grad = self._packed[param]
        return one

    @torch.no_grad()
    def _pack(self, name: str, param: nn.Parameter) -> None:
        if not self._open or (live := self.live.live_gradient(name)) is None:
            return
        earlier = self._packed.get(param)
        self._packed[param] = live if earlier is None else earlier.add_(live)
        param.grad = None


class _StandIns:
    """What Trainer's clipping asks of a model."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._params = params

    def parameters(self) -> list[nn.Parameter]:
        return self._params


class PackedGradientsMixin(_Base):
    """Trainer's clipping, of packed gradients too."""

    _gap_gradients: PackedGradients | None = None

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._gap_gradients is None:
            return super()._clip_grad_norm(model)
        norm = super()._clip_grad_norm(self._gap_stand_ins(model))
        self._gap_gradients.was_clipped()
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._gap_stand_ins(model), grad_norm=grad_norm)

    def _gap_stand_ins(self, model: Any) -> Any:
        if self._gap_gradients is None:
            return model
        return _StandIns(self._gap_gradients.stand_ins(model.parameters()))

    def _gap_packing(self, sparsifier: Sparsifier) -> AbstractContextManager[None]:
        if self._gap_gradients is None or sparsifier.needs_dense_gradients:
            return nullcontext()
        return self._gap_gradients.packing()

    def _gap_clear_gradients(self) -> None:
        if self._gap_gradients is not None:
            self._gap_gradients.clear()

    def _gap_leave_gradients(self) -> None:
        if self._gap_gradients is not None:
            self._gap_gradients.detach()
            self._gap_gradients = None

    def _gap_pack_gradients(self, sparsifier: Sparsifier) -> None:
        """Pack the gradients of a run whose optimizer state is packed, where nothing else has to see them whole."""
        self._gap_leave_gradients()
        # DDP reduces whole gradients, and a GradScaler looks for them in the optimizer's groups.
        alone = self.args.world_size == 1 and self.accelerator.scaler is None
        if isinstance(sparsifier.optimizer, LiveState) and alone:
            clips = (self.args.max_grad_norm or 0) > 0
            self._gap_gradients = PackedGradients(sparsifier, clips=clips)
