"""Optimizer state of live weights only: at 90 % a tenth of the moments, and an update that never touches a masked weight.

For the length of an optimizer's step a sparse weight is replaced in its groups by a vector of its live entries, gathered
from weight and gradient; after it they are scattered back. What an optimizer keeps for the vector is all that it keeps, so
any optimizer works that updates each weight by itself: torch's Adam, AdamW, SGD, RMSprop and their like, and others that
a short trial finds to be so. No product with a mask is needed after a step. The weights are those of masked dense training,
bit for bit in fp32; but of a weight whose size is no multiple of 16, fused kernels on a CPU round the last entries otherwise.

    sparsifier = Sparsifier(model, GaPConfig(sparsity=0.9, live_state=True), total_steps=1000, optimizer=optimizer)

Between steps `optimizer.state` holds 1-D tensors for sparse weights, and so does its `state_dict()`, under names of their own:
an optimizer that knows nothing of this misses its own and says so. A state of either kind may be loaded where the other is
kept, if masks are loaded after it. `release` gives the usual dense state back.

What somebody else writes to masked weights between two steps `mask_weights` zeroes; what is written through ``.data``, which torch
does not count, only where the mask next changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gap_hf.elementwise import check_elementwise
from gap_hf.errors import GaPError
from gap_hf.masks import Masks
from gap_hf.optimizer_state import OwnState, clear_grown, clear_pruned, reset_all, unwrap

if TYPE_CHECKING:
    from gap_hf.packed_gradients import PackedGradients

PREFIX = "live_"
_LINE = 64  # entries: a cache line of bytes and a multiple of one in any wider dtype
# By weak references on both sides: the hooks keep a LiveState as long as its optimizer, and no longer.
_attached: WeakKeyDictionary[Optimizer, ref[LiveState]] = WeakKeyDictionary()


def release(optimizer: Any) -> None:
    """End what `LiveState` does on an optimizer; its state is dense again, with zeros where there was none."""
    found = _attached.pop(unwrap(optimizer), None)
    if found is not None and (live := found()) is not None:
        live.detach()


class LiveState(OwnState):
    """Keeps the state of an optimizer packed, by hooks around its step.

    Args:
        optimizer: A torch optimizer, bare or wrapped by Accelerate. It stays what the training loop uses.
        masks: Whose sparse weights are meant. A mask is replaced, never changed in place.

    Raises:
        GaPError: if the optimizer does not update each weight by itself, or a weight is sharded.
    """

    def __init__(self, optimizer: Any, masks: Masks) -> None:
        self.optimizer = unwrap(optimizer)
        self._check()
        for name, part in masks.parts.items():
            if part.peers.num_ranks > 1:
                raise GaPError(f"gap.live_state: '{name}' is sharded, expected whole weights; set live_state: false")
        self._masks = masks
        self._places: dict[nn.Parameter, _Places] = {}
        self._swapped: list[_Swap] = []
        self._taken: dict[nn.Parameter, Tensor] = {}  # packed gradients of the step at hand
        self._versions: dict[nn.Parameter, int] = {}  # of weights whose masked entries are known to be 0
        self._is_as_loaded = False
        self.gradients: PackedGradients | None = None
        self._handles = [
            self.optimizer.register_step_pre_hook(self._gather),
            self.optimizer.register_step_post_hook(self._scatter),
            self.optimizer.register_state_dict_post_hook(self._rename),
            self.optimizer.register_load_state_dict_post_hook(self._was_loaded),
        ]
        _attached[self.optimizer] = ref(self)

    def _check(self) -> None:
        check_elementwise(self.optimizer)

    def detach(self) -> None:
        """Remove the hooks and make the state dense again; one that was loaded since the last step stays as it was loaded, because
        the masks that it is packed by may not be here yet.
        """
        self._restore()
        if not self._is_as_loaded:
            self.sync()
        for param in list(self._places):
            self._unpack(param)
        for handle in self._handles:
            handle.remove()

    def num_bytes(self) -> int:
        """Bytes of the state of the prunable weights, with what is kept to find them by; `masks` not included."""
        state = (v for p in self._masks.params.values() for v in self.optimizer.state.get(p, {}).values())
        places = sum(places.num_bytes for places in self._places.values())
        return places + sum(v.numel() * v.element_size() for v in state if isinstance(v, Tensor))

    @torch.no_grad()
    def live_gradient(self, name: str) -> Tensor | None:
        """The live entries of a weight's gradient, 1-D; None if it has none or is dense now."""
        param, mask = self._masks.params[name], self._masks[name]
        if mask is None or param.grad is None:
            return None
        if (places := self._places.get(param)) is None or places.mask is not mask:
            self.sync()
            places = self._places[param]
        return places.take(param.grad, places.positions())

    # --- around a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gather(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None):
            raise GaPError("gap.live_state: the optimizer was given a closure, which would see live entries only")
        self._restore()  # what a step that raised has left, or one whose class calls its parent's, which has hooks too
        if self.gradients is not None:
            self.gradients.give_back(self._taken)
        self._taken = {}
        self.sync()
        for group in optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                if (found := self._stand_in(param)) is None:
                    continue
                self._swapped.append(_Swap(group["params"], i, param, *found))
                group["params"][i] = found[0]
                if param in optimizer.state:
                    optimizer.state[found[0]] = optimizer.state.pop(param)

    def _stand_in(self, param: nn.Parameter) -> tuple[nn.Parameter, Tensor | None] | None:
        """What the optimizer is to see of a weight, and the places of its entries; None if the weight itself."""
        if (places := self._places.get(param)) is None:
            return None
        packed = None if self.gradients is None else self.gradients.take(param)
        if packed is None and param.grad is None:
            return None
        if packed is not None:
            self._taken[param] = packed
        at = places.positions()
        live = nn.Parameter(places.take(param, at))
        live.grad = packed
        if param.grad is not None:
            whole = places.take(param.grad, at)
            live.grad = whole if packed is None else packed + whole
        return live, at

    @torch.no_grad()
    def _scatter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for swap in self._swapped:
            clean = self._versions.get(swap.param) == swap.param._version
            self._write(swap)
            if clean:
                self._versions[swap.param] = swap.param._version
        self._restore()
        self._taken = {}

    @torch.no_grad()
    def mask_weights(self, masks: Masks) -> None:
        for param, mask in masks.sparse_params():
            if self._versions.get(param) != param._version:
                param.mul_(mask)
                self._versions[param] = param._version

    def _write(self, swap: _Swap) -> None:
        assert swap.at is not None
        put(swap.param, swap.at, swap.live)

    def _restore(self) -> None:
        """Put the weights back into their groups; if a step raised, in the next."""
        for swap in self._swapped:
            swap.params[swap.i] = swap.param
            if swap.live in self.optimizer.state:
                self.optimizer.state[swap.param] = self.optimizer.state.pop(swap.live)
        self._swapped = []

    def _rename(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Packed state gets names of its own in what is saved: a fused kernel would not notice that it is too short."""
        self.sync()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for i, state in saved["state"].items():
            if params[i] in self._places:
                packed = {key for key, _ in tensors_of(state)}
                saved["state"][i] = {PREFIX * (key in packed) + key: value for key, value in state.items()}
        return saved

    # --- when masks change -------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Pack the state of every sparse weight by its present mask, and unpack that of dense ones."""
        self._is_as_loaded = False
        sparse = dict(self._masks.sparse_params())
        for param in [p for p in self._places if p not in sparse]:
            self._unpack(param)
        for param, mask in sparse.items():
            if (places := self._places.get(param)) is None or places.mask is not mask:
                self._unpack(param)
                self._pack(param, mask)

    def follow_growth(self, param: nn.Parameter, mask: Tensor, policy: str) -> None:
        self.sync()
        self._unpack(param)
        clear_grown(self.optimizer, param, mask)

    def follow_mask(self, param: nn.Parameter, mask: Tensor, policy: str) -> None:
        self._unpack(param)
        clear_pruned(self.optimizer, param, mask)
        self._pack(param, mask)

    def follow_restart(self, policy: str) -> None:
        if policy == "all":
            reset_all(self.optimizer)

    def mask_weight_copies(self, sparse: Any) -> None:
        """There are none: of masked weights nothing is kept."""

    def _was_loaded(self, optimizer: Optimizer) -> None:
        self._places.clear()
        self._is_as_loaded = True

    @torch.no_grad()
    def _pack(self, param: nn.Parameter, mask: Tensor) -> None:
        places = self._places[param] = _Places(param, mask)
        state = self.optimizer.state.get(param, {})
        for key in [key for key in state if key.startswith(PREFIX)]:
            state[key.removeprefix(PREFIX)] = state.pop(key)
        for key, value in tensors_of(state):
            if value.shape == param.shape:
                state[key] = places.take(value, places.positions())
            elif value.shape != (places.length,):
                raise GaPError(
                    f"gap.live_state: the optimizer's '{key}' has shape {tuple(value.shape)} for a weight of "
                    f"{tuple(param.shape)}, expected that or ({places.length},) for its {places.count} live entries"
                )

    @torch.no_grad()
    def _unpack(self, param: nn.Parameter) -> None:
        if (places := self._places.pop(param, None)) is None:
            return
        state = self.optimizer.state.get(param, {})
        for key, value in tensors_of(state):
            if value.shape == (places.length,):
                state[key] = torch.zeros_like(param, dtype=value.dtype)
                put(state[key], places.positions(), value)


class _Swap(NamedTuple):
    """A weight that is out of its group, and what stands for it there."""

    params: list[Any]
    i: int
    param: nn.Parameter
    live: nn.Parameter
    at: Tensor | None


class _Places:
    """Where the live entries of a weight lie in its memory, in a byte each: the distance from the one before.

    A sum brings the positions back in a tenth of a step's time. Distances over 255 make it two bytes for
    that tensor, and over 32,767 four. Vectors are filled up with zeros to a whole number of cache lines: fused kernels round otherwise in what
    remains after those.
    """

    def __init__(self, param: nn.Parameter, mask: Tensor) -> None:
        if torch.empty_like(param).stride() != param.stride():
            raise GaPError(
                f"gap.live_state: a weight of shape {tuple(param.shape)} has strides {param.stride()}, expected one that fills its "
                "memory; make it contiguous, or set live_state: false"
            )
        self.mask = mask
        layout = torch.empty_like(param, dtype=mask.dtype).copy_(mask)
        at = _flat(layout).nonzero().view(-1)
        self.shape, self.stride, self.count = param.shape, param.stride(), at.numel()
        self.length = -(-self.count // _LINE) * _LINE
        steps = torch.diff(at, prepend=at.new_zeros(1))
        largest = int(steps.max()) if self.count else 0
        self._steps = steps.to(torch.uint8 if largest <= 255 else torch.int16 if largest < 2**15 else torch.int32)

    @property
    def num_bytes(self) -> int:
        return self._steps.numel() * self._steps.element_size()

    def positions(self) -> Tensor:
        """1-D int64, ascending."""
        return torch.cumsum(self._steps, 0, dtype=torch.int64)

    def take(self, tensor: Tensor, at: Tensor) -> Tensor:
        """The live entries of a tensor of the weight's shape, 1-D."""
        out = tensor.new_empty(self.length)
        out[self.count :] = 0
        if tensor.stride() != self.stride:
            tensor = torch.empty_strided(self.shape, self.stride, dtype=tensor.dtype, device=tensor.device).copy_(
                tensor
            )
        torch.index_select(_flat(tensor), 0, at, out=out[: self.count])
        return out


def put(tensor: Tensor, at: Tensor, live: Tensor) -> None:
    """Write live entries to their places; a tensor that was made like the weight has its layout."""
    _flat(tensor).index_copy_(0, at, live.detach()[: at.numel()])


def _flat(tensor: Tensor) -> Tensor:
    """A view in the order of memory, such as of a convolution's weight in channels_last."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def tensors_of(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What is kept entry by entry; counts are scalars."""
    return ((k, v) for k, v in list(state.items()) if isinstance(v, Tensor) and v.ndim > 0)
