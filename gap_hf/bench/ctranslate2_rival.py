"""CTranslate2 as a rival: whole models that generate, on token ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from gap_hf.bench.rivals import Inputs, until_end
from gap_hf.bench.subject import SEQ2SEQ, Job, Shape, Subject
from gap_hf.ctranslate2_files import IdTokenizer, write_ctranslate2
from gap_hf.errors import GaPError, first_line, require


class CTranslate2Rival:
    """A converted model. Its files are made once for both precisions; int8 is quantised when it is loaded."""

    def __init__(self, subject: Subject, folder: Path, precision: str) -> None:
        require("ctranslate2")
        if not subject.generates:
            raise GaPError(f"CTranslate2 generates text, and this is an {subject.task}")
        self.subject, self.folder, self.precision = subject, folder, precision
        self.tokenizer = IdTokenizer(subject.model.config)
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            write_ctranslate2(subject.model, folder, self.tokenizer)
        self.set_threads(1)

    def set_threads(self, threads: int) -> None:
        import ctranslate2

        cls = ctranslate2.Translator if self.subject.task == SEQ2SEQ else ctranslate2.Generator
        try:
            self.engine: Any = cls(
                str(self.folder), device="cpu", compute_type=self.precision, intra_threads=threads, inter_threads=1
            )
        except (RuntimeError, ValueError) as error:
            raise GaPError(f"CTranslate2 cannot load what it converted: {first_line(error)}") from None

    def generate(self, inputs: Inputs, job: Job) -> Callable[[], Any]:
        name = self.tokenizer.convert_ids_to_tokens
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        given = [[name(i) for i, used in zip(ids, mask, strict=True) if used] for ids, mask in rows]
        banned = [[name(i)] for i in self.subject.special.banned if name(i) != "<pad>"]
        shortest, options = 0 if job.stop else job.tokens, {"suppress_sequences": banned or None}
        if self.subject.task == SEQ2SEQ:
            return lambda: self.engine.translate_batch(
                given,
                beam_size=job.beams,
                max_decoding_length=job.tokens,
                min_decoding_length=shortest,
                **options,
            )
        return lambda: self.engine.generate_batch(
            given,
            beam_size=job.beams,
            max_length=job.tokens,
            min_length=shortest,
            include_prompt_in_result=False,
            sampling_topk=1,
            **options,
        )

    def tokens(self, result: Any) -> list[list[int]]:
        rows = [
            [int(token[1:]) for token in (one.hypotheses if hasattr(one, "hypotheses") else one.sequences)[0]]
            for one in result
        ]
        return until_end(rows, self.subject.special.ends)

    def forward(self, inputs: Inputs) -> Callable[[], Tensor | None]:
        return lambda: None  # it gives tokens only

    def layer(self, shape: Shape, x: Tensor) -> None:
        return None
