"""What a run will be, before it runs: targets, groups, phases and cost, as data and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from math import floor, prod
from typing import Any

from torch import nn
from transformers import TrainingArguments

from gap_hf.allocation import keep_counts, make_groups
from gap_hf.config import GaPConfig
from gap_hf.pattern_names import parse_pattern
from gap_hf.phases import Phase
from gap_hf.plan import Plan, make_plan
from gap_hf.tables import size_text, time_text
from gap_hf.targets import Targets, clean_name, find_targets


def dtype_of(found: str | None, gap: GaPConfig) -> str:
    """In which a recipe's checkpoint is trained, its `model.dtype` being `found`: a torch type's name, or ``auto`` for what was saved.

    fp32 if nothing is said. transformers would take what was saved, and a bf16 weight cannot take the small steps of
    fine-tuning. `master_weights` has fp32 copies, and is given what was saved.
    """
    return found or ("auto" if gap.master_weights and not gap.is_off else "float32")


def count_batches(num_examples: int, args: TrainingArguments) -> int:
    """Batches of an epoch on each process, for a dataset that the Trainer batches itself."""
    together = args.train_batch_size * args.world_size
    return num_examples // together if args.dataloader_drop_last else math.ceil(num_examples / together)


def count_optimizer_steps(num_batches: int, args: TrainingArguments) -> tuple[int, Fraction | None]:
    """Optimizer steps in all and per epoch, as the Trainer will count them.

    With `max_steps` the length of an epoch is None, because a trainer's plan goes without it then.
    """
    if args.max_steps > 0:
        return args.max_steps, None
    per_epoch = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch), Fraction(per_epoch)


def plan_for(model: nn.Module, config: GaPConfig, args: TrainingArguments, *, total_steps: int) -> Plan:
    """The plan that a trainer with these arguments would follow; for checks before one is made.

    Raises:
        GaPError: if training is too short, or anything about the targets is wrong.
    """
    seed = config.seed if config.seed is not None else args.seed
    groups = make_groups(find_targets(model, config), config, seed=seed)
    epochs = None if args.max_steps > 0 else Fraction(str(args.num_train_epochs))
    # Trainer has total = ceil(epochs * steps per epoch), and the latter is whole.
    steps_per_epoch = None if epochs is None else Fraction(floor(total_steps / epochs))
    return make_plan(
        config, num_groups=len(groups), total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=seed
    )


def summarize(
    model: nn.Module,
    config: GaPConfig,
    *,
    total_steps: int,
    steps_per_epoch: Fraction | None = None,
    seed: int = 0,
    peak_bytes: Callable[[Mapping[str, int]], int] | None = None,
    step_seconds: Callable[[Sequence[float] | None], float] | None = None,
) -> dict[str, Any]:
    """Everything `format_summary` shows, as plain data.

    FLOPs count each weight of a matrix product once per token, forward and backward alike, so they are exact for
    Linear layers, leave out attention scores, and for convolutions and experts weigh every weight the same.

    Args:
        model: May be on the meta device.
        config: Of grow-and-prune.
        total_steps: Optimizer steps.
        steps_per_epoch: Needed where the config goes by epochs.
        seed: Of what is drawn, if the config has none.
        peak_bytes: Gives the peak memory of a step from the live weights of each tensor with a mask, such as
            `gap_hf.memory.MemoryForecast.peak_bytes`; None: memory is not foreseen.
        step_seconds: Gives the seconds of a step from the level of each group, and of dense training from None, such as
            `gap_hf.step_times.StepTimer` measures them; None: time is not foreseen.

    Raises:
        GaPError: for anything that `GaPTrainer` would refuse about the model, the targets or the length.
    """
    seed = config.seed if config.seed is not None else seed
    targets = find_targets(model, config)
    counts = keep_counts(targets, config)
    groups = make_groups(targets, config, seed=seed)
    plan = make_plan(
        config, num_groups=len(groups), total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=seed
    )
    pattern = parse_pattern(config.pattern)
    per_unit = pattern.rows * pattern.cols if pattern.kind == "block" else 1
    live = {name: count * per_unit for name, count in counts.items()}
    sizes = [group.numel for group in groups]
    densities = [sum(live[n] for n in group.names) / group.numel for group in groups]
    prunable = sum(sizes)
    num_params = sum(p.numel() for p in model.parameters())
    other_products = _other_matrix_products(model, targets)

    def flops(share: float) -> float:
        return (share * prunable + other_products) / (prunable + other_products)

    def most_live(phase: Phase) -> tuple[float, ...]:
        """The levels of the phase's step with the most live weights."""
        steps = {phase.start, *(u.step for u in plan.updates if phase.start <= u.step < phase.end)}
        return min(
            map(plan.levels_at, sorted(steps)),
            key=lambda levels: sum(n * level * (1 - d) for n, level, d in zip(sizes, levels, densities, strict=True)),
        )

    def memory(levels: Sequence[float]) -> int:
        """Groups have about one size, so it does not matter which of them has which level; levels count in whole percents."""
        key = tuple(sorted(round(level, 2) for level in levels))
        if key not in foreseen:
            assert peak_bytes is not None
            foreseen[key] = peak_bytes(
                {
                    name: round(numel_of[name] - level * (numel_of[name] - live[name]))
                    for group, level in zip(groups, levels, strict=True)
                    if level > 0
                    for name in group.names
                }
            )
        return foreseen[key]

    def seconds(phase: Phase) -> float:
        """Of its steps: those of its first, middle and last one on average, levels to a tenth."""
        steps, total = (phase.start, (phase.start + phase.end) // 2, phase.end - 1), 0.0
        for levels in map(plan.levels_at, steps):
            rounded = [round(level, 1) for level in levels]
            key = tuple(sorted(rounded))
            if key not in timed:
                assert step_seconds is not None
                timed[key] = step_seconds(rounded)
            total += timed[key]
        return total / len(steps) * (phase.end - phase.start)

    timed: dict[tuple[float, ...], float] = {}
    foreseen: dict[tuple[float, ...], int] = {}
    numel_of = {w.name: w.numel for w in targets.weights}
    average = plan.average_live_share(sizes, densities)
    final = sum(live.values()) / prunable
    return {
        "model": type(model).__name__,
        "config": config.to_dict(),
        "total_steps": total_steps,
        "num_params": num_params,
        "num_prunable": prunable,
        "num_live": sum(live.values()),
        "sparsity": 1 - final,
        "model_sparsity": (prunable - sum(live.values())) / num_params,
        "average_density": average,
        "training_flops_of_prunable": average,
        "training_flops_of_model": flops(average),
        "inference_flops_of_model": flops(final),
        "groups": [{"blocks": list(g.blocks), "tensors": len(g.names), "weights": g.numel} for g in groups],
        **({} if peak_bytes is None else {"peak_bytes_of_dense": peak_bytes({})}),
        **({} if step_seconds is None else {"seconds_of_dense": step_seconds(None) * total_steps}),
        "phases": [
            {
                "phase": p.index + 1,
                "kind": p.kind,
                "round": p.round,
                "start": p.start,
                "end": p.end,
                "dense_groups": [g + 1 for g in plan.grown(p)],
                "live_share": plan.live_share(p, sizes, densities),
                "flops_of_model": flops(plan.live_share(p, sizes, densities)),
                **({} if peak_bytes is None else {"peak_bytes": memory(most_live(p))}),
                **({} if step_seconds is None else {"seconds": seconds(p)}),
            }
            for p in plan.phases
        ],
        "targets": [{"name": w.name, "shape": list(w.shape), "live": live[w.name]} for w in targets.weights],
        "left_dense": [{"name": s.name, "shape": list(s.shape), "reason": s.reason} for s in targets.skipped],
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as tables for people; tensors that differ only in a number share a line."""
    s = summary
    dense_bytes, dense_seconds = s.get("peak_bytes_of_dense"), s.get("seconds_of_dense")
    lines = [
        f"{s['model']}: {s['num_params']:,} parameters, {s['num_prunable']:,} prunable "
        f"({s['num_prunable'] / s['num_params']:.1%}), {s['num_live']:,} of them live at the end",
        f"sparsity {s['sparsity']:.2%} of the prunable set, {s['model_sparsity']:.2%} of the model",
        "",
        "Prunable",
        *_table(
            ["tensors", "shape", "name"],
            [
                [n, _shape(shape), name]
                for (name, shape, _), n in _collapse((t["name"], t["shape"], "") for t in s["targets"])
            ],
        ),
        "",
        "Left dense",
        *_table(
            ["tensors", "shape", "name", "why"],
            [
                [n, _shape(shape), name, why]
                for (name, shape, why), n in _collapse((t["name"], t["shape"], t["reason"]) for t in s["left_dense"])
            ],
        ),
        "",
        "Groups",
        *_table(
            ["group", "weights", "tensors", "blocks"],
            [[i + 1, f"{g['weights']:,}", g["tensors"], _blocks(g["blocks"])] for i, g in enumerate(s["groups"])],
        ),
        "",
        "Phases",
        *_table(
            [
                *["phase", "kind", "round", "steps", "length", "dense group", "live share", "FLOPs of the model"],
                *(["peak memory"] if dense_bytes else []),
                *(["time"] if dense_seconds else []),
            ],
            [
                [
                    p["phase"],
                    p["kind"],
                    p["round"],
                    f"{p['start']}–{p['end']}",
                    p["end"] - p["start"],
                    _numbers(p["dense_groups"]),
                    f"{p['live_share']:.3f}",
                    f"{p['flops_of_model']:.3f}",
                    *([size_text(p["peak_bytes"])] if dense_bytes else []),
                    *([time_text(p["seconds"])] if dense_seconds else []),
                ]
                for p in s["phases"]
            ],
        ),
        "",
        f"average density in training {s['average_density']:.3f} of the prunable set",
        f"matrix-product FLOPs against dense: training {s['training_flops_of_prunable']:.3f} of the prunable set, "
        f"{s['training_flops_of_model']:.3f} of the model; inference {s['inference_flops_of_model']:.3f} of the model",
        "(FLOPs that sparse kernels could skip: dense kernels compute with the zeros.)",
    ]
    if dense_bytes:
        most = max(p["peak_bytes"] for p in s["phases"])
        lines += [
            f"peak memory of a training step: {size_text(most)}, dense training {size_text(dense_bytes)} ({most / dense_bytes:.3f} of it)",
            "(What tensors take at a time. A process takes more, by what its allocator keeps and its libraries need.)",
        ]
    if dense_seconds:
        total = sum(p["seconds"] for p in s["phases"])
        lines += [
            f"time of all steps on this machine: {time_text(total)}, dense training {time_text(dense_seconds)} "
            f"({total / dense_seconds:.3f} of it)",
            "(From a few measured steps of each kind. Loading data, evaluating, saving and changing masks come on top.)",
        ]
    return "\n".join(lines)


def _other_matrix_products(model: nn.Module, targets: Targets) -> int:
    """Weights outside the prunable set that multiply activations: all but look-up tables, and a tied head once."""
    prunable = {w.name for w in targets.weights}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and getattr(head, "weight", None) is not None:
        tables.discard(id(head.weight))
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim >= 2 and clean_name(name) not in prunable and id(p) not in tables
    )


def _collapse(rows: Iterable[tuple[str, Sequence[int], str]]) -> list[tuple[tuple[str, tuple[int, ...], str], int]]:
    """Names that differ only in numbers together, in order of first appearance, with how many there are."""
    found: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, shape, why in rows:
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(shape), why)
        found[key] = found.get(key, 0) + 1
    return list(found.items())


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape) if prod(shape) else "empty"


def _blocks(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]} ({len(blocks)})"


def _numbers(groups: Sequence[int]) -> str:
    if len(groups) > 4:
        return f"{len(groups)} tensors"
    return ", ".join(str(g) for g in groups) or "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
