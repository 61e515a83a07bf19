"""The model that is timed: loaded from its folder, with what it does and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from gap_hf.errors import GaPError
from gap_hf.loaded import load_model, load_tokenizer

SEQ2SEQ, CAUSAL, ENCODER, IMAGES = "seq2seq", "causal language model", "encoder", "image model"
# A layer with fewer zeros than this is counted as dense.
SPARSE = 0.5


@dataclass(frozen=True)
class Job:
    """What is asked of a model that generates: up to `tokens` tokens a row, exactly that many unless `stop`."""

    tokens: int
    beams: int = 1
    stop: bool = False


@dataclass(frozen=True)
class Shape:
    """Sparse layers of one shape: the first of them, how many there are, and the share of zeros of all."""

    name: str
    inputs: int
    outputs: int
    count: int
    zeros: float


@dataclass(frozen=True)
class Special:
    """Ids that mean something to a search, and those that it never lets out, one by one."""

    start: int | None = None
    ends: tuple[int, ...] = ()
    padding: int = 0
    banned: tuple[int, ...] = ()
    reserved: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Subject:
    """A model in fp32 on the CPU, in eval mode, without a generation config of its own.

    `output_layer` and `decode_step` are what `optimize_for_inference` is given.
    """

    folder: Path
    model: Any
    task: str
    layers: tuple[Shape, ...]
    special: Special
    output_layer: str | None = None
    decode_step: str | None = None

    @property
    def generates(self) -> bool:
        return self.task in (SEQ2SEQ, CAUSAL)


def load_subject(folder: Path) -> Subject:
    """Load a saved model, in either form.

    Raises:
        GaPError: if the folder is none of a model, damaged, incomplete, or of a class that transformers has not.
    """
    return subject_of(load_model(folder), folder)


def subject_of(model: Any, folder: Path = Path()) -> Subject:
    """A model that is loaded already. Its generation config is replaced, or its values would come back in every search.

    Raises:
        GaPError: if it takes neither token ids nor pixels, or is an encoder-decoder that does not generate.
    """
    model = model.eval()
    if model.main_input_name == "pixel_values":
        task = IMAGES
    elif model.main_input_name != "input_ids":
        raise GaPError(f"{folder}: the model takes '{model.main_input_name}', expected input_ids or pixel_values")
    elif model.config.is_encoder_decoder:
        task = SEQ2SEQ
        if not model.can_generate():
            raise GaPError(
                f"{folder}: {type(model).__name__} is an encoder-decoder that does not generate, expected a model that generates, "
                "or an encoder"
            )
    else:
        task = CAUSAL if model.can_generate() else ENCODER
    special = Special()
    if task in (SEQ2SEQ, CAUSAL):
        special = _special(model)
        model.generation_config = GenerationConfig()
    return Subject(folder, model, task, tuple(_shapes(model)), special)


def _special(model: Any) -> Special:
    own, found = model.generation_config, {}
    for name in ("pad", "bos", "eos", "decoder_start"):
        key = f"{name}_token_id"
        value = getattr(own, key, None)
        value = getattr(model.config, key, None) if value is None else value
        found[name] = value if isinstance(value, list) else [] if value is None else [value]
    words = own.bad_words_ids or []
    banned = {word[0] for word in words if len(word) == 1} | set(own.suppress_tokens or [])
    return Special(
        start=next(iter(found["decoder_start"]), None),
        ends=tuple(found["eos"]),
        padding=next(iter([*found["pad"], *found["eos"]]), 0),
        banned=tuple(sorted(banned)),
        reserved=frozenset(i for ids in found.values() for i in ids),
    )


def _shapes(model: nn.Module) -> list[Shape]:
    found: dict[tuple[int, int], list[tuple[str, float]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        zeros = float((module.weight == 0).float().mean())
        if zeros >= SPARSE:
            rows, columns = module.weight.shape
            shape = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            found.setdefault(shape, []).append((name, zeros))
    return [
        Shape(names[0][0], *shape, len(names), sum(zeros for _, zeros in names) / len(names))
        for shape, names in found.items()
    ]


def search_settings(special: Special, job: Job) -> GenerationConfig:
    """The search that every rival does: greedy or beams, without penalties or forced tokens."""
    return GenerationConfig(
        max_new_tokens=job.tokens,
        min_new_tokens=None if job.stop else job.tokens,
        num_beams=job.beams,
        do_sample=False,
        length_penalty=1.0,
        bad_words_ids=[[i] for i in special.banned] or None,
        eos_token_id=list(special.ends) or None,
        pad_token_id=special.padding,
        decoder_start_token_id=special.start,
    )


def random_inputs(subject: Subject, batch: int, length: int) -> dict[str, Tensor]:
    """`batch` rows of `length` random tokens, none of them special but for the end of a source; or images.

    Raises:
        GaPError: if the model does not say how large its images are.
    """
    generator = torch.Generator().manual_seed(0)
    model = subject.model
    if subject.task == IMAGES:
        size = getattr(model.config, "image_size", None)
        if not isinstance(size, int):
            raise GaPError(f"{subject.folder}: config.image_size is {size!r}, expected a number of pixels")
        return {"pixel_values": torch.randn(batch, model.config.num_channels, size, size, generator=generator)}
    special = subject.special
    allowed = torch.tensor([i for i in range(model.config.vocab_size) if i not in special.reserved])
    ids = allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
    if subject.task == SEQ2SEQ and special.ends:
        ids[:, -1] = special.ends[0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_inputs(subject: Subject, lines: Sequence[str], batch: int) -> dict[str, Tensor]:
    """The first `batch` lines by the model's own tokenizer, again from the start where there are fewer.

    What continues its text gets all of them cut to the shortest, as padding would stand between text and continuation.

    Raises:
        GaPError: if the folder has no tokenizer.
    """
    tokenizer = load_tokenizer(subject.folder)
    rows = [tokenizer(lines[i % len(lines)])["input_ids"] for i in range(batch)]
    if subject.task == CAUSAL:
        shortest = min(map(len, rows))
        rows = [row[:shortest] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [subject.special.padding] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
