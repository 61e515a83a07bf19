"""Train a sparse translation model by scheduled grow-and-prune, and translate with it.

    accelerate launch scripts/translate.py recipes/translation/demo.yaml --training.learning_rate=2e-3
    python scripts/translate.py --predict FILE --model runs/demo [--output FILE]

The recipe (gap, model, data, training) says everything about a run; docs are in `gap_hf.recipe`, `ModelSection`
and `DataSection`. The output folder holds the model, its tokenizer, the masks, the recipe as it was run,
results.json, the translations of the test set (of dev with data.score=dev) and plot.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import yaml
from _run import (
    RECIPE_FILE,
    check_schedule,
    cost_of,
    data_seed,
    dtype_of,
    read_reference,
    refuse_other_orders,
    sparsity_of,
)
from _translation.batching import TokenBatches, TokenBatchSampler
from _translation.data import DataSection, load_pairs
from _translation.model import ModelSection, load_model, load_tokenizer
from _translation.scoring import Scorer
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    set_seed,
)

import gap_hf
from gap_hf import GaPError, GaPSeq2SeqTrainer, refusals
from gap_hf.output import checkpoint_to_resume, remove_earlier_run
from gap_hf.planning import count_batches, count_optimizer_steps
from gap_hf.recipe import Recipe, load_recipe, one_line
from gap_hf.report import plot_run, results_table

TranslationRecipe = Recipe[ModelSection, DataSection]


class TranslationTrainer(TokenBatches, GaPSeq2SeqTrainer):
    """GaPSeq2SeqTrainer on token batches, with cheap evaluations during training."""

    eval_num_beams = 1

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        kwargs.setdefault("num_beams", self.eval_num_beams)
        return super().evaluate(*args, **kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; what is wrong with the recipe or the data is one line on stderr and exit code 2."""
    try:
        args, overrides = parse(argv)
        if args.predict is not None:
            translate_file(args.predict, args.model, args.output, batch_size=args.batch_size)
        else:
            recipe = load_recipe(args.recipe, overrides, model_cls=ModelSection, data_cls=DataSection)
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
    parser.add_argument("--predict", type=Path, metavar="FILE", help="translate this text file line by line, and stop")
    parser.add_argument("--model", type=Path, metavar="DIR", help="with --predict: output folder of a training run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="with --predict: where to write; stdout if left out"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="with --predict: lines translated at once")
    args, overrides = parser.parse_known_args(argv)
    if args.predict is not None:
        if args.recipe or overrides or args.model is None:
            raise GaPError("--predict: expected --predict FILE --model DIR [--output FILE], without a recipe")
        if args.batch_size < 1:
            raise GaPError(f"--batch-size: found {args.batch_size}, expected at least 1")
    elif args.recipe is None:
        raise GaPError("no recipe given; expected a YAML file such as recipes/translation/demo.yaml")
    elif args.model is not None or args.output is not None:
        raise GaPError("--model and --output go with --predict; expected --model.key=value or --training.output_dir=…")
    return args, overrides


# --- training --------------------------------------------------------------------------------------------------------


def train(recipe: TranslationRecipe, *, plan_only: bool = False) -> None:
    """From a recipe to the finished output folder, which is only created once nothing can be wrong any more."""
    if plan_only and recipe.gap.is_off:
        raise GaPError("gap.method: 'dense' trains without grow-and-prune, so there is nothing to plan")
    data = recipe.data
    args: Seq2SeqTrainingArguments = recipe.training_arguments(Seq2SeqTrainingArguments)
    check_arguments(recipe, args, plan_only=plan_only)
    resume = None if plan_only else checkpoint_to_resume(args, overwrite=recipe.overwrite_output_dir)
    set_seed(args.seed)

    with args.main_process_first(desc="loading the data"):
        pairs = load_pairs(data)
    texts = (text for column in ("source", "target") for text in pairs["train"][column])
    tokenizer = load_tokenizer(recipe.model, texts, max_length=data.max_length, broadcast=broadcast_object_list)
    with args.main_process_first(desc="tokenizing"):
        tokens = {split: tokenize(rows, tokenizer, data, split) for split, rows in pairs.items()}
    set_seed(args.seed)  # the same weights, whatever came before
    model = load_model(
        recipe.model,
        tokenizer,
        max_length=args.generation_max_length or data.max_length,
        dtype=dtype_of(recipe.model.dtype, recipe.gap, args),
    )
    assert model.generation_config is not None
    model.generation_config.num_beams = args.generation_num_beams or model.generation_config.num_beams
    if model.config.model_type == "t5" and data.source_prefix:
        model.config.prefix = data.source_prefix

    sampler = make_sampler(tokens["train"], recipe, args)
    total_steps, steps_per_epoch = count_steps(len(tokens["train"]), sampler, args)
    cost = cost_of(recipe, model, args, (total_steps, steps_per_epoch), plan_only=plan_only)
    if cost is None:
        return
    check_schedule(args, total_steps, recipe.gap)

    scorer = Scorer(lowercase=data.lowercase_bleu)
    references = {split: pairs[split]["target"] for split in ("dev", "test")}
    trainer = TranslationTrainer(
        model=model,
        args=args,
        gap_config=recipe.gap,
        train_dataset=tokens["train"],
        eval_dataset=tokens["dev"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, model=model, pad_to_multiple_of=8 if args.fp16 and sampler is None else None
        ),
        compute_metrics=lambda p: scorer(decode(p.predictions, tokenizer, references["dev"]), references["dev"]),
    )
    trainer.eval_num_beams = data.eval_num_beams
    if sampler is not None:
        trainer.use_token_batches(sampler)
    output = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        if resume is None:
            remove_earlier_run(output)
        (output / RECIPE_FILE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        if scorer.note:
            print(scorer.note)
        left_out = len(pairs["train"]) - len(tokens["train"])
        print(
            f"{model.num_parameters():,} parameters, {len(tokens['train']):,} training pairs "
            f"({left_out:,} longer than {data.max_length} tokens left out), {total_steps:,} steps"
        )

    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    train_seconds = time.perf_counter() - begin
    trainer.save_model()
    trainer.save_state()

    # The test set is translated and scored here and nowhere else: no choice is ever made by it.
    trainer.compute_metrics = None
    scored = data.score
    predictions = trainer.predict(tokens[scored])  # type: ignore[arg-type]
    if trainer.is_world_process_zero():
        translations = decode(predictions.predictions, tokenizer, references[scored])
        results = {
            "command": " ".join(["python", *sys.argv]),
            **scorer(translations, references[scored]),
            "signatures": scorer.signatures(),
            "bleu_by_origin": score_by_origin(scorer, translations, pairs[scored]),
            "scored": scored,
            f"{scored}_pairs": len(translations),
            **sparsity_of(trainer, model),
            "steps": trainer.state.global_step,
            "seconds": round(train_seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),  # of this process, start and scoring included
            "dev": [entry for entry in trainer.state.log_history if "eval_bleu" in entry],
            "versions": {m.__name__: m.__version__ for m in (gap_hf, torch, transformers)},
            "cost": cost,
            "recipe": recipe.to_dict(),
            "sentence_statistics": scorer.sentence_statistics(translations, references[scored]),
        }
        write_outputs(output, results, translations, trainer)
        print("\n" + results_table(results, reference=read_reference(data.reference, ("bleu", "chrf"))))
        print(f"saved in {output}: the model, {RECIPE_FILE}, results.json, translations.txt and plot.png")


def check_arguments(recipe: TranslationRecipe, args: Seq2SeqTrainingArguments, *, plan_only: bool = False) -> None:
    if not args.predict_with_generate:
        raise GaPError("training.predict_with_generate: found false, expected true: BLEU is computed on translations")
    refuse_other_orders(args)
    if args.auto_find_batch_size and recipe.data.max_tokens_per_batch is not None:
        raise GaPError(
            "training.auto_find_batch_size: contradicts data.max_tokens_per_batch, which sets the batches; expected one"
        )
    # A plan needs no processes, and finds by itself what contradicts its length.
    if not recipe.gap.is_off and not plan_only:
        refusals.check_arguments(args, recipe.gap)
    read_reference(recipe.data.reference, ("bleu", "chrf"))


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataSection, split: str) -> Dataset:
    """Columns input_ids, attention_mask and labels. Too long training pairs go; sources to translate are cut."""
    longest = None if split == "train" else data.max_length

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        sources = [data.source_prefix + text for text in batch["source"]]
        # Without truncation a tokenizer warns about each model's own limit; those pairs are left out below.
        encoded = tokenizer(sources, max_length=longest, truncation=longest is not None, verbose=False)
        labels = tokenizer(
            text_target=batch["target"], max_length=longest, truncation=longest is not None, verbose=False
        )
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels["input_ids"],
        }

    # A bar where there is something to wait for.
    (datasets.enable_progress_bars if len(rows) > 100_000 else datasets.disable_progress_bars)()
    workers = data.num_workers if data.num_workers and data.num_workers > 1 else None
    out = rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=workers, load_from_cache_file=False)
    if split != "train":
        return out
    fits = [i for i, n in enumerate(lengths(out)) if n <= data.max_length]
    if not fits:
        raise GaPError(
            f"data.max_length: no training pair has at most {data.max_length} tokens; expected a larger number"
        )
    return out.select(fits)


def lengths(tokens: Dataset) -> list[int]:
    """The longer side of each pair, in tokens."""
    return [max(len(s), len(t)) for s, t in zip(tokens["input_ids"], tokens["labels"], strict=True)]


def make_sampler(train: Dataset, recipe: TranslationRecipe, args: Seq2SeqTrainingArguments) -> TokenBatchSampler | None:
    if recipe.data.max_tokens_per_batch is None:
        return None
    return TokenBatchSampler(
        lengths(train),
        max_tokens=recipe.data.max_tokens_per_batch,
        seed=data_seed(args),
        group_size=args.world_size * args.gradient_accumulation_steps,
    )


def count_steps(
    num_pairs: int, sampler: TokenBatchSampler | None, args: Seq2SeqTrainingArguments
) -> tuple[int, Fraction | None]:
    """Optimizer steps in all and, unless `max_steps` sets them, per epoch, as the Trainer will count them."""
    batches = count_batches(num_pairs, args) if sampler is None else math.ceil(len(sampler) / args.world_size)
    return count_optimizer_steps(batches, args)


def decode(predictions: Any, tokenizer: PreTrainedTokenizerBase, references: Sequence[str]) -> list[str]:
    """Generated token ids, padded with -100, to one text per reference.

    With several processes Seq2SeqTrainer also returns the examples that filled up their last batches, at the end.
    """
    ids = np.array(predictions)
    ids[ids < 0] = tokenizer.pad_token_id
    texts = tokenizer.batch_decode(ids[: len(references)], skip_special_tokens=True)
    return [text.strip() for text in texts]


# --- results ---------------------------------------------------------------------------------------------------------


def score_by_origin(scorer: Scorer, translations: Sequence[str], pairs: Dataset) -> dict[str, dict[str, float]]:
    """BLEU, chrF and number of pairs for each value of the origin column; empty where all are from one place."""
    if "origin" not in pairs.column_names or len(set(pairs["origin"])) < 2:
        return {}
    names = ["unknown" if name is None else str(name) for name in pairs["origin"]]
    rows = list(zip(names, translations, pairs["target"], strict=True))
    out = {}
    for origin in sorted(set(names)):
        mine = [(text, reference) for name, text, reference in rows if name == origin]
        out[origin] = {**scorer([t for t, _ in mine], [r for _, r in mine]), "pairs": len(mine)}
    return out


def write_outputs(output: Path, results: dict[str, Any], translations: Sequence[str], trainer: Any) -> None:
    # One line per sentence, where indenting would give each number its own.
    rows = ",\n    ".join(json.dumps(row) for row in results["sentence_statistics"])
    text = json.dumps({**results, "sentence_statistics": "…"}, indent=2, ensure_ascii=False)
    text = text.removesuffix('"…"\n}') + f"[\n    {rows}\n  ]\n}}\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    (output / "translations.txt").write_text("".join(f"{text}\n" for text in translations), encoding="utf-8")
    plan = trainer.gap.plan if trainer.gap is not None else None
    plot_run(trainer.state.log_history, plan, output / "plot.png")


# --- translating -----------------------------------------------------------------------------------------------------


def translate_file(path: Path, folder: Path, output: Path | None, *, batch_size: int) -> None:
    """Translate a text file line by line with a trained model.

    Raises:
        GaPError: if the file or the model cannot be read.
    """
    if not path.is_file():
        raise GaPError(f"--predict: no such file: {path}")
    if not folder.is_dir():
        raise GaPError(f"--model: no such folder: {folder}")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise GaPError(f"--output: found {output}, expected a file in a folder that exists")
    try:
        # Not splitlines(): it also cuts at U+2028 and form feeds, and then lines no longer match those of the file.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise GaPError(f"--predict: {one_line(error)}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    prefix, max_length = _translation_settings(folder)
    translations = list(
        _translate(lines, model, tokenizer, prefix=prefix, max_length=max_length, batch_size=batch_size)
    )
    text = "".join(f"{line}\n" for line in translations)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def _translation_settings(folder: Path) -> tuple[str, int | None]:
    """Prefix and longest input that the model was trained with, from the recipe beside it or above a checkpoint."""
    for path in (folder / RECIPE_FILE, folder.parent / RECIPE_FILE):
        if path.is_file():
            data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
            return data["source_prefix"], data["max_length"]
    return "", None


def _translate(
    lines: Sequence[str], model: Any, tokenizer: Any, *, prefix: str, max_length: int | None, batch_size: int
) -> Iterator[str]:
    """One translation per line, in order; an empty line stays empty."""
    for start in range(0, len(lines), batch_size):
        batch = [line.strip() for line in lines[start : start + batch_size]]
        texts = [prefix + line for line in batch if line]
        translated = iter(())
        if texts:
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
            with torch.inference_mode():
                generated = model.generate(**inputs.to(model.device))
            translated = iter(tokenizer.batch_decode(generated, skip_special_tokens=True))
        for line in batch:
            yield " ".join(next(translated).split()) if line else ""


if __name__ == "__main__":
    sys.exit(main())
