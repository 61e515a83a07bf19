"""Peak memory of training, foreseen: a step is made with tensors that have shapes and no numbers, and what lives is added up.

Everything in the step is real but the numbers: the model's forward and backward, the optimizer, and what `live_state` does
around it. torch's MemTracker counts storages from their making to their end, as an allocator that wastes nothing would hold
them; what a process takes lies above that by what its allocator keeps for later, and by the libraries that it loads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer

from gap_hf.errors import GaPError
from gap_hf.live_state import _LINE, LiveState, _Places
from gap_hf.masks import Masks
from gap_hf.master_weights import MasterState
from gap_hf.packed_gradients import PackedGradients
from gap_hf.sparse_layers import layers_of
from gap_hf.sparse_products import is_worth_it, kept_bytes
from gap_hf.targets import clean_name


class MemoryForecast:
    """Peak bytes of one training step under masks of given sizes.

    Args:
        make_model: Gives the model; it is called where no memory is taken for it.
        make_batch: Gives what the model is called with, such as ``{"input_ids": …, "labels": …}``; called there too.
        make_optimizer: Gives the optimizer of a list of parameters.
        autocast: Type that products are made in, such as bfloat16; None: that of the weights.
        clips: Gradients are clipped before the step.
        checkpointing: Activations are computed again in backward (``gradient_checkpointing``).
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_batch: Callable[[nn.Module], dict[str, Any]],
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        autocast: torch.dtype | None = None,
        clips: bool = True,
        checkpointing: bool = False,
    ) -> None:
        self._make_optimizer, self._autocast, self._clips = make_optimizer, autocast, clips
        self._mode = FakeTensorMode()
        with self._mode:
            self._model: Any = make_model().train()
            if checkpointing:
                enable_checkpointing(self._model)
            self._batch = make_batch(self._model)
            _freeze(self._model)
        self._params = {clean_name(n): p for n, p in self._model.named_parameters() if p.requires_grad}

    def peak_bytes(
        self, live: Mapping[str, int], *, live_state: bool = False, master_weights: bool = False, compute_rows: int = 0
    ) -> int:
        """Most bytes that tensors take at a time in a step, weights and state included.

        Args:
            live: Live weights of each tensor that has a mask, by name. None has: plain Trainer.
            live_state: With `GaPConfig.live_state`.
            master_weights: With `GaPConfig.master_weights` too.
            compute_rows: With `GaPConfig.sparse_compute`: outputs of a block of the pattern, 1 for single weights.
        """
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of a step that is none: MemTracker warns of arguments that are None
            optimizer = self._make_optimizer(list(self._params.values()))
            masks = _SizedMasks(self._params, live)
            state = gradients = None
            if live_state and live:
                state = (_SizedMasters if master_weights else _Sized)(optimizer, masks)
                gradients = PackedGradients(SimpleNamespace(optimizer=state, masks=masks), clips=False)  # type: ignore[arg-type]
                stack.callback(gradients.detach)
            self._first_step(optimizer)
            kept = [*_state_tensors(optimizer), *(mask for _, mask in masks.sparse_params())]
            kept += [] if state is None else [places._steps for places in state._places.values()]
            kept += [master.values for master in state._masters.values()] if isinstance(state, MasterState) else []
            kept += [torch.empty(size, dtype=torch.uint8) for size in self._computed(live, compute_rows)]
            tracker = MemTracker()
            tracker.track_external(self._model, *kept, *(v for v in self._batch.values() if isinstance(v, Tensor)))
            with tracker:
                self._step(optimizer, gradients)
            peak = tracker.get_tracker_snapshot("peak")
            for param in self._params.values():
                param.grad = None
        return sum(int(of_device["Total"]) for of_device in peak.values())

    def _computed(self, live: Mapping[str, int], rows: int) -> Iterator[int]:
        """Bytes that sparse products keep of each weight."""
        params = {clean_name(name): param for name, param in self._model.named_parameters()}
        for name in layers_of(self._model, {param: name for name, param in params.items()}).values() if rows else ():
            if name in live and is_worth_it(live[name], params[name].numel(), rows):
                yield kept_bytes(live[name], rows)

    def _first_step(self, optimizer: Optimizer) -> None:
        """After it the optimizer has its state."""
        for param in self._params.values():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()

    def _step(self, optimizer: Optimizer, gradients: PackedGradients | None) -> None:
        products = nullcontext() if self._autocast is None else torch.autocast("cpu", self._autocast)
        with nullcontext() if gradients is None else gradients.packing():
            with products:
                loss = self._model(**self._batch).loss
            loss.backward()
        params = list(self._params.values())
        if self._clips:
            nn.utils.clip_grad_norm_(params if gradients is None else gradients.stand_ins(params), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _freeze(model: nn.Module) -> None:
    """Make buffers of the parameters that are not trained: MemTracker takes every parameter for one that is."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, param.detach())


class _SizedMasks(Masks):
    """Masks of which the number of live weights is known, and nothing else."""

    def __init__(self, params: Mapping[str, nn.Parameter], live: Mapping[str, int]) -> None:
        super().__init__({name: params[name] for name in live})
        self.live_of = {params[name]: count for name, count in live.items()}
        for name, param in self.params.items():
            self._masks[name] = torch.empty_like(param, dtype=torch.uint8, requires_grad=False)


class _Sized(LiveState):
    """State of live weights, of which the number is known and not the places."""

    def _check(self) -> None:
        with unset_fake_temporarily():  # the trial of an optimizer compares numbers
            super()._check()

    def _pack(self, param: nn.Parameter, mask: Tensor) -> None:
        assert isinstance(self._masks, _SizedMasks)
        self._places[param] = _SizedPlaces(param, mask, self._masks.live_of[param])


class _SizedMasters(MasterState, _Sized):
    """The same with masters."""


class _SizedPlaces(_Places):
    def __init__(self, param: nn.Parameter, mask: Tensor, count: int) -> None:
        self.mask, self.shape, self.stride = mask, param.shape, param.stride()
        self._steps = torch.empty(count, dtype=torch.uint8)
        self.count, self.length = count, -(-count // _LINE) * _LINE


def _state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    return (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def enable_checkpointing(model: Any) -> None:
    """Have a transformers model compute its activations again in backward."""
    new = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.20 or so on
    (new or model.gradient_checkpointing_enable)()


def batch_of(model: nn.Module, *, size: int, tokens: int | None = None) -> dict[str, Tensor]:
    """A batch such as a Trainer would give a transformers model: of tokens or of images, with labels.

    Args:
        tokens: Of each sequence; None: 128, or as many as the model has positions for.

    Raises:
        GaPError: if the model reads something else, or has not so many positions.
    """
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    if tokens is not None and most is not None and tokens > most:
        raise GaPError(
            f"--tokens: found {tokens}, but {type(model).__name__} has {most} positions; expected at most that"
        )
    tokens = tokens or min(128, most or 128)
    kind = getattr(model, "main_input_name", None)
    by_token = any(word in type(model).__name__ for word in ("LM", "Generation", "Translation", "MTModel"))
    labels = torch.zeros((size, tokens) if by_token else (size,), dtype=torch.int64)
    if kind == "input_ids":
        return {"input_ids": torch.zeros(size, tokens, dtype=torch.int64), "labels": labels}
    if kind == "pixel_values" and isinstance(side := getattr(config, "image_size", None), int):
        return {"pixel_values": torch.zeros(size, getattr(config, "num_channels", 3), side, side), "labels": labels}
    raise GaPError(
        f"--memory: {type(model).__name__} reads '{kind}', expected a model of tokens or of images of one size"
    )
