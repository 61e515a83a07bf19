"""The step of a model that generates, one token for each row, as a straight line of operations (`gap_hf.inference.straight`).

In a decoding step of a small model most of the time goes into Python around its operations. The model's class is changed, as a
layer's is; its `forward` takes the straight line where that gives what the modules give, and is the ordinary one everywhere else.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from gap_hf.caches import CACHES, after_source, filled, tensors_of
from gap_hf.errors import GaPError
from gap_hf.inference.calls import Key, StepCall
from gap_hf.inference.layers import ORDINARY, CopiesAreOrdinary
from gap_hf.inference.product import is_transformed
from gap_hf.inference.straight import straighten

logger = logging.getLogger(__name__)

EXPORTED = "exported"
# Sizes of the example that is traced. No two are equal, and none is 1, or axes would be taken for one another, or for constants.
_BATCH, _SOURCE, _PAST = 2, 7, 5
_LARGE = 2**31
_MAX_LINES = 8  # of a model; what is called in more ways than these is called in a way that changes all the time
_CAPTURING = "transformers.utils.output_capturing"
_lock = threading.RLock()
_Line = Callable[..., tuple[Tensor, ...]]


class DecodesExported(CopiesAreOrdinary):
    """A model whose decoding step is a straight line.

    Attributes:
        gap_step: Its lines.
        gap_class: The class that it had.
    """

    gap_step: DecodingStep
    gap_class: type

    def ordinary_class(self) -> type:
        return self.gap_class


def ordinary_class(cls: type) -> Any:
    """The class that a model has or had."""
    return getattr(cls, "gap_class", cls)


def check_decodes(model: Any) -> None:
    """Whether the decoding step of a model can be a line.

    Raises:
        GaPError: if it does not generate from token ids with a cache, is not on a CPU, or somebody, such as accelerate's hooks, has
            replaced the forward of a module.
    """
    cls: Any = ordinary_class(type(model))
    can_generate = getattr(model, "can_generate", bool)() and getattr(model, "main_input_name", "") == "input_ids"
    if not can_generate or not any(name in inspect.signature(cls.forward).parameters for name in CACHES):
        raise GaPError(f"decode_step: {cls.__name__} does not generate from token ids with a cache; expected None")
    if model.device.type != "cpu":
        raise GaPError(f"decode_step: found the model on {model.device}, expected it on a CPU, or None")
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise GaPError(f"decode_step: the forward of '{name}' has been replaced; expected the class's own, or None")


def decode_exported(model: Any) -> None:
    """Change the class of a model that passes `check_decodes`. Lines are written when a step first needs one."""
    model.__class__ = _lean(ordinary_class(type(model)))
    model.gap_step = DecodingStep(model)


def decode_ordinarily(model: Any) -> None:
    """Undo it."""
    if isinstance(model, DecodesExported):
        del model.gap_step
        cast(Any, model).__class__ = ordinary_class(type(model))


@functools.cache
def _lean(cls: Any) -> type:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = vars(self).get("gap_step")  # an object that somebody makes of this class has none
        output = None if args or step is None else step(self, kwargs)
        return cls.forward(self, *args, **kwargs) if output is None else output

    names = {"forward": forward, "gap_class": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (DecodesExported, cls), names)


class DecodingStep:
    """The lines of one model, by what its forward is called with.

    Attributes:
        steps: How many calls ran as a line.
        lines: By what was in the call; None where the modules have to run.
    """

    def __init__(self, model: Any) -> None:
        self.is_seq2seq = bool(model.config.is_encoder_decoder)
        modules = modules_of_step(model)
        self.hooks = [hooks for module in modules if module is not model for hooks in _hooks_of(module)]
        # Whoever replaces a parameter or a module, as adapters do, makes another model of it.
        self.parts = [
            (parts, name, part)
            for module in modules
            for parts in (module._parameters, module._buffers, module._modules)
            for name, part in parts.items()
        ]
        self.own = [vars(module) for module in modules]
        configs = {id(module.config): module.config for module in modules if "config" in vars(module)}
        self.configs: list[Any] = list(configs.values())
        self.first = next(model.parameters())
        self.place = (self.first.dtype, self.first.device)
        self.steps = 0
        self.lines: dict[Key, _Line | None] = {}
        self.fields: dict[Key, tuple[type, tuple[str, ...]]] = {}

    def __call__(self, model: Any, kwargs: Mapping[str, Any]) -> Any:
        """The output of a step, or None where the modules have to run."""
        call = StepCall.of(kwargs, self.is_seq2seq)
        if call is None or not self._is_as_written(model):
            return None
        key: Key = (*call.key, *(config._attn_implementation for config in self.configs))
        if key not in self.lines:
            if len(self.lines) >= _MAX_LINES:
                return None
            with _lock:
                return self._first(model, call, key)
        line = self.lines[key]
        if line is None:
            return None
        self.steps += 1
        logits, *own = line(*call.tensors.values(), *call.past)
        call.keep(own)
        kind, names = self.fields[key]
        return kind(**{name: _field(name, logits, call) for name in names})

    def _is_as_written(self, model: Any) -> bool:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_transformed():
            return False
        if any("forward" in own or own["training"] for own in self.own):
            return False
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if is_traced or torch_module._has_any_global_hook():
            return False
        config = model.config
        if config.output_attentions or config.output_hidden_states or any(map(_has_hooks, self.hooks)):
            return False
        if (self.first.dtype, self.first.device) != self.place:
            return False
        return all(parts.get(name) is part for parts, name, part in self.parts)

    def _first(self, model: Any, call: StepCall, key: Key) -> Any:
        """The modules' output; the line is written beside it, and must give the same."""
        before = call.copy()
        output = ordinary_class(type(model)).forward(model, **call.kwargs)
        try:
            fields = tuple(name for name, value in output.items() if value is not None)
            unknown = [name for name in fields if name not in ("logits", *CACHES, "encoder_last_hidden_state")]
            if unknown:
                raise ValueError(f"its output has '{unknown[0]}'")
            line = self._write(model, before)
            _compare(line(*before.tensors.values(), *before.past), (output["logits"], *call.own()))
            self.fields[key], self.lines[key] = (type(output), fields), line
        except Exception as error:  # whatever torch.export finds in a stranger's model, the modules can do
            self.lines[key] = None
            reason = str(error).strip().partition("\n")[0]
            logger.warning("The decoding step of %s runs in its modules: %s", type(model).__name__, reason)
        return output

    def _write(self, model: Any, call: StepCall) -> _Line:
        layers = [module for module in model.modules() if type(module) in ORDINARY]
        with torch.inference_mode(False), torch.no_grad():
            example, axes = call.example(model, _BATCH, _SOURCE, _PAST)
            step = _Step(model, call)
            program = torch.export.export(step, example, dynamic_shapes=axes, strict=False)
            _check_any_size(program)
            line = straighten(program, step, layers)
            # At other sizes than those of the example and of the call.
            (tensors, past), _ = call.example(model, _BATCH + 1, _SOURCE - 3, _PAST - 1)
            logits, own = step(tensors, past)
            _compare(line(*tensors, *past), (logits, *own))
        return line


class _Step(nn.Module):
    """A step as a function of tensors: those of the call, then keys and values. It gives logits, and keys and values longer by one."""

    def __init__(self, model: nn.Module, call: StepCall) -> None:
        super().__init__()
        self.model, self.call, self.ordinary = model, call, ordinary_class(type(model))

    def forward(self, tensors: list[Tensor], past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        model = cast(Any, self.model)
        kwargs = {**self.call.constants, **dict(zip(self.call.tensors, tensors, strict=True))}
        if not self.call.is_seq2seq:
            cache: Any = filled(past)
            output = self.ordinary.forward(model, **kwargs, **{self.call.cache_name: cache})
            return output.logits, list(tensors_of(cache))
        half = len(past) // 2
        cache, kwargs["encoder_outputs"] = after_source(past[:half], past[half:])
        output = self.ordinary.forward(model, **kwargs, **{self.call.cache_name: cache})
        return output.logits, list(tensors_of(cache.self_attention_cache))


def modules_of_step(model: Any) -> list[nn.Module]:
    """All modules but those that the encoder has for itself."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if module is not encoder and module not in found:
            found[module] = None
            waiting += module.children()
    return list(found)


def _check_any_size(program: torch.export.ExportedProgram) -> None:
    """Raises ValueError where Python took a way that depends on a size, such as a window of keys."""
    for symbol, sizes in program.range_constraints.items():
        low, high = str(sizes.lower), str(sizes.upper)
        # From 2 on is what torch takes for any size; a mask is one longer than the past.
        if int(low) > 3 or (high.isdigit() and int(high) < _LARGE):
            raise ValueError(f"what it does depends on a size, which has to be from {low} to {high} ({symbol})")


def _field(name: str, logits: Tensor, call: StepCall) -> Any:
    if name == "logits":
        return logits
    return call.cache if name in CACHES else call.kwargs["encoder_outputs"][0]


def _hooks_of(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _has_hooks(hooks: Mapping[int, Any]) -> bool:
    """Beside transformers' own, which stay where outputs were once captured and do nothing until they are again."""
    return bool(hooks) and any(getattr(hook, "__module__", "") != _CAPTURING for hook in hooks.values())


def _compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raises ValueError unless both are the same up to rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        limit = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            raise ValueError(f"written down, it gives {tuple(ours.shape)} for {tuple(theirs.shape)}")
        is_number = theirs.isfinite()
        largest = theirs[is_number].abs().max() if bool(is_number.any()) else torch.zeros(())
        near = torch.isclose(ours, theirs, rtol=0, atol=float(limit * largest.clamp(min=1e-6)), equal_nan=True)
        if not bool(near.all()):
            raise ValueError("written down, it gives other values")
