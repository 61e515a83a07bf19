"""What a model is run with. A rival has a name, takes a number of threads, and gives calls to be timed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gap_hf.bench.subject import CAUSAL, Job, Shape, Subject, search_settings
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.onnx_graphs import main_output
from gap_hf.quiet import quiet

Inputs = Mapping[str, Tensor]
BASE, OURS = "torch fp32", "ours"


class Rival(Protocol):
    """One way to run a model."""

    def set_threads(self, threads: int) -> None:
        """Use so many threads from now on."""
        ...

    def generate(self, inputs: Inputs, job: Job) -> Callable[[], Any]:
        """A call that generates, with all that can be prepared beforehand done."""
        ...

    def tokens(self, result: Any) -> list[list[int]]:
        """What `generate`'s call gave, a row each: new tokens, up to the end if there is one."""
        ...

    def forward(self, inputs: Inputs) -> Callable[[], Tensor | None]:
        """A call of one forward pass. It gives a Tensor (batch, classes) or (batch, tokens, features), fp32; None if it gives none to compare."""
        ...

    def layer(self, shape: Shape, x: Tensor) -> Callable[[], Any] | None:
        """A call of the one layer on `x` (tokens, inputs); None if this rival runs whole models only."""
        ...


class TorchRival:
    """A module of torch, through transformers."""

    def __init__(self, subject: Subject, model: Any) -> None:
        self.subject, self.model = subject, model

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def generate(self, inputs: Inputs, job: Job) -> Callable[[], Any]:
        settings, start = search_settings(self.subject.special, job), 1
        if self.subject.task == CAUSAL:
            start = inputs["input_ids"].shape[1]

        def call() -> Tensor:
            with torch.inference_mode():
                return self.model.generate(**inputs, generation_config=settings)[:, start:]

        return call

    def tokens(self, result: Tensor) -> list[list[int]]:
        return until_end(result.tolist(), self.subject.special.ends)

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        dtype = self.model.dtype
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}

        def call() -> Tensor:
            with torch.inference_mode():
                output = self.model(**given)
                return output[main_output(output)].float()

        return call

    def layer(self, shape: Shape, x: Tensor) -> Callable[[], Any]:
        module = self.model.get_submodule(shape.name)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and isinstance(module, nn.Linear | Conv1D):
            x = x.to(weight.dtype)

        def call() -> Tensor:
            with torch.inference_mode():
                return module(x)

        return call


def until_end(rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[list[int]]:
    """Each row up to its first end, without it."""
    cut = []
    for row in rows:
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        cut.append(list(row[:stop]))
    return cut


def _fp32(subject: Subject, scratch: Path) -> Rival:
    return TorchRival(subject, subject.model)


def _bf16(subject: Subject, scratch: Path) -> Rival:
    return TorchRival(subject, copy.deepcopy(subject.model).to(torch.bfloat16))


def _int8(subject: Subject, scratch: Path) -> Rival:
    with quiet():  # deprecated since torch 2.10; what torch names instead is another package
        try:
            from torch.ao.quantization import quantize_dynamic
        except ImportError:
            raise GaPError(f"torch {torch.__version__} has no torch.ao.quantization any more") from None
        if not any(isinstance(module, nn.Linear) for module in subject.model.modules()):
            raise GaPError("torch's dynamic quantisation is of Linear layers, and the model has none")
        return TorchRival(subject, quantize_dynamic(copy.deepcopy(subject.model), {nn.Linear}, dtype=torch.qint8))


def _ours(subject: Subject, scratch: Path) -> Rival:
    from gap_hf.inference.optimize import optimize_for_inference

    model = copy.deepcopy(subject.model)
    optimize_for_inference(model, output_layer=subject.output_layer, decode_step=subject.decode_step)
    return TorchRival(subject, model)


def _onnx(precision: str) -> Callable[[Subject, Path], Rival]:
    def make(subject: Subject, scratch: Path) -> Rival:
        from gap_hf.bench.onnx_rival import OnnxRival

        return OnnxRival(subject, scratch / "onnx", precision)

    return make


def _ctranslate2(precision: str) -> Callable[[Subject, Path], Rival]:
    def make(subject: Subject, scratch: Path) -> Rival:
        from gap_hf.bench.ctranslate2_rival import CTranslate2Rival

        return CTranslate2Rival(subject, scratch / "ctranslate2", precision)

    return make


@dataclass(frozen=True)
class Kind:
    """A rival by name, and how it is made of a subject, with a folder for its files."""

    title: str
    make: Callable[[Subject, Path], Rival]


KINDS = {
    "fp32": Kind(BASE, _fp32),
    "bf16": Kind("torch bf16", _bf16),
    "int8": Kind("torch int8", _int8),
    "onnx": Kind("ONNX Runtime fp32", _onnx("fp32")),
    "onnx-int8": Kind("ONNX Runtime int8", _onnx("int8")),
    "ctranslate2": Kind("CTranslate2 fp32", _ctranslate2("float32")),
    "ctranslate2-int8": Kind("CTranslate2 int8", _ctranslate2("int8")),
    "ours": Kind(OURS, _ours),
}


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names` in the order of `KINDS`, with fp32 and ours, which all others are compared with.

    Raises:
        GaPError: if one is unknown, with the nearest that is.
    """
    for name in names:
        if name not in KINDS:
            raise GaPError(f"--rivals: unknown '{name}'{did_you_mean(name, KINDS)}")
    return tuple(name for name in KINDS if name in {*names, "fp32", "ours"})


def make_rivals(
    subject: Subject, names: Sequence[str], scratch: Path, say: Callable[[str], None]
) -> tuple[dict[str, Rival], dict[str, str]]:
    """Rivals by title, and for those that cannot run here the reason, a sentence."""
    rivals: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    for name in names:
        kind = KINDS[name]
        say(f"preparing {kind.title}")
        try:
            rivals[kind.title] = kind.make(subject, scratch)
        except GaPError as error:
            missing[kind.title] = str(error)
    return rivals, missing


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for exported files, gone afterwards."""
    return tempfile.TemporaryDirectory(prefix="gap-hf-bench-")
