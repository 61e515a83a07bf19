"""Train a sparse object detector by scheduled grow-and-prune.

    accelerate launch scripts/detect_objects.py recipes/detection/digits.yaml --training.learning_rate=2e-3

The recipe (gap, model, data, training) says everything about a run; docs are in `gap_hf.recipe`, `ModelSection` and
`DataSection`. The output folder holds the model (transformers' own with an image processor, so that pipelines load it), the
masks, the recipe as it was run, results.json, detections.png and plot.png. Where the data have a test set, it is scored once, at the end; COCO's has no public boxes, so its dev set is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
import transformers
import yaml
from _detection.data import DataSection, load_splits
from _detection.drawing import draw_detections
from _detection.model import ModelSection, image_processor, load_model
from _detection.preparing import DetectionSet, collate
from _detection.results import SCORES, results_table
from _detection.training import DetectionTrainer
from _run import (
    RECIPE_FILE,
    SetEpoch,
    check_schedule,
    cost_of,
    data_seed,
    dtype_of,
    read_reference,
    refuse_persistent_workers,
    sparsity_of,
)
from transformers import TrainingArguments, set_seed

import gap_hf
from gap_hf import GaPError, refusals
from gap_hf.output import checkpoint_to_resume, remove_earlier_run
from gap_hf.planning import count_batches, count_optimizer_steps
from gap_hf.recipe import Recipe, load_recipe, one_line
from gap_hf.report import run_figure

DetectionRecipe = Recipe[ModelSection, DataSection]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; what is wrong with the recipe or the data is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", help="YAML file; any --section.key=value after it overrides one value")
    parser.add_argument("--plan", action="store_true", help="print targets, groups, phases and cost, and stop")
    args, overrides = parser.parse_known_args(argv)
    try:
        if args.recipe is None:
            raise GaPError("no recipe given; expected a YAML file such as recipes/detection/digits.yaml")
        recipe = load_recipe(
            args.recipe, overrides, model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments
        )
        train(recipe, plan_only=args.plan)
    except GaPError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def train(recipe: DetectionRecipe, *, plan_only: bool = False) -> None:
    """From a recipe to the finished output folder, which is only created once nothing can be wrong any more."""
    if plan_only and recipe.gap.is_off:
        raise GaPError("gap.method: 'dense' trains without grow-and-prune, so there is nothing to plan")
    data = recipe.data
    args: TrainingArguments = recipe.training_arguments(TrainingArguments)
    refuse_persistent_workers(args)
    if args.label_smoothing_factor:
        raise GaPError(
            f"training.label_smoothing_factor: found {args.label_smoothing_factor}, expected 0: a detection model works out its own loss"
        )
    # A plan needs no processes, and finds by itself what contradicts its length.
    if not recipe.gap.is_off and not plan_only:
        refusals.check_arguments(args, recipe.gap)
    reference = read_reference(data.reference, tuple(SCORES))
    resume = None if plan_only else checkpoint_to_resume(args, overwrite=recipe.overwrite_output_dir)

    splits = load_splits(data)
    set_seed(args.seed)  # the same weights, whatever came before
    with args.main_process_first(desc="loading the model"):
        model, classes, form = load_model(
            recipe.model, splits.names, dtype=dtype_of(recipe.model.dtype, recipe.gap, args)
        )
    train_set = DetectionSet(splits.train, form, classes=classes, augmentation=data.augmentation, seed=data_seed(args))
    dev_set = DetectionSet(splits.dev, form, classes=classes)
    split, scored = splits.scored(data.score)

    total_steps, steps_per_epoch = count_optimizer_steps(count_batches(len(train_set), args), args)
    cost = cost_of(recipe, model, args, (total_steps, steps_per_epoch), plan_only=plan_only)
    if cost is None:
        return
    check_schedule(args, total_steps, recipe.gap)

    trainer = DetectionTrainer(
        model=model,
        args=args,
        gap_config=recipe.gap,
        train_dataset=train_set,
        eval_dataset=dev_set,
        data_collator=collate,
        processing_class=image_processor(model, form),
    )
    trainer.add_callback(SetEpoch(train_set))
    trainer.score_on(splits.dev, splits.names, classes)
    output = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        if resume is None:
            remove_earlier_run(output)
            (output / "detections.png").unlink(missing_ok=True)
        (output / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        print(
            f"{model.num_parameters():,} parameters, {len(train_set):,} training images of {form.size[1]}×{form.size[0]}, "
            f"{len(splits.names)} classes, {total_steps:,} steps"
        )

    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    train_seconds = time.perf_counter() - begin
    trainer.save_model()
    trainer.save_state()

    # The test set is looked at here and nowhere else: no choice is ever made by it.
    trainer.score_on(scored, splits.names, classes)
    prefix = "eval" if split == "dev" else split
    loss = trainer.evaluate(DetectionSet(scored, form, classes=classes), metric_key_prefix=prefix)[f"{prefix}_loss"]
    if trainer.is_world_process_zero():
        results = {
            "command": " ".join(["python", *sys.argv]),
            **trainer.figures,
            "loss": loss,
            "scored": split,
            f"{split}_images": len(scored),
            **sparsity_of(trainer, model),
            "steps": trainer.state.global_step,
            "seconds": round(train_seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),  # of this process, start and scoring included
            "dev": [entry for entry in trainer.state.log_history if "eval_map" in entry],
            "versions": {m.__name__: m.__version__ for m in (gap_hf, torch, torchvision, transformers)},
            "cost": cost,
            "recipe": recipe.to_dict(),
        }
        (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
        plan = trainer.gap.plan if trainer.gap is not None else None
        run_figure(trainer.state.log_history, plan, scores=("map", "map_50")).savefig(output / "plot.png", dpi=130)
        shown = scored[: data.num_drawn]
        if shown:
            path = output / "detections.png"
            draw_detections(shown, trainer.found, splits.names, path, threshold=data.draw_threshold)
        print("\n" + results_table(results, reference=reference))
        pictures = "detections.png and plot.png" if shown else "plot.png"
        print(f"saved in {output}: the model, {RECIPE_FILE}, results.json, {pictures}")


if __name__ == "__main__":
    sys.exit(main())
