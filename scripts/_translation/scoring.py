"""sacreBLEU and chrF with their signatures, through `evaluate` where the Hub can be reached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import sacrebleu

HUB_TIMEOUT = 5.0  # seconds


class Scorer:
    """Corpus BLEU and chrF of detokenised text against one reference each.

    `evaluate` downloads the code of its metrics from the Hub and retries for long when there is no network, so the
    Hub is asked once, briefly. Without it sacrebleu computes the same figures itself; `note` says so.
    """

    def __init__(self, *, lowercase: bool = False) -> None:
        self.lowercase = lowercase
        self.metrics: dict[str, Any] | None = None
        self.note = ""
        why = _unreachable()
        if not why:
            try:
                import evaluate

                self.metrics = {name: evaluate.load(name) for name in ("sacrebleu", "chrf")}
            except Exception as error:  # evaluate runs downloaded code
                why = " ".join(f"{type(error).__name__}: {error}".split())
        if why:
            self.note = f"evaluate's metrics could not be loaded ({why}); scoring with sacrebleu itself"

    def __call__(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """`bleu` and `chrf`, both from 0 to 100."""
        refs = [[text] for text in references]
        if self.metrics is not None:
            bleu = self.metrics["sacrebleu"].compute(
                predictions=list(hypotheses), references=refs, lowercase=self.lowercase
            )
            chrf = self.metrics["chrf"].compute(predictions=list(hypotheses), references=refs)
            return {"bleu": float(bleu["score"]), "chrf": float(chrf["score"])}
        return {
            name: float(metric.corpus_score(list(hypotheses), [list(references)]).score)
            for name, metric in self._sacrebleu().items()
        }

    def signatures(self) -> dict[str, str]:
        """What makes the figures comparable; `evaluate` does not report it, and scores with the same settings."""
        out = {}
        for name, metric in self._sacrebleu().items():
            metric.corpus_score(["a"], [["a"]])  # the signature names the number of references, known only now
            out[name] = str(metric.get_signature())
        return out

    def sentence_statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[list[int]]:
        """sacreBLEU's sufficient statistics of each sentence: n-grams that match (orders 1 to 4), n-grams of the
        translation (orders 1 to 4), its length, the reference's length. Corpus BLEU is a function of their sums.
        """
        # The effective order changes a sentence's score, which is not used, and not its counts.
        metric = sacrebleu.BLEU(lowercase=self.lowercase, effective_order=True)
        scores = (metric.sentence_score(text, [ref]) for text, ref in zip(hypotheses, references, strict=True))
        return [[int(n) for n in (*s.counts, *s.totals, s.sys_len, s.ref_len)] for s in scores]

    def _sacrebleu(self) -> dict[str, Any]:
        return {"bleu": sacrebleu.BLEU(lowercase=self.lowercase), "chrf": sacrebleu.CHRF()}


def _unreachable() -> str:
    """Why the metrics cannot be had from the Hub, or an empty string."""
    if any(
        os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")
    ):
        return "offline mode"
    from huggingface_hub import HfApi

    try:
        HfApi().space_info("evaluate-metric/sacrebleu", timeout=HUB_TIMEOUT)
    except Exception as error:  # the client raises its HTTP library's own errors
        return " ".join(str(error).split()) or type(error).__name__
    return ""
