"""How a weight reads as outputs by inputs, told from the module that holds it."""

from __future__ import annotations

import torch
from torch import nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def layout_of(module: nn.Module, attribute: str, tensor: torch.Tensor) -> str | None:
    if attribute == "weight" and isinstance(module, nn.Linear):
        return "out_in"
    if attribute == "weight" and _is_transposed_linear(module):
        return "in_out"
    if attribute == "weight" and isinstance(module, CONVS):
        return "conv"
    if attribute in _ATTENTION_WEIGHTS and isinstance(module, nn.MultiheadAttention):
        return "out_in"
    return _expert_layout(module, tensor)


def _is_transposed_linear(module: nn.Module) -> bool:
    """GPT-2's Conv1D, told by its home so that this module does not need transformers."""
    names = {(cls.__module__, cls.__name__) for cls in type(module).__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in names


def _expert_layout(module: nn.Module, tensor: torch.Tensor) -> str | None:
    """Layout of an expert weight (experts, a, b), or None where nothing says which of a and b is the output."""
    if tensor.ndim != 3:
        return None
    # transformers' use_experts_implementation sets this on nearly every experts module.
    transposed = vars(module).get("is_transposed")
    if isinstance(transposed, bool):
        return "expert_in_out" if transposed else "expert_out_in"
    # JetMoe's names both sides. Where they are equal nothing tells which is which.
    num_out, num_in = vars(module).get("output_size"), vars(module).get("input_size")
    if num_out != num_in and tuple(tensor.shape[1:]) == (num_out, num_in):
        return "expert_out_in"
    if num_out != num_in and tuple(tensor.shape[1:]) == (num_in, num_out):
        return "expert_in_out"
    # The others (Llama 4): a fused gate-and-up matrix of width 2i beside a down matrix of width i. No pair of
    # shapes fits both readings, nor both orders.
    stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    for up in stacked:
        for down in stacked:
            if up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]:
                return "expert_out_in"
            if up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]:
                return "expert_in_out"
    return None
