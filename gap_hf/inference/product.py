"""The product of one layer: sparse where that was measured to be faster and gives what dense gives, else dense."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gap_hf.inference import compiled
from gap_hf.inference.choice import DENSE, MEMORY, fastest, range_of
from gap_hf.inference.forms import COMPILED, FORMS, CompiledForm, Form, can_read, candidates
from gap_hf.inference.int8 import INT8, int8
from gap_hf.inference.zeros import Structure, structure_of

logger = logging.getLogger(__name__)

_lock = threading.RLock()  # one measurement at a time, or they would measure each other
_told: set[str] = set()
ALONE = " on 1 thread"
_MAX_BOUND = 64  # shapes of one layer
_LAUNCHES = 10  # of a GPU at a time, to measure
_transforms: Any = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]


class Layer(Protocol):
    """What a product asks of its layer (`gap_hf.inference.layers`)."""

    _parameters: Any

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as outputs by inputs, (N, K); a view where it can be."""
        ...

    def num_tokens(self, x: Tensor) -> int:
        """M of an input; 0 where the layer cannot be a product of it, and dense says why."""
        ...

    def dense(self, x: Tensor) -> Tensor:
        """What the layer is without us."""
        ...

    def sparse(self, x: Tensor, form: Form, threads: int) -> Tensor | None:
        """The same by a form; None if dense has to run."""
        ...

    def samples(self, x: Tensor, range_: int) -> list[Tensor]:
        """Inputs to measure with, of the range of token counts that `x` is in."""
        ...

    def kind(self) -> str:
        """What a choice depends on beside the matrix."""
        ...


@dataclass
class Packed:
    """A weight as it was when its forms were made of it.

    Attributes:
        weight: The parameter; `address`, `version`, `shape` and `dtype` tell whether it has changed since.
        structure: Of its zeros.
        chosen: By (threads, range of token counts): a form, or None where dense is faster.
        at: The same by (threads, token count), as it is looked up in every call.
        names: As `chosen`, by name, for people.
    """

    weight: Tensor
    structure: Structure
    chosen: dict[tuple[int, int], Form | None] = field(default_factory=dict)
    at: dict[tuple[int, int], Form | None] = field(default_factory=dict)
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    forms: dict[str, Form | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weight = self.weight
        self.address, self.shape, self.dtype = weight.data_ptr(), weight.shape, weight.dtype
        # Tensors made under inference_mode do not count their changes.
        self.version = None if weight.is_inference() else weight._version

    def is_of(self, weight: Tensor) -> bool:
        if weight is not self.weight or weight.data_ptr() != self.address:
            return False
        is_same = self.version is None or weight._version == self.version
        return is_same and weight.dtype is self.dtype and weight.shape == self.shape

    def form(self, name: str, matrix: Tensor) -> Form | None:
        """None where this weight cannot take it. Made when it is asked for first."""
        base = name.removesuffix(ALONE)
        if base not in self.forms:
            make = int8 if base == INT8 else FORMS[base]
            self.forms[base] = make(matrix, matrix != 0, self.structure)
        form = self.forms[base]
        return form if name == base or form is None else partial(_alone, form)


def _alone(form: Form, x: Tensor, bias: Tensor | None, threads: int) -> Tensor | None:
    return form(x, bias, 1)


class Product:
    """Stands in a layer for its dense product."""

    is_lent = False

    def __init__(self) -> None:
        self.packed: Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Addresses and compiled code mean nothing in another process, nor beside a copied weight.
        return {"packed": None}

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's output. Never other than dense's by more than rounding, and dense itself where that is not sure."""
        parameters, packed = layer._parameters, self.packed
        weight = parameters["weight"]
        tokens = layer.num_tokens(x) if is_allowed(x, weight, parameters["bias"]) else 0
        if tokens == 0:
            return layer.dense(x)
        if packed is None or not packed.is_of(weight):
            if self._is_lent(layer, weight):
                return layer.dense(x)
            packed = self.pack(layer)
        threads = torch.get_num_threads()
        try:
            form = packed.at[threads, tokens]
        except KeyError:
            form = packed.at[threads, tokens] = self.choose(layer, packed, x, threads, range_of(tokens))
        out = None if form is None else layer.sparse(x, form, threads)
        return layer.dense(x) if out is None else out

    def _is_lent(self, layer: Layer, weight: Tensor) -> bool:
        """Whether accelerate's hooks, which came after us, bring the weight for each call. Then nothing of it is to be kept."""
        if "forward" not in vars(layer):
            self.is_lent = False
        elif self.packed is not None and self.packed.weight is not weight:
            self.packed, self.is_lent = None, True
            _tell_once("Weights of layers that are optimized for inference are offloaded, so these layers run dense")
        return self.is_lent

    def pack(self, layer: Layer) -> Packed:
        """Look at the weight, for the first time or because it has changed."""
        weight = layer._parameters["weight"]
        with _lock, torch.no_grad():
            found = self.structure_of(layer.matrix(weight.detach()))
            self.packed = Packed(weight, found)
            return self.packed

    def structure_of(self, matrix: Tensor) -> Structure:
        return structure_of(matrix != 0)

    def prepare(self, layer: Layer, packed: Packed, tokens: int) -> None:
        """Choose now what an input of so many tokens would have to wait for."""
        self.choose(layer, packed, packed.weight.detach().new_empty(0), torch.get_num_threads(), range_of(tokens))

    def choose(self, layer: Layer, packed: Packed, x: Tensor, threads: int, range_: int) -> Form | None:
        """Take the remembered choice, or measure and remember one."""
        with _lock, torch.no_grad():
            if (threads, range_) in packed.chosen:
                return packed.chosen[threads, range_]
            matrix = layer.matrix(packed.weight.detach())
            names = _names(packed.structure, matrix, threads)
            key = _key(layer, packed.structure, matrix, names, threads, range_)
            name = MEMORY.get(key, names)
            if name is None:
                forms = {name: form for name in names if (form := packed.form(name, matrix)) is not None}
                name = DENSE
                # Otherwise there is nothing to measure, nor to remember.
                if forms and can_read(layer._parameters["bias"], len(matrix), matrix.dtype):
                    name = fastest([_runs(layer, forms, sample, threads) for sample in layer.samples(x, range_)])
                    MEMORY.set(key, name)
            form = None if name == DENSE else packed.form(name, matrix)
            packed.names[threads, range_] = DENSE if form is None else name
            packed.chosen[threads, range_] = form
            kept = {name.removesuffix(ALONE) for name in packed.names.values()}
            packed.forms = {name: form for name, form in packed.forms.items() if name in kept}
            return form


def direct(layer: Layer) -> Callable[[Tensor], Tensor]:
    """A layer's output for a caller who has seen to what `is_allowed` asks for, and to the bias being the same tensor.

    What a call of one shape needs is worked out once.
    """
    parameters = layer._parameters
    bound: dict[tuple[int, torch.Size], Callable[[Tensor], Tensor | None]] = {}
    bound_of: Packed | None = None

    def call(x: Tensor) -> Tensor:
        nonlocal bound_of
        weight, product = parameters["weight"], vars(layer).get("gap_product")
        packed: Packed | None = None if product is None else product.packed
        is_bound = packed is not None and packed is bound_of and packed.is_of(weight)
        if is_bound and x.dtype is weight.dtype and x.is_contiguous():
            run = bound.get((torch.get_num_threads(), x.shape))
            if run is not None and (out := run(x)) is not None:
                return out
        out = cast(Any, layer)(x)  # which packs, chooses a form, or runs dense
        packed = None if product is None else product.packed
        if packed is not bound_of:
            bound.clear()
            bound_of = packed
        threads = torch.get_num_threads()
        form = None if packed is None else packed.at.get((threads, x.numel() // x.shape[-1]))
        if form is not None and len(bound) < _MAX_BOUND:
            bound[threads, x.shape] = _bind(form, x.shape, parameters["bias"], threads)
        return out

    return call


def _bind(form: Form, shape: torch.Size, bias: Tensor | None, threads: int) -> Callable[[Tensor], Tensor | None]:
    if isinstance(form, CompiledForm):
        return form.bind(shape, bias, threads)
    return lambda x: form(x, bias, threads)


class Int8Product(Product):
    """Stands in an output layer, for its product in int8."""

    def structure_of(self, matrix: Tensor) -> Structure:
        return Structure(INT8, 1, 1.0)


def _names(structure: Structure, matrix: Tensor, threads: int) -> tuple[str, ...]:
    """Forms to measure. Where little is to be done, or another process has the cores, one thread is faster than many."""
    if structure.pattern == INT8:
        return (INT8,)
    names = candidates(structure, matrix.device.type)
    return names + tuple(name + ALONE for name in names if threads > 1 and name in COMPILED)


def is_recorded(x: Tensor) -> bool:
    """Whether operations are written down, by torch.compile or a CUDA graph, so that no value may be looked at."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is at work, which sees torch's own operations alone."""
    return forward_ad._current_level >= 0 or _transforms() is not None


def is_allowed(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether anything but dense may run: no gradients, no autocast, nothing that records operations."""
    if type(x) is not Tensor or x.dtype is not weight.dtype or x.device != weight.device or not x.numel():
        return False
    if bias is not None and (bias.dtype is not weight.dtype or bias.device != weight.device):
        return False
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        _tell_once(
            "Gradients are on, so layers that are optimized for inference run dense; expected torch.inference_mode()"
        )
        return False
    is_traced = is_recorded(x) or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not (is_traced or is_transformed() or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type))


def _runs(layer: Layer, forms: dict[str, Form], x: Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """What to time, by name. A sparse run has the checks in it that come with every call."""
    bias, weight = layer._parameters["bias"], layer._parameters["weight"]

    def timed(form: Form | None) -> Callable[[], object]:
        def run() -> None:
            if form is None:
                layer.dense(x)
            else:
                is_allowed(x, weight, bias)
                layer.sparse(x, form, threads)

        return partial(_launched, run) if x.is_cuda else run

    return {DENSE: timed(None), **{name: timed(form) for name, form in forms.items()}}


def _launched(run: Callable[[], object]) -> None:
    # Several in a row, as a model launches them: the check of the input's values waits for the GPU, and dense does not.
    for _ in range(_LAUNCHES):
        run()
    torch.cuda.synchronize()


def _key(layer: Layer, structure: Structure, matrix: Tensor, names: tuple[str, ...], threads: int, range_: int) -> str:
    device = compiled.cpu_name() if matrix.device.type == "cpu" else torch.cuda.get_device_name(matrix.device)
    size = f"{matrix.shape[0]}x{matrix.shape[1]}{layer.kind()}"
    parts = (
        device,
        f"torch {torch.__version__}",
        str(matrix.dtype),
        size,
        structure.pattern,
        f"{structure.density:.2f}",
    )
    return " | ".join((*parts, "+".join(names), f"{threads} threads", f"{2**range_} tokens"))


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.warning(message)


def _in_child() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
