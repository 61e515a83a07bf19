"""The report's text, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

HEADER = (
    *("method", "BLEU", "chrF", "seeds", "dev BLEU", "to dense", "p (dense)", "p (best other)"),
    *("FLOPs", "s per run"),
)
TRIALS_NOTE = (
    "Of each method's trials the one of the lowest loss on dev, at the last evaluation in training, is chosen (the first "
    "of equal ones). BLEU on so few pairs is too noisy to choose by, and is only shown."
)


def markdown(report: dict[str, Any], plots: Sequence[str]) -> str:
    rows, draws = report["rows"], report["bootstrap"]["resamples"]
    lines = [f"# Quality: {report['tier']}", "", f"{report['title']}. Made by `benchmarks/quality/report.py`.", ""]
    main = [row for row in rows if row["steps_multiple"] == 1 and not row["variant"]]
    dense = [row for row in main if row["sparsity"] is None]
    sparsities = sorted({row["sparsity"] for row in main if row["sparsity"] is not None})
    for sparsity in sparsities:
        lines += [f"## {100 * sparsity:g} % of the prunable weights zero", ""]
        lines += [*_table(dense + _by_bleu([row for row in main if row["sparsity"] == sparsity]), draws), ""]
    for steps in sorted({row["steps_multiple"] for row in rows} - {1}):
        lines += [f"## {steps:g} × the steps", ""]
        longer = _by_bleu([row for row in rows if row["steps_multiple"] == steps and not row["variant"]])
        lines += [*_table(longer, draws, with_sparsity=True), ""]
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"]):
        lines += [f"## {variant}", ""]
        mine = _by_bleu([row for row in rows if row["variant"] == variant])
        lines += [*_table(mine, draws, with_sparsity=True), ""]
    lines += [_caption(report), ""]
    if report["missing"]:
        lines += [f"**Missing:** {_some(report['missing'])}.", ""]
    if report["of_other_settings"]:
        named = [f"{name} ({why})" for name, why in report["of_other_settings"].items()]
        lines += [f"**Left out, because of other settings than the tier's:** {_some(named)}.", ""]
    for plot in plots:
        lines += [f"![{plot}]({plot})", ""]
    lines += ["## Settings", "", *_settings(report["settings"]), ""]
    for row in report["settings"]:
        if conflict := _conflict(row):
            lines += [f"**{conflict}**", ""]
    if any(trial["dev_bleu"] is not None for trial in report["trials"]):
        lines += ["## Trials that settings were chosen by", "", *_trials(report["trials"]), "", TRIALS_NOTE, ""]
    return "\n".join(lines).rstrip() + "\n"


def _by_bleu(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -1.0 if row["bleu_mean"] is None else -row["bleu_mean"] - 1)


def _table(rows: Sequence[dict[str, Any]], draws: int, *, with_sparsity: bool = False) -> list[str]:
    cells = []
    for row in rows:
        label = row["label"]
        if with_sparsity and row["sparsity"] is not None:
            label += f", {100 * row['sparsity']:g} %"
        spread = "" if row["bleu_sd"] is None else f" ± {row['bleu_sd']:.2f}"
        best = "" if row["best_other"] is None else f" ({row['best_other']})"
        cells.append(
            [
                label,
                "missing" if row["bleu_mean"] is None else f"{row['bleu_mean']:.2f}{spread}",
                _show(row["chrf_mean"], ".2f"),
                str(row["n"]) if row["n"] == row["planned"] else f"**{row['n']} of {row['planned']}**",
                _show(row["dev_bleu"], ".2f"),
                _show(row["difference_to_dense"], "+.2f"),
                show_p(row["p_dense"], draws),
                show_p(row["p_best_other"], draws) + best,
                _show(row["training_flops"], ".2f"),
                _show(row["seconds"], ",.0f"),
            ]
        )
    return _grid(HEADER, cells)


def _caption(report: dict[str, Any]) -> str:
    training, boot = report["training"], report["bootstrap"]
    which = "the best on dev" if training["load_best_model_at_end"] else "the last ones"
    code = len(report["code_sha256"])
    hardware = f" on {report['hardware']}" if report["hardware"] else ""
    return (
        f"{report['finished']} of {report['planned']} runs, {report['cpu_hours']:.1f} CPU hours of training "
        f"({report['threads']} thread{'s' if report['threads'] > 1 else ''} a run){hardware}. All runs of a table have the same "
        f"number of optimizer steps, dense too. BLEU and chrF: mean over seeds (± sample standard deviation) on "
        f"{report['sentences']:,} test sentences, {training['generation_num_beams'] or 1} beams, {report['signatures']['bleu']}; "
        f"the weights are {which}, and the test set is translated once per run, at its end. dev BLEU: the last "
        f"evaluation in training, {report['eval_num_beams']} beam{'s' if report['eval_num_beams'] > 1 else ''}. "
        f"p: two-sided, paired bootstrap over test sentences ({boot['resamples']:,} draws, seeds averaged; "
        "< where none of them went as far), not corrected for the number of comparisons; it covers the choice of sentences and not that of seeds, which the "
        "standard deviation shows. FLOPs: of the matrix products in training, against the recipe's dense run, if "
        "kernels skipped every zero; dense kernels do not (RigL's dense gradients at its updates, 3 % of its own at ΔT = 100, are left out). s per run: training with its evaluations, of runs that "
        f"were not interrupted. Versions: {'; '.join(report['versions'])}"
        + (f"; the sources changed between or during runs ({code} states)." if code > 1 else ".")
    )


def _settings(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        chosen = _values(row["chosen"]) or ("no change" if row["trials"] else "no trials")
        if row["done"] < row["trials"]:
            chosen = f"{_values(row['chosen']) or 'open'} ({row['done']} of {row['trials']} trials done)"
        cells.append([row["label"], _values(row["own"]) or "defaults", chosen])
    return _grid(("method", "set in the tier", "chosen by trials"), cells)


def _conflict(row: dict[str, Any]) -> str | None:
    """What is wrong with the settings that stand as chosen."""
    if not row["trials"]:
        return f"{row['label']} has settings under `chosen`, and no trials that chose them." if row["chosen"] else None
    if row["is_lowest"] is not False:
        return None
    return (
        f"{row['label']} does not run with what its trials choose: the tier has {_values(row['chosen']) or 'no change'}, "
        f"and the lowest dev loss is that of {row['lowest']} ({_values(row['lowest_changes']) or 'no change'})."
    )


def _trials(trials: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for trial in trials:
        row = [trial["trial"], _values(trial["changes"]) or "no change", trial["choice"] or ""]
        if trial["dev_bleu"] is None:
            cells.append([*row, "missing", ""])
        else:
            cells.append([*row, _show(trial["dev_loss"], ".4f") or "none", f"{trial['dev_bleu']:.2f}"])
    return _grid(("trial", "settings", "by dev loss", "dev loss", "dev BLEU, all beams"), cells)


def _values(values: Mapping[str, Any]) -> str:
    """As in a recipe: null, true, and strings without quotes."""
    return ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())


def _grid(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show_p(value: float | None, draws: int) -> str:
    """Never 0: where no draw went as far, p is below what that many draws can tell."""
    if value is None:
        return ""
    if value < 1 / draws:
        return f"< {1 / draws:g}"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
