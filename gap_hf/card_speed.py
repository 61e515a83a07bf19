"""How long a sparse model takes beside the same model without zeros, where somebody asks."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gap_hf.errors import GaPError
from gap_hf.folder_files import read_config

ROUNDS, TOKENS, SECONDS = 20, 64, 30.0


def measure_speed(folder: Path) -> str:
    """Time forward passes, interleaved with those of a copy whose zeros are filled, and say it in a sentence.

    Raises:
        GaPError: if transformers has no class for the model, or it takes neither token ids nor pixels.
    """
    import gap_hf.packed.loading  # noqa: F401 - a packed folder loads with it

    names = read_config(folder).get("architectures") or [""]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise GaPError(f"{folder}: transformers has no class '{names[0]}', so its speed cannot be measured")
    sparse = cls.from_pretrained(folder).eval()
    dense = copy.deepcopy(sparse)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.where(parameter == 0, torch.randn_like(parameter) * 0.02, parameter))
    inputs, what = _inputs(sparse)
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    with torch.inference_mode():
        began = time.perf_counter()
        for number in range(ROUNDS + 2):
            if number >= 5 and time.perf_counter() - began > SECONDS:
                break
            for name, model in (("sparse", sparse), ("dense", dense)):
                start = time.perf_counter()
                model(**inputs)
                if number >= 2:  # the first ones find nothing in the caches
                    times[name].append(time.perf_counter() - start)
    ratios = [s / d for s, d in zip(times["sparse"], times["dense"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return (
        f"A forward pass of {what} takes {ratio:.2f} × the time of the same model with its zeros filled (median of {len(ratios)} rounds, "
        f"interleaved in one process, half of them from {low:.2f} to {high:.2f}; {1e3 * statistics.median(times['sparse']):.1f} ms on a CPU, "
        f"{torch.get_num_threads()} threads), through plain transformers, which makes no use of zeros."
    )


def _inputs(model: Any) -> tuple[Mapping[str, Tensor], str]:
    config = model.config
    if model.main_input_name == "input_ids":
        length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
        tokens = torch.randint(0, config.vocab_size, (1, length))
        extra = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        return {"input_ids": tokens, **extra}, f"1 × {length} tokens"
    if model.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        return {"pixel_values": torch.randn(1, config.num_channels, size, size)}, f"one image of {size} × {size} pixels"
    raise GaPError(f"speed: the model takes '{model.main_input_name}', expected input_ids or pixel_values")
