"""Training that skips masked weights: sparse layers compute their output and gradients by kernels, on a CPU.

    with sparse_compute(sparsifier):
        ...                             # the training loop

Every Linear and Conv1D (GPT-2's) with a mask that leaves few enough weights becomes a layer of `Products` while it is open;
masks are followed as they change. Weights, gradients, optimizers and files are what they are without it, dense tensors with
zeros in them. Outputs and gradients are dense's up to the order of additions in fp32.

What decides between dense and sparse is a rule, not a stopwatch, so that a run and its resume compute the same numbers.
**Dense runs** in a layer that is grown, under autocast and `torch.compile`, in other types than fp32, for fewer than
`MIN_TOKENS` tokens, for inputs that hold NaN or an infinity, on GPUs, and where no kernel can be compiled. Gradients of masked
weights are 0, but in a step that chooses by them what grows; there they are whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from gap_hf.errors import GaPError
from gap_hf.inference import compiled
from gap_hf.inference.layers import CopiesAreOrdinary, SparseConv1D, SparseLinear
from gap_hf.sparse_products import MIN_TOKENS, MIN_WEIGHTS, NotCompiled, Products, is_worth_it

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier


@contextmanager
def sparse_compute(sparsifier: Sparsifier) -> Iterator[None]:
    """Let the sparse layers of a sparsifier's model skip masked weights while this is open.

    What is written to a weight through ``.data`` torch does not count, and is not seen before the next change of masks: write
    to it under ``torch.no_grad()``.

    Args:
        sparsifier: Its model is on a CPU and in fp32; what is not stays dense.

    Raises:
        GaPError: if a weight is sharded.
    """
    install(sparsifier)
    try:
        yield
    finally:
        remove(sparsifier.model)


def install(sparsifier: Sparsifier) -> list[str]:
    """Make the layers ready; until `remove` they follow the sparsifier's masks.

    Returns:
        Names of the weights that may be computed with sparsely.

    Raises:
        GaPError: if a weight is sharded.
    """
    for name, part in sparsifier.masks.parts.items():
        if part.peers.num_ranks > 1:
            raise GaPError(
                f"gap.sparse_compute: '{name}' is sharded, expected whole weights; set sparse_compute: false"
            )
    remove(sparsifier.model)
    if not compiled.available():  # which says so
        return []
    found = layers_of(sparsifier.model, {param: name for name, param in sparsifier.masks.params.items()})
    for module, name in found.items():
        cast(Any, module).__class__ = _SPARSE[type(module)]
        module.gap_product = cast(Any, _Computed(sparsifier, name))
    return list(found.values())


def layers_of(model: nn.Module, names: Mapping[nn.Parameter, str]) -> dict[nn.Module, str]:
    """The layers that may compute sparsely, with the names of their weights."""
    found = {}
    for module in model.modules():
        # Somebody, such as accelerate's hooks, has replaced the forward of this one module; or a subclass has.
        if type(module) not in _SPARSE or "forward" in vars(module):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight in names and MIN_WEIGHTS <= weight.numel() < 2**31:
            found[module] = names[weight]
    return found


def remove(model: nn.Module | None) -> None:
    """Make the layers ordinary again."""
    for module in () if model is None else model.modules():
        if type(module) in _ORDINARY:
            cast(Any, module).__class__ = _ORDINARY[type(module)]
            del module.gap_product


class _Computed:
    """What one layer computes with, under the mask that it has now."""

    def __init__(self, sparsifier: Sparsifier, name: str) -> None:
        self.sparsifier, self.name = sparsifier, name
        self._mask: Tensor | None = None
        self._writes = 0
        self._products: Products | None = None

    def __call__(self, layer: _Layer, x: Tensor) -> Tensor:
        weight = cast(Tensor, layer._parameters["weight"])
        products = self.products(layer, weight) if _is_allowed(x, weight) else None
        if products is None or x.shape[-1] != products.num_in or x.numel() < MIN_TOKENS * products.num_in:
            return layer.dense(x)
        return cast(Tensor, _Product.apply(x, weight, layer._parameters["bias"], self, products, layer.matrix))

    def products(self, layer: _Layer, weight: Tensor) -> Products | None:
        """None where dense is faster, or there is no mask."""
        if (mask := self.sparsifier.masks[self.name]) is not self._mask:
            self._mask, self._products = mask, None
            # How live weights lie is looked at only where blocks, which gain the soonest, would gain.
            num_live = self.sparsifier.masks.live(self.name)
            if mask is not None and is_worth_it(num_live, mask.numel(), rows=8) and weight.is_contiguous():
                self._products = _made(layer.matrix(mask.contiguous()))  # as the weight lies
        elif self._products is not None and self._writes != self.sparsifier.masks.writes:
            self._products.forget_values()
        self._writes = self.sparsifier.masks.writes
        return self._products

    @property
    def needs_whole_gradient(self) -> bool:
        return self.sparsifier.needs_dense_gradients


def _made(mask: Tensor) -> Products | None:
    try:
        products = Products(mask)
    except NotCompiled:
        return None
    return products if products.any_sparse else None


def _is_allowed(x: Tensor, weight: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return False
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return x.is_cpu and weight.is_cpu and not is_traced and not torch.is_autocast_enabled("cpu")


class _Product(torch.autograd.Function):
    """``x @ matrix(weight).T + bias``, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, computed: _Computed, products: Products, matrix: Any
    ) -> Tensor:
        y = products.output(x, weight, bias)
        ctx.finite = y is not None
        ctx.computed, ctx.products, ctx.matrix, ctx.has_bias = computed, products, matrix, bias is not None
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, matrix(weight), bias) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        products: Products = ctx.products
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gy = gy.contiguous()
        flat = gy.view(-1, gy.shape[-1])
        gx = of_weight = None
        if needs_x:
            gx = products.input_gradient(gy, weight) if ctx.finite else None
            gx = gy @ ctx.matrix(weight) if gx is None else gx
        if needs_weight:
            inputs = x.reshape(-1, x.shape[-1])
            skips = ctx.finite and not ctx.computed.needs_whole_gradient
            of_weight = products.weight_gradient(flat, inputs, weight) if skips else None
            of_weight = ctx.matrix(flat.t() @ inputs) if of_weight is None else of_weight
        of_bias = flat.sum(0) if ctx.has_bias and needs_bias else None
        return gx, of_weight, of_bias, None, None, None


class _SparseLinear(CopiesAreOrdinary, SparseLinear):
    gap_product: Any


class _SparseConv1D(CopiesAreOrdinary, SparseConv1D):
    gap_product: Any


_Layer = _SparseLinear | _SparseConv1D
_SPARSE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _SparseLinear, Conv1D: _SparseConv1D}
_ORDINARY = {sparse: ordinary for ordinary, sparse in _SPARSE.items()}
