"""Layers that keep their live weights alone: the dense weight is given up, and made again only where something asks for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gap_hf.errors import GaPError
from gap_hf.inference.forms import FORMS, CompiledForm, candidates
from gap_hf.inference.layers import ORDINARY, CopiesAreOrdinary, SparseConv1D, SparseLinear
from gap_hf.inference.product import Layer, Packed, Product, is_allowed, is_recorded
from gap_hf.inference.zeros import structure_of


class _Passed(torch.autograd.Function):
    """The second tensor, as if it were the first: what is asked of its gradient goes there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(placeholder: Tensor, made: Tensor) -> Tensor:  # type: ignore[override]
        return made.view_as(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class AloneProduct(Product):
    """Stands in a layer for a weight that is there no more.

    Attributes:
        form: Holds the live values.
        placeholder: The layer's parameter now: of the weight's shape and type, one NaN in memory, so that whoever reads the
            weight past the layer notices. Once somebody has changed it, it counts as a weight that was given to the layer.
    """

    def __init__(self, form: CompiledForm, placeholder: nn.Parameter, packed: Packed) -> None:
        super().__init__()
        self.form, self.placeholder, self.packed = form, placeholder, packed
        self._nothing = placeholder.detach()  # held, so that nothing else is put at its address
        self._looked_at: weakref.ref[Tensor] | None = None  # what was in the placeholder's place

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's output; dense where an input is not finite or gradients are asked for."""
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if not self.is_untouched(weight):
            self._check_given(weight)
            return layer.dense(x)
        out = None
        if is_allowed(x, weight, bias) and layer.num_tokens(x):
            out = layer.sparse(x, self.form, torch.get_num_threads())
        if out is not None:
            return out
        matrix = self.form.matrix()
        if weight.requires_grad and torch.is_grad_enabled():
            made = layer.matrix(matrix)  # turning twice is turning back
            matrix = layer.matrix(cast(Tensor, _Passed.apply(weight, made)))
        return nn.functional.linear(x, matrix, bias)

    def is_untouched(self, weight: Tensor) -> bool:
        """Whether a layer's weight is the placeholder as it was made."""
        if weight is not self.placeholder or self.packed is None:
            return False
        return _is_of_outside(self.packed, weight) if torch.compiler.is_compiling() else self.packed.is_of(weight)

    def _check_given(self, weight: Tensor) -> None:
        is_known = self._looked_at is not None and self._looked_at() is weight
        if is_known or weight.is_meta or is_recorded(weight):
            return
        try:
            is_nothing = bool(weight.flatten()[:1].isnan()) and bool(weight.isnan().all())
        except RuntimeError:  # under torch.func it cannot be looked at
            return
        if is_nothing:
            raise GaPError(
                "a layer without its dense weight was moved or converted by copying its parameter, as accelerate's dispatch_model does; "
                "expected model.to(device or dtype), or gap_hf.restore(model) before it"
            )
        self._looked_at = weakref.ref(weight)

    def dense_weight(self, layer: Layer) -> Tensor | None:
        """The weight as it was, made anew, or what the placeholder was changed to; None if the layer has another one."""
        weight = layer._parameters["weight"]
        if self.is_untouched(weight):
            return layer.matrix(self.form.matrix()).contiguous()
        return weight.detach().contiguous() if weight is self.placeholder else None


# Asked outside of the graph that torch.compile writes, in which tensors have no addresses.
_is_of_outside: Any = torch.compiler.disable(Packed.is_of)


class _Alone(CopiesAreOrdinary):
    """What a layer without its weight does differently."""

    gap_product: Any

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        me = cast(Any, self)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if (weight := self.gap_product.dense_weight(me)) is not None:
            destination[prefix + "weight"] = weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        take_back(cast(Any, self))
        cast(Any, self)._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        me = cast(Any, self)
        take_back(me)
        me._apply(fn, recurse)
        if me._parameters["weight"].device.type == "cpu" and me._parameters["weight"].dtype in _TYPES:
            give_up(me)
        return self

    def ordinary_state(self) -> dict[str, Any]:
        me, state = cast(Any, self), super().ordinary_state()
        if (weight := self.gap_product.dense_weight(me)) is not None:
            parameter = nn.Parameter(weight, self.gap_product.placeholder.requires_grad)
            state["_parameters"] = {**me._parameters, "weight": parameter}
        return state


class AloneLinear(_Alone, SparseLinear):
    """A Linear of live weights alone."""


class AloneConv1D(_Alone, SparseConv1D):
    """A Conv1D of live weights alone."""


_TYPES = (torch.float32, torch.bfloat16)
_ALONE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AloneLinear, Conv1D: AloneConv1D}
ORDINARY.update({alone: ordinary for ordinary, alone in _ALONE.items()})


def can_give_up(layer: nn.Module) -> bool:
    """Whether a layer is of a kind that may keep its live weights alone."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return type(layer) in _ALONE and weight.device.type == "cpu" and weight.dtype in _TYPES


def give_up(layer: nn.Module) -> None:
    """Keep the live weights of an ordinary layer alone.

    Raises:
        GaPError: if no kernel can be compiled here.
    """
    weight = cast(nn.Parameter, layer._parameters["weight"])
    cast(Any, layer).__class__ = _ALONE[type(layer)]
    alone = cast(Any, layer)
    matrix = alone.matrix(weight.detach())
    structure = structure_of(matrix != 0)
    name = candidates(structure, "cpu")[0]
    form = FORMS[name](matrix, matrix != 0, structure)
    if not isinstance(form, CompiledForm):
        alone.__class__ = ORDINARY[type(layer)]
        raise GaPError(
            "keep_dense: found False, which needs the kernels that llvmlite compiles; pip install 'gap_hf[inference]'"
        )
    with torch.inference_mode(False):  # where changes are counted
        nothing = torch.full((1,), torch.nan, dtype=weight.dtype, device="cpu").expand(weight.shape)
        placeholder = nn.Parameter(nothing, requires_grad=weight.requires_grad)
    packed = Packed(placeholder, structure, names={(torch.get_num_threads(), 0): name})
    alone._parameters["weight"] = placeholder
    alone.gap_product = AloneProduct(form, placeholder, packed)


def take_back(layer: nn.Module) -> None:
    """Make the layer ordinary again, with its whole weight."""
    alone = cast(Any, layer)
    product: AloneProduct = alone.gap_product
    if (weight := product.dense_weight(alone)) is not None:
        product.placeholder.data = weight
    del alone.gap_product
    alone.__class__ = ORDINARY[type(layer)]
