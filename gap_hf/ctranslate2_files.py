"""A model converted for CTranslate2, which runs on without torch or transformers."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from gap_hf.errors import GaPError, first_line, require
from gap_hf.quiet import quiet

# What CTranslate2 4.8 reads of a config, and transformers 5 has no more: it is the same for all models of these types.
_FORMER_CONFIG: dict[str, dict[str, Any]] = {
    "bart": {"normalize_before": False, "normalize_embedding": True},
    "mbart": {"normalize_before": True, "normalize_embedding": True},
    "pegasus": {"normalize_before": True, "normalize_embedding": False},
}
# What a conversion is compared with torch on; logits relative to the largest.
_SOURCES, _LENGTH, _TOKENS, _TOLERANCE = 8, 12, 16, 1e-4


class IdTokenizer:
    """Stands in for a tokenizer: the token of id 7 is ``"t7"``. What CTranslate2's converter asks for, and nothing else."""

    unk_token, unk_token_id = "t0", 0

    def __init__(self, config: Any) -> None:
        self.vocab_size, self.model_type = config.vocab_size, config.model_type
        self.special_tokens_map: dict[str, Any] = {}
        for name in ("bos", "eos", "pad"):
            value = getattr(config, f"{name}_token_id", None)
            value = value[0] if isinstance(value, list) else value
            # Converters want a name for every one of them.
            setattr(self, f"{name}_token", self.convert_ids_to_tokens(0 if value is None else value))
            setattr(self, f"{name}_token_id", value)

    def convert_ids_to_tokens(self, index: int) -> str:
        """Of one id."""
        # Marian's converter takes the last token away if it has this name, and expects it to.
        last = self.model_type == "marian" and index == self.vocab_size - 1
        return "<pad>" if last else f"t{index}"

    def get_vocab(self) -> dict[str, int]:
        """All of them."""
        return {self.convert_ids_to_tokens(i): i for i in range(self.vocab_size)}

    def __len__(self) -> int:
        return self.vocab_size


def write_ctranslate2(model: Any, folder: Path, tokenizer: Any) -> None:
    """Convert a model that is in memory, so in whichever form it was saved.

    Args:
        model: A transformers model on the CPU, in fp32.
        folder: To be written; what an earlier conversion left in it is replaced.
        tokenizer: Gives the vocabulary.

    Raises:
        GaPError: if ctranslate2 is missing, or has no conversion for the model.
    """
    require("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    # Converters take modules out of the model, and write on its config.
    model = copy.deepcopy(model)
    for key, value in _FORMER_CONFIG.get(model.config.model_type, {}).items():
        if not hasattr(model.config, key):
            setattr(model.config, key, value)

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            if hasattr(model_class, "config_class") and not isinstance(model, model_class):
                raise ValueError(f"it converts {model_class.__name__} of models of its type")
            return model

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return tokenizer

    with quiet(), tempfile.TemporaryDirectory() as source:
        model.config.save_pretrained(source)  # the converter reads from a folder which type the model is of
        try:
            Converter(source).convert(str(folder), quantization="float32", force=True)
        except Exception as error:  # a converter may stumble over anything in a model that it does not know
            raise GaPError(_reason(model, error)) from None


def _reason(model: Any, error: Exception) -> str:
    import ctranslate2
    import transformers

    return (
        f"CTranslate2 {ctranslate2.__version__} does not convert {type(model).__name__} of transformers {transformers.__version__}: "
        f"{first_line(error).split(' (supported')[0]}"
    )


def compare_with_torch(model: Any, folder: Path, tokenizer: Any) -> int:
    """Generate a few tokens from random sources with both, greedily and in fp32.

    Returns:
        How many sources there were.

    Raises:
        GaPError: if a token differs where torch's two best logits are not nearly equal.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    known = sorted(
        {i for i in tokenizer.get_vocab().values() if i < model.config.vocab_size} - set(tokenizer.all_special_ids)
    )
    ids = torch.tensor(known)[torch.randint(len(known), (_SOURCES, _LENGTH), generator=generator)]
    seq2seq = model.config.is_encoder_decoder
    if seq2seq:
        ids[:, -1] = tokenizer.eos_token_id
    texts = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    try:
        theirs = _run(folder, texts, tokenizer, seq2seq=seq2seq)
    except (RuntimeError, ValueError) as error:
        raise GaPError(f"ctranslate2: cannot run what it converted: {first_line(error)}") from None
    start = model.generation_config.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None and seq2seq else start
    never = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    for row, (source, given) in enumerate(zip(ids, theirs, strict=True)):
        target = torch.tensor([given])
        with torch.inference_mode(), quiet():
            if seq2seq:
                begun = torch.cat([torch.tensor([[start]]), target[:, :-1]], 1)
                logits = model(input_ids=source[None], decoder_input_ids=begun).logits[0]
            else:
                logits = model(input_ids=torch.cat([source[None], target], 1)).logits[0, len(source) - 1 : -1]
        logits = logits.clone()
        logits[:, never] = -torch.inf
        behind = (logits.max(-1).values - logits.gather(-1, target[0][:, None])[:, 0]) / logits[
            logits > -torch.inf
        ].abs().max()
        if not float(behind.max()) <= _TOLERANCE:
            place = int((behind > _TOLERANCE).nonzero()[0])
            raise GaPError(
                f"ctranslate2: source {row}, token {place}: gives '{tokenizer.convert_ids_to_tokens(given[place])}', "
                f"whose logit is {float(behind[place]):.1e} of the largest below that of torch's choice"
            )
    return len(ids)


def _run(folder: Path, texts: list[list[str]], tokenizer: Any, *, seq2seq: bool) -> list[list[int]]:
    import ctranslate2

    options: dict[str, Any] = {"device": "cpu", "compute_type": "float32", "intra_threads": 1}
    if seq2seq:
        results = ctranslate2.Translator(str(folder), **options).translate_batch(
            texts, beam_size=1, max_decoding_length=_TOKENS, min_decoding_length=_TOKENS
        )
        return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    results = ctranslate2.Generator(str(folder), **options).generate_batch(
        texts, beam_size=1, max_length=_TOKENS, min_length=_TOKENS, include_prompt_in_result=False, sampling_topk=1
    )
    return [result.sequences_ids[0] for result in results]
