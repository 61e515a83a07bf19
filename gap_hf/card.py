"""The model card of a sparse model: gap_hf's section, written from what was measured, beside whatever the card says already."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gap_hf.card_facts import CardFacts
from gap_hf.card_loading import auto_class
from gap_hf.card_section import GROW_AND_PRUNE, PLOT, CardOptions, section
from gap_hf.errors import GaPError, first_line
from gap_hf.tables import plot_bars

BEGIN, END = "<!-- gap_hf:begin -->", "<!-- gap_hf:end -->"
TAGS = ("gap_hf", "sparse", "pruned")


def write_card(folder: Path, facts: CardFacts, options: CardOptions | None = None) -> Path:
    """Write or renew gap_hf's section and metadata in ``README.md``, and the plot beside it; all else in the card stays.

    Returns:
        The card's path.

    Raises:
        GaPError: if the card that is there has no valid metadata. It is untouched then.
    """
    options = options or CardOptions()
    path = folder / "README.md"
    try:
        card = _parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    except UnicodeDecodeError as error:
        raise GaPError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    has_plot = True
    try:
        scratch = folder / f".{PLOT}.part.png"
        names = [layer.name for layer in facts.layers]
        plot_bars(names, [layer.sparsity for layer in facts.layers], scratch, label="zeros of the layer's weights, %")
        os.replace(scratch, folder / PLOT)
    except GaPError:  # no matplotlib: a card without it
        has_plot = False
    part = folder / ".README.md.part"
    part.write_text(_text(card, facts, options, folder.resolve().name, has_plot), encoding="utf-8")
    os.replace(part, path)
    return path


def _parse(text: str) -> ModelCard:
    try:
        return ModelCard(text or "---\n{}\n---\n", ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise GaPError(f"README.md: its metadata are not valid: {first_line(error)}") from None


def _text(card: ModelCard, facts: CardFacts, options: CardOptions, name: str, has_plot: bool) -> str:
    """The card with gap_hf's metadata and section; where there is no section yet, it goes to the end."""
    data = card.data
    assert isinstance(data, ModelCardData)
    _fill(data, facts, options, name)
    options = replace(options, base_model=_words(data.get("base_model")), datasets=_list(data.get("datasets")))
    body = card.text.strip("\n")
    part = f"{BEGIN}\n{section(facts, options, name=options.repo or name, has_plot=has_plot)}\n{END}"
    if BEGIN in body and END in body:
        before, rest = body.split(BEGIN, 1)
        body = before + part + rest.split(END, 1)[1]
    else:
        body = f"{body or f'# {name}'}\n\n{part}"
    return f"---\n{data.to_yaml()}\n---\n\n{body.lstrip()}\n"


def _list(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [str(v) for v in value] if isinstance(value, list) else []


def _words(value: object) -> str | None:
    return ", ".join(_list(value)) or None


def _fill(data: ModelCardData, facts: CardFacts, options: CardOptions, name: str) -> None:
    """Metadata: what is there wins over what is guessed, and what the user says now over both."""
    data.library_name = data.library_name or "transformers"
    tags: list[str] = [*(data.tags or [])]
    ours = [*TAGS, *(["grow-and-prune"] if facts.config.get("method") in GROW_AND_PRUNE else [])]
    data.tags = tags + [tag for tag in ours if tag not in tags]
    for key in ("license", "language", "pipeline_tag", "base_model"):
        if (value := getattr(options, key)) is not None:
            data[key] = value
    if data.get("pipeline_tag") is None:
        data["pipeline_tag"] = auto_class(facts.architecture, facts.auto_map)[1]
    if options.datasets:
        data["datasets"] = list(options.datasets)
    datasets = _list(data.get("datasets"))
    if not facts.scores:
        return
    data["metrics"] = list(
        dict.fromkeys([*(data.get("metrics") or []), *(key for key in facts.scores if key != "loss")])
    )
    if datasets:  # the Hub's index has no place for a score on nobody knows what
        split = facts.split if facts.split in ("test", "dev", "validation") else None
        data["model_name"] = data.get("model_name") or name
        data["eval_results"] = [
            EvalResult(
                task_type=data.get("pipeline_tag") or "other",
                dataset_type=datasets[0],
                dataset_name=datasets[0],
                dataset_split=split,
                metric_type=key,
                metric_value=round(value, 4),
            )
            for key, value in facts.scores.items()
        ]
