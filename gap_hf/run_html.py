"""One HTML file about a run: no script, nothing to fetch; the figures are in it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import yaml

from gap_hf import run_figures as figures
from gap_hf.run_record import RunRecord
from gap_hf.tables import size_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.what { color: #555; margin: .3rem 0 .6rem; } img { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } div.wide { overflow-x: auto; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } th { font-weight: 600; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; } summary { cursor: pointer; margin: .5rem 0; }
"""


def run_html(run: RunRecord) -> str:
    """The whole file, as text. The same run gives the same text.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    title = escape(f"{run.name}: sparse training")
    parts = [
        f"<h1>{title}</h1>",
        f"<p class=what>{escape(_summary(run))}</p>",
        *_section("Result", "", _table(["", ""], _results(run))),
        *_section(
            "Over time",
            "Zeros of the prunable weights and of all, loss and scores; shades are phases.",
            _image(figures.svg(figures.over_time(run)), "sparsity, loss and scores over optimizer steps"),
        ),
        *_plan(run),
        *_prunes(run),
        *_layers(run),
        *_section("Recipe", "", f"<pre>{escape(_recipe(run))}</pre>"),
        f"<p class=what>Written with {escape(', '.join(f'{k} {v}' for k, v in run.facts.versions.items()))}.</p>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, what: str, *content: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", f"<p class=what>{escape(what)}</p>" if what else "", *content]


def _summary(run: RunRecord) -> str:
    facts, method = run.facts, run.facts.config.get("method", "masks of no run")
    done = "" if run.plan is None or facts.steps is None else f", {facts.steps:,} of {run.plan.total_steps:,} steps"
    return f"{facts.architecture or 'model'}, {method}, {facts.sparsity:.2%} of {facts.weights:,} prunable weights are 0{done}"


def _results(run: RunRecord) -> list[list[str]]:
    facts = run.facts
    rows = [
        ["sparsity of the prunable set", f"{facts.sparsity:.2%}"],
        ["sparsity of the whole model", "" if facts.model_sparsity is None else f"{facts.model_sparsity:.2%}"],
        ["live weights of the prunable set", f"{facts.live:,} of {facts.weights:,}"],
    ]
    if facts.patterns:
        rows.append(["patterns found", ", ".join(f"{name} in {n}" for name, n in facts.patterns.items())])
    if facts.bytes_dense:
        rows.append(["weight files, dense form", size_text(facts.bytes_dense)])
    if facts.bytes_packed:
        share = f" ({facts.bytes_packed / facts.bytes_dense:.3f} of that)" if facts.bytes_dense else ""
        rows.append(["weight files, packed form", size_text(facts.bytes_packed) + share])
    where = f" on {facts.split}" if facts.split else ""
    rows += [[f"{name}{where}", f"{value:.4g}"] for name, value in facts.scores.items()]
    return [row for row in rows if row[1]]


def _plan(run: RunRecord) -> list[str]:
    if run.plan is None:
        return []
    plan, target = run.plan, run.facts.config.get("sparsity")
    sparsity = target if isinstance(target, float) else run.facts.sparsity
    rows = []
    for phase in plan.phases:
        inside = [entry for entry in run.log if phase.start < entry["step"] <= phase.end]
        # What a phase ends with is written when the next begins, before it changes masks back; the last has no next.
        at_end = [entry for entry in inside if "gap_sparsity" in entry]
        loss = [entry["eval_loss"] for entry in inside if "eval_loss" in entry]
        grown = ", ".join(str(g + 1) for g in plan.grown(phase))
        iou, error = ([entry[key] for entry in at_end if key in entry] for key in ("gap_mask_iou", "gap_pruning_error"))
        rows.append(
            [
                str(phase.index + 1),
                phase.kind,
                f"{phase.start:,} to {phase.end:,}",
                grown or "none",
                f"{error[-1]:.4f}" if error else "",
                f"{iou[-1]:.3f}" if iou else "",
                f"{loss[-1]:.4f}" if loss else "",
            ]
        )
    head = ["phase", "kind", "steps", "dense at its start", "error of its last prune", "IoU", "dev loss"]
    return _section(
        "Phases",
        "Zeros of each group as planned: grown to dense, trained, pruned back.",
        _image(figures.svg(figures.groups(plan, sparsity)), "sparsity of every group over optimizer steps"),
        f"<div class=wide>{_table(head, rows)}</div>",
    )


def _prunes(run: RunRecord) -> list[str]:
    figure = figures.prunes(run)
    if figure is None:
        return []
    what = (
        "Churn is the share of the union of old and new masks that is in one of them only, where a group's masks are "
        "replaced; the error is the share of the pruned weights' squared norm that pruning took away."
    )
    return _section("Prunes", what, _image(figures.svg(figure), "mask churn and pruning error over optimizer steps"))


def _layers(run: RunRecord) -> list[str]:
    rows = [[layer.name, *layer.cells()] for layer in run.facts.layers]
    table = _table(["layer", "shape", "weights", "live", "zeros"], rows)
    parts = _section(
        "Layers",
        "Zeros of every layer in every save that is there.",
        _image(figures.svg(figures.layers(run)), "zeros of every layer in every save"),
    )
    if (figure := figures.churn_of_layers(run)) is not None:
        what = "Churn of each layer's mask since the last save in which it was sparse; grey where it was dense."
        parts += [
            f"<p class=what>{escape(what)}</p>",
            _image(figures.svg(figure), "mask churn of every layer"),
        ]
    return [
        *parts,
        f"<details><summary>All {len(rows)} layers as a table</summary><div class=wide>{table}</div></details>",
    ]


def _recipe(run: RunRecord) -> str:
    kept = {key: value for key, value in run.facts.config.items() if value not in (None, [], {})}
    return yaml.safe_dump({"gap": kept}, sort_keys=False).strip()


def _image(svg: str, words: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return "<table>" + (f"<thead><tr>{top}</tr></thead>" if top else "") + f"<tbody>{''.join(lines)}</tbody></table>"
