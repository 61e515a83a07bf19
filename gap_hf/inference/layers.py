"""Layers with a sparse product. A layer becomes one by changing its class, as torch's `fully_shard` does it: module, parameters,
names, hooks and ties stay what they are, and changing the class back is all there is to undo.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gap_hf.inference.choice import ends_of
from gap_hf.inference.forms import Form
from gap_hf.inference.product import Product


class SparseLinear(nn.Linear):
    """A Linear that multiplies by its live weights alone where that is faster."""

    gap_product: Product

    def forward(self, input: Tensor) -> Tensor:
        return self.gap_product(self, input)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def num_tokens(self, x: Tensor) -> int:
        num_in = self._parameters["weight"].shape[-1]  # type: ignore[union-attr]  # somebody may have put a narrower one there
        return x.numel() // num_in if x.shape[-1] == num_in else 0

    def dense(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]

    def sparse(self, x: Tensor, form: Form, threads: int) -> Tensor | None:
        return form(x if x.is_contiguous() else x.contiguous(), self._parameters["bias"], threads)

    def samples(self, x: Tensor, range_: int) -> list[Tensor]:
        return [_random((tokens, self.weight.shape[-1]), x) for tokens in ends_of(range_)]

    def kind(self) -> str:
        return ""


class SparseConv1D(Conv1D):
    """GPT-2's layer, of which the weight is (K, N)."""

    gap_product: Product

    def forward(self, x: Tensor) -> Tensor:
        return self.gap_product(self, x)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def num_tokens(self, x: Tensor) -> int:
        num_in = self._parameters["weight"].shape[0]  # type: ignore[union-attr]
        return x.numel() // num_in if x.shape[-1] == num_in else 0

    def dense(self, x: Tensor) -> Tensor:
        return Conv1D.forward(self, x)

    def sparse(self, x: Tensor, form: Form, threads: int) -> Tensor | None:
        return form(x if x.is_contiguous() else x.contiguous(), self._parameters["bias"], threads)

    def samples(self, x: Tensor, range_: int) -> list[Tensor]:
        return [_random((tokens, self.weight.shape[0]), x) for tokens in ends_of(range_)]

    def kind(self) -> str:
        return " (in, out)"


class CopiesAreOrdinary:
    """Copies and pickles of such a module, as an average of weights makes them, are of the ordinary class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (self.ordinary_class(),), self.ordinary_state()

    def ordinary_class(self) -> type:
        """The class that it would have."""
        return next(cls for cls in type(self).__mro__ if cls in SPARSE)

    def ordinary_state(self) -> dict[str, Any]:
        """What the ordinary module would have."""
        return {key: value for key, value in vars(self).items() if key not in ("gap_product", "gap_step")}


class SparseConv2d(nn.Conv2d):
    """A convolution as a product: places are tokens, and their inputs are the channels under the kernel."""

    gap_product: Product

    def forward(self, input: Tensor) -> Tensor:
        return self.gap_product(self, input)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def num_tokens(self, x: Tensor) -> int:
        if x.ndim != 4 or self.weight.shape[1:] != (x.shape[1], *self.kernel_size):
            return 0
        height, width = self._places(x)
        return x.shape[0] * height * width if min(height, width) > 0 else 0

    def dense(self, x: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, x)

    def sparse(self, x: Tensor, form: Form, threads: int) -> Tensor | None:
        if self.kernel_size == self.stride == (1, 1) and self._padding == (0, 0):
            patches = x.permute(0, 2, 3, 1).contiguous()
        else:
            # (batch, channels * kernel, places)
            columns = nn.functional.unfold(x, self.kernel_size, self.dilation, self._padding, self.stride)
            patches = columns.transpose(1, 2).contiguous().view(len(x), *self._places(x), -1)
        out = form(patches, self._parameters["bias"], threads)
        if out is None:
            return None
        out = out.permute(0, 3, 1, 2)
        return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()

    def samples(self, x: Tensor, range_: int) -> list[Tensor]:
        return [_random(x.shape, x)]

    def kind(self) -> str:
        return f" conv {self.kernel_size} {self.stride} {self.padding} {self.dilation}"

    @property
    def _padding(self) -> tuple[int, int]:
        assert not isinstance(self.padding, str)
        return self.padding[0], self.padding[1]

    def _places(self, x: Tensor) -> tuple[int, int]:
        height, width = (
            (x.shape[2 + i] + 2 * self._padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return height, width


SPARSE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SparseLinear,
    Conv1D: SparseConv1D,
    nn.Conv2d: SparseConv2d,
}
ORDINARY = {sparse: ordinary for ordinary, sparse in SPARSE.items()}


def why_not(module: nn.Module) -> str | None:
    """Why a layer of one of these classes cannot be a product, or None."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return "a grouped convolution"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"a convolution with padding '{module.padding}', {module.padding_mode}"
    return None


def _random(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    # With a generator of its own, so that the user's random numbers are not touched.
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0), device="cpu").to(like)
