"""The report's text, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADER = (
    *("method", "BLEU", "chrF", "seeds", "dev BLEU", "to dense", "p (dense)", "p (best other)"),
    *("FLOPs", "s per run"),
)


def markdown(report: dict[str, Any], plots: Sequence[str]) -> str:
    rows = report["rows"]
    lines = [f"# Quality: {report['tier']}", "", f"{report['title']}. Made by `benchmarks/quality/report.py`.", ""]
    main = [row for row in rows if row["steps_multiple"] == 1 and not row["variant"]]
    dense = [row for row in main if row["sparsity"] is None]
    sparsities = sorted({row["sparsity"] for row in main if row["sparsity"] is not None})
    for sparsity in sparsities:
        lines += [f"## {100 * sparsity:g} % of the prunable weights zero", ""]
        lines += [*_table(dense + _by_bleu([row for row in main if row["sparsity"] == sparsity])), ""]
    for steps in sorted({row["steps_multiple"] for row in rows} - {1}):
        lines += [f"## {steps:g} × the steps", ""]
        lines += [*_table(_by_bleu([r for r in rows if r["steps_multiple"] == steps and not r["variant"]]), True), ""]
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"]):
        lines += [f"## {variant}", ""]
        lines += [*_table(_by_bleu([row for row in rows if row["variant"] == variant]), True), ""]
    lines += [_caption(report), ""]
    if report["missing"]:
        lines += [f"**Missing:** {_some(report['missing'])}.", ""]
    if report["of_other_settings"]:
        named = [f"{name} ({why})" for name, why in report["of_other_settings"].items()]
        lines += [f"**Left out, because of other settings than the tier's:** {_some(named)}.", ""]
    for plot in plots:
        lines += [f"![{plot}]({plot})", ""]
    if any(trial["dev_bleu"] is not None for trial in report["trials"]):
        lines += ["## Trials that settings were chosen by", "", *_trials(report["trials"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _by_bleu(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -1.0 if row["bleu_mean"] is None else -row["bleu_mean"] - 1)


def _table(rows: Sequence[dict[str, Any]], with_sparsity: bool = False) -> list[str]:
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
                _p(row["p_dense"]),
                _p(row["p_best_other"]) + best,
                _show(row["training_flops"], ".2f"),
                _show(row["seconds"], ",.0f"),
            ]
        )
    return _grid(HEADER, cells)


def _caption(report: dict[str, Any]) -> str:
    training, boot = report["training"], report["bootstrap"]
    which = "the best on dev" if training["load_best_model_at_end"] else "the last ones"
    code = len(report["code_sha256"])
    return (
        f"{report['finished']} of {report['planned']} runs, {report['cpu_hours']:.1f} CPU hours of training "
        f"({report['threads']} thread{'s' if report['threads'] > 1 else ''} a run). All runs of a table have the same "
        f"number of optimizer steps, dense too. BLEU and chrF: mean over seeds (± standard deviation) on "
        f"{report['sentences']:,} test sentences, {training['generation_num_beams'] or 1} beams, {report['signatures']['bleu']}; "
        f"the weights are {which}, and the test set is translated once per run, at its end. dev BLEU: the last "
        f"evaluation in training, {report['eval_num_beams']} beam{'s' if report['eval_num_beams'] > 1 else ''}. "
        f"p: two-sided, paired bootstrap over test sentences ({boot['resamples']:,} draws, seeds averaged), not "
        "corrected for the number of comparisons; it covers the choice of sentences and not that of seeds, which the "
        "standard deviation shows. FLOPs: of the matrix products in training, against the recipe's dense run, if "
        "kernels skipped every zero; dense kernels do not. s per run: training with its evaluations, of runs that "
        f"were not interrupted. Versions: {'; '.join(report['versions'])}"
        + (f"; the sources changed between runs ({code} states)." if code > 1 else ".")
    )


def _trials(trials: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        [
            trial["trial"],
            ", ".join(f"{key} {value}" for key, value in trial["changes"].items()) or "as above",
            "missing" if trial["dev_bleu"] is None else f"{trial['dev_bleu']:.2f}",
        ]
        for trial in trials
    ]
    return _grid(("trial", "settings", "dev BLEU, all beams"), cells)


def _grid(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
