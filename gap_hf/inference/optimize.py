"""Making a sparse model faster on this machine, and undoing it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from gap_hf.errors import GaPError, did_you_mean
from gap_hf.inference import compiled
from gap_hf.inference.alone import AloneProduct, can_give_up, give_up, take_back
from gap_hf.inference.decoding import EXPORTED, DecodesExported, check_decodes, decode_exported, decode_ordinarily
from gap_hf.inference.forms import fits_tensor_cores
from gap_hf.inference.int8 import INT8
from gap_hf.inference.layers import ORDINARY, SPARSE, why_not
from gap_hf.inference.product import Int8Product, Layer, Packed, Product
from gap_hf.targets import clean_name

logger = logging.getLogger(__name__)

# A product of fewer weights takes a few microseconds, as do the checks before it.
MIN_WEIGHTS = 2**16
MIN_SPARSITY = 0.5  # of a layer; below it no form is worth its memory


class MasksByName(Protocol):
    """A dict of masks, or `Sparsifier.masks`."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> Tensor | None: ...


_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class LayerReport:
    """How one layer of an optimized model runs.

    Attributes:
        name: Of the module.
        shape: (N, K): outputs, inputs (of a convolution: channels times kernel).
        sparsity: Share of zeros.
        pattern: That its zeros hold to: ``block:16x1``, ``2:4``, ``unstructured``; ``int8`` of an output layer.
        forms: By (threads, first token count of a range [2**i, 2**(i + 1))): ``dense`` or the form that is used. Ranges
            that were not met yet are missing.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str
    forms: dict[tuple[int, int], str]


def optimize_for_inference(
    model: _Model,
    *,
    masks: MasksByName | None = None,
    token_counts: Sequence[int] = (),
    output_layer: str | None = None,
    keep_dense: bool = True,
    decode_step: str | None = None,
) -> _Model:
    """Make the sparse layers of a model run in the fastest form for this machine, in place.

    Every Linear, Conv1D (GPT-2's) and Conv2d with 65,536 weights or more, at least half of them 0, may run sparse. Which form it takes,
    or that it runs dense, is measured when it first meets a number of tokens (in ranges [2**i, 2**(i + 1)), and for each
    `torch.get_num_threads()`), and remembered in ``$GAP_HF_CACHE/inference.json`` (``~/.cache/gap_hf`` by default). So the
    first calls are slow; `token_counts` has them measured here.

    The model stays what it was for everything else: parameters, names, ties, hooks, `state_dict`, `save_pretrained`, devices.
    Weights are not rounded; outputs are dense's up to the order of additions in fp32 (in bf16 models, sums are in fp32 and
    rounded once). **Dense runs** wherever sparse would not give what dense gives: with an input that holds NaN or an infinity,
    which times a masked weight is NaN; where gradients are asked for; under autocast, `torch.compile` and tracing; in fp16
    and fp64; and on GPUs, but for 2:4 in torch's own form. A weight that is changed in place or replaced is packed anew. Only
    changes that hide from torch's version counter (``weight.data.mul_(2)``) are not seen: call this function again then.

    The live values are held a second time, in fp32 at 90 % about 0.16 of the dense weight for single weights, 0.10 for blocks.

    Args:
        model: On a CPU, fp32 or bf16.
        masks: Of the layers that may run sparse, by parameter name, such as `load_masks` gives and `Sparsifier.masks` are. By
            default the zeros of the weights decide, which is the same for every pruned model.
        token_counts: Numbers of tokens (batch x length; 1 in greedy decoding) to choose forms for now.
        output_layer: ``int8`` runs a dense output layer (the model's `get_output_embeddings`) in int8 where that is faster, and
            computes the 32 largest outputs of each token anew with the weight itself (`gap_hf.inference.int8`). The others are
            rounded, by about 2 % of the largest. None rounds nothing.
        keep_dense: False gives up the dense weights of sparse Linears and Conv1Ds on a CPU (`gap_hf.inference.alone`): their live
            values are all that is held, and they run sparse for every number of tokens. `state_dict`, copies, `restore` and what
            has to run dense make a weight anew, for as long as it takes. Weights that several layers share are kept.
        decode_step: ``exported`` runs a decoding step of `generate`, of one token in each row with a cache that grows, without
            transformers' modules, as `torch.export` writes it down when a step first needs it, which takes seconds
            (`gap_hf.inference.decoding`). Its outputs are compared with the modules' then. None leaves it to the modules, and so does
            whatever is not such a step: a prompt, a static cache, output_attentions, hooks, gradients, autocast, an adapter.

    Returns:
        `model` itself.

    Raises:
        GaPError: if no layer is sparse, a mask names no layer of the model, weights do not obey their mask, there is no
            dense output layer for `output_layer`, no compiler for ``keep_dense=False``, or `decode_step` is asked for of a model that
            does not generate.
    """
    if decode_step not in (None, EXPORTED):
        raise GaPError(f"decode_step: found {decode_step!r}, expected None or '{EXPORTED}'")
    if any(not isinstance(count, int) or count < 1 for count in token_counts):
        raise GaPError(f"token_counts: found {list(token_counts)}, expected numbers of at least 1")
    if decode_step is not None:
        check_decodes(model)
    all_layers = {clean_name(name): m for name, m in model.named_modules() if _ordinary_class(m) is not None}
    layers = all_layers if masks is None else _of_masks(all_layers, masks)
    sparsities = {name: _sparsity(module) for name, module in layers.items()}
    chosen = {name: layers[name] for name, share in sparsities.items() if share is not None and share >= MIN_SPARSITY}
    if not chosen:
        raise GaPError(_nothing_sparse(model, sparsities))
    head = None if output_layer is None else _output_layer(model, output_layer, chosen)
    # Nothing was changed until here, as nothing was sure.
    for module in all_layers.values():
        if isinstance(getattr(module, "gap_product", None), Int8Product | AloneProduct):
            restore(module)
    on_gpu = {name: module for name, module in chosen.items() if _device_of(module) != "cpu"}
    if len(on_gpu) < len(chosen):
        compiled.available()  # says now, not in the middle of a generation, if it is not
    for module in chosen.values() if keep_dense else ():
        _install(module, Product(), token_counts)
    if not keep_dense:
        _keep_live(model, list(chosen.values()), token_counts)
    if head is not None:
        _install(head, Int8Product(), token_counts)
    decode_ordinarily(model)
    if decode_step is not None:
        decode_exported(model)
    if stay := [name for name, module in on_gpu.items() if not _runs_on_gpu(module)]:
        logger.warning(
            "%d sparse layers stay dense on their GPU, the first is '%s': only 2:4 in fp16 or bf16, with sizes divisible by 16, "
            "can run sparse there",
            len(stay),
            stay[0],
        )
    logger.info("%d of %d layers may run sparse", len(chosen), len(layers))
    return model


def _device_of(module: nn.Module) -> str:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.device.type


def _runs_on_gpu(module: nn.Module) -> bool:
    packed = cast(Product, module.gap_product).packed
    assert packed is not None
    return fits_tensor_cores(cast(Layer, module).matrix(packed.weight.detach()), packed.structure)


def _install(module: nn.Module, product: Product, token_counts: Sequence[int]) -> Packed:
    """Put a product into a layer, and choose its forms for these numbers of tokens."""
    if type(module) in SPARSE:
        cast(Any, module).__class__ = SPARSE[type(module)]
    module.gap_product = cast(Any, product)
    packed = product.pack(cast(Layer, module))
    if not isinstance(module, nn.Conv2d):
        for count in token_counts:
            product.prepare(cast(Layer, module), packed, count)
    return packed


def _keep_live(model: nn.Module, chosen: list[nn.Module], token_counts: Sequence[int]) -> None:
    """Give up the dense weights of those layers that can do without; the others are as with `keep_dense`."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module in chosen:
        restore(module)
        if can_give_up(module) and holders[id(module._parameters["weight"])] == 1:
            give_up(module)
        else:
            _install(module, Product(), token_counts)


def _output_layer(model: nn.Module, how: str, chosen: dict[str, nn.Module]) -> nn.Module:
    """The dense Linear that gives the model's outputs.

    Raises:
        GaPError: if there is none.
    """
    if how != INT8:
        raise GaPError(f"output_layer: found {how!r}, expected None or '{INT8}'")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or _ordinary_class(head) is not nn.Linear:
        raise GaPError(
            f"output_layer: {type(model).__name__} has no Linear of at least {MIN_WEIGHTS} weights as its output layer; expected None"
        )
    if any(head is module for module in chosen.values()):
        raise GaPError("output_layer: the output layer is sparse and runs so; expected None")
    if _device_of(head) != "cpu":
        raise GaPError(
            f"output_layer: '{INT8}' is computed on a CPU, found a model on '{_device_of(head)}'; expected None"
        )
    return head


def restore(model: _Model) -> _Model:
    """Undo `optimize_for_inference`: every layer is the ordinary one again, with the very parameters that it has.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if isinstance(module, DecodesExported):
            decode_ordinarily(module)
        if isinstance(getattr(module, "gap_product", None), AloneProduct):
            take_back(module)
        elif type(module) in ORDINARY:
            cast(Any, module).__class__ = ORDINARY[type(module)]
            del module.gap_product
    return model


def inference_report(model: nn.Module) -> list[LayerReport]:
    """What `optimize_for_inference` made of each layer, and which forms were chosen until now; empty for an ordinary model.
    Layers whose weights are offloaded are left out.
    """
    found = []
    for name, module in model.named_modules():
        if type(module) not in ORDINARY:
            continue
        layer, product = cast(Layer, module), cast(Product, module.gap_product)
        if product.packed is None and product.is_lent:
            continue
        packed: Packed = product.packed or product.pack(layer)
        num_out, num_in = layer.matrix(packed.weight.detach()).shape
        forms = {(threads, 2**range_): form for (threads, range_), form in sorted(packed.names.items())}
        sparsity = 1 - packed.structure.density
        found.append(LayerReport(clean_name(name), (num_out, num_in), sparsity, packed.structure.pattern, forms))
    return found


def _ordinary_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer has or had, None for what is not ours to change."""
    # Somebody, such as accelerate's hooks, may have replaced the forward of this one module.
    if not _could_be_ours(module) or "forward" in vars(module) or _device_of(module) == "meta":
        return None
    return ORDINARY.get(type(module), type(module))


def _could_be_ours(module: nn.Module) -> bool:
    """Whether a layer's class, weight and settings are of a kind that may run sparse."""
    weight = module._parameters.get("weight")
    if ORDINARY.get(type(module), type(module)) not in SPARSE or weight is None or type(weight.data) is not Tensor:
        return False
    return why_not(module) is None and weight.is_floating_point() and weight.numel() >= MIN_WEIGHTS


def _weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, made anew where it holds live values alone."""
    product = getattr(module, "gap_product", None)
    made = product.dense_weight(cast(Layer, module)) if isinstance(product, AloneProduct) else None
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach() if made is None else made


def _sparsity(module: nn.Module) -> float | None:
    weight = _weight_of(module)
    return 1 - int(torch.count_nonzero(weight)) / weight.numel() if weight.numel() else None


def _of_masks(layers: dict[str, nn.Module], masks: MasksByName) -> dict[str, nn.Module]:
    """Those that have a mask, checked. Weights of other kinds, such as experts, stay as they are."""
    found = {}
    for name in masks:
        mask, path = masks[name], clean_name(name).removesuffix(".weight")
        if path not in layers:
            continue
        if mask is None:
            continue
        weight = _weight_of(layers[path])
        if mask.shape != weight.shape:
            raise GaPError(f"masks['{name}'] has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
        if wrong := int(((weight != 0) & (mask.to(weight.device) == 0)).sum()):
            raise GaPError(f"'{name}' has {wrong} masked weights that are not 0; expected a model that obeys its masks")
        found[path] = layers[path]
    if not found:
        names = list(masks)
        hint = did_you_mean(names[0], [f"{path}.weight" for path in layers]) if names else ""
        raise GaPError(
            f"masks: found none of a Linear, Conv1D or Conv2d that could run sparse among {len(names)}{hint}"
        )
    return found


def _nothing_sparse(model: nn.Module, sparsities: dict[str, float | None]) -> str:
    known = {name: share for name, share in sparsities.items() if share is not None}
    hooked = [name for name, module in model.named_modules() if "forward" in vars(module) and _could_be_ours(module)]
    if not known and hooked:
        return (
            f"every layer that could run sparse has a forward of its own, as accelerate's hooks give it, '{hooked[0]}' is the first; "
            "expected a model without them, on one device"
        )
    if not known:
        return f"the model has no Linear, Conv1D or Conv2d of at least {MIN_WEIGHTS} weights that could run sparse"
    name = max(known, key=lambda n: known[n])
    return (
        f"the sparsest layer, '{name}', has {100 * known[name]:.0f} % zeros; expected at least {100 * MIN_SPARSITY:.0f} % "
        "in some layer, as pruning leaves them"
    )
