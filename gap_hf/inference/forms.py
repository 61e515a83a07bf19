"""The forms that a sparse (N, K) weight can take, each with the operation that multiplies by it.

A form is built from the weight and a bool matrix of what is live in it, and holds the live values as they are. It is called
with `x` of shape (…, K), contiguous and of the weight's dtype, the bias or None, and a number of threads. It returns
(…, N), or None where dense has to run: `x` holds NaN or an infinity, which times a masked weight are NaN, and a form that skips it
cannot know, or a kernel cannot read the bias.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gap_hf.inference import compiled
from gap_hf.inference.zeros import Structure

Form = Callable[[Tensor, Tensor | None, int], Tensor | None]
_VALUES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SLICE = 8  # gap_hf.inference.kernels.SLICE, which needs llvmlite


class CompiledForm:
    """What both kernels need: addresses of the packed weight, and a call.

    Args:
        shape: (N, K) of the weight.
        values: In the order's places, of the weight's dtype; they may be overwritten with others.
        turned: The kernel takes rows of N numbers and gives rows of K.
    """

    def __init__(
        self, kernel: compiled.Compiled, shape: Sequence[int], order: Order, values: Tensor, *, turned: bool = False
    ) -> None:
        num_out, num_in = shape
        self.takes, self.gives = (num_out, num_in) if turned else (num_in, num_out)
        self.dtype, self.always_scratch = values.dtype, turned
        arrays = [order.starts, order.columns, values] + ([] if order.lengths is None else [order.lengths])
        self.arrays, self.scratch = arrays, kernel.scratch(num_out, num_in)
        sizes = [num_in, num_out, len(order.starts) - 1, self.scratch]
        self.layer = torch.tensor([*sizes, *(array.data_ptr() for array in arrays)], dtype=torch.int64, device="cpu")
        self.no_bias = torch.zeros(self.gives, device="cpu")
        self.shape, self.kernel = shape, kernel
        self._layer_address, self._no_bias_address = self.layer.data_ptr(), self.no_bias.data_ptr()

    def matrix(self) -> Tensor:
        """The (N, K) weight, made anew of its live values."""
        num_out, num_in = self.shape
        starts, columns, values, *lengths = self.arrays
        starts, columns = starts.long(), columns.long()
        group = torch.arange(len(starts) - 1, device="cpu").repeat_interleave(starts.diff())
        if not lengths:
            width = num_out // (len(starts) - 1)
            output = group[:, None] * width + torch.arange(width, device="cpu")
            column = columns[:, None].expand_as(output)
            is_live = torch.ones_like(output, dtype=torch.bool)
        else:
            output = group[:, None] * _SLICE + torch.arange(_SLICE, device="cpu")
            rank = torch.arange(len(group), device="cpu") - starts[group]
            length = torch.nn.functional.pad(lengths[0], (0, -num_out % _SLICE))
            is_live, column = rank[:, None] < length[output], columns.view(-1, _SLICE)
        out = torch.zeros(num_out, num_in, dtype=self.dtype, device="cpu")
        out[output[is_live], column[is_live]] = values.view(output.shape)[is_live]
        return out

    def __call__(self, x: Tensor, bias: Tensor | None, threads: int) -> Tensor | None:
        if not can_read(bias, self.gives, self.dtype):
            return None
        tokens = x.numel() // self.takes
        if self.dtype is not torch.float32:
            x, bias = x.float(), None if bias is None else bias.float()
        y = x.new_empty((*x.shape[:-1], self.gives))
        threads = self.kernel.threads(threads)
        if self.scratch and (tokens > 1 or self.always_scratch):
            scratch = torch.empty(threads * self.scratch, device="cpu")
            scratch_address = scratch.data_ptr()
        else:
            scratch_address = None
        bias_address = self._no_bias_address if bias is None else bias.data_ptr()
        call = (self._layer_address, x.data_ptr(), bias_address, y.data_ptr(), scratch_address, tokens)
        if self.kernel.run(call, threads):
            return None
        return y if self.dtype is torch.float32 else y.to(self.dtype)

    def bind(self, shape: torch.Size, bias: Tensor | None, threads: int) -> Callable[[Tensor], Tensor | None]:
        """The same call for fp32 inputs of one shape, with what does not change worked out; what `bias` holds may."""
        tokens = math.prod(shape) // self.takes
        if self.dtype is not torch.float32 or (self.scratch and (tokens > 1 or self.always_scratch)):
            return lambda x: self(x, bias, threads)
        out, kernel = (*shape[:-1], self.gives), self.kernel
        bias = self.no_bias if bias is None else bias

        def call(x: Tensor) -> Tensor | None:
            if not can_read(bias, self.gives, self.dtype):
                return None
            y = x.new_empty(out)
            given = (self._layer_address, x.data_ptr(), bias.data_ptr(), y.data_ptr(), None, tokens)
            return None if kernel.run(given, kernel.threads(threads)) else y

        return call


def can_read(bias: Tensor | None, num_out: int, dtype: torch.dtype) -> bool:
    """Whether a bias is as kernels expect it: a number for each output, of the weight's type, side by side."""
    return bias is None or (bias.dtype is dtype and bias.shape == (num_out,) and bias.is_contiguous())


def blocks(weight: Tensor, live: Tensor, structure: Structure) -> Form | None:
    """Blocks of 8, 16 or 32 outputs by one input, compiled. None where there are none, or nothing can be compiled."""
    width = min(structure.rows, 32)
    if width < 8 or not is_packable(weight):
        return None
    kernel = compiled.kernel("blocks", width, _VALUES[weight.dtype], columns_of(weight.shape))
    return None if kernel is None else _filled(kernel, weight, order_of_blocks(live, width))


def singles(weight: Tensor, live: Tensor, structure: Structure) -> Form | None:
    """Single weights, compiled."""
    if not is_packable(weight):
        return None
    kernel = compiled.kernel("singles", 1, _VALUES[weight.dtype], columns_of(weight.shape))
    return None if kernel is None else _filled(kernel, weight, order_of_singles(live))


class Order(NamedTuple):
    """Where a kernel finds what it multiplies, of an (N, K) weight.

    Attributes:
        starts: (groups + 1,) int32, where each group's items start.
        columns: The input of each item, uint16 or int32.
        places: int64, where each value stands in the weight, row by row; -1 for one that fills up, which is 0.
        lengths: (N,) int32, live weights of each output; None for blocks.
    """

    starts: Tensor
    columns: Tensor
    places: Tensor
    lengths: Tensor | None = None


def order_of_blocks(live: Tensor, width: int) -> Order:
    """Of blocks of `width` outputs by one input, group by group."""
    num_in, of_group = live.shape[1], live[::width]
    group, column = of_group.nonzero(as_tuple=True)
    outputs = torch.arange(width, device=live.device) * num_in
    places = (group * width * num_in + column)[:, None] + outputs
    return Order(_starts(of_group.sum(dim=1)), _narrow(column, live.shape), places.view(-1))


def order_of_singles(live: Tensor) -> Order:
    """The j-th live weights of eight neighbouring outputs lie side by side, as in sliced ELL (Monakov et al. 2010); an output
    with fewer than its neighbours is filled up.
    """
    lengths = live.sum(dim=1)
    padded = torch.nn.functional.pad(lengths, (0, -len(lengths) % _SLICE))
    starts = _starts(padded.view(-1, _SLICE).max(dim=1).values)
    output, column = live.nonzero(as_tuple=True)
    before = lengths.cumsum(dim=0) - lengths
    rank = torch.arange(len(output), device=live.device) - before[output]
    at = (starts[output // _SLICE].long() + rank) * _SLICE + output % _SLICE
    columns = torch.zeros(int(starts[-1]) * _SLICE, dtype=torch.int64, device=live.device)
    places = torch.full_like(columns, -1)
    columns[at], places[at] = column, output * live.shape[1] + column
    return Order(starts, _narrow(columns, live.shape), places, lengths.to(torch.int32))


def _filled(kernel: compiled.Compiled, weight: Tensor, order: Order) -> CompiledForm:
    values = weight.reshape(-1)[order.places.clamp_min(0)].masked_fill_(order.places < 0, 0)
    return CompiledForm(kernel, weight.shape, order, values)


def is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _VALUES and 0 < weight.numel() < 2**31


def columns_of(shape: Sequence[int]) -> str:
    """The kind of the kernel's columns for an (N, K) weight."""
    return "u16" if shape[1] <= 2**16 else "i32"


def _narrow(columns: Tensor, shape: Sequence[int]) -> Tensor:
    return columns.to(torch.int32).to(torch.uint16 if columns_of(shape) == "u16" else torch.int32)


def _starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).to(torch.int32)


def torch_csr(weight: Tensor, live: Tensor, structure: Structure) -> Form | None:
    """torch's own CSR product (MKL on x86), fp32 on a CPU."""
    if weight.device.type != "cpu" or weight.dtype is not torch.float32:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = (weight * live).to_sparse_csr()

    def form(x: Tensor, bias: Tensor | None, threads: int) -> Tensor | None:
        if not _is_finite(x):
            return None
        y = (matrix @ x.view(-1, x.shape[-1]).t()).t()
        return (y if bias is None else y + bias).contiguous().view(*x.shape[:-1], y.shape[-1])

    return form


def gathered(weight: Tensor, live: Tensor, structure: Structure) -> Form | None:
    """Blocks without a compiler: the live inputs of each group are gathered and multiplied in one batch of small products.
    A group with fewer blocks than the fullest is filled up with zeros.
    """
    rows = structure.rows
    if rows < 8 or weight.device.type != "cpu" or weight.dtype not in _VALUES:
        return None
    num_out, num_in = weight.shape
    of_group = live.view(num_out // rows, rows, num_in).any(dim=1)
    longest = int(of_group.sum(dim=1).max())
    # A stable sort puts the live columns first, in order; those after them are multiplied by 0.
    index = (~of_group).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    values = (
        (weight * live).view(len(of_group), rows, num_in).gather(2, index[:, None].expand(-1, rows, -1)).contiguous()
    )
    flat = index.reshape(-1)

    def form(x: Tensor, bias: Tensor | None, threads: int) -> Tensor | None:
        if not _is_finite(x):
            return None
        inputs = x.view(-1, num_in).t().index_select(0, flat).view(len(of_group), longest, x.numel() // num_in)
        y = (values @ inputs).view(num_out, x.numel() // num_in).t()
        return (y if bias is None else y + bias).contiguous().view(*x.shape[:-1], num_out)

    return form


def _is_finite(x: Tensor) -> bool:
    # Finite inputs whose sum is not finite are taken for others, and run dense: slower, never wrong.
    return math.isfinite(x.sum(dtype=torch.float32).item())


def fits_tensor_cores(weight: Tensor, structure: Structure) -> bool:
    """Whether an (N, K) weight may run as 2:4 on its GPU: cuSPARSELt takes half precision, in tiles of 16 x 16."""
    is_half = weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)
    return is_half and structure.pattern in ("2:4", "1:4") and all(size % 16 == 0 for size in weight.shape)


def two_of_four(weight: Tensor, live: Tensor, structure: Structure) -> Form | None:
    """2:4 on the tensor cores of a GPU, through torch core's `to_sparse_semi_structured`; None where type, shape or GPU do
    not allow it.
    """
    if not fits_tensor_cores(weight, structure):
        return None
    from torch.sparse import to_sparse_semi_structured

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype")
            packed = to_sparse_semi_structured((weight * live).contiguous())
    except (RuntimeError, ValueError, NotImplementedError):
        return None

    def form(x: Tensor, bias: Tensor | None, threads: int) -> Tensor | None:
        if not bool(torch.isfinite(x).all()):
            return None
        y = torch.nn.functional.linear(x.view(-1, x.shape[-1]), packed, bias)
        return y.contiguous().view(*x.shape[:-1], weight.shape[0])  # some versions of torch give it column by column

    return form


# In the order in which they are tried. What needs no compiler stands in for what does.
FORMS: Mapping[str, Callable[[Tensor, Tensor, Structure], Form | None]] = {
    "blocks": blocks,
    "singles": singles,
    "torch csr": torch_csr,
    "gathered blocks": gathered,
    "2:4 tensor cores": two_of_four,
}


COMPILED = ("blocks", "singles")  # those that take a number of threads


def candidates(structure: Structure, device: str) -> tuple[str, ...]:
    """Names of the forms that are worth measuring."""
    if device == "cuda":
        return ("2:4 tensor cores",)
    if not compiled.available():
        return ("gathered blocks", "torch csr") if structure.rows > 1 else ("torch csr",)
    return ("blocks",) if structure.rows > 1 else ("singles", "torch csr")
