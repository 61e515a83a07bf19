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
import enum
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from gap_hf.config import GaPConfig, load_yaml
from gap_hf.errors import GaPError, did_you_mean

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
        return {name: _plain(section) for name, section in sections.items()}

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
            raise GaPError(f"{name}: found {_show(section)}, expected a mapping of keys to values")
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
        except yaml.YAMLError as error:
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
        raise GaPError(f"{name}: {below} is {_show(whole)}, expected a mapping to set a key of")
    whole = inner = dict(whole)
    for key in rest[:-1]:
        deeper = inner.get(key) or {}
        if not isinstance(deeper, Mapping):
            raise GaPError(f"{name}: '{key}' is {_show(deeper)}, expected a mapping to set a key of")
        inner[key] = dict(deeper)
        inner = inner[key]
    inner[rest[-1]] = value.value
    section[first] = _At(whole, value.folder if first not in section else section[first].folder)


def _check_section(name: str) -> None:
    if name not in SECTIONS:
        known = f"expected one of {', '.join(SECTIONS)}"
        hint = did_you_mean(name, SECTIONS)
        raise GaPError(f"{name}: unknown section, {known}{hint if 'did you mean' in hint else ''}")


# --- sections --------------------------------------------------------------------------------------------------------


def _check_gap(values: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads 1e-1 as a string; otherwise GaPConfig checks itself."""
    hints = typing.get_type_hints(GaPConfig)
    # In YAML 1.1, 2:4 without quotes is a number in base 60. No other integer makes sense as a pattern.
    if isinstance(pattern := values.get("pattern"), int) and not isinstance(pattern, bool) and pattern >= 60:
        text = f"{pattern // 60}:{pattern % 60}"
        raise GaPError(f'gap.pattern: found the number {pattern}, expected a string; write "{text}" with its quotes')
    return {k: _number(v) if hints.get(k) == (float | None) else v for k, v in values.items()}


def _build(section: str, values: dict[str, _At], cls: type[Any]) -> Any:
    if cls is dict:
        return {key: at.value for key, at in values.items()}
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    out: dict[str, Any] = {}
    for key, at in values.items():
        if key not in names:
            raise GaPError(f"{section}.{key}: unknown key{did_you_mean(key, names)}")
        out[key] = _coerce(f"{section}.{key}", at.value, hints[key], at.folder)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in out and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise GaPError(f"{section}.{missing[0]}: not set; expected {_describe(hints[missing[0]])}")
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
        out[key] = _coerce(f"training.{key}", value, hints[key], Path())
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


# --- values ----------------------------------------------------------------------------------------------------------


def _number(value: Any) -> Any:
    """A float from a string that reads as one (5e-4 is a string in YAML 1.1), else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _coerce(name: str, value: Any, hint: Any, folder: Path) -> Any:
    """`value` as the annotation `hint` wants it, or a GaPError that says what was expected."""
    options = _options(hint)
    if value is None:
        if type(None) in options:
            return None
        raise GaPError(f"{name}: found nothing, expected {_describe(hint)}")
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return _choice(name, value, [str(member.value) for member in option])
        if typing.get_origin(option) is typing.Literal:
            return _choice(name, value, list(typing.get_args(option)))
    if set(options) >= {str, Path} and isinstance(value, str):
        return folder / value if value and (folder / value).exists() else value
    for option in options:
        ok, result = _as_type(name, value, option, folder)
        if ok:
            return result
    raise GaPError(f"{name}: found {_show(value)}, expected {_describe(hint)}")


def _as_type(name: str, value: Any, option: Any, folder: Path) -> tuple[bool, Any]:
    origin = typing.get_origin(option) or option
    if origin is bool:
        return isinstance(value, bool), value
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is float:
        number = _number(value)
        # Whole numbers stay int: in TrainingArguments 100 steps and 100.0 are not always the same.
        return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number), number
    if origin is str:
        return isinstance(value, str), value
    if origin is Path:
        return isinstance(value, str | Path) and bool(str(value)), folder / value if isinstance(value, str) else value
    if origin in (list, tuple) and isinstance(value, list):
        inner = (typing.get_args(option) or (Any,))[0]
        items = [_coerce(f"{name}[{i}]", item, inner, folder) for i, item in enumerate(value)]
        return True, tuple(items) if origin is tuple else items
    if origin is dict:
        inner = (typing.get_args(option) or (Any, Any))[1]
        if not isinstance(value, Mapping):
            return False, None
        return True, {str(k): _coerce(f"{name}.{k}", v, inner, folder) for k, v in value.items()}
    return origin is Any, value


def _choice(name: str, value: Any, valid: list[Any]) -> Any:
    if value is False and "no" in valid:
        return "no"  # a bare `no` is false in YAML 1.1
    if value not in valid:
        shown = ", ".join(str(v) for v in valid)
        hint = did_you_mean(str(value), [str(v) for v in valid])
        raise GaPError(f"{name}: found {_show(value)}, expected one of {shown}{hint if 'did you mean' in hint else ''}")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (type(None), Any) if hint is Any else (hint,)


def _describe(hint: Any) -> str:
    words: list[str] = []
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        word = {
            bool: "true or false",
            int: "a whole number",
            float: "a finite number",
            str: "a string",
            Path: "a path",
            list: "a list",
            tuple: "a list",
            dict: "a mapping",
        }.get(origin)
        if word and word not in words:
            words.append(word)
    return " or ".join(words) or "another value"


def _show(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


def one_line(error: object) -> str:
    """The text of an error from a library, on one line."""
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


__all__ = ["OVERWRITE", "SECTIONS", "Recipe", "load_recipe", "one_line", "parse_overrides"]
