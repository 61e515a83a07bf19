"""What training costs with what is packed and skipped: state, memory and time, beside Trainer and GaP without it.

    make bench-training                        # or: python benchmarks/training.py
    python benchmarks/training.py --quick      # a small model and few steps: does it run?

For each size of a GPT-2 and each sparsity some runs take turns step by step in one process, on the same batches: plain
Trainer, GaPTrainer, with `live_state`, with `sparse_compute` too, and that with blocks of 16x1; all with Trainer's own
optimizer, fused AdamW. C-GaP in the paper's schedule (no ramps), four groups, so that in a round a quarter is dense and the
rest sparse.

1. Bytes of the optimizer's state of the prunable weights, and of the whole model, as a share of plain Trainer's: the mean
   over the steps of a round, indices included. Masks, a byte a weight in both GaP runs, are listed apart.
2. Step time: the median of the rounds' ratios to plain Trainer, with a 95 % bootstrap interval, over steps without a change
   and without the first after one, in which sparse products look at the new masks; that step's ratio is listed apart. And
   what `gap_hf.step_times`, which `gap-hf plan --time` uses, foresees of it.
3. Memory: each way in a process of its own, the highest anonymous memory above that before the model is made; in another
   one, what torch's allocator gave out at most, beside what `gap_hf.memory` foresees of that.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _memory import from_child, highest_allocated, highest_anonymous
from overhead import Turns, run_in_turns
from torch.optim import AdamW
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments, set_seed

from gap_hf import GaPConfig, GaPTrainer, Sparsifier
from gap_hf.bench.timing import ratio
from gap_hf.live_state import LiveState
from gap_hf.memory import MemoryForecast, batch_of
from gap_hf.optimizer_state import unwrap
from gap_hf.pattern_names import parse_pattern
from gap_hf.plan import Plan
from gap_hf.planning import summarize
from gap_hf.step_times import StepTimer

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {"25M": {"n_layer": 8, "n_embd": 512}, "100M": {"n_layer": 15, "n_embd": 768}}
QUICK: dict[str, Any] = {"1M": {"n_layer": 4, "n_embd": 128}}
# Of GaPConfig; plain Trainer has none.
WAYS: dict[str, dict[str, Any] | None] = {
    "trainer": None,
    "gap": {},
    "live_state": {"live_state": True},
    "sparse_compute": {"live_state": True, "sparse_compute": True},
    "sparse_compute, 16x1": {"live_state": True, "sparse_compute": True, "pattern": "block:16x1"},
}
SPARSE_WAYS = [way for way, changes in WAYS.items() if changes is not None]
GROUPS, PHASE, WARM_UP = 4, 5, 3
STEPS = PHASE * (1 + GROUPS) + PHASE  # a first phase, one round, a fine-tune


class Tokens(Dataset):
    """Random tokens: what is measured does not depend on them."""

    def __init__(self, length: int) -> None:
        self.rows = torch.randint(0, 4096, (512, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Stop(TrainerCallback):
    """Ends a run two steps after its first change: memory is at its highest before that."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= PHASE + 2


class Watched(GaPTrainer):
    """Notes the bytes of its optimizer's state after every step."""

    notes: list[tuple[int, int]]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step:
            self.notes.append(state_bytes(self))
        return super().training_step(*args, **kwargs)


def state_bytes(trainer: GaPTrainer) -> tuple[int, int]:
    """Of the prunable weights, with indices, and of the whole model."""
    optimizer = unwrap(trainer.optimizer)
    held = {
        param: sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
        for param, state in optimizer.state.items()
    }
    if trainer.gap is None:
        prunable = [p for n, p in trainer.model.named_parameters() if ".h." in n and p.ndim == 2]  # pyright: ignore
        return sum(held[p] for p in prunable), sum(held.values())
    params = list(trainer.gap.masks.params.values())
    plain = sum(held[p] for p in params)
    live = trainer.gap.optimizer
    ours = live.num_bytes() if isinstance(live, LiveState) else plain
    return ours, sum(held.values()) + ours - plain


def network(size: dict[str, Any]) -> GPT2LMHeadModel:
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(**size, n_head=size["n_embd"] // 64, vocab_size=4096, n_positions=64, bos_token_id=0, eos_token_id=1)
    )


def gap_config(way: str, sparsity: float) -> GaPConfig:
    return GaPConfig(
        sparsity=sparsity,
        num_partitions=GROUPS,
        num_rounds=1,
        phase_steps=PHASE,
        ramp_share=0,
        prune_share=0,
        **(WAYS[way] or {}),
    )


def make(way: str, size: dict[str, Any], sparsity: float, folder: str, turns: bool) -> Watched:
    model = network(size)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    trainer = Watched(
        model=model,
        args=arguments,
        train_dataset=Tokens(64),
        gap_config=None if WAYS[way] is None else gap_config(way, sparsity),
        callbacks=[Turns() if turns else Stop()],
    )
    trainer.notes = []
    return trainer


def measure(ways: list[str], size: dict[str, int], sparsity: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = [make(way, size, sparsity, folder, turns=True) for way in ways]
        seconds = run_in_turns(trainers, STEPS)
    in_round = slice(PHASE, PHASE * (1 + GROUPS) - 1)
    means = np.array([np.mean(t.notes[in_round], axis=0) for t in trainers])
    gap = trainers[1].gap
    assert gap is not None
    used, first = used_steps(gap.plan), [phase.start for phase in gap.plan.phases[1:]]
    model = trainers[0].model
    result: dict[str, Any] = {
        "sparsity": sparsity,
        "parameters": sum(p.numel() for p in model.parameters()),  # type: ignore[union-attr]
        "prunable": sum(w.numel for w in gap.weights.values()),
        "trainer_ms": 1e3 * float(np.median(seconds[used, 0])),
    }
    for i, way in enumerate(ways[1:], start=1):
        step = ratio(seconds[used, i].tolist(), seconds[used, 0].tolist())
        result[way] = {
            "prunable_state": float(means[i, 0] / means[0, 0]),
            "whole_state": float(means[i, 1] / means[0, 1]),
            "step": step.median,
            "step_interval_95": [step.low, step.high],
            "first_step": float(np.median(seconds[first, i] / seconds[first, 0])),
        }
    return result


def used_steps(plan: Plan) -> list[int]:
    """Those without a change of masks before or after them."""
    starts = {phase.start for phase in plan.phases}
    return [i for i in range(WARM_UP, STEPS - 1) if i not in starts and i + 1 not in starts]


def foreseen_step(way: str, size: dict[str, int], sparsity: float) -> float:
    """Of the measured steps, as a share of a dense step, as it is foreseen."""
    config = gap_config(way, sparsity)
    parts = lambda: network(size), partial(batch_of, size=4, tokens=64), partial(AdamW, fused=True)
    timer = StepTimer(*parts, config, total_steps=STEPS)
    dense, seconds = timer.dense(), {}
    plan = Sparsifier(network(size), config, total_steps=STEPS).plan
    keys = [tuple(sorted(plan.levels_at(step))) for step in used_steps(plan)]
    for key in set(keys):
        seconds[key] = timer.sparse(key)
    return float(np.median([seconds[key] for key in keys])) / dense


def peak_of(way: str, size: dict[str, int], sparsity: float) -> int:
    """Highest anonymous memory over the first phase and the first change, in bytes, above what was there before."""
    with tempfile.TemporaryDirectory() as folder:
        return highest_anonymous(lambda: make(way, size, sparsity, folder, turns=False).train())


def allocated_by(way: str, size: dict[str, int], sparsity: float) -> dict[str, int]:
    """Most bytes that tensors took over the same steps, as torch's allocator counted and as they are foreseen."""
    with tempfile.TemporaryDirectory() as folder:
        measured = highest_allocated(lambda: make(way, size, sparsity, folder, turns=False).train())
        trainer = make(way, size, sparsity, folder, turns=False)
        model: Any = trainer.model
        config = trainer.gap_config
        forecast = MemoryForecast(
            lambda: GPT2LMHeadModel(model.config), partial(batch_of, size=4, tokens=64), partial(AdamW, fused=True)
        )
    if config is None:
        return {"measured": measured, "foreseen": forecast.peak_bytes({})}
    rows = parse_pattern(config.pattern).rows if config.sparse_compute else 0
    peak_bytes = partial(forecast.peak_bytes, live_state=config.live_state, compute_rows=rows)
    phases = summarize(model, config, total_steps=STEPS, seed=42, peak_bytes=peak_bytes)["phases"]
    return {"measured": measured, "foreseen": max(phase["peak_bytes"] for phase in phases[:2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--ways", nargs="+", choices=SPARSE_WAYS, default=SPARSE_WAYS, help="beside trainer")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/training.json")
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "WAY", "SIZE", "SPARSITY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if args.child:
        what, way, size, sparsity = args.child
        measure_child: Any = {"process": peak_of, "allocator": allocated_by, "time": foreseen_step}[what]
        print(json.dumps(measure_child(way, (SIZES | QUICK)[size], float(sparsity))))
        return
    rows = []
    for name in QUICK if args.quick else args.sizes:
        for sparsity in args.sparsities:
            ways = ["trainer", *args.ways]
            row = {"model": name, **measure(ways, (SIZES | QUICK)[name], sparsity)}
            peaks = {way: from_child(__file__, "process", way, name, str(sparsity)) for way in ways}
            bytes_of = {way: from_child(__file__, "allocator", way, name, str(sparsity)) for way in ways}
            row["trainer_peak_bytes"], row["trainer_allocated"] = peaks["trainer"], bytes_of["trainer"]
            for way in args.ways:
                row[way]["peak"] = peaks[way] / peaks["trainer"]
                row[way]["allocated"] = bytes_of[way]["measured"] / bytes_of["trainer"]["measured"]
                foreseen = from_child(__file__, "time", way, name, str(sparsity))
                row[way]["foreseen_step"] = foreseen / row[way]["step"]
                row[way]["foreseen"] = bytes_of[way]["foreseen"] / bytes_of[way]["measured"]
            rows.append(row)
            print(table(rows[-1:]), flush=True)
    result = {
        "rows": rows,
        "threads": 1,
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print("\n" + table(rows))
    if not args.quick or args.output != ROOT / "benchmarks/results/training.json":
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | sparsity | way | state, prunable | state, whole model | peak, process | peak, tensors | foreseen / measured "
        "| step (95 % interval) | foreseen / measured | first step after a change |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for way in [way for way in SPARSE_WAYS if way in row]:
            r = row[way]
            low, high = r["step_interval_95"]
            lines.append(
                f"| {row['model']} | {row['sparsity']:.0%} | {way} | {r['prunable_state']:.3f} | {r['whole_state']:.3f} | "
                f"{r['peak']:.3f} | {r['allocated']:.3f} | {r['foreseen']:.3f} | {r['step']:.3f} ({low:.3f}–{high:.3f}) | "
                f"{r['foreseen_step']:.3f} | {r['first_step']:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
