"""The model and tokenizer of a translation recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _run import check_dtype
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from _translation.tokenizer import train_tokenizer, wrap
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.recipe import one_line


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`model` of a translation recipe: either `checkpoint`, or `type` and `config` for one from scratch.

    Attributes:
        checkpoint: A name on the Hub or a folder.
        type: A transformers model type, such as marian or t5.
        config: Keys of that type's config; the vocabulary and special tokens come from the tokenizer.
        tokenizer: A name on the Hub or a folder; None takes the checkpoint's, or trains one on the training pairs.
        vocab_size: Size of a trained tokenizer's joint vocabulary.
        generation: Keys of GenerationConfig, such as length_penalty. They are saved with the model.
        dtype: In which a checkpoint's weights are trained: float32, bfloat16, float16, or auto for what they were saved in. None is
            float32, and auto with `gap.master_weights`.
        source_code, target_code: Language codes of many-to-many models, such as en_XX and de_DE for mBART.
    """

    checkpoint: str | Path | None = None
    type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | Path | None = None
    vocab_size: int = 8000
    generation: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    source_code: str | None = None
    target_code: str | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.type is None):
            found = "neither" if self.type is None else "both"
            raise GaPError(f"model.type: found {found} of type and checkpoint, expected one of the two")
        if self.checkpoint is not None and self.config:
            raise GaPError("model.config: contradicts model.checkpoint, which has its own; expected model.type with it")
        check_dtype(self.dtype, self.checkpoint)
        known = list(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        if self.type is not None and self.type not in known:
            raise GaPError(
                f"model.type: found '{self.type}', no sequence-to-sequence model{did_you_mean(self.type, known)}"
            )
        if self.vocab_size < 260:
            raise GaPError(
                f"model.vocab_size: found {self.vocab_size}, expected at least 260 (256 bytes and the special tokens)"
            )
        if self.type is not None:
            names = vars(AutoConfig.for_model(self.type)) | AutoConfig.for_model(self.type).attribute_map
            _check_names("model.config", self.config, [name for name in names if not name.startswith("_")])
        _check_names(
            "model.generation", self.generation, [n for n in vars(GenerationConfig()) if not n.startswith("_")]
        )


def _check_names(where: str, found: Iterable[str], valid: list[str]) -> None:
    for name in found:
        if name not in valid:
            raise GaPError(f"{where}.{name}: unknown key{did_you_mean(name, valid)}")


def load_tokenizer(
    model: ModelSection,
    texts: Iterable[str],
    *,
    max_length: int,
    broadcast: Callable[[list[Any]], Any],
) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, or one trained on `texts` by the main process and sent to the others.

    Raises:
        GaPError: if it cannot be loaded.
    """
    name = model.tokenizer or model.checkpoint
    if name is None:
        box: list[Any] = [train_tokenizer(texts, vocab_size=model.vocab_size)]
        broadcast(box)
        return wrap(box[0], max_length=max_length)
    codes = {key: code for key, code in (("src_lang", model.source_code), ("tgt_lang", model.target_code)) if code}
    try:
        return AutoTokenizer.from_pretrained(name, **codes)
    except (OSError, ValueError, ImportError) as error:
        key = "tokenizer" if model.tokenizer else "checkpoint"
        raise GaPError(f"model.{key}: could not load a tokenizer from {name}: {one_line(error)}") from None


def load_model(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, *, max_length: int, dtype: str = "float32"
) -> PreTrainedModel:
    """The recipe's model, with the generation settings it is to be saved with. `dtype` is a checkpoint's.

    Raises:
        GaPError: if it cannot be loaded or built.
    """
    if section.checkpoint is not None:
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(section.checkpoint, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise GaPError(f"model.checkpoint: could not load {section.checkpoint}: {one_line(error)}") from None
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    else:
        model = _from_scratch(section, tokenizer)
    generation = dict(section.generation)
    if section.target_code is not None:
        generation["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(section.target_code)
    generation.setdefault("max_length", max_length)
    settings = model.generation_config
    assert settings is not None
    try:
        settings.update(**generation)
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise GaPError(f"model.generation: {one_line(error)}") from None
    return model


def _from_scratch(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    assert section.type is not None
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": pad,
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad,
        "eos_token_id": eos,
        "forced_eos_token_id": eos,
        "decoder_start_token_id": pad,  # as Marian and T5 do: the decoder starts from padding
    }
    try:
        config = AutoConfig.for_model(section.type, **{**tokens, **section.config})
        return AutoModelForSeq2SeqLM.from_config(config)
    except Exception as error:  # each model checks its own config, with its own kinds of error
        raise GaPError(f"model.config: {section.type} refuses it: {one_line(error)}") from None
