"""Train a sparse network for 3-D part segmentation by scheduled grow-and-prune.

    accelerate launch scripts/segment_points.py recipes/points/robots.yaml --training.learning_rate=2e-3

The recipe (gap, model, data, training) says everything about a run; docs are in `gap_hf.recipe`, `ModelSection` and
`DataSection`. The output folder holds the model with the code of its network, the masks, the recipe as it was run,
results.json, predictions.npz (the parts of every point scored), clouds.png and plot.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from _norms import RecalibratedTrainer
from _points.data import PointClouds, PointData, load_shapes
from _points.metrics import best_parts, nearest_neighbour_parts, part_scores
from _points.model import ModelSection, load_model
from _points.render import Drawn, draw_clouds, table
from _points.section import DataSection
from _run import (
    RECIPE_FILE,
    SetEpoch,
    check_schedule,
    cost_of,
    data_seed,
    read_reference,
    refuse_other_orders,
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

PointRecipe = Recipe[ModelSection, DataSection]


class PointTrainer(RecalibratedTrainer):
    """RecalibratedTrainer whose predictions are parts (B, N), not logits: ShapeNet's are 50 numbers for each point."""

    category_parts: Sequence[Sequence[int]] = ()

    def plain_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Clouds without augmentation."""
        clouds: Any = self.train_dataset
        plain = PointClouds(clouds.shapes, clouds.data, seed=clouds.seed, training=False)
        items = [plain[int(i)] for i in indices]
        return {name: torch.stack([item[name] for item in items]) for name in ("points", "category")}

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if isinstance(logits, torch.Tensor):
            logits = best_parts(logits, inputs["category"].to(logits.device), self.category_parts)
        return loss, logits, labels


def main(argv: Sequence[str] | None = None) -> int:
    """Run; what is wrong with the recipe or the data is one line on stderr and exit code 2."""
    try:
        args, overrides = parse(argv)
        recipe = load_recipe(
            args.recipe, overrides, model_cls=ModelSection, data_cls=DataSection, training_cls=TrainingArguments
        )
        train(recipe, plan_only=args.plan)
    except GaPError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", help="YAML file; any --section.key=value after it overrides one value")
    parser.add_argument("--plan", action="store_true", help="print targets, groups, phases and cost, and stop")
    args, overrides = parser.parse_known_args(argv)
    if args.recipe is None:
        raise GaPError("no recipe given; expected a YAML file such as recipes/points/robots.yaml")
    return args, overrides


# --- training --------------------------------------------------------------------------------------------------------


def train(recipe: PointRecipe, *, plan_only: bool = False) -> None:
    """From a recipe to the finished output folder, which is only created once nothing can be wrong any more."""
    if plan_only and recipe.gap.is_off:
        raise GaPError("gap.method: 'dense' trains without grow-and-prune, so there is nothing to plan")
    data = recipe.data
    args: TrainingArguments = recipe.training_arguments(TrainingArguments)
    check_arguments(recipe, args, plan_only=plan_only)
    resume = None if plan_only else checkpoint_to_resume(args, overwrite=recipe.overwrite_output_dir)

    shapes = load_shapes(data)
    seed = data_seed(args)
    clouds = {
        split: PointClouds(found, data, seed=seed, training=split == "train") for split, found in shapes.splits.items()
    }
    set_seed(args.seed)  # the same weights, whatever came before
    model = load_model(recipe.model, data, shapes)
    total_steps, steps_per_epoch = count_optimizer_steps(count_batches(len(clouds["train"]), args), args)
    cost = cost_of(recipe, model, args, (total_steps, steps_per_epoch), plan_only=plan_only)
    if cost is None:
        return
    check_schedule(args, total_steps, recipe.gap)

    trainer = PointTrainer(
        model=model,
        args=args,
        gap_config=recipe.gap,
        train_dataset=clouds["train"],
        eval_dataset=clouds["dev"],
        compute_metrics=lambda p: scores_of(p.predictions, clouds["dev"], shapes),
        callbacks=[SetEpoch(clouds["train"])],
    )
    trainer.category_parts = shapes.category_parts
    trainer.recalibrate = recipe.model.recalibrate_batchnorm
    output = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        if resume is None:
            remove_earlier_run(output)
        (output / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        counts = ", ".join(f"{len(found):,} of {split}" for split, found in clouds.items())
        print(
            f"{model.num_parameters():,} parameters, clouds: {counts}, {len(shapes.categories)} categories, "
            f"{len(shapes.parts)} parts, {total_steps:,} steps"
        )

    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    train_seconds = time.perf_counter() - begin
    trainer.keep_finished_weights()
    trainer.save_model()
    trainer.save_state()

    # The test set is predicted and scored here and nowhere else: no choice is ever made by it.
    trainer.compute_metrics = None
    scored = clouds[data.score]
    predictions = trainer.predict(scored).predictions
    if trainer.is_world_process_zero():
        predicted = np.asarray(predictions)[: len(scored)]
        nearest = baseline(scored, clouds["train"], data)
        results = {
            "command": " ".join(["python", *sys.argv]),
            **scores_of(predicted, scored, shapes),
            "by_name": scores_by_name(predicted, nearest, scored, shapes),
            "baseline": None,
            "scored": data.score,
            "num_clouds": len(scored),
            **sparsity_of(trainer, model),
            "steps": trainer.state.global_step,
            "seconds": round(train_seconds, 1),
            "dev": [entry for entry in trainer.state.log_history if "eval_point_accuracy" in entry],
            "versions": {m.__name__: m.__version__ for m in (gap_hf, torch, transformers)},
            "cost": cost,
            "recipe": recipe.to_dict(),
        }
        if nearest is not None:
            found = sum(map(len, examples(clouds["train"], data).values()))
            results["baseline"] = {**scores_of(nearest, scored, shapes), "num_examples": found}
        write_outputs(output, results, predicted, nearest, scored, shapes, trainer)
        print("\n" + table(results, read_reference(data.reference, ("point_accuracy",))))
        print(f"saved in {output}: the model, {RECIPE_FILE}, results.json, predictions.npz, clouds.png and plot.png")


def check_arguments(recipe: PointRecipe, args: TrainingArguments, *, plan_only: bool = False) -> None:
    refuse_persistent_workers(args)
    refuse_other_orders(args)
    if not recipe.gap.is_off and not plan_only:
        refusals.check_arguments(args, recipe.gap)
    read_reference(recipe.data.reference, ("point_accuracy",))


# --- results ---------------------------------------------------------------------------------------------------------


def scores_of(predicted: Any, clouds: PointClouds, shapes: PointData) -> dict[str, float]:
    """`part_scores` of one prediction (num_points,) per cloud; what several processes added to fill up is cut off."""
    items = [clouds[i] for i in range(len(clouds))]
    truth = [item["labels"].numpy() for item in items]
    kinds = [int(item["category"]) for item in items]
    return part_scores(list(np.asarray(predicted))[: len(items)], truth, kinds, shapes.category_parts)


def scores_by_name(
    predicted: np.ndarray, nearest: np.ndarray | None, clouds: PointClouds, shapes: PointData
) -> dict[str, dict[str, float]]:
    """Point accuracy of clouds of the same name together, and the baseline's; empty where every name is another."""
    names = [shape.name for shape in clouds.shapes]
    if len(set(names)) == len(names):
        return {}
    out: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(names):
        mine = [i for i, other in enumerate(names) if other == name]
        truth = np.stack([clouds[i]["labels"].numpy() for i in mine])
        out[name] = {"point_accuracy": float((predicted[mine] == truth).mean()), "clouds": len(mine)}
        if nearest is not None:
            out[name]["baseline_point_accuracy"] = float((nearest[mine] == truth).mean())
    return out


def examples(clouds: PointClouds, data: DataSection) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Coordinates and parts of the training clouds that the baseline may use, by category."""
    # As evaluation draws them: without what training adds at random.
    plain = PointClouds(clouds.shapes, data, seed=clouds.seed, training=False)
    out: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for i, shape in enumerate(plain.shapes):
        mine = out.setdefault(shape.category, [])
        if data.baseline_shapes is None or len(mine) < data.baseline_shapes:
            mine.append((plain[i]["points"][:, :3], plain[i]["labels"]))
    return out


def baseline(scored: PointClouds, training: PointClouds, data: DataSection) -> np.ndarray | None:
    """1-nearest-neighbour's parts (clouds, num_points); None if the recipe wants none."""
    if data.baseline_shapes == 0:
        return None
    found = examples(training, data)
    items = (scored[i] for i in range(len(scored)))
    return np.stack([nearest_neighbour_parts(x["points"][:, :3], int(x["category"]), found) for x in items])


def write_outputs(
    output: Path,
    results: dict[str, Any],
    predicted: np.ndarray,
    nearest: np.ndarray | None,
    scored: PointClouds,
    shapes: PointData,
    trainer: PointTrainer,
) -> None:
    (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    items = [scored[i] for i in range(len(scored))]
    np.savez_compressed(
        output / "predictions.npz",
        points=np.stack([item["points"][:, :3].numpy() for item in items]),
        truth=np.stack([item["labels"].numpy() for item in items]).astype(np.int16),
        predicted=predicted.astype(np.int16),
        name=np.array([shape.name for shape in scored.shapes]),
    )
    data = scored.data
    drawn = []
    # Spread over the clouds, not the first few, which may all be of one category.
    for i in np.linspace(0, len(items) - 1, min(data.draw, len(items))).astype(int).tolist():
        parts = {"truth": items[i]["labels"].numpy(), "prediction": predicted[i]}
        if nearest is not None:
            parts["1-nearest-neighbour"] = nearest[i]
        drawn.append(Drawn(scored.shapes[i].name, items[i]["points"][:, :3].numpy(), parts))
    if drawn:
        up = data.rotate if data.rotate != "none" else "y" if data.folder is not None else "z"
        draw_clouds(drawn, shapes.parts, output / "clouds.png", up=up)
    plan = trainer.gap.plan if trainer.gap is not None else None
    figure = run_figure(trainer.state.log_history, plan, scores=("point_accuracy", "instance_miou"))
    figure.savefig(output / "plot.png", dpi=130)


if __name__ == "__main__":
    sys.exit(main())
