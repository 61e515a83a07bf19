"""A dense output layer in int8, of which the largest outputs are computed anew in full precision.

The output layer of a small language model is as large as all of its sparse layers, and is read whole for every token. torch's
own int8 product (FBGEMM's, as in `quantize_dynamic`: a scale for each output, inputs rounded to 7 bits at run time) reads a quarter
of it. It may change which of two close outputs is the larger, so the best `ANEW` of every token are then multiplied
with the weight itself: greedy and beam search choose among exact values, unless the true best is not among those.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gap_hf.inference.forms import Form, _is_finite
from gap_hf.inference.zeros import Structure

INT8 = "int8"
ANEW = 32  # outputs of each token


def int8(weight: Tensor, live: Tensor, found: Structure) -> Form | None:
    """The form of an (N, K) weight. None where this build of torch has no such product, or the weight is not finite."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    whole = weight.float()
    scales = whole.abs().amax(dim=1).clamp_min(1e-12) / 127
    if not bool(torch.isfinite(scales).all()):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch 2.14 deprecates tensors of quantised types; without them there is no form
            zeros = torch.zeros(len(scales), dtype=torch.int64, device="cpu")
            packed = torch.ops.quantized.linear_prepack(
                torch.quantize_per_channel(whole, scales.double(), zeros, 0, torch.qint8), None
            )
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    num_best = min(ANEW, len(weight))

    def form(x: Tensor, bias: Tensor | None, threads: int) -> Tensor | None:
        if not _is_finite(x):
            return None
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.quantized.linear_dynamic(rows.float(), packed, True)
        best = (y if bias is None else y + bias).topk(num_best, dim=-1).indices
        exact = torch.bmm(weight[best], rows.unsqueeze(-1)).squeeze(-1)
        y = y.scatter_(-1, best, exact.float()).to(x.dtype)
        return (y if bias is None else y + bias).view(*x.shape[:-1], len(weight))

    return form
