"""A model's cache of keys and values, as tensors and from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

CACHES = ("cache", "past_key_values")  # what a forward calls it; transformers renamed it in 2026


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def filled(tensors: Sequence[Tensor]) -> DynamicCache:
    """A cache of the keys and values of each layer, in turn."""
    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def tensors_of(cache: Any) -> Iterator[Tensor]:
    """Keys and values of each layer, in turn."""
    for layer in cache.layers:
        yield layer.keys
        yield layer.values


def after_source(own: Sequence[Tensor], source: Sequence[Tensor]) -> tuple[EncoderDecoderCache, BaseModelOutput]:
    """The cache of a decoder that has read its source, and hidden states of the shape that it asks for and never reads."""
    cache = EncoderDecoderCache(filled(own), filled(source))
    for layer in range(len(own) // 2):
        cache.is_updated[layer] = True  # so that nothing is computed from hidden states of the source
    return cache, BaseModelOutput(last_hidden_state=source[0][:, 0])  # type: ignore[arg-type]
