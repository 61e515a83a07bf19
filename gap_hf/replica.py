"""All that a worker of P-GaP has for itself: tensors, optimizer state, masks and levels; in memory, and in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gap_hf.errors import GaPError
from gap_hf.masks import pack_bits, unpack_bits
from gap_hf.optimizer_state import unwrap
from gap_hf.targets import clean_name

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier


class TensorSpec(NamedTuple):
    """What a tensor of an optimizer's state is, for those who have to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Replica:
    """A worker's own. `live_replica` gives the model's, by reference.

    Attributes:
        params: The model's parameters by clean name, tied ones once.
        tensors: Values of parameters and buffers.
        grads: Of the parameters that have one.
        optimizer: State of each parameter, empty where it has none yet.
        masks, previous, levels: As the sparsifier's.
    """

    params: dict[str, nn.Parameter]
    tensors: dict[str, Tensor]
    grads: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    masks: dict[str, Tensor | None]
    previous: dict[str, Tensor]
    levels: list[float]

    def clone(self, *, share_optimizer: bool = False) -> Replica:
        """A copy of all tensors. Masks are never changed in place, so they are shared; gradients are handed over."""
        state = {
            name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
            for name, values in self.optimizer.items()
        }
        return Replica(
            params=self.params,
            tensors={name: tensor.detach().clone() for name, tensor in self.tensors.items()},
            grads=dict(self.grads),
            optimizer=dict(self.optimizer) if share_optimizer else state,
            masks=dict(self.masks),
            previous=dict(self.previous),
            levels=list(self.levels),
        )

    def install(self, sparsifier: Sparsifier, *, with_optimizer: bool) -> None:
        """Make it the model's own. Its optimizer state is handed over, not copied."""
        live = live_replica(sparsifier)
        write_tensors(live.tensors, self.tensors)
        if with_optimizer:
            state = unwrap(sparsifier.optimizer).state
            for name, param in live.params.items():
                param.grad = self.grads.get(name)
                if self.optimizer[name]:
                    state[param] = self.optimizer[name]
                else:
                    state.pop(param, None)
        sparsifier.previous, sparsifier.levels = dict(self.previous), list(self.levels)
        for name, mask in self.masks.items():
            if mask is not sparsifier.masks[name]:  # else the weights that came obey it
                sparsifier.masks.set(name, mask)

    def state_device(self, name: str, key: str) -> torch.device:
        """Where an optimizer keeps this part of a parameter's state; some keep counts on the CPU."""
        value = self.optimizer[name].get(key)
        return value.device if isinstance(value, Tensor) else self.params[name].device


def live_replica(sparsifier: Sparsifier) -> Replica:
    """The model's tensors, gradients and state as they are, by reference."""
    params = {clean_name(name): param for name, param in sparsifier.model.named_parameters()}
    buffers = {clean_name(name): buffer for name, buffer in sparsifier.model.named_buffers()}
    state = {} if sparsifier.optimizer is None else unwrap(sparsifier.optimizer).state
    return Replica(
        params=params,
        tensors={**params, **buffers},
        grads={name: param.grad for name, param in params.items() if param.grad is not None},
        optimizer={name: state.get(param, {}) for name, param in params.items()},
        masks={name: sparsifier.masks[name] for name in sparsifier.weights},
        previous=sparsifier.previous,
        levels=sparsifier.levels,
    )


def describe(replica: Replica) -> dict[str, Any]:
    """What others have to know to receive its tensors: optimizer state, which tensors are sparse, levels.

    Raises:
        GaPError: for optimizer state that is no plain tensor and so cannot be sent or averaged.
    """
    for name, values in replica.optimizer.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and type(value) is not Tensor:
                raise GaPError(
                    f"{name}: its optimizer state '{key}' is a {type(value).__name__}, which replicas cannot merge; expected an "
                    "optimizer with plain tensors, such as adamw_torch_fused"
                )
    return {
        "optimizer": {
            name: {
                key: TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for name, values in replica.optimizer.items()
        },
        "sparse": {name: mask is not None for name, mask in replica.masks.items()},
        "previous": sorted(replica.previous),
        "levels": list(replica.levels),
    }


@torch.no_grad()
def write_tensors(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the model's tensors, in place: DDP and compiled code hold references to them."""
    for name, tensor in live.items():
        tensor.copy_(values[name])


def write_state(sparsifier: Sparsifier, live: Replica, name: str, values: Mapping[str, Any]) -> None:
    """Replace one parameter's optimizer state, in place where the tensors are there already."""
    state = unwrap(sparsifier.optimizer).state
    if not values:
        state.pop(live.params[name], None)
        return
    old = live.optimizer[name]
    for key, value in values.items():
        found = old.get(key)
        if isinstance(found, Tensor) and isinstance(value, Tensor) and found.shape == value.shape:
            found.copy_(value)
        else:
            old[key] = _laid_out(live.params[name], value)
    state[live.params[name]] = old


def _laid_out(param: nn.Parameter, value: Any) -> Any:
    """Optimizer state of a parameter's shape in its memory format: fused kernels walk both in the order of memory."""
    if not isinstance(value, Tensor) or value.shape != param.shape:
        return value
    return torch.empty_like(param, dtype=value.dtype, device=value.device).copy_(value)


# --- files -----------------------------------------------------------------------------------------------------------


def save_replica(path: Path, replica: Replica) -> None:
    """Write a safetensors file: ``tensor/NAME``, ``state/NAME/KEY``, and masks as bits; what is no tensor as its metadata."""
    tensors = {f"tensor/{name}": value.detach() for name, value in replica.tensors.items()}
    values: dict[str, dict[str, Any]] = {}
    for name, state in replica.optimizer.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"state/{name}/{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    tensors |= {f"mask/{name}": pack_bits(mask) for name, mask in replica.masks.items() if mask is not None}
    tensors |= {f"previous/{name}": pack_bits(mask) for name, mask in replica.previous.items()}
    header = json.dumps({"levels": replica.levels, "state": values})
    part = path.with_name(f".{path.name}.part")
    # Copies, because some share memory, and on a CPU, because a GPU may have no room for them.
    copies = {name: value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    save_file(copies, part, metadata={"gap_hf": header})
    part.replace(path)


def load_replica(path: Path, sparsifier: Sparsifier) -> Replica:
    """Read what `save_replica` wrote, for this model.

    Raises:
        GaPError: if the file is missing or is not a replica of this model.
    """
    live = live_replica(sparsifier)
    shapes = {name: tuple(weight.shape) for name, weight in sparsifier.weights.items()}
    optimizer: dict[str, dict[str, Any]] = {name: {} for name in live.params}
    masks: dict[str, Tensor | None] = dict.fromkeys(shapes)
    tensors: dict[str, Tensor] = {}
    previous: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["gap_hf"])
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, _, rest = key.partition("/")
                name, _, entry = rest.rpartition("/") if kind == "state" else (rest, "", "")
                value = file.get_tensor(key)
                if name not in live.tensors:
                    raise GaPError(f"{path}: holds '{name}', which the model has not")
                if kind == "tensor":
                    if value.shape != live.tensors[name].shape:
                        found, expected = tuple(value.shape), tuple(live.tensors[name].shape)
                        raise GaPError(f"{path}: '{name}' has shape {found}, the model has {expected}")
                    tensors[name] = value
                elif kind == "state":
                    optimizer[name][entry] = _laid_out(live.params[name], value.to(live.state_device(name, entry)))
                elif kind in ("mask", "previous"):
                    mask = unpack_bits(value, shapes[name], name).to(live.params[name].device)
                    (masks if kind == "mask" else previous)[name] = mask
        for name, values in header["state"].items():
            optimizer[name] |= values
        levels = [float(level) for level in header["levels"]]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, GaPError):
            raise
        raise GaPError(f"{path}: not a replica of this model ({error!r})") from None
    if missing := sorted(live.tensors.keys() - tensors.keys()):
        raise GaPError(f"{path}: lacks '{missing[0]}', which the model has")
    if len(levels) != len(sparsifier.groups):
        raise GaPError(f"{path}: holds {len(levels)} levels, expected {len(sparsifier.groups)}")
    return Replica(live.params, tensors, {}, optimizer, masks, previous, levels)
