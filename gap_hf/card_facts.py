"""What a model card says, measured: from a saved folder, its masks and weights, and the scores that lie beside them."""

from __future__ import annotations

import math
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gap_hf.checkpoint import CONFIG_NAME, read_record
from gap_hf.errors import GaPError
from gap_hf.folder_files import is_packed, read_config, weight_files
from gap_hf.folders import pack_folder, unpack_folder
from gap_hf.inspection import TensorFacts, inspect_model, totals
from gap_hf.stored_model import open_model, read_object
from gap_hf.uploads import files_of

# Files that hold the scores of a run, the first that is there: of scripts/translate.py, then Trainer's.
SCORE_FILES = ("results.json", "all_results.json", "eval_results.json")
_STATE = "trainer_state.json"
# Numbers in them that say nothing about quality.
_NO_SCORES = (
    "runtime",
    "per_second",
    "samples",
    "epoch",
    "flos",
    "steps",
    "seconds",
    "sparsity",
    "pairs",
    "train_loss",
)


@dataclass(frozen=True)
class Layer:
    """A tensor with a mask, as `gap_config.json` records it."""

    name: str
    shape: tuple[int, ...]
    weights: int
    live: int

    @property
    def sparsity(self) -> float:
        return 1 - self.live / self.weights

    def cells(self) -> list[str]:
        """Shape, weights, live ones, and the share of zeros, as tables show them."""
        return ["×".join(map(str, self.shape)), f"{self.weights:,}", f"{self.live:,}", f"{self.sparsity:.2%}"]


@dataclass(frozen=True)
class CardFacts:
    """What was found; None or empty is what is not known.

    Attributes:
        layers: In order of the model.
        config: The gap section of the run.
        architecture: Of the model class.
        auto_map: Of config.json.
        form: ``dense`` or ``packed``.
        steps: Optimizer steps of the run so far.
        seed: Of the run's masks.
        model_sparsity: Zeros of all weights, counted in the files if `measured`, else by the masks.
        patterns: That the zeros were found to hold to, with the number of layers.
        bytes_dense, bytes_packed: Of the weight files in both forms.
        scores: Of the model, by name.
        split: What they were scored on.
        versions: Of what is installed.
    """

    layers: tuple[Layer, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    auto_map: Mapping[str, Any] = field(default_factory=dict)
    form: str = "dense"
    steps: int | None = None
    seed: int | None = None
    model_sparsity: float | None = None
    measured: bool = False
    patterns: Mapping[str, int] = field(default_factory=dict)
    bytes_dense: int | None = None
    bytes_packed: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    split: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def live(self) -> int:
        return sum(layer.live for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return 1 - self.live / self.weights if self.weights else 0.0


def facts_of(folder: Path, *, measure: bool = True) -> CardFacts:
    """Facts of a saved folder, in either form.

    Args:
        measure: Read the weights too: count their zeros, tell their patterns, and make the other form to weigh it.

    Raises:
        GaPError: if the folder has no masks, or `measure` finds weights that do not obey them.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise GaPError(f"{folder}: has no {CONFIG_NAME}, so there are no masks to write a card from")
    header = read_record(folder)
    layers = tuple(
        Layer(w["name"], tuple(w["shape"]), math.prod(w["shape"]), w["live"])
        for w in header["weights"]
        if not w["dense"]
    )
    known: Any = _measure(folder) if measure else {}
    scores, split = scores_of(folder)
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    facts = CardFacts(
        layers=layers,
        model_sparsity=header.get("model_sparsity"),
        config=header.get("config") or {},
        architecture=(config.get("architectures") or [None])[0],
        auto_map=config.get("auto_map") or {},
        steps=header.get("step"),
        seed=header.get("seed"),
        scores=scores,
        split=split,
        versions={
            "gap_hf": sys.modules["gap_hf"].__version__,
            **{name: version(name) for name in ("torch", "transformers")},
            "Python": platform.python_version(),
        },
    )
    return replace(facts, **known)


def _measure(folder: Path) -> dict[str, Any]:
    facts = inspect_model(open_model(str(folder)))
    total = totals(facts)
    if total["disobeying"]:
        raise GaPError(f"{folder}: {total['disobeying']} masked weights are not 0; a card would not be true")
    patterns: dict[str, int] = {}
    for fact in _pruned(facts):
        for pattern in fact.patterns or ("unstructured",):
            patterns[pattern] = patterns.get(pattern, 0) + 1
    packed = is_packed(folder)
    sizes: dict[str, int | None] = {"packed" if packed else "dense": _bytes(folder)}
    with tempfile.TemporaryDirectory() as scratch:
        files, other = Path(scratch) / "files", Path(scratch) / "other"
        files.mkdir()
        for name, path in files_of(folder).items():  # without what an optimizer left
            (files / name).symlink_to(path.resolve())
        try:
            (unpack_folder if packed else pack_folder)(files, other)
            sizes["dense" if packed else "packed"] = _bytes(other)
        except GaPError:  # files that name weights otherwise than the masks: only the model's class can pack those
            sizes["dense" if packed else "packed"] = None
    return {
        "form": "packed" if packed else "dense",
        "model_sparsity": total["sparsity"],
        "measured": True,
        "patterns": patterns,
        "bytes_dense": sizes["dense"],
        "bytes_packed": sizes["packed"],
    }


def _pruned(facts: list[TensorFacts]) -> list[TensorFacts]:
    return [fact for fact in facts if fact.live is not None and fact.live < fact.weights]


def scores_in(log_history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], str | None]:
    """Scores of the last evaluation in a trainer's log."""
    last = next((entry for entry in reversed(log_history) if any(key.startswith("eval_") for key in entry)), {})
    return _scores({key: value for key, value in last.items() if key.startswith("eval_")}), (
        "the evaluation set" if last else None
    )


def scores_of(source: Path) -> tuple[dict[str, float], str | None]:
    """Scores in a file, or in the first of `SCORE_FILES` of a folder, or in its trainer's log; empty if there are none.

    Raises:
        GaPError: if a file is no JSON object.
    """
    files = [source] if source.is_file() else [source / name for name in SCORE_FILES]
    found = next((path for path in files if path.is_file()), None)
    if found is None and (source / _STATE).is_file():
        log = read_object(source / _STATE).get("log_history")
        return scores_in([entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else [])
    values = {} if found is None else read_object(found)
    split = values.get("scored")
    if split is None and any(key.startswith("eval_") for key in values):
        split = "the evaluation set"
    return _scores(values), split if isinstance(split, str) else None


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in values.items()
        if type(value) in (int, float) and not key.startswith("num_") and not any(word in key for word in _NO_SCORES)
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))
