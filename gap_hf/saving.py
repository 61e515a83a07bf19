"""Saving a sparse model for others in either form."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gap_hf import checkpoint
from gap_hf.card_loading import change_form
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.folder_files import keys_of, replaced, weight_files
from gap_hf.folders import pack_in_place
from gap_hf.packed.loading import SUFFIX, PackedConfig, PackedQuantizer, UnpackingConverter, packed_keys
from gap_hf.pattern_names import Pattern, parse_pattern
from gap_hf.sparsifier import Sparsifier


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    masks: Sparsifier | Mapping[str, Tensor],
    *,
    packed: bool = False,
    **kwargs: Any,
) -> None:
    """Save a sparse model: as ordinary safetensors with zeros and its masks beside them, or in the packed form.

    The dense form loads anywhere. The packed one (docs/format.md) holds the values of live weights and a coded bit for each weight; it loads
    with ``import gap_hf`` before the usual ``from_pretrained``, or with ``trust_remote_code=True`` where gap_hf is not installed,
    and fails on its shapes otherwise, unless transformers is told to ignore these: with ``ignore_mismatched_sizes=True`` and no reader it
    warns and gives random weights.

    Args:
        model: Whole, in this process.
        folder: Made if need be; weights and masks of an earlier save in it are replaced.
        masks: What trained it (`trainer.gap`), or masks by parameter name: of the parameter's shape, not 0 is live.
        packed: Which form.
        **kwargs: For `model.save_pretrained`, such as ``max_shard_size``; with ``is_main_process=False`` nothing is written.

    Raises:
        GaPError: if a mask is of no parameter, a masked weight is not 0, it is to be pushed, or its packed form could not be loaded.
            Nothing is written then.
    """
    if kwargs.get("push_to_hub"):
        raise GaPError(
            "push_to_hub: found True, expected a save alone; publish with trainer.push_to_hub or `gap-hf push`"
        )
    named = {n: masks.masks[n] for n in masks.weights} if isinstance(masks, Sparsifier) else dict(masks)
    sparse = {name: mask for name, mask in named.items() if mask is not None}
    _check(model, sparse)
    if not kwargs.get("is_main_process", True):
        return
    with replaced(Path(folder)) as made:
        model.save_pretrained(made, **kwargs)
        if isinstance(masks, Sparsifier):
            checkpoint.save(made, masks, step=masks.step)
        else:
            checkpoint.write_masks(made, {n: (mask != 0).to(torch.uint8) for n, mask in sparse.items()})
        if packed:
            pattern = parse_pattern(masks.config.pattern) if isinstance(masks, Sparsifier) else None
            _pack(model, made, sparse, pattern, original=kwargs.get("save_original_format", True))
    change_form(Path(folder), packed=packed)


def _pack(
    model: PreTrainedModel, made: Path, masks: Mapping[str, Tensor], pattern: Pattern | None, *, original: bool
) -> None:
    # transformers renames and splits masks as it does weights, so that they are under the file's own keys.
    with tempfile.TemporaryDirectory(dir=made.parent) as bits:
        params = dict(model.named_parameters())
        state = {n: (m != 0).to(params[n].device, params[n].dtype) for n, m in masks.items()}
        model.save_pretrained(bits, state_dict=state, save_original_format=original)
        files = {key: path for path in weight_files(Path(bits)) for key in keys_of(path)}

        def mask_of(key: str, tensor: Tensor) -> Tensor | None:
            if key not in files:
                return None
            with safe_open(files[key], "pt") as file:
                return file.get_tensor(key)

        pack_in_place(made, mask_of, pattern)
    _check_loads(model, made)


def _check_loads(model: PreTrainedModel, made: Path) -> None:
    """Refuse what `from_pretrained` would not unpack, by the names and conversions that it goes by."""
    keys = {key for path in weight_files(made) for key in packed_keys(path)}
    quantizer = PackedQuantizer(PackedConfig())
    quantizer.keys = keys
    rules = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    for key in sorted(keys):
        (name, values), (other, mask) = (
            rename_source_key(found, renamings, converters, model.base_model_prefix, state)
            for found in (key, key + SUFFIX)
        )
        converter = by_pattern.get(values or "")
        unpacks = isinstance(converter, UnpackingConverter) and by_pattern.get(mask or "") is converter
        if not unpacks or name != other or name not in state:
            raise GaPError(
                f"{type(model).__name__}: its files name a weight '{key}', which transformers would not unpack; expected "
                "packed=False, or save_original_format=False for the model's own names"
            )


def _check(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    params = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in params:
            raise GaPError(f"masks: '{name}' is no parameter of the model{did_you_mean(name, params)}")
        weight = params[name].detach()
        if mask.shape != weight.shape:
            raise GaPError(f"masks: '{name}' has shape {tuple(mask.shape)}, expected {tuple(weight.shape)}")
        if weight.is_meta:
            raise GaPError(f"'{name}' is not in memory but offloaded; expected a model that is whole on its devices")
        if wrong := int(((weight != 0) & (mask.to(weight.device) == 0)).sum()):
            raise GaPError(f"masks: '{name}' has {wrong} masked weights that are not 0")
