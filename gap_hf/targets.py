"""Which weights of a model may become sparse, found from the model's own modules; no list of models.

A *block* is one encoder or decoder layer, or one stage of a hierarchical network. Blocks are what
`gap_hf.partition` groups, and by default only weights inside a block are targets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from gap_hf.blocks import find_blocks
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError, nearest
from gap_hf.layouts import CONVS, TRANSPOSED_CONVS, layout_of
from gap_hf.shards import class_of


@dataclass(frozen=True)
class PrunableWeight:
    """One weight that may be sparse.

    Attributes:
        name: As in `model.named_parameters()`, without what torch.compile and DDP add (see `clean_name`).
        shape: As stored.
        layout: How to read it as outputs and inputs: ``out_in`` (out, in); ``in_out`` (in, out), GPT-2's Conv1D;
            ``conv`` (out, in / groups, *kernel); ``expert_out_in`` (experts, out, in); ``expert_in_out``
            (experts, in, out).
        block: Path of the block or stage that owns it; its own module's path if it is in none.
        module_type: Class name of the module that holds it.
        override: Its own sparsity from `GaPConfig.overrides`, else None. Where it is 0 the weight is no target.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    block: str
    module_type: str
    override: float | None

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return prod(self.shape)


@dataclass(frozen=True)
class Skipped:
    """A weight of two or more dimensions that stays dense, and why, as a short phrase."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Targets:
    """The prunable set and the rest, all in network order (the order of `model.named_parameters()`).

    `weights` and `skipped` together are every parameter of two or more dimensions, a tied one once. `blocks`
    are the owners of `weights`, each once.
    """

    weights: tuple[PrunableWeight, ...]
    skipped: tuple[Skipped, ...]
    blocks: tuple[str, ...]


def clean_name(name: str) -> str:
    """A parameter's or module's path without what torch.compile, FSDP's activation checkpointing and DDP put into it."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts[1:] if parts[0:1] == ["module"] else parts)


def find_targets(model: nn.Module, config: GaPConfig) -> Targets:
    """Find the weights of `model` that `config` makes sparse.

    Without `config.include` these are the weights of every Linear, Conv1D (GPT-2's), Conv1d/2d/3d and
    MultiheadAttention, and every 3-D expert weight, inside a block. Left dense there: routers, patch embeddings,
    gates with a single output, and depthwise convolutions, which are few weights with one input channel per
    output: there is no redundancy to remove and they are the first to break. Outside the blocks lie stems,
    embeddings, poolers and heads (`gap_hf.blocks` says how a block is told).

    `config.include` replaces that choice: whatever it names is a target wherever it lies, if it can be pruned at
    all. Tied weights (one parameter in two modules), embeddings, norms, biases, frozen and quantised weights,
    and parameters that cannot be read as outputs by inputs never can. An entry that names a module, by path or
    by type, means all that is in it. A module that is used many times, as ALBERT's layer, counts once.

    Raises:
        GaPError: if an entry of include, exclude or overrides matches nothing, one of include or overrides
            nothing that can be pruned, or nothing is left to prune.
    """
    tree = _Tree(model)
    included = [tree.select("include", i, entry) for i, entry in enumerate(config.include)]
    excluded = [tree.select("exclude", i, entry) for i, entry in enumerate(config.exclude)]
    overrides = [tree.select("overrides", i, entry) for i, (entry, _) in enumerate(config.overrides)]
    blocks = {module: clean_name(path) for module, path in find_blocks(model).items()}

    weights: list[PrunableWeight] = []
    skipped: list[Skipped] = []
    useful: set[str] = set()  # what an override may name: targets, and those that an override makes dense
    for param in tree.params:
        name, shape = param.name, tuple(param.tensor.shape)
        block = blocks.get(id(param.site.module))
        layout, reason = _read(param)
        if reason is None:
            reason = _why_dense(param, block, included, excluded)
        if layout is None or reason is not None:
            skipped.append(Skipped(name, shape, reason or "unsupported"))
            continue
        first = next((i for i, names in enumerate(overrides) if name in names), None)
        override = None if first is None else config.overrides[first][1]
        useful.add(name)
        if override == 0:
            skipped.append(Skipped(name, shape, f"sparsity 0 by gap.overrides['{config.overrides[first or 0][0]}']"))
            continue
        owner = param.site.path if block is None else block
        weights.append(PrunableWeight(name, shape, layout, owner, param.site.type_name, override))

    impossible = {param.name: reason for param in tree.params if (reason := _read(param)[1]) is not None}
    _check_useful("include", config.include, included, {p.name for p in tree.params} - impossible.keys(), impossible)
    if not weights:
        raise GaPError(_nothing_found(tree, skipped))
    entries = [entry for entry, _ in config.overrides]
    _check_useful("overrides", entries, overrides, useful, {s.name: s.reason for s in skipped})
    return Targets(tuple(weights), tuple(skipped), tuple(dict.fromkeys(weight.block for weight in weights)))


def _why_dense(
    param: _Param, block: str | None, included: Sequence[set[str]], excluded: Sequence[set[str]]
) -> str | None:
    """Why a weight that could be pruned is not; None if it is a target."""
    for i, names in enumerate(excluded):
        if param.name in names:
            return f"excluded by gap.exclude[{i}]"
    if included:
        return None if any(param.name in names for names in included) else "not matched by gap.include"
    return "outside the blocks and stages" if block is None else _dense_by_default(param)


def _check_useful(
    key: str, entries: Sequence[str], selected: Sequence[set[str]], useful: set[str], reasons: dict[str, str]
) -> None:
    """Refuse an entry that matches something, but none of the `useful` names."""
    for i, (entry, names) in enumerate(zip(entries, selected, strict=True)):
        if names & useful:
            continue
        found = next(((name, reason) for name, reason in reasons.items() if name in names), None)
        why = f"'{found[0]}' stays dense, reason: {found[1]}" if found else "all it matches has one dimension or none"
        raise GaPError(f"{_key(key, i)}: '{entry}' matches no weight that can be pruned; {why}")


def _key(key: str, index: int) -> str:
    return f"gap.{key}" if key == "overrides" else f"gap.{key}[{index}]"


# --- Reading one parameter ----------------------------------------------------------------------------------------


class _Site(NamedTuple):
    path: str
    module: nn.Module
    parent: _Site | None

    @property
    def type_name(self) -> str:
        return class_of(self.module).__name__


class _Param(NamedTuple):
    name: str
    attribute: str
    tensor: torch.Tensor
    site: _Site
    tied_to: str | None


def _read(param: _Param) -> tuple[str | None, str | None]:
    """The layout of a weight that can be pruned, or the reason why it cannot; always exactly one of the two."""
    module, tensor = param.site.module, param.tensor
    # float8 counts as floating to torch, but no optimizer trains it.
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return None, f"quantised ({tensor.dtype})"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, "an embedding" + (f", tied to {param.tied_to}" if param.tied_to else "")
    if param.tied_to is not None:
        return None, f"tied to {param.tied_to}"
    if "bias" in param.attribute:
        return None, "a bias"
    layout = layout_of(module, param.attribute, tensor)
    if layout is None and isinstance(module, TRANSPOSED_CONVS):
        return None, "a transposed convolution, which is not supported"
    if layout is None:
        return None, f"a parameter of {param.site.type_name} that cannot be read as outputs by inputs"
    return (layout, None) if tensor.requires_grad else (None, "frozen (requires_grad is False)")


def _is_norm(module: nn.Module) -> bool:
    # Every library's own norms say so: LlamaRMSNorm, DetrFrozenBatchNorm2d, timm's BatchNormAct2d. So do whole
    # layers, such as RobertaPreLayerNormLayer; a norm has vectors only.
    return "Norm" in type(module).__name__ and all(p.ndim < 2 for p in module.parameters())


def _dense_by_default(param: _Param) -> str | None:
    """Why a weight that could be pruned is not, unless `include` names it."""
    module, shape = param.site.module, param.tensor.shape
    if isinstance(module, CONVS) and module.groups > 1 and shape[1] == 1:
        return "a depthwise convolution"
    for site in (param.site, param.site.parent):
        if site is not None and site.type_name.endswith("Router"):
            return "a router"
        # Segformer and CvT have patch embeddings, of which the first reads the image, inside their stages.
        if site is not None and site.type_name.endswith(("Embed", "Embedding", "Embeddings")):
            return "a patch or position embedding"
    if isinstance(module, nn.Linear) and shape[0] == 1:
        return "a gate with a single output"
    return None


# --- Names --------------------------------------------------------------------------------------------------------


class _Tree:
    """The modules and parameters of a model under their clean names, in network order, each once."""

    def __init__(self, model: nn.Module) -> None:
        by_path: dict[str, _Site] = {}
        self.sites: list[_Site] = []
        for raw, module in model.named_modules():
            parent = by_path.get(raw.rpartition(".")[0]) if raw else None
            self.sites.append(site := _Site(clean_name(raw), module, parent))
            by_path[raw] = site
        owners: dict[int, list[tuple[str, str, torch.Tensor, _Site]]] = {}
        for site in self.sites:
            # Every name that a module gives a parameter, not only the first: two names are a tie.
            for attribute, tensor in site.module.named_parameters(recurse=False, remove_duplicate=False):
                name = f"{site.path}.{attribute}" if site.path else attribute
                owners.setdefault(id(tensor), []).append((name, attribute, tensor, site))
        # Every name of a parameter -> the module that has it there, and the first name.
        self.names = {owner[0]: (owner[3], found[0][0]) for found in owners.values() for owner in found}
        self.params: list[_Param] = [
            _Param(*found[0], tied_to=found[1][0] if len(found) > 1 else None)
            for found in owners.values()
            if found[0][2].ndim >= 2
        ]

    def select(self, key: str, index: int, entry: str) -> set[str]:
        """First names of the parameters that one entry of include, exclude or overrides matches.

        Raises:
            GaPError: if it matches no module and no parameter.
        """
        hit: dict[int, bool] = {}
        for site in self.sites:
            inherited = site.parent is not None and hit[id(site.parent)]
            hit[id(site)] = inherited or entry == site.type_name or fnmatchcase(site.path, entry)
        names = {first for name, (site, first) in self.names.items() if hit[id(site)] or fnmatchcase(name, entry)}
        if not names and not any(hit.values()):
            raise GaPError(f"{_key(key, index)}: '{entry}' matches no module{self._nearest(entry)}")
        return names

    def _nearest(self, entry: str) -> str:
        types = {site.type_name for site in self.sites}
        paths = {site.path for site in self.sites if site.path}
        if re.search(r"[*?[]", entry):
            # Offer globs for a glob: any index, and paths as long as the entry's.
            length = entry.count(".") + 1
            paths = {re.sub(r"\b\d+\b", "*", path) for path in paths}
            paths |= {"*." + ".".join(path.split(".")[1 - length :]) for path in paths if length > 1}
        return nearest(entry, paths | types) or "; " + _example(self)


def _example(tree: _Tree) -> str:
    types = Counter(param.site.type_name for param in tree.params if _read(param)[1] is None)
    if not types:
        return "the model has no weight that could be pruned"
    return f"expected a glob over module paths or a module type, such as '{types.most_common(1)[0][0]}'"


def _nothing_found(tree: _Tree, skipped: Sequence[Skipped]) -> str:
    model = [site.type_name for site in tree.sites if not site.path][-1]
    why = ""
    if skipped:
        reason, count = Counter(skip.reason for skip in skipped).most_common(1)[0]
        why = f" (skipped {count} of {len(skipped)} weights: {reason})"
    return f"gap.include: found nothing to prune in {model}{why}; {_example(tree)}"
