"""The three products of a sparse layer in training, by kernels that skip masked weights: output, and gradients of input and weight.

A layer is ``y = x @ weight.T + bias`` with an (N, K) weight. Where its mask leaves blocks of 8, 16 or 32 outputs by one input,
they are multiplied as blocks, and else as single weights (`gap_hf.inference.kernels`). The gradient of the weight is made at
its live entries, and is 0 at the others (`gap_hf.inference.gradients`). All in fp32, on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gap_hf.inference import compiled
from gap_hf.inference.forms import CompiledForm, Order, columns_of, order_of_blocks, order_of_singles
from gap_hf.inference.zeros import structure_of

PAD = 32  # gap_hf.inference.gradients.PAD, which needs llvmlite
MIN_TOKENS = 32
MIN_WEIGHTS = 2**14
# Up to which share of live weights a product is faster than dense, of blocks and of single weights: docs/lab-notebook.md.
_OUTPUT, _INPUT, _WEIGHT = (0.4, 0.25), (0.4, 0.22), (0.4, 0.15)


def is_worth_it(num_live: int, numel: int, rows: int) -> bool:
    """Whether any product of a matrix with so many live weights, in blocks of `rows` outputs, may be faster than dense."""
    return 0 < num_live <= max(limits[rows < 8] for limits in (_OUTPUT, _INPUT, _WEIGHT)) * numel


def kept_bytes(num_live: int, rows: int) -> int:
    """About what `Products` keep of a weight with so many live entries, in blocks of `rows` outputs by one input.

    A value and its place, 4 bytes each, and the input of each block; of single weights twice, for both directions.
    """
    return num_live * 8 + num_live // rows * 2 if rows >= 8 else 2 * num_live * 10


class Products:
    """Of one weight under one mask. What is kept depends on the mask alone; values are gathered when the weight has changed.

    A product of which too much is live to be faster than dense is dense.

    Args:
        mask: (N, K), not 0 is live; a view of one that lies as the weight does. At least one entry is 0 and one is not.

    Raises:
        NotCompiled: if a kernel cannot be made here.
    """

    def __init__(self, mask: Tensor) -> None:
        live, strides = mask != 0, mask.stride()
        self.num_out, self.num_in = mask.shape
        structure = structure_of(live)
        self.width = min(structure.rows, 32) if structure.rows >= 8 else 1
        output, input_, weight = (limits[self.width < 8] for limits in (_OUTPUT, _INPUT, _WEIGHT))
        self._output = self._input = self._weight = None
        if structure.density > output:
            return
        zero = int(mask.reshape(-1).argmin())  # a masked entry
        order = order_of_blocks(live, self.width) if self.width > 1 else order_of_singles(live)
        values = _Values(order, self.num_in, strides, zero)
        self._output = _Product("blocks" if self.width > 1 else "singles", self.width, live.shape, order, values)
        if structure.density <= input_ and self.width > 1:
            self._input = _Product("block inputs", self.width, live.shape, order, values, turned=True)
        elif structure.density <= input_:
            turned = live.t().contiguous()
            back = order_of_singles(turned)
            zero = zero % self.num_in * self.num_out + zero // self.num_in
            of_back = _Values(back, self.num_out, strides[::-1], zero)
            self._input = _Product("singles", 1, turned.shape, back, of_back)
        if structure.density <= weight:
            kind = "block gradients" if self.width > 1 else "single gradients"
            self._weight = _kernel(kind, self.width, live.shape)
            # gap_hf.inference.gradients.PLACED_LAYER, of which the values and the scratch are not used
            arrays = [order.starts, order.columns, order.lengths]
            starts, columns, lengths = (0 if array is None else array.data_ptr() for array in arrays)
            sizes = [self.num_in, self.num_out, len(order.starts) - 1]
            self._placed = torch.tensor(
                [*sizes, 0, starts, columns, 0, lengths, *strides], dtype=torch.int64, device="cpu"
            )

    @property
    def any_sparse(self) -> bool:
        """Whether any product skips masked weights; the output does wherever another one does."""
        return self._output is not None

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """(…, K) to (…, N); None where dense has to: `x` holds NaN or an infinity, or dense is faster."""
        return None if self._output is None else self._output(x, weight, bias)

    def input_gradient(self, gy: Tensor, weight: Tensor) -> Tensor | None:
        """(…, N) to (…, K); None where dense has to."""
        return None if self._input is None else self._input(gy, weight, None)

    def weight_gradient(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        """Of (M, N) and (M, K), in the weight's shape, 0 where it is masked; None where dense has to."""
        if self._weight is None:
            return None
        tokens = len(x)
        padded = -(-tokens // PAD) * PAD
        inputs = _transposed(x, padded)
        if self.width > 1:
            grouped = gy.view(tokens, self.num_out // self.width, self.width)
            outputs = _empty((self.num_out // self.width, padded, self.width), gy, full=padded == tokens)
            outputs[:, :tokens] = grouped.transpose(0, 1)
        else:
            outputs = _transposed(gy, padded)
        gradient = torch.zeros_like(weight)
        tensors = (self._placed, inputs, outputs, gradient)
        call = (*(t.data_ptr() for t in tensors), None, padded)
        self._weight.run(call, self._weight.threads(torch.get_num_threads()))
        return gradient

    def forget_values(self) -> None:
        """Gather the weight's values anew, although torch may not have counted a write to it."""
        for product in (self._output, self._input):
            if product is not None:
                product.values.forget()

    def num_bytes(self) -> int:
        """What is kept beside weight and mask."""
        kept = [t for p in (self._output, self._input) if p is not None for t in [p.values.places, *p.form.arrays]]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in kept}.values())


class _Values:
    """The live values of a weight in a kernel's order."""

    def __init__(self, order: Order, num_in: int, strides: tuple[int, ...], zero: int) -> None:
        at = order.places.masked_fill(order.places < 0, zero)  # what fills up is 0, and stays it
        self.places = (at // num_in * strides[0] + at % num_in * strides[1]).to(torch.int32)
        self.tensor = torch.empty(len(at), device="cpu")
        self._of: tuple[int, int] | None = None

    def forget(self) -> None:
        self._of = None

    def follow(self, weight: Tensor) -> None:
        """Gather them, if the weight has changed."""
        of = (weight.data_ptr(), weight._version)
        if of != self._of:
            torch.index_select(weight.detach().view(-1), 0, self.places, out=self.tensor)
            self._of = of


class _Product:
    def __init__(
        self, kind: str, width: int, shape: Any, order: Order, values: _Values, *, turned: bool = False
    ) -> None:
        self.values = values
        self.form = CompiledForm(_kernel(kind, width, shape), shape, order, values.tensor, turned=turned)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        self.values.follow(weight)
        return self.form(x if x.is_contiguous() else x.contiguous(), bias, torch.get_num_threads())


class NotCompiled(Exception):
    """There is no compiler here."""


def _kernel(kind: str, width: int, shape: Any) -> compiled.Compiled:
    kernel = compiled.kernel(kind, width, "f32", columns_of(shape))
    if kernel is None:
        raise NotCompiled
    return kernel


def _transposed(x: Tensor, padded: int) -> Tensor:
    """(M, K) to (K, padded), filled up with zeros."""
    out = _empty((x.shape[1], padded), x, full=padded == x.shape[0])
    out[:, : x.shape[0]] = x.t()
    return out


def _empty(shape: tuple[int, ...], like: Tensor, *, full: bool) -> Tensor:
    """Zeros, but where all of it is written."""
    return like.new_empty(shape) if full else like.new_zeros(shape)
