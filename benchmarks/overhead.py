"""What a step of GaPTrainer costs against Trainer's, for every method, on the demo: interleaved, in one process.

    make bench-overhead          # or: python benchmarks/overhead.py --rounds 300 --methods cyclic rigl
    python benchmarks/overhead.py --recipe recipes/translation/gpu.yaml --output benchmarks/results/overhead-gpu.json

The demo's recipe without GaP and with each method take turns step by step (greenlets, so that all have the same threads
and caches), on the same batches. A turn is one whole trip round Trainer's loop: data, forward, backward, clipping,
update, callbacks, logging. The order within a round moves on from round to round. On a GPU a turn ends when the GPU has
done all of it; `where_ms` is then what Python takes to launch, but for `_apply`.

For each method: the median ratio to the dense step of the same round with a 95 % bootstrap interval, over the steps at
which no mask changes; the cost of the mask changes that the method makes over the whole demo, spread over its steps; and
their sum. The upper end of that sum is what counts.
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

from gap_hf.config import METHODS, GaPConfig  # noqa: E402
from gap_hf.plan import make_plan  # noqa: E402
from gap_hf.recipe import load_recipe  # noqa: E402
from gap_hf.sparsifier import Sparsifier  # noqa: E402

WARM_UP = 10
ALONE = tuple(m for m in METHODS if m not in ("dense", "parallel"))  # P-GaP takes several processes


class Turns(TrainerCallback):
    """Hands over to the other run at the start of every step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hub = greenlet.getcurrent().parent
        assert hub is not None
        hub.switch()


# Keys of a method whose own defaults would not change masks often enough in a run of a few hundred steps.
SQUEEZED: dict[str, dict[str, Any]] = {
    "rigl": {"update_steps": 10},
    "set": {"update_steps": 10},
    "mest": {"update_steps": 10},
    "acdc": {"num_rounds": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/translation/demo-dense.yaml")
    parser.add_argument("--methods", nargs="+", default=list(ALONE), choices=ALONE)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=200, help="counted steps of each run")
    parser.add_argument("--threads", type=int, default=1, help="as the demo has them: accelerate launch sets one")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    configs = {m: GaPConfig(method=m, sparsity=args.sparsity) for m in args.methods}
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"--training.output_dir={folder}", "--training.eval_strategy=no", "--training.save_strategy=no"]
        quiet += ["--training.disable_tqdm=true", "--training.load_best_model_at_end=false"]
        make, demo_steps = trainer_maker(args.recipe, quiet)
        total = args.rounds + WARM_UP
        # Each method's schedule squeezed into the rounds, so that every kind of mask change is met and timed.
        trainers = [make(None, total)]
        trainers += [make(config.replace(**SQUEEZED.get(m, {})), total) for m, config in configs.items()]
        spent = instrument()
        seconds = run_in_turns(trainers, total)

    dense = seconds[:, 0]
    methods = {}
    for i, (method, config) in enumerate(configs.items(), start=1):
        gap = trainers[i].gap
        changed = {u.step + shift for u in gap.plan.updates for shift in (-1, 0)} | {
            p.start - 1 for p in gap.plan.phases
        }
        used = [step for step in range(WARM_UP, total - 1) if step not in changed]
        plan = make_plan(config, num_groups=len(gap.groups), total_steps=demo_steps)
        updates = spent[id(gap)].pop("_apply", [])
        methods[method] = figures(seconds[used, i] / dense[used], updates, len(plan.updates), demo_steps, dense[used])
        methods[method]["where_ms"] = {name: 1e3 * float(np.median(times)) for name, times in spent[id(gap)].items()}
    result = {
        "sparsity": args.sparsity,
        "demo_steps": demo_steps,
        "trainer_ms": 1e3 * float(np.median(dense)),
        "methods": methods,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_initialized() else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)


def figures(
    ratios: np.ndarray, updates: list[float], num_updates: int, demo_steps: int, dense: np.ndarray
) -> dict[str, Any]:
    """Of one method: ratios of steps without a change, and seconds of each update that was timed."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(4000, len(ratios))), axis=1)
    low, high = (float(x) for x in np.percentile(medians, [2.5, 97.5]))
    per_update = float(np.mean(updates)) if updates else 0.0
    share = per_update * num_updates / (demo_steps * float(np.median(dense)))
    return {
        "steps": len(ratios),
        "median_ratio": float(np.median(ratios)),
        "interval_95": [low, high],
        "update_ms": 1e3 * per_update,
        "updates_in_demo": num_updates,
        "updates_share": share,
        "total_ratio": float(np.median(ratios)) + share,
        "total_upper_95": high + share,
    }


def trainer_maker(recipe_path: Path, quiet: list[str]) -> tuple[Callable[[GaPConfig | None, int], Any], int]:
    """A function (config, steps) -> trainer on the demo's model and data; and the demo's steps."""
    recipe = load_recipe(recipe_path, quiet, model_cls=ModelSection, data_cls=DataSection)
    arguments = Seq2SeqTrainingArguments(**recipe.training)
    pairs = load_pairs(recipe.data)
    texts = (text for column in ("source", "target") for text in pairs["train"][column])
    tokenizer = load_tokenizer(
        recipe.model, texts, max_length=recipe.data.max_length, broadcast=lambda objects: objects
    )
    train = translate.tokenize(pairs["train"], tokenizer, recipe.data, "train")
    sampler = translate.make_sampler(train, recipe, arguments)
    demo_steps, _ = translate.count_steps(len(train), sampler, arguments)

    def make(config: GaPConfig | None, steps: int) -> Any:
        set_seed(arguments.seed)
        model = load_model(recipe.model, tokenizer, max_length=recipe.data.max_length)
        trainer = translate.TranslationTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**{**recipe.training, "max_steps": steps}),
            train_dataset=train,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
            gap_config=config,
            callbacks=[Turns()],
        )
        sampler = translate.make_sampler(train, recipe, arguments)
        if sampler is not None:
            trainer.use_token_batches(sampler)
        return trainer

    return make, demo_steps


def run_in_turns(trainers: list[Any], total: int) -> np.ndarray:
    """Seconds of each step (rows) of each trainer (columns)."""
    runs = [greenlet.greenlet(t.train) for t in trainers]
    for run in runs:
        run.switch()  # up to the start of the first step
    seconds = np.zeros((total, len(runs)))
    for step in range(total):
        for turn in range(len(runs)):
            i = (step + turn) % len(runs)
            begin = time.perf_counter()
            runs[i].switch()
            wait_for_gpu()
            seconds[step, i] = time.perf_counter() - begin
    return seconds  # the last turn also contains the end of training


def wait_for_gpu() -> None:
    """Until a GPU, if this run is on one, has done all it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def instrument() -> dict[int, dict[str, list[float]]]:
    """Time what GaP adds to a step, by the sparsifier's id and the name of the call."""
    spent: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        wait = wait_for_gpu if name == "_apply" else lambda: None

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            wait()
            begin = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                wait()
                spent[id(self)][name].append(time.perf_counter() - begin)

        return call

    for name in ("mask_gradients", "mask_weights", "advance", "_apply"):
        setattr(Sparsifier, name, timed(name, getattr(Sparsifier, name)))
    return spent


def print_table(r: dict[str, Any]) -> None:
    print(
        f"\nTrainer's step {r['trainer_ms']:.1f} ms; {r['threads']} thread(s), sparsity {r['sparsity']:g}, "
        f"torch {r['versions']['torch']}"
    )
    print(
        f"{'method':10} {'ratio':>7} {'95 % interval':>17} {'one update':>11} {'updates':>8} {'in all':>7} {'upper':>7}"
    )
    for name, m in r["methods"].items():
        low, high = m["interval_95"]
        print(
            f"{name:10} {m['median_ratio']:7.4f} {low:8.4f}–{high:.4f}  {m['update_ms']:8.2f} ms "
            f"{m['updates_in_demo']:8} {m['total_ratio']:7.4f} {m['total_upper_95']:7.4f}"
        )


if __name__ == "__main__":
    main()
