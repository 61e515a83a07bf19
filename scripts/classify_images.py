"""Train a sparse image classifier by scheduled grow-and-prune: any of timm's networks, or a checkpoint.

    accelerate launch scripts/classify_images.py recipes/vision/mnist.yaml --gap.sparsity=0.9
    python scripts/classify_images.py --predict photo.jpg --model runs/mnist

The recipe (gap, model, data, training) says everything about a run; docs are in `gap_hf.recipe`, `ModelSection` and
`DataSection`. The output folder holds the model, which AutoModelForImageClassification loads, and pipelines too if it takes
three channels (they make every image one of three), the masks, the recipe as it was run, results.json, mistakes.png and plot.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import yaml
from _run import (
    RECIPE_FILE,
    check_schedule,
    cost_of,
    dtype_of,
    read_reference,
    refuse_other_orders,
    refuse_persistent_workers,
    sparsity_of,
)
from _vision.data import DataSection, load_images
from _vision.model import ModelSection, check_training, known_format, load_model
from _vision.prediction import best_names
from _vision.scoring import accuracy, best_classes, draw_mistakes
from _vision.training import Batches, ClassificationTrainer, image_format, make_mixup, set_transforms
from transformers import TrainingArguments, set_seed

import gap_hf
from gap_hf import GaPError, refusals
from gap_hf.output import checkpoint_to_resume, remove_earlier_run
from gap_hf.planning import count_batches, count_optimizer_steps
from gap_hf.recipe import Recipe, load_recipe, one_line
from gap_hf.report import run_figure
from gap_hf.tables import text_table

ImageRecipe = Recipe[ModelSection, DataSection]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; what is wrong with the recipe or the data is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", help="YAML file; any --section.key=value after it overrides one value")
    parser.add_argument("--plan", action="store_true", help="print targets, groups, phases and cost, and stop")
    parser.add_argument("--predict", type=Path, nargs="+", metavar="IMAGE", help="image files to name the classes of")
    parser.add_argument("--model", help="with --predict: a saved model, such as a run's output folder")
    args, overrides = parser.parse_known_args(argv)
    try:
        if args.predict is not None:
            if args.model is None or args.recipe is not None or overrides:
                raise GaPError("--predict: expected image files and --model, and nothing else")
            for path, best in zip(args.predict, best_names(args.model, args.predict), strict=True):
                print(f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in best))
            return 0
        if args.recipe is None:
            raise GaPError("no recipe given; expected a YAML file such as recipes/vision/mnist.yaml")
        recipe = load_recipe(
            args.recipe, overrides, model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments
        )
        train(recipe, plan_only=args.plan)
    except GaPError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def train(recipe: ImageRecipe, *, plan_only: bool = False) -> None:
    """From a recipe to the finished output folder, which is only created once nothing can be wrong any more."""
    if plan_only and recipe.gap.is_off:
        raise GaPError("gap.method: 'dense' trains without grow-and-prune, so there is nothing to plan")
    data, section = recipe.data, recipe.model
    # Examples are no rows of columns.
    args: TrainingArguments = recipe.training_arguments(partial(TrainingArguments, remove_unused_columns=False))
    check_arguments(recipe, args, plan_only=plan_only)
    reference = read_reference(data.reference, ("top1",))
    resume = None if plan_only else checkpoint_to_resume(args, overwrite=recipe.overwrite_output_dir)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):
        splits = load_images(data)
    says_all = None not in (data.mean, data.std, data.image_size)
    known = {} if section.checkpoint is None or says_all else known_format(section.checkpoint)
    form = image_format(splits["train"], data, known)
    set_transforms(splits, data, form)
    set_seed(args.seed)  # the same weights, whatever came before
    model, processor = load_model(
        section, splits["train"].classes, form, dtype=dtype_of(section.dtype, recipe.gap, args)
    )

    total_steps, steps_per_epoch = count_optimizer_steps(count_batches(len(splits["train"]), args), args)
    check_training(section, model, args, total_steps)
    cost = cost_of(recipe, model, args, (total_steps, steps_per_epoch), plan_only=plan_only)
    if cost is None:
        return
    if section.schedule is None:
        check_schedule(args, total_steps, recipe.gap)

    mixup = make_mixup(data, len(splits["train"].classes), args.label_smoothing_factor)
    plain = Batches(data, form, training=False)
    trainer = ClassificationTrainer(
        model=model,
        args=args,
        gap_config=recipe.gap,
        train_dataset=splits["train"],
        eval_dataset=splits["dev"],
        data_collator=plain,
        processing_class=processor,
        preprocess_logits_for_metrics=best_classes,
        compute_metrics=lambda found: accuracy(found.predictions, found.label_ids),
    )
    trainer.attach(section, Batches(data, form, mixup, training=True), plain)
    output = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        if resume is None:
            remove_earlier_run(output)
        (output / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        counts = ", ".join(f"{len(images):,} {split}" for split, images in splits.items())
        print(f"{model.num_parameters():,} parameters, {counts} images, {total_steps:,} steps")

    begin = time.perf_counter()
    if trainer.average is not None and resume is not None:
        trainer.average.resume = Path(resume)
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - begin
    trainer.keep_finished_weights()
    trainer.save_model()
    trainer.save_state()

    # The test set is looked at here and nowhere else: no choice is ever made by it.
    scored = splits[data.score]
    found: Any = trainer.predict(scored)  # type: ignore[arg-type]
    if trainer.is_world_process_zero():
        best = found.predictions[: len(scored)]
        results = {
            "command": " ".join(["python", *sys.argv]),
            **accuracy(best, scored.labels),
            "scored": data.score,
            f"{data.score}_images": len(scored),
            **sparsity_of(trainer, model),
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "dev": [entry for entry in trainer.state.log_history if "eval_top1" in entry],
            "versions": {m.__name__: m.__version__ for m in (gap_hf, torch, transformers, timm)},
            "cost": cost,
            "recipe": recipe.to_dict(),
        }
        (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        wrong = draw_mistakes(scored, best, output / "mistakes.png")
        plan = trainer.gap.plan if trainer.gap is not None else None
        run_figure(trainer.state.log_history, plan, scores=("top1",)).savefig(output / "plot.png", dpi=130)
        print("\n" + table(results, reference))
        print(f"{wrong:,} of {len(scored):,} {data.score} images are wrong, some of them in mistakes.png")
        print(f"saved in {output}: the model, {RECIPE_FILE}, results.json, mistakes.png and plot.png")


def check_arguments(recipe: ImageRecipe, args: TrainingArguments, *, plan_only: bool) -> None:
    if recipe.model.average_decay is not None and args.load_best_model_at_end:
        raise GaPError(
            "training.load_best_model_at_end: contradicts model.average_decay, whose average is of all steps; expected one"
        )
    if (recipe.data.mixup or recipe.data.cutmix) and args.per_device_train_batch_size % 2:
        raise GaPError(
            f"training.per_device_train_batch_size: found {args.per_device_train_batch_size}, expected an even number: mixup takes images in pairs"
        )
    if recipe.model.schedule is not None and recipe.gap.lr_schedule == "restart" and not recipe.gap.is_off:
        raise GaPError(
            "gap.lr_schedule: found restart beside model.schedule, which runs once over all steps; expected whole, "
            "or training.lr_scheduler_type in place of model.schedule"
        )
    if recipe.model.average_decay is not None and recipe.gap.method == "parallel":
        raise GaPError(
            "model.average_decay: contradicts gap.method: parallel, whose replicas would each have an average of their own; expected null"
        )
    refuse_persistent_workers(args)
    refuse_other_orders(args)
    if not recipe.gap.is_off and not plan_only:
        refusals.check_arguments(args, recipe.gap)


def table(results: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """The figures of a run, beside those of a recorded one if there is one."""
    rows = []
    for label, key, show in (
        ("top-1", "top1", "{:.2%}"),
        ("top-5", "top5", "{:.2%}"),
        ("sparsity of the prunable set", "sparsity", "{:.2%}"),
        ("sparsity of the whole model", "model_sparsity", "{:.2%}"),
        ("optimizer steps", "steps", "{:,}"),
        ("training time", "seconds", "{:,.0f} s"),
    ):
        recorded = [] if reference is None else [show.format(reference[key]) if key in reference else ""]
        rows.append([label, show.format(results[key]), *recorded])
    return text_table(["", "this run", *([] if reference is None else ["recorded"])], rows)


if __name__ == "__main__":
    sys.exit(main())
