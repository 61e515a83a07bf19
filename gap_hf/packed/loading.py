"""Loading the packed form through transformers' own `from_pretrained`: a quantizer that unpacks, and then is gone.

Importing this registers it. The model that comes out is an ordinary dense one: it trains, and saves as any other does. A copy
lies in every packed folder, for ``trust_remote_code=True``, so of gap_hf it may import `gap_hf.packed.layout` alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.core_model_loading import ConversionOps, WeightConverter, set_param_for_module
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gap_hf.packed.layout import PackedError, parse_mask, unpack

METHOD = "gap_hf"
VERSION = 1
SUFFIX = "_mask"
_MAX_HEADER = 100_000_000
# Where there is a quantizer, transformers 5.17 does not.
_COMPARES_SHAPES = "param_needs_quantization" in inspect.unwrap(set_param_for_module).__code__.co_names
_DOT = "\\."  # as a pattern may end


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model.

    Attributes:
        version: Of the form.
        files: Each weight file's name to its ``size`` in bytes and ``sha256``.
    """

    def __init__(self, version: int = VERSION, files: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        if not isinstance(files, Mapping | None):
            raise PackedError(f"quantization_config.files is {type(files).__name__}, expected an object of file names")
        self.files = dict(files or {})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "version": self.version, "files": self.files}


def check_files(paths: Sequence[str | Path], config: PackedConfig) -> None:
    """Compare the weight files with what is recorded of them, all of them, before any is used.

    Raises:
        PackedError: if a file is missing, is one too many, or was changed, or the version is not known.
    """
    if config.version != VERSION:
        raise PackedError(
            f"quantization_config.version is {config.version!r}, expected {VERSION}, which this reader knows"
        )
    given = {Path(path).name: Path(path) for path in paths}
    if given.keys() != config.files.keys():
        name = min(given.keys() ^ config.files.keys())
        raise PackedError(
            f"{name}: is {'not recorded in config.json' if name in given else 'recorded in config.json, and missing'}"
        )
    for name, path in given.items():
        entry = config.files[name]
        if not isinstance(entry, dict) or entry.get("size") != path.stat().st_size:
            raise PackedError(f"{name}: has {path.stat().st_size} bytes, expected what config.json records")
        if sha256(path) != entry.get("sha256"):
            raise PackedError(f"{name}: SHA-256 is not what config.json records; the file was changed")


def sha256(path: Path) -> str:
    """Of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        if not path.stat().st_size:
            return hashlib.sha256().hexdigest()
        # Mapped, as it will be for loading: nothing is copied.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return hashlib.sha256(data).hexdigest()


def packed_keys(path: str | Path) -> set[str]:
    """Keys of a safetensors file that have a mask beside them.

    Raises:
        PackedError: if its header cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, Path(path).stat().st_size - 8):
            raise PackedError(f"{Path(path).name}: is not a safetensors file")
        try:
            keys = json.loads(file.read(length)).keys()
        except (ValueError, RecursionError, AttributeError):
            raise PackedError(f"{Path(path).name}: its header is not JSON") from None
    return {key for key in keys if key + SUFFIX in keys}


class Unpack(ConversionOps):
    """Values and masks to dense tensors; what has no mask passes. The first of a converter's operations."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        lists = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        masks = {_plain(key): value for key, value in lists.items() if _plain(key).endswith(SUFFIX)}
        out: dict[str, Any] = {}
        for key, values in lists.items():
            if _plain(key).endswith(SUFFIX):
                continue
            # Both lists are in the order of the keys, and only a packed tensor has one dimension where there are many.
            rest = list(masks.get(_plain(key) + SUFFIX, []))
            dense = [unpack(v, rest.pop(0)) if rest and (v.ndim == 1 or len(values) == 1) else v for v in values]
            if rest:
                raise PackedError(f"{key}: has {len(rest)} masks without values")
            out[key] = dense
        return out


class UnpackOne(Unpack):
    """The same for a tensor that no other operation follows, so that its shape is compared with the model's before memory is
    taken by it. One of another shape is a mismatch, as it is in a dense file.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        assert full_layer_name is not None
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        mask = next((value for key, value in tensors.items() if _plain(key).endswith(SUFFIX)), None)
        shape = next(iter(tensors.values())).shape if mask is None else parse_mask(mask.cpu().numpy()).shape
        expected = model.get_parameter_or_buffer(full_layer_name).shape
        if shape == expected:
            ((_, (tensor,)),) = super().convert(input_dict).items()
        elif _COMPARES_SHAPES:
            tensor = torch.empty(shape, device="meta")
        else:
            raise PackedError(f"{full_layer_name}: has shape {tuple(shape)}, expected {tuple(expected)}")
        return {full_layer_name: tensor}


class UnpackingConverter(WeightConverter):
    """A converter that is cheap to copy: transformers copies it for every tensor, and only what it collects is its own."""

    def __init__(self, source_patterns: Any, target_patterns: Any, operations: list[ConversionOps]) -> None:
        # Not WeightConverter's, which lets only sources or only targets be several: every source has its mask beside it.
        super(WeightConverter, self).__init__(source_patterns, target_patterns)
        self.operations, self.force_cpu = operations, False

    def __deepcopy__(self, memo: dict[int, Any]) -> UnpackingConverter:
        one = copy.copy(self)
        for name in ("collected_tensors", "layer_targets"):
            setattr(one, name, copy.deepcopy(getattr(self, name), memo))
        return one


def _plain(pattern: str) -> str:
    return pattern.removesuffix("$")


def _unpacking(converter: Any, leaf: str | None = None) -> UnpackingConverter:
    """A converter that unpacks first; with a leaf, of what ends in it after the converter's own patterns."""
    sources, targets = (
        [pattern if leaf is None else f"{pattern.rstrip(_DOT)}.{leaf}" for pattern in patterns]
        for patterns in (converter._original_source_patterns, converter._original_target_patterns)
    )
    # Masks first: a pattern without an end, as transformers 5.17 has them, would match both.
    masks = [f"{_plain(s)}{SUFFIX}{'$' if s.endswith('$') else ''}" for s in sources]
    ours = UnpackingConverter([*masks, *sources], targets, [Unpack(), *converter.operations])
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(converter, name):
            setattr(ours, name, getattr(converter, name))
    return ours


class PackedQuantizer(HfQuantizer):
    """Gives transformers' loader the operations that unpack, after every file was checked."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.keys: set[str] = set()
        self._dtype: torch.dtype | None = None
        self._originals: dict[int, Any] = {}

    def preprocess_model(self, model: Any, dtype: Any = None, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not checkpoint_files:
            raise PackedError("a packed model is loaded from its files; no state_dict can be given instead")
        if getattr(model.config, "distributed_config", None) is not None:
            raise PackedError("a packed model cannot be sharded while it is loaded; unpack it first (gap-hf unpack)")
        check_files(checkpoint_files, self.quantization_config)  # type: ignore[arg-type]
        self.keys = set().union(*map(packed_keys, checkpoint_files))
        self._dtype = dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if name.startswith(("F", "BF")) or "float" in name else None

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        leaves = sorted({key.rpartition(".")[2] for key in self.keys})
        updated = []
        for converter in weight_conversions:
            sources = getattr(converter, "_original_source_patterns", [])
            if isinstance(converter, WeightConverter) and any(_plain(s).endswith(tuple(leaves)) for s in sources):
                ours = _unpacking(converter)
                self._originals[id(ours)] = converter
                converter = ours
            elif isinstance(converter, WeightConverter) and not any(s.endswith("$") for s in sources):
                # Such as ``attn.Wqkv``, with anything after it: of that, what is packed comes first, and its biases remain.
                ahead = [_unpacking(converter, leaf) for leaf in leaves]
                self._originals |= {id(ours): converter for ours in ahead}
                updated += ahead
            updated.append(converter)
        own = [UnpackingConverter([f"{leaf}$", f"{leaf}{SUFFIX}$"], leaf, [UnpackOne()]) for leaf in leaves]
        self._originals |= {id(converter): None for converter in own}
        return [*updated, *own]

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        conversions = getattr(model, "_weight_conversions", None)
        self.remove_quantization_config(model)
        if conversions is not None:
            restored = [self._originals.get(id(c), c) for c in conversions]
            model._weight_conversions = list({id(c): c for c in restored if c is not None}.values())
        if "AutoConfig" in (getattr(model.config, "auto_map", None) or {}):
            del model.config.auto_map
        return model

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class PackedAutoConfig(PreTrainedConfig):
    """What config.json names under ``auto_map``: to have been imported is all that it is for."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The model's own config, from where this one was asked for."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **kwargs)


# The other of the two, gap_hf's and the copy in a model's folder, may have come first; transformers refuses a second one.
with contextlib.suppress(ValueError):
    register_quantization_config(METHOD)(PackedConfig)
with contextlib.suppress(ValueError):
    register_quantizer(METHOD)(PackedQuantizer)
