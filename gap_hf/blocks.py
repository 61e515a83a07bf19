"""Blocks of a model, found from its own modules: encoder and decoder layers, stages of a hierarchical network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from gap_hf.layouts import layout_of


def find_blocks(model: nn.Module) -> dict[int, str]:
    """`id` of every module inside a block -> path of that block, as in `model.named_modules()`.

    Blocks are the outermost lists of block-like modules, and numbered siblings (ResNet's layer1 to layer4), with at
    least two weights and a norm each. Nothing in a prediction head is a block, though SSDlite's heads have norms:
    heads of detection and segmentation models are classes whose name ends in Head.

    A network without a single norm (VGG, AlexNet, SSD on VGG) has no such modules. Its layers are known by the
    activation that comes after each of them in their Sequential, and every one is a block of its own. The first one
    reads the input and is the stem; what no activation comes after is an output. Neither is a block.
    """
    if not any(_is_norm(module) for module in model.modules()):
        return _activated_layers(model)
    found: dict[int, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        blocks = _block_children(module)
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if id(child) in found or _is_head(child):
                continue
            if name in blocks:
                found.update((id(inner), child_path) for inner in child.modules() if id(inner) not in found)
            else:
                visit(child, child_path)

    visit(model, "")
    return found


def _block_children(module: nn.Module) -> set[str]:
    """Names of the children of `module` that are blocks."""
    children = dict(module.named_children())
    blocks = [name for name, child in children.items() if _is_block_like(child)]
    if isinstance(module, nn.ModuleList | nn.Sequential):
        # One block-like child among others is a whole network beside its head, so its own layers are the blocks.
        return set(blocks) if len(blocks) > 1 or len(blocks) == len(children) else set()
    stems = Counter(_stem(name) for name in blocks if _stem(name) != name)
    return {name for name in blocks if stems[_stem(name)] > 1}


def _stem(name: str) -> str:
    return re.sub(r"\d+$", "", name)


def _is_block_like(module: nn.Module) -> bool:
    """At least two weights and a norm: a layer or stage, but no input projection and no prediction head."""
    num_weights = sum(_is_weight(m, name, p) for m in module.modules() for name, p in _own_weights(m))
    return num_weights >= 2 and any(_is_norm(m) for m in module.modules())


def _activated_layers(model: nn.Module) -> dict[int, str]:
    """`find_blocks` of a network without norms."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        children = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        for (name, layer), (_, following) in pairwise(children):
            is_layer = any(_is_weight(layer, attribute, p) for attribute, p in _own_weights(layer))
            if is_layer and _is_activation(following):
                found.setdefault(id(layer), f"{path}.{name}" if path else name)
    return dict(list(found.items())[1:])


def _is_head(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Head")


def _is_norm(module: nn.Module) -> bool:
    # Every library's own norms say so: LlamaRMSNorm, DetrFrozenBatchNorm2d, timm's BatchNormAct2d. So do whole
    # layers, such as RobertaPreLayerNormLayer; a norm has vectors only.
    return "Norm" in type(module).__name__ and all(p.ndim < 2 for p in module.parameters())


def _is_activation(module: nn.Module) -> bool:
    # torch's are in torch.nn.modules.activation, transformers' in transformers.activations, and so on.
    return type(module).__module__.rpartition(".")[2] in ("activation", "activations")


def _is_weight(module: nn.Module, attribute: str, tensor: torch.Tensor) -> bool:
    return layout_of(module, attribute, tensor) is not None


def _own_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, param in module.named_parameters(recurse=False):
        if param.ndim >= 2 and "bias" not in name:
            yield name, param
