"""Recipes: one YAML file that says everything about a run, with every value overridable on the command line.

    gap:        # GaPConfig
    model:      # a dataclass of the script
    data:       # another one
    training:   # any name of (Seq2Seq)TrainingArguments

`load_recipe` checks names, types and ranges of all four before anything is built, downloaded or written.

Relative paths in the `model` and `data` sections of a file are relative to that file's folder; those given as
overrides, and all of `training` (as everywhere in transformers), to the current folder.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from gap_hf.coercion import coerce, describe, number, one_line, plain, show
from gap_hf.config import GaPConfig, load_yaml
from gap_hf.errors import GaPError, did_you_mean, nearest

M = TypeVar("M")
D = TypeVar("D")

SECTIONS = ("gap", "model", "data", "training")
# Gone from transformers 5, but every user of its examples knows it: may a run write into a folder that is not empty?
OVERWRITE = "overwrite_output_dir"


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[M, D]):
    """A checked recipe.

    Attributes:
        path: The file it was read from.
        gap: Method ``dense`` is plain training.
        model, data: Instances of the dataclasses given to `load_recipe`.
        training: Keyword arguments for `TrainingArguments`, checked and coerced; only those that were set.
        overwrite_output_dir: `training.overwrite_output_dir`, which `TrainingArguments` no longer has.
    """

    path: Path
    gap: GaPConfig
    model: M
    data: D
    training: dict[str, Any]
    overwrite_output_dir: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON and YAML types): the whole recipe as it was run."""
        training = {**self.training, OVERWRITE: self.overwrite_output_dir}
        sections = {"gap": self.gap.to_dict(), "model": self.model, "data": self.data, "training": training}
        return {name: plain(section) for name, section in sections.items()}

    def training_arguments(self, cls: Callable[..., Any]) -> Any:
        """Build `cls` from the `training` section.

        Raises:
            GaPError: if `cls` itself refuses a combination, with its words on one line.
        """
        try:
            return cls(**self.training)
        except (ValueError, TypeError, ImportError) as error:
            raise GaPError(f"training: {one_line(error)}") from None


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    model_cls: type[M],
    data_cls: type[D],
    training_cls: type | None = None,
) -> Recipe[M, D]:
    """Read a recipe and check all of it.

    Args:
        path: The YAML file.
        overrides: Command-line words: ``--section.key=value`` or ``--section.key value``, the value in YAML.
            Below a key whose value is a mapping, dots go deeper: ``--model.config.d_model=64``.
        model_cls: Dataclass of the `model` section. Its annotations are the types that are checked; `Path` is a
            file or folder, `str | Path` a Hub name unless such a path exists; its `__post_init__` may raise GaPError.
            `dict` takes the section as it is, for tools that serve recipes of every script.
        data_cls: The same for `data`.
        training_cls: Whose fields are valid under `training`; Seq2SeqTrainingArguments when left out.

    Raises:
        GaPError: one sentence with the key, what was found, what was expected and the nearest valid name.
    """
    path = Path(path)
    sections = load_yaml(path)
    for name, section in sections.items():
        _check_section(str(name))
        if section is not None and not isinstance(section, Mapping):
            raise GaPError(f"{name}: found {show(section)}, expected a mapping of keys to values")
    values = {name: _resolve_at(dict(sections.get(name) or {}), path.parent) for name in SECTIONS}
    for keys, value in parse_overrides(overrides):
        _set(values[keys[0]], keys[1:], _At(value, Path()), ".".join(keys))

    if training_cls is None:
        # torch comes with this import, so it waits until a recipe is really loaded.
        from transformers import Seq2SeqTrainingArguments as training_cls
    training = _check_training({key: at.value for key, at in values["training"].items()}, training_cls)
    return Recipe(
        path=path,
        gap=GaPConfig.from_dict(_check_gap({key: at.value for key, at in values["gap"].items()})),
        model=_build("model", values["model"], model_cls),
        data=_build("data", values["data"], data_cls),
        overwrite_output_dir=training.pop(OVERWRITE, False),
        training=training,
    )


# --- the command line ------------------------------------------------------------------------------------------------


def parse_overrides(words: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Command-line words to (keys, value) pairs, the first key being the section.

    Raises:
        GaPError: if a word is no override, a value is missing or not YAML, a section is unknown, or a key is set twice.
    """
    found: list[tuple[list[str], Any]] = []
    seen: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise GaPError(f"found '{word}', expected an override such as --training.learning_rate=5e-4")
        name, equals, text = word[2:].partition("=")
        section, dot, below = name.partition(".")
        if not dot or not below:
            known = [f"--{s}.…" for s in SECTIONS]
            raise GaPError(f"{word}: expected --section.key=value, with one of {', '.join(known)}")
        _check_section(section)
        if not equals:
            # Values may start with one dash (-1), the next override starts with two.
            if not rest or rest[0].startswith("--"):
                raise GaPError(f"{name}: no value given; expected --{name}=value")
            text = rest.pop(0)
        # The keys of gap.overrides are globs over module paths, which have dots of their own.
        keys = [section, *(below.split(".", 1) if below.startswith("overrides.") else below.split("."))]
        if "" in keys:
            raise GaPError(f"{name}: found an empty key, expected --section.key=value")
        for other in seen.values():
            if keys[: len(other)] == other[: len(keys)]:
                raise GaPError(f"{name}: overridden twice (--{'.'.join(other)} is the other), expected once")
        seen[name] = keys
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # the latter for dates that there are not
            raise GaPError(f"{name}: found {text!r}, expected a YAML value: {one_line(error)}") from None
        found.append((keys, value))
    return found


@dataclass(frozen=True)
class _At:
    """A value and the folder its relative paths start from."""

    value: Any
    folder: Path


def _resolve_at(section: Mapping[Any, Any], folder: Path) -> dict[str, _At]:
    return {str(key): _At(value, folder) for key, value in section.items()}


def _set(section: dict[str, _At], keys: list[str], value: _At, name: str) -> None:
    """Put `value` under `keys`, inside the mapping that a first key already holds, without changing that one."""
    first, rest = keys[0], keys[1:]
    if not rest:
        section[first] = value
        return
    whole = section[first].value if first in section else None
    whole = {} if whole is None else whole
    below = name.rsplit(".", len(rest))[0]
    if not isinstance(whole, Mapping):
        raise GaPError(f"{name}: {below} is {show(whole)}, expected a mapping to set a key of")
    whole = inner = dict(whole)
    for key in rest[:-1]:
        deeper = inner.get(key) or {}
        if not isinstance(deeper, Mapping):
            raise GaPError(f"{name}: '{key}' is {show(deeper)}, expected a mapping to set a key of")
        inner[key] = dict(deeper)
        inner = inner[key]
    inner[rest[-1]] = value.value
    section[first] = _At(whole, value.folder if first not in section else section[first].folder)


def _check_section(name: str) -> None:
    if name not in SECTIONS:
        known = f"expected one of {', '.join(SECTIONS)}"
        raise GaPError(f"{name}: unknown section, {known}{nearest(name, SECTIONS)}")


# --- sections --------------------------------------------------------------------------------------------------------


def _check_gap(values: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads 1e-1 as a string; otherwise GaPConfig checks itself."""
    hints = typing.get_type_hints(GaPConfig)
    # In YAML 1.1, 2:4 without quotes is a number in base 60. No other integer makes sense as a pattern.
    if isinstance(pattern := values.get("pattern"), int) and not isinstance(pattern, bool) and pattern >= 60:
        text = f"{pattern // 60}:{pattern % 60}"
        raise GaPError(f'gap.pattern: found the number {pattern}, expected a string; write "{text}" with its quotes')
    return {k: number(v) if hints.get(k) == (float | None) else v for k, v in values.items()}


def _existing_path(at: _At) -> Any:
    """The value, or the path below its folder if a string names one that exists."""
    found = isinstance(at.value, str) and at.value and (at.folder / at.value).exists()
    return str(at.folder / at.value) if found else at.value


def _build(section: str, values: dict[str, _At], cls: type[Any]) -> Any:
    if cls is dict:
        return {key: _existing_path(at) for key, at in values.items()}
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    out: dict[str, Any] = {}
    for key, at in values.items():
        if key not in names:
            raise GaPError(f"{section}.{key}: unknown key{did_you_mean(key, names)}")
        out[key] = coerce(f"{section}.{key}", at.value, hints[key], at.folder)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in out and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise GaPError(f"{section}.{missing[0]}: not set; expected {describe(hints[missing[0]])}")
    return cls(**out)


# Ranges that TrainingArguments itself does not check: (low, high, both included), None for open.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_epsilon": (0, None),
    "eval_steps": (0, None),
    "generation_max_length": (1, None),
    "generation_num_beams": (1, None),
    "gradient_accumulation_steps": (1, None),
    "label_smoothing_factor": (0, 0.999999),
    "learning_rate": (0, None),
    "logging_steps": (0, None),
    "max_grad_norm": (0, None),
    "max_steps": (-1, None),
    "num_train_epochs": (0, None),
    "per_device_eval_batch_size": (1, None),
    "per_device_train_batch_size": (1, None),
    "save_steps": (0, None),
    "save_total_limit": (1, None),
    "seed": (0, 2**32 - 1),
    "warmup_steps": (0, None),
    "weight_decay": (0, None),
}
_NEVER_ZERO = ("eval_steps", "logging_steps", "max_steps", "num_train_epochs", "save_steps")


def _check_training(values: dict[str, Any], cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init] + [OVERWRITE]
    hints[OVERWRITE] = bool
    hints["resume_from_checkpoint"] = str | bool | None  # `true` means the last one in output_dir
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise GaPError(f"training.{key}: unknown key{did_you_mean(key, names)}")
        out[key] = coerce(f"training.{key}", value, hints[key], Path())
        if isinstance(out[key], int | float) and not isinstance(out[key], bool):
            low, high = _RANGES.get(key, (None, None))
            too_low = low is not None and out[key] < low
            too_high = high is not None and out[key] > high
            if too_low or too_high or (key in _NEVER_ZERO and out[key] == 0):
                raise GaPError(f"training.{key}: found {out[key]}, expected {_show_range(key, low, high)}")
    if not out.get("output_dir"):
        raise GaPError("training.output_dir: not set; expected the folder that the model is saved to")
    return out


def _show_range(key: str, low: float | None, high: float | None) -> str:
    if key == "max_steps":
        return "at least 1, or -1 to go by num_train_epochs"
    if high is not None:
        return f"{low:g} to {f'{high:,}' if high >= 1 else 'below 1'}"
    return f"above {low:g}" if key in _NEVER_ZERO else f"at least {low:g}"


__all__ = ["OVERWRITE", "SECTIONS", "Recipe", "load_recipe", "one_line", "parse_overrides"]
