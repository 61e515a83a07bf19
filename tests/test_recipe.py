"""Recipes: loading, overrides, coercion, and one error for each way to get one wrong."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from gap_hf import GaPError
from gap_hf.recipe import load_recipe, parse_overrides


@dataclass(frozen=True, kw_only=True)
class Model:
    checkpoint: str | Path | None = None
    size: Literal["small", "large"] = "small"
    config: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Data:
    train: Path
    columns: list[str] | None = None
    max_length: int = 64
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise GaPError(f"data.max_length: found {self.max_length}, expected at least 1")


RECIPE = """
    gap: {sparsity: 0.8}
    model: {config: {d_model: 32, inner: {a: 1}}}
    data: {train: train.tsv}
    training: {output_dir: runs/x, learning_rate: 5e-4, eval_strategy: no, max_steps: 10}
"""


def load(tmp_path: Path, *overrides: str, text: str = RECIPE) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return load_recipe(path, overrides, model_cls=Model, data_cls=Data)


def test_a_recipe_is_read_and_coerced(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.gap.sparsity == 0.8
    assert recipe.model.config == {"d_model": 32, "inner": {"a": 1}}
    assert recipe.training == {
        "output_dir": "runs/x",
        "learning_rate": 5e-4,  # a string in YAML 1.1
        "eval_strategy": "no",  # false in YAML 1.1
        "max_steps": 10,
    }
    assert not recipe.overwrite_output_dir


def test_it_becomes_plain_data_that_loads_again(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "train.tsv").touch()
    recipe = load(tmp_path, "--training.overwrite_output_dir=true")
    again = load(tmp_path, text=yaml.safe_dump(recipe.to_dict()))
    assert again == recipe


def test_training_arguments_are_built_or_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainingArguments

    args = load(tmp_path, "--training.use_cpu=true").training_arguments(Seq2SeqTrainingArguments)
    assert (args.learning_rate, args.max_steps) == (5e-4, 10)
    assert not Path("runs/x").exists()
    with pytest.raises(GaPError, match=r"^training: .*load_best_model_at_end") as error:
        load(tmp_path, "--training.load_best_model_at_end=true").training_arguments(Seq2SeqTrainingArguments)
    assert "\n" not in str(error.value)


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_in_a_file_start_from_its_folder_and_in_overrides_from_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(tmp_path).data.train == tmp_path / "train.tsv"
    assert load(tmp_path, "--data.train=mine.tsv").data.train == Path("mine.tsv")
    assert load(tmp_path, f"--data.train={elsewhere / 'x.tsv'}").data.train == elsewhere / "x.tsv"
    assert load(tmp_path).training["output_dir"] == "runs/x"


def test_a_hub_name_stays_one_unless_such_a_folder_exists(tmp_path: Path) -> None:
    text = RECIPE.replace("{config: {d_model: 32, inner: {a: 1}}}", "{checkpoint: org/name}")
    assert load(tmp_path, text=text).model.checkpoint == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(tmp_path, text=text).model.checkpoint == tmp_path / "org" / "name"


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_with_equals_or_a_space(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "--training.learning_rate=1e-3",
        "--training.max_steps",
        "-1",
        "--training.bf16=true",
        "--data.columns=[a, b]",
        "--gap.sparsity",
        "5e-1",
    )
    assert recipe.training["learning_rate"] == 1e-3
    assert recipe.training["max_steps"] == -1
    assert recipe.training["bf16"] is True
    assert recipe.data.columns == ["a", "b"]
    assert recipe.gap.sparsity == 0.5


def test_overrides_go_into_mappings(tmp_path: Path) -> None:
    recipe = load(tmp_path, "--model.config.d_model=64", "--model.config.inner.b=2", "--model.config.new.deep=3")
    assert recipe.model.config == {"d_model": 64, "inner": {"a": 1, "b": 2}, "new": {"deep": 3}}


def test_globs_of_gap_overrides_keep_their_dots(tmp_path: Path) -> None:
    recipe = load(tmp_path, "--gap.overrides.model.encoder.layers.0.*=0.5")
    assert recipe.gap.overrides == (("model.encoder.layers.0.*", 0.5),)


def test_null_unsets_what_may_be_unset(tmp_path: Path) -> None:
    assert load(tmp_path, "--model.checkpoint=null").model.checkpoint is None
    with pytest.raises(GaPError, match=r"^data.max_length: found nothing, expected a whole number$"):
        load(tmp_path, "--data.max_length=")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rate=1"], r"^found 'learning_rate=1', expected an override such as --training"),
        (["--learning_rate=1"], r"^--learning_rate=1: expected --section.key=value"),
        (["--trainig.max_steps=1"], r"^trainig: unknown section, .*; did you mean 'training'\?$"),
        (["--training.max_steps"], r"^training.max_steps: no value given"),
        (["--training.bf16", "--training.seed=1"], r"^training.bf16: no value given"),
        (["--training.seed=1", "--training.seed=2"], r"^training.seed: overridden twice"),
        (["--model.config={}", "--model.config.d_model=2"], r"^model.config.d_model: overridden twice"),
        (["--data.columns=[a"], r"^data.columns: found '\[a', expected a YAML value"),
        (["--model..x=1"], r"^model..x: found an empty key"),
    ],
)
def test_bad_overrides(words: list[str], message: str) -> None:
    with pytest.raises(GaPError, match=message):
        parse_overrides(words)


def test_an_override_cannot_go_below_a_plain_value(tmp_path: Path) -> None:
    with pytest.raises(GaPError, match=r"^model.config.d_model.x: .*32, expected a mapping"):
        load(tmp_path, "--model.config.d_model.x=1")
    with pytest.raises(
        GaPError, match=r"^training.learning_rate.x: training.learning_rate is '5e-4', expected a mapping"
    ):
        load(tmp_path, "--training.learning_rate.x=1")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys, with the nearest valid one
        ("--training.learning_rat=1", r"^training.learning_rat: unknown key; did you mean 'learning_rate'\?$"),
        (
            "--training.evaluation_strategy=no",
            r"^training.evaluation_strategy: unknown key; did you mean 'eval_strategy'\?$",
        ),
        ("--gap.sparcity=0.5", r"^gap.sparcity: unknown key; did you mean 'sparsity'\?$"),
        ("--gap.num_parts=3", r"^gap.num_parts: unknown key; it is called 'num_partitions' here$"),
        ("--data.maxlength=3", r"^data.maxlength: unknown key; did you mean 'max_length'\?$"),
        ("--model.checkpont=x", r"^model.checkpont: unknown key; did you mean 'checkpoint'\?$"),
        # wrong types
        ("--training.learning_rate=fast", r"^training.learning_rate: found 'fast', expected a finite number$"),
        ("--training.learning_rate=.nan", r"^training.learning_rate: found nan, expected a finite number$"),
        ("--training.learning_rate=true", r"^training.learning_rate: found True, expected a finite number$"),
        ("--training.max_steps=true", r"^training.max_steps: found True, expected a whole number$"),
        ("--training.max_steps=1.5", r"^training.max_steps: found 1.5, expected a whole number$"),
        ("--training.max_steps=1e3", r"^training.max_steps: found '1e3', expected a whole number$"),
        ("--training.bf16=1", r"^training.bf16: found 1, expected true or false$"),
        ("--training.output_dir=3", r"^training.output_dir: found 3, expected a string$"),
        ("--data.max_length='8'", r"^data.max_length: found '8', expected a whole number$"),
        ("--data.columns=en", r"^data.columns: found 'en', expected a list$"),
        ("--data.columns=[en, 3]", r"^data.columns\[1\]: found 3, expected a string$"),
        ("--model.config=[1]", r"^model.config: found \[1\], expected a mapping$"),
        ("--gap.sparsity=much", r"^gap.sparsity: found 'much', expected a number"),
        # out of range, or not among the choices
        ("--training.learning_rate=-1", r"^training.learning_rate: found -1, expected at least 0$"),
        ("--training.max_steps=0", r"^training.max_steps: found 0, expected at least 1, or -1"),
        ("--training.num_train_epochs=0", r"^training.num_train_epochs: found 0, expected above 0$"),
        ("--training.label_smoothing_factor=1", r"^training.label_smoothing_factor: found 1, expected 0 to below 1$"),
        ("--training.lr_scheduler_type=cosin", r"^training.lr_scheduler_type: .*; did you mean 'cosine'\?$"),
        ("--training.optim=adamw", r"^training.optim: found 'adamw', expected one of adamw_torch"),
        ("--model.size=medium", r"^model.size: found 'medium', expected one of small, large"),
        ("--data.max_length=0", r"^data.max_length: found 0, expected at least 1$"),
        ("--gap.sparsity=1.5", r"^gap.sparsity: found 1.5, expected a number above 0 and below 1$"),
        # YAML's own traps
        ("--gap.pattern=2:4", r'^gap.pattern: found the number 124, expected a string; write "2:4" with its quotes$'),
    ],
)
def test_one_sentence_for_each_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(GaPError, match=message) as error:
        load(tmp_path, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gap: {sparsity: 0.5}\nmodle: {}", r"^modle: unknown section, .*; did you mean 'model'\?$"),
        ("gap: 3", r"^gap: found 3, expected a mapping"),
        ("training: [1]", r"^training: found \[1\], expected a mapping"),
        ("gap: {sparsity: 0.5", r"not valid YAML"),
        ("a: b: c", r"not valid YAML"),
        ("- 1", r"found list at the top, expected a mapping"),
        ("", r"found NoneType at the top, expected a mapping"),
        ("gap: {sparsity: 0.5}\ntraining: {max_steps: 1}", r"^training.output_dir: not set"),
        ("gap: {sparsity: 0.5}\ntraining: {output_dir: x}", r"^data.train: not set; expected a path$"),
        ("training: {output_dir: x}\ndata: {train: x}", r"^gap.sparsity: not set"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GaPError, match=message) as error:
        load(tmp_path, text=text)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(GaPError, match=r"recipes.yaml: no such file; did you mean .*recipe.yaml'\?$"):
        load_recipe(tmp_path / "recipes.yaml", model_cls=Model, data_cls=Data)
    with pytest.raises(GaPError, match=r"no such file$"):
        load_recipe(tmp_path / "nowhere" / "recipe.yaml", model_cls=Model, data_cls=Data)
