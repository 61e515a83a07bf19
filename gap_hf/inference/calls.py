"""What a decoding step is called with, and its cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from gap_hf.caches import CACHES, tensors_of

Key = tuple[Any, ...]
_IDS = {True: "decoder_input_ids", False: "input_ids"}


class StepCall:
    """What a decoding step is called with."""

    def __init__(self, kwargs: Mapping[str, Any], cache_name: str, is_seq2seq: bool) -> None:
        self.kwargs, self.cache_name, self.is_seq2seq = dict(kwargs), cache_name, is_seq2seq
        self.cache = kwargs[cache_name]
        self.tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        self.constants = {
            name: value for name, value in kwargs.items() if value is None or isinstance(value, bool | int | float)
        }
        shapes = tuple((name, value.ndim, value.dtype) for name, value in self.tensors.items())
        self.key: Key = (shapes, tuple(self.constants.items()), self.past[0].dtype, len(self.past))

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], is_seq2seq: bool) -> StepCall | None:
        """None for what is no step of one token with a cache that grows, or asks for more than logits."""
        ids = kwargs.get(_IDS[is_seq2seq])
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or ids.shape[0] == 0:
            return None
        name = next((name for name in CACHES if kwargs.get(name) is not None), "")
        if not name or not _grows(kwargs[name], is_seq2seq) or kwargs.get("return_dict") is False:
            return None
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states") or kwargs.get("use_cache") is False:
            return None
        outputs = kwargs.get("encoder_outputs")
        if is_seq2seq and (outputs is None or not isinstance(outputs[0], Tensor)):
            return None
        if not _fits(kwargs, ids, kwargs[name], is_seq2seq):
            return None
        others = [v for k, v in kwargs.items() if k not in (name, "encoder_outputs")]
        if not all(v is None or type(v) is Tensor or isinstance(v, bool | int | float) for v in others):
            return None
        return cls(kwargs, name, is_seq2seq)

    @property
    def past(self) -> list[Tensor]:
        """Keys and values of each layer, the decoder's own first, then those of the source."""
        if not self.is_seq2seq:
            return list(tensors_of(self.cache))
        return [*tensors_of(self.cache.self_attention_cache), *tensors_of(self.cache.cross_attention_cache)]

    def own(self) -> list[Tensor]:
        return list(tensors_of(self.cache.self_attention_cache if self.is_seq2seq else self.cache))

    def keep(self, own: list[Tensor]) -> None:
        """Put longer keys and values into the cache."""
        cache = self.cache.self_attention_cache if self.is_seq2seq else self.cache
        for layer, keys, values in zip(cache.layers, own[::2], own[1::2], strict=True):
            layer.keys, layer.values = keys, values

    def copy(self) -> StepCall:
        """The same call with a cache of its own; tensors are shared, as no cache changes them in place."""
        cache = copy.copy(self.cache)
        if self.is_seq2seq:
            cache.self_attention_cache = _shallow(cache.self_attention_cache)
        else:
            cache = _shallow(cache)
        return StepCall({**self.kwargs, self.cache_name: cache}, self.cache_name, self.is_seq2seq)

    def example(self, model: Any, batch: int, source: int, past: int) -> tuple[Any, Any]:
        """Inputs of a step at these sizes, like those of this call, and which of their axes vary.

        Raises:
            ValueError: for a tensor whose axes are not known.
        """
        generator = torch.Generator().manual_seed(0)
        tensors, axes = [], []
        for name, value in self.tensors.items():
            if name == _IDS[self.is_seq2seq]:
                size = min(model.config.get_text_config(decoder=True).vocab_size, 100)
                made = torch.randint(0, size, (batch, 1), generator=generator, device="cpu")
                axis: dict[int, Any] = {0: Dim.DYNAMIC}
            elif name == "attention_mask" and value.ndim == 2:
                made = torch.ones(batch, source if self.is_seq2seq else past + 1, dtype=torch.long, device="cpu")
                made[0, 0] = 0
                axis = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
            elif name == "position_ids" and value.shape == (len(self.kwargs[_IDS[self.is_seq2seq]]), 1):
                made, axis = torch.full((batch, 1), past, device="cpu"), {0: Dim.DYNAMIC}
            elif name == "cache_position" and value.shape == (1,):
                made, axis = torch.full((1,), past, device="cpu"), {}
            else:
                raise ValueError(f"it is called with {name} of shape {tuple(value.shape)}")
            tensors.append(made.to(value))
            axes.append(axis)
        kept, own = [], len(self.own())
        for number, value in enumerate(self.past):
            shape = (batch, value.shape[1], past if number < own else source, value.shape[3])
            kept.append(torch.randn(shape, generator=generator, device="cpu").to(value))
        return (tensors, kept), (axes, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * len(kept))


def _fits(kwargs: Mapping[str, Any], ids: Tensor, cache: Any, is_seq2seq: bool) -> bool:
    """Whether masks and positions are of the usual shapes; transformers makes the best of others."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    layer = cache.cross_attention_cache.layers[0] if is_seq2seq else cache.layers[0]
    total = layer.keys.shape[2] + (0 if is_seq2seq else 1)
    has_mask = not isinstance(mask, Tensor) or mask.shape == (len(ids), total)
    return has_mask and (not isinstance(positions, Tensor) or positions.shape == ids.shape)


def _grows(cache: Any, is_seq2seq: bool) -> bool:
    """Whether a cache is of the kind that joins keys and values to those it has, and has some."""
    if is_seq2seq:
        if type(cache) is not EncoderDecoderCache or not all(cache.is_updated.values()):
            return False
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return len(parts[0].layers) == len(parts[1].layers) and all(_grows(part, False) for part in parts)
    return type(cache) is DynamicCache and bool(cache.layers) and all(map(_holds, cache.layers))


def _holds(layer: Any) -> bool:
    is_known = type(layer) is DynamicLayer and layer.is_initialized
    return is_known and cast(Any, layer).keys.ndim == 4 and cast(Any, layer).keys.shape[2] > 0


def _shallow(cache: Any) -> Any:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
