"""What a step of GaPTrainer costs against Trainer's, on the demo: paired, interleaved, in one process.

    make bench-overhead          # or: python benchmarks/overhead.py --pairs 300

Two runs of the demo's recipe, one with GaP and one without, take turns step by step (greenlets, so that both have the
same threads and caches), on the same batches. A turn is one whole trip round Trainer's loop: data, forward, backward,
clipping, update, callbacks, logging. Which of the two goes first alternates.

Printed: the median of the paired ratios with a 95 % bootstrap interval, the cost of the mask changes of the whole demo
spread over its steps, and their sum. The upper end of that sum is what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet
import numpy as np
import torch
import transformers
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import translate  # noqa: E402
from _translation.data import DataSection, load_pairs  # noqa: E402
from _translation.model import ModelSection, load_model, load_tokenizer  # noqa: E402
from transformers import DataCollatorForSeq2Seq  # noqa: E402

from gap_hf.recipe import load_recipe  # noqa: E402

WARM_UP = 10


class Turns(TrainerCallback):
    """Hands over to the other run at the start of every step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hub = greenlet.getcurrent().parent
        assert hub is not None
        hub.switch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/translation/demo.yaml")
    parser.add_argument("--pairs", type=int, default=300, help="counted pairs of steps")
    parser.add_argument("--threads", type=int, default=1, help="as the demo has them: accelerate launch sets one")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"--training.output_dir={folder}", "--training.eval_strategy=no", "--training.save_strategy=no"]
        quiet += ["--training.disable_tqdm=true", "--training.load_best_model_at_end=false"]
        make, demo_steps = trainer_maker(args.recipe, quiet)
        # The demo's own schedule squeezed into the pairs, so that every kind of mask change is met and timed.
        total = args.pairs + WARM_UP
        dense, gap = make(False, total), make(True, total)
        spent = instrument()
        pairs, change_steps = run_in_turns(dense, gap, total)
        gap_plan = gap.gap.plan

    used = [i for i in range(WARM_UP, len(pairs)) if i not in change_steps]
    dense_s, gap_s = (np.array([pairs[i][side] for i in used]) for side in (0, 1))
    ratios = gap_s / dense_s
    rng = np.random.default_rng(0)
    resampled = np.median(rng.choice(ratios, size=(4000, len(ratios))), axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    # advance() is called after every step; its calls beyond the median one are the changes themselves.
    changes = sorted(spent["advance"])[-len(gap_plan.phases) + 1 :]
    per_change = float(np.median(changes))
    change_share = per_change * len(gap_plan.phases) / (demo_steps * float(np.median(dense_s)))
    result = {
        "pairs": len(used),
        "trainer_ms": 1e3 * float(np.median(dense_s)),
        "gap_trainer_ms": 1e3 * float(np.median(gap_s)),
        "median_ratio": float(np.median(ratios)),
        "interval_95": [float(low), float(high)],
        "mask_change_ms": 1e3 * per_change,
        "mask_changes_in_demo": len(gap_plan.phases),
        "demo_steps": demo_steps,
        "mask_changes_share": change_share,
        "total_ratio": float(np.median(ratios)) + change_share,
        "total_upper_95": float(high) + change_share,
        "where_ms": {name: 1e3 * float(np.median(times)) for name, times in spent.items()},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)


def trainer_maker(recipe_path: Path, quiet: list[str]) -> tuple[Callable[[bool, int], Any], int]:
    """A function (with GaP?, steps) -> trainer on the demo's model and data, and the demo's number of steps."""
    recipe = load_recipe(recipe_path, quiet, model_cls=ModelSection, data_cls=DataSection)
    arguments = Seq2SeqTrainingArguments(**recipe.training)
    pairs = load_pairs(recipe.data)
    texts = (text for column in ("source", "target") for text in pairs["train"][column])
    tokenizer = load_tokenizer(
        recipe.model, texts, max_length=recipe.data.max_length, broadcast=lambda objects: objects
    )
    train = translate.tokenize(pairs["train"], tokenizer, recipe.data, "train")
    demo_steps, _ = translate.count_steps(len(train), translate.make_sampler(train, recipe, arguments), arguments)

    def make(with_gap: bool, steps: int) -> Any:
        set_seed(arguments.seed)
        model = load_model(recipe.model, tokenizer, max_length=recipe.data.max_length)
        trainer = translate.TranslationTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**{**recipe.training, "max_steps": steps}),
            train_dataset=train,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
            gap_config=recipe.gap if with_gap else None,
            callbacks=[Turns()],
        )
        sampler = translate.make_sampler(train, recipe, arguments)
        if sampler is not None:
            trainer.use_token_batches(sampler)
        return trainer

    return make, demo_steps


def run_in_turns(dense: Any, gap: Any, total: int) -> tuple[list[tuple[float, float]], set[int]]:
    """Seconds of each step of both, and the steps at whose end masks changed."""
    runs = [greenlet.greenlet(t.train) for t in (dense, gap)]
    for run in runs:
        run.switch()  # up to the start of the first step
    pairs = []
    for i in range(total):
        seconds = [0.0, 0.0]
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            runs[side].switch()
            seconds[side] = time.perf_counter() - begin
        pairs.append((seconds[0], seconds[1]))
    # The last turn also contains the end of training, in both.
    return pairs[:-1], {phase.start - 1 for phase in gap.gap.plan.phases}


def instrument() -> dict[str, list[float]]:
    """Time the three calls that GaP adds to a step."""
    from gap_hf.sparsifier import Sparsifier

    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[name].append(time.perf_counter() - begin)

        return call

    for name in ("mask_gradients", "mask_weights", "advance"):
        setattr(Sparsifier, name, timed(name, getattr(Sparsifier, name)))
    return spent


def print_table(r: dict[str, Any]) -> None:
    print(f"\n{r['pairs']} pairs of steps, {r['threads']} threads, torch {r['versions']['torch']}")
    rows = [
        ("Trainer, one step", f"{r['trainer_ms']:.2f} ms"),
        ("GaPTrainer, one step", f"{r['gap_trainer_ms']:.2f} ms"),
        ("median paired ratio", f"{r['median_ratio']:.4f}"),
        ("  95 % interval", f"{r['interval_95'][0]:.4f} – {r['interval_95'][1]:.4f}"),
        (f"{r['mask_changes_in_demo']} mask changes over {r['demo_steps']} steps", f"+{r['mask_changes_share']:.4f}"),
        ("in all", f"{r['total_ratio']:.4f}"),
        ("upper end", f"{r['total_upper_95']:.4f}"),
        *((f"  {name}", f"{ms:.3f} ms") for name, ms in r["where_ms"].items()),
        ("  one mask change", f"{r['mask_change_ms']:.3f} ms"),
    ]
    for name, value in rows:
        print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
