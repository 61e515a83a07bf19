"""The section that gap_hf writes into a model card: what was found, as Markdown. It measures nothing itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from gap_hf.card_facts import CardFacts, Layer
from gap_hf.card_loading import auto_class, loading, own_code
from gap_hf.tables import size_text

METHODS = {
    "cyclic": "scheduled grow-and-prune, one partition after the other (C-GaP, [Ma et al., 2022](https://arxiv.org/abs/2106.09857))",
    "parallel": "scheduled grow-and-prune, all partitions at once on worker groups (P-GaP, [Ma et al., 2022](https://arxiv.org/abs/2106.09857))",
    "random": "grow-and-prune with partitions drawn at random",
    "static": "a fixed mask",
    "oneshot": "one-shot magnitude pruning and fine-tuning ([Han et al., 2015](https://arxiv.org/abs/1506.02626))",
    "gmp": "gradual magnitude pruning ([Zhu and Gupta, 2017](https://arxiv.org/abs/1710.01878))",
    "set": "sparse evolutionary training ([Mocanu et al., 2018](https://arxiv.org/abs/1707.04780))",
    "rigl": "RigL ([Evci et al., 2020](https://arxiv.org/abs/1911.11134))",
    "acdc": "AC/DC ([Peste et al., 2021](https://arxiv.org/abs/2106.12379))",
    "mest": "MEST ([Yuan et al., 2021](https://arxiv.org/abs/2110.14032))",
}
PLOT = "sparsity.png"
GROW_AND_PRUNE = ("cyclic", "parallel", "random")
# More layers than these are also summed up by kind.
_MANY_LAYERS = 12
# What is better where it is lower; of other scores nothing is said.
_ERRORS, _GAINS = ("loss", "perplexity", "wer", "cer"), ("bleu", "chrf", "accuracy", "f1", "rouge", "map", "iou")


@dataclass(frozen=True)
class CardOptions:
    """What cannot be measured, as the user says it.

    Attributes:
        dense: Scores of a dense run of the same length, by name.
        license, language, pipeline_tag, base_model: Metadata; None leaves what is there.
        datasets: Names of the data that it was trained and scored on.
        speed: A sentence of what was measured, or None.
        repo: Where it can be loaded from; the folder's name if None.
    """

    dense: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None
    language: str | None = None
    pipeline_tag: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    speed: str | None = None
    repo: str | None = None


def section(facts: CardFacts, options: CardOptions, *, name: str, has_plot: bool) -> str:
    """What stands between the marks."""
    parts = [
        "## Sparsity",
        _summary(facts),
        _table(["", ""], _fact_rows(facts)),
        f"![zeros of every layer]({PLOT})" if has_plot else "",
        _layers(facts),
        "## Quality",
        _quality(facts, options),
        "## How to load it",
        _loading(facts, name),
        "## How it was trained",
        _training(facts, options),
        "## Limits",
        _limits(facts, options),
    ]
    return "\n\n".join(part for part in parts if part)


def _summary(facts: CardFacts) -> str:
    method = METHODS.get(str(facts.config.get("method")))
    by = f" by {method}" if method else ""
    return (
        f"This model was trained sparse{by}, with gap_hf. "
        f"**{facts.sparsity:.2%}** of its prunable weights are exactly 0."
    )


def _fact_rows(facts: CardFacts) -> list[list[str]]:
    rows = [
        ["prunable weights", f"{facts.weights:,} in {len(facts.layers)} tensors"],
        ["of them live", f"{facts.live:,}"],
        ["sparsity of the prunable set", f"{facts.sparsity:.2%}"],
    ]
    if facts.model_sparsity is not None:
        how = "counted in the files" if facts.measured else "by the masks"
        rows.append(["sparsity of the whole model", f"{facts.model_sparsity:.2%} ({how})"])
    if pattern := facts.config.get("pattern"):
        rows.append(["pattern", str(pattern)])
    if facts.patterns:
        rows.append(["patterns found", ", ".join(f"{name} in {n} tensors" for name, n in facts.patterns.items())])
    if facts.bytes_dense:
        rows.append(["weight files, dense form", size_text(facts.bytes_dense)])
    if facts.bytes_packed:
        share = f", {facts.bytes_packed / facts.bytes_dense:.3f} of that" if facts.bytes_dense else ""
        rows.append(["weight files, packed form", size_text(facts.bytes_packed) + share])
    return rows


def _layers(facts: CardFacts) -> str:
    head = ["shape", "weights", "live", "zeros"]
    rows = [[f"`{layer.name}`", *layer.cells()] for layer in facts.layers]
    table = _table(["layer", *head], rows)
    if len(rows) <= _MANY_LAYERS:
        return table
    kinds: dict[tuple[str, tuple[int, ...]], list[Layer]] = {}
    for layer in facts.layers:
        kinds.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), layer.shape), []).append(layer)
    summed = [[f"`{name}`", str(len(layers)), *_counts(layers)] for (name, _), layers in kinds.items()]
    return (
        f"{_table(['layers', 'number', *head], summed)}\n\n"
        f"<details>\n<summary>Every layer</summary>\n\n{table}\n\n</details>"
    )


def _counts(layers: Sequence[Layer]) -> list[str]:
    """Shape, weights, live ones, and the share of zeros of layers of one shape."""
    shares = sorted(layer.sparsity for layer in layers)
    low, high = f"{shares[0]:.2%}", f"{shares[-1]:.2%}"
    return [
        "×".join(map(str, layers[0].shape)),
        f"{sum(layer.weights for layer in layers):,}",
        f"{sum(layer.live for layer in layers):,}",
        low if low == high else f"{low} to {high}",
    ]


def _quality(facts: CardFacts, options: CardOptions) -> str:
    if not facts.scores:
        return "No scores were recorded."
    where = f"On {facts.split}. " if facts.split else ""
    common = [key for key in facts.scores if key in options.dense]
    head = ["score", "this model", *(["dense, the same length", "share of dense"] if common else [])]
    rows = []
    for key, value in facts.scores.items():
        row = [key, f"{value:.4g}"]
        if common:
            dense = options.dense.get(key)
            row.append("" if dense is None else f"{dense:.4g}")
            row.append(f"{value / dense:.3f}" if dense else "")
        rows.append(row)
    without = (
        "" if common else "\n\nNo dense run was given to compare with, so what the sparsity cost is not said here."
    )
    return f"{where}{'One run.' if facts.seed is not None else ''}".strip() + f"\n\n{_table(head, rows)}{without}"


def _loading(facts: CardFacts, name: str) -> str:
    lines = loading(
        name,
        auto_class(facts.architecture, facts.auto_map)[0],
        packed=facts.form == "packed",
        own=bool(own_code(facts.auto_map)),
    )
    # What the masks were made for, so that they fit when they are given; other keys have no say over given masks.
    kept = {key: facts.config.get(key) for key in ("pattern", "include", "exclude", "overrides")}
    given = {"sparsity": facts.config.get("sparsity", float(f"{facts.sparsity:.4f}")), "method": "static"}
    given |= {key: value for key, value in kept.items() if value not in (None, [], {}, "unstructured")}
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return (
        f"{lines}\n\nTo train it on, sparse, with the masks that it has:\n\n```python\nfrom gap_hf import GaPConfig, GaPTrainer, load_masks\n\n"
        f"config = GaPConfig({arguments})\n"
        f'trainer = GaPTrainer(model, args, train_dataset=data, gap_config=config, gap_masks=load_masks("{name}"))\n```'
    )


def _training(facts: CardFacts, options: CardOptions) -> str:
    lines = [f"Base model: {options.base_model or 'none is recorded'}. Data: {_and(options.datasets)}."]
    if facts.steps is not None:
        lines.append(
            f"{facts.steps:,} optimizer steps" + (f", seed {facts.seed}" if facts.seed is not None else "") + "."
        )
    lines.append("Written with " + ", ".join(f"{name} {found}" for name, found in facts.versions.items()) + ".")
    text = " ".join(lines)
    if facts.config:
        kept = {key: value for key, value in facts.config.items() if value not in (None, [], {}, ())}
        text += f"\n\n```yaml\n{yaml.safe_dump({'gap': kept}, sort_keys=False).strip()}\n```"
    return text


def _limits(facts: CardFacts, options: CardOptions) -> str:
    lines = [
        "- In memory this is an ordinary dense model with zeros in it: it is not faster, unless something makes use of the zeros."
        if options.speed is None
        else f"- {options.speed}",
        "- Ordinary fine-tuning fills the zeros again; see above for how to keep them.",
    ]
    worse = [
        f"{key} {value:.4g}, dense {options.dense[key]:.4g}"
        for key, value in facts.scores.items()
        if key in options.dense and _is_worse(key, value, options.dense[key])
    ]
    if worse:
        lines.append(f"- It is worse than the dense run: {'; '.join(worse)}.")
    if facts.seed is not None:
        lines.append("- It is one run of one seed.")
    return "\n".join(lines)


def _and(names: Sequence[str]) -> str:
    return ", ".join(names) or "none are recorded"


def _is_worse(key: str, value: float, dense: float) -> bool:
    if any(name in key for name in _ERRORS):
        return value > dense
    return any(name in key for name in _GAINS) and value < dense


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("|", "\\|"))
