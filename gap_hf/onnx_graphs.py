"""What goes into a model's ONNX graphs and comes out of them, by the names that optimum and transformers.js know.

A model that generates has its keys and values as inputs and outputs. An encoder–decoder is three graphs: the encoder, the decoder
without a past, which also gives the keys and values of the source, and the decoder with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from gap_hf.caches import after_source, cache_argument, filled, tensors_of
from gap_hf.errors import GaPError

ENCODER, DECODER, DECODER_WITH_PAST, MODEL = "encoder_model", "decoder_model", "decoder_with_past_model", "model"
# Of the example that is traced. No two are equal, and none is 1, or axes would be taken for one another, or for constants.
_BATCH, _SOURCE, _TARGET, _PAST = 2, 7, 3, 5


@dataclass(frozen=True)
class Graph:
    """A module to trace, what it is traced on, and the names of its inputs and outputs.

    `axes` has the argument's structure, with ``{axis: name}`` for each tensor.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    axes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def graphs_of(model: Any) -> list[Graph]:
    """The graphs of a transformers model in eval mode.

    Raises:
        GaPError: if it takes neither token ids nor pixels.
    """
    if model.main_input_name == "pixel_values":
        return [_images(model)]
    if model.main_input_name != "input_ids":
        raise GaPError(f"onnx: the model takes '{model.main_input_name}', expected input_ids or pixel_values")
    if model.config.is_encoder_decoder:
        return _seq2seq(model)
    return [_causal(model) if model.can_generate() else _tokens(model)]


def main_output(output: Any) -> str:
    """The name of what a model without a past is run for: its logits, or else its last hidden states.

    Raises:
        GaPError: if it gives neither.
    """
    for name in ("logits", "last_hidden_state"):
        if name in output:
            return name
    raise GaPError(f"the model gives {', '.join(output)}, expected logits or last_hidden_state")


class _First(nn.Module):
    """Of a model without a past: its main output."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        return output[main_output(output)]


class _Causal(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cache = model, cache_argument(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = filled(past)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **{self.cache: cache})
        return output.logits, list(tensors_of(cache))


class _Decoder(nn.Module):
    """The decoder without a past: logits, keys and values of all of its tokens and of the source."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cache = model, cache_argument(model)

    def forward(self, input_ids: Tensor, hidden: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        output = self.model(
            decoder_input_ids=input_ids,
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),  # type: ignore[arg-type]
            use_cache=True,
            **{self.cache: cache},
        )
        own, source = (list(tensors_of(part)) for part in (cache.self_attention_cache, cache.cross_attention_cache))
        return output.logits, _by_layer(own, source)


class _DecoderWithPast(nn.Module):
    """One more token: logits, and the decoder's own keys and values, longer by it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cache = model, cache_argument(model)

    def forward(self, input_ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        own, source = _apart(past)
        cache, hidden = after_source(own, source)
        output = self.model(
            decoder_input_ids=input_ids,
            attention_mask=mask,
            encoder_outputs=hidden,
            use_cache=True,
            **{self.cache: cache},
        )
        return output.logits, list(tensors_of(cache.self_attention_cache))


def _by_layer(own: Sequence[Tensor], source: Sequence[Tensor]) -> list[Tensor]:
    pairs = [(own[i], own[i + 1], source[i], source[i + 1]) for i in range(0, len(own), 2)]
    return [tensor for four in pairs for tensor in four]


def _apart(past: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    own = [tensor for i, tensor in enumerate(past) if i % 4 < 2]
    return own, [tensor for i, tensor in enumerate(past) if i % 4 >= 2]


def _names(kind: str, layers: int, parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{kind}.{i}.{part}{what}" for i in range(layers) for part in parts for what in ("key", "value"))


def _ids(model: Any, length: int) -> Tensor:
    return torch.randint(0, min(model.config.vocab_size, 100), (_BATCH, length))


def _images(model: Any) -> Graph:
    size = getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        raise GaPError(f"onnx: config.image_size is {size!r}, expected a number of pixels")
    pixels = torch.randn(_BATCH, model.config.num_channels, size, size)
    names = ("pixel_values",)
    return Graph(MODEL, _First(model, names), (pixels,), (({0: "batch"},),), names, ("logits",))


def _tokens(model: Any) -> Graph:
    names = ("input_ids", "attention_mask")
    ids, axes = _ids(model, _SOURCE), {0: "batch", 1: "sequence"}
    module = _First(model, names)
    with torch.inference_mode():
        output = main_output(model(input_ids=ids))
    return Graph(MODEL, module, (ids, torch.ones_like(ids)), ((axes, axes),), names, (output,))


def _causal(model: Any) -> Graph:
    with torch.inference_mode():
        past = [t.clone() for t in tensors_of(model(input_ids=_ids(model, _PAST), use_cache=True).past_key_values)]
    layers, ids = len(past) // 2, _ids(model, _TARGET)
    mask = torch.ones(_BATCH, _PAST + _TARGET, dtype=torch.long)
    axes = (
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "total"},
        [{0: "batch", 2: "past"}] * len(past),
    )
    inputs = ("input_ids", "attention_mask", *_names("past_key_values", layers, ("",)))
    return Graph(MODEL, _Causal(model), (ids, mask, past), axes, inputs, ("logits", *_names("present", layers, ("",))))


def _seq2seq(model: Any) -> list[Graph]:
    ids, target = _ids(model, _SOURCE), _ids(model, _PAST)
    mask = torch.ones_like(ids)
    decoder, step = _Decoder(model), _DecoderWithPast(model)
    with torch.inference_mode():
        hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state.clone()
        past = [tensor.clone() for tensor in decoder(target, hidden, mask)[1]]
    layers, both, source = len(past) // 4, ("decoder.", "encoder."), {0: "batch", 1: "source"}
    names = ("input_ids", "attention_mask")
    kept = [{0: "batch", 2: "past"}, {0: "batch", 2: "past"}, {0: "batch", 2: "source"}, {0: "batch", 2: "source"}]
    return [
        Graph(
            ENCODER,
            _First(model.get_encoder(), names),
            (ids, mask),
            ((source, source),),
            names,
            ("last_hidden_state",),
        ),
        Graph(
            DECODER,
            decoder,
            (target, hidden, mask),
            ({0: "batch", 1: "target"}, source, source),
            ("input_ids", "encoder_hidden_states", "encoder_attention_mask"),
            ("logits", *_names("present", layers, both)),
        ),
        Graph(
            DECODER_WITH_PAST,
            step,
            (target[:, :1], mask, past),
            ({0: "batch"}, source, kept * layers),
            ("input_ids", "encoder_attention_mask", *_names("past_key_values", layers, both)),
            ("logits", *_names("present", layers, ("decoder.",))),
        ),
    ]
