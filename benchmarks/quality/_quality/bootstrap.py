"""Corpus BLEU from sentence statistics, and a paired bootstrap test over the sentences of the test set.

The test, for two methods A and B with one or more seeds each: draw N of the N test sentences with replacement, the same
ones for every run; b = 1 … R. With BLEU_r(b) the corpus BLEU of run r on draw b, computed from the summed statistics,

    d(b) = mean over A's seeds of BLEU_r(b) - mean over B's seeds of BLEU_r(b),     d = the same on the whole test set,
    p    = (1 + number of b with |d(b) - mean of d(·)| >= |d|) / (R + 1),

two-sided, as sacreBLEU's paired bootstrap has it for single runs (Koehn, EMNLP 2004; Riezler and Maxwell, 2005). It
says how far a difference may come from the choice of test sentences; it says nothing about other seeds.
"""

from __future__ import annotations

import numpy as np

from gap_hf.errors import GaPError

RESAMPLES, SEED = 10_000, 12345
_CHUNK = 500  # draws at a time: weights of 500 × N float64


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU (0 to 100, exponential smoothing, one reference) of summed statistics.

    Args:
        sums: Last axis as `Scorer.sentence_statistics` gives it: matches and totals of orders 1 to 4, and both lengths.
    """
    sums = np.asarray(sums, dtype=np.float64)
    correct, total = sums[..., :4], sums[..., 4:8]
    sys_len, ref_len = sums[..., 8], sums[..., 9]
    # An order without a match counts as half a match, the next such as a quarter, and so on.
    smooth = 0.5 ** np.cumsum(correct == 0, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(correct == 0, smooth, correct) / total
        score = 100 * np.exp(np.mean(np.log(precision), axis=-1))
        score = score * np.where(sys_len < ref_len, np.exp(1 - ref_len / sys_len), 1.0)
    defined = correct.any(axis=-1) & (total > 0).all(axis=-1) & (sys_len > 0)
    return np.where(defined, score, 0.0)


def resampled_bleu(runs: list[np.ndarray], *, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Corpus BLEU of every run on the same draws: shape (runs, resamples).

    Args:
        runs: Sentence statistics, each of shape (sentences, 10).

    Raises:
        GaPError: if they are not of the same number of sentences.
    """
    numbers = {len(run) for run in runs}
    if len(numbers) != 1:
        raise GaPError(f"sentence_statistics: found runs of {sorted(numbers)} sentences, expected one number for all")
    size = numbers.pop()
    rng = np.random.default_rng(seed)
    together = np.concatenate(runs, axis=1).astype(np.float64)  # (sentences, runs × 10)
    out = np.empty((len(runs), resamples))
    for start in range(0, resamples, _CHUNK):
        draws = min(_CHUNK, resamples - start)
        # How often each sentence is drawn is all that a sum depends on.
        weights = rng.multinomial(size, np.full(size, 1 / size), size=draws)
        sums = (weights.astype(np.float64) @ together).reshape(draws, len(runs), 10)
        out[:, start : start + draws] = bleu_of(sums).T
    return out


def p_value(difference: float, resampled: np.ndarray) -> float:
    """Two-sided p of a difference; the formula is at the top of this file."""
    # Equal runs differ by rounding only, which must count as no difference.
    beyond = np.abs(resampled - resampled.mean()) >= abs(difference) - 1e-9
    return float((1 + beyond.sum()) / (len(resampled) + 1))
