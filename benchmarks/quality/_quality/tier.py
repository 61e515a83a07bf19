"""A tier file, and the cells (method, sparsity, seed, and whatever an extra changes) that it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from _quality.cell import ROOT, Cell, Settings
from gap_hf.config import METHODS, load_yaml
from gap_hf.errors import GaPError, did_you_mean, nearest
from gap_hf.recipe import SECTIONS

TIER_KEYS = (
    *("recipe", "title", "hardware", "sparsities", "seeds", "threads", "jobs", "steps_per_epoch"),
    *("methods", "extras", "tune", *SECTIONS),
)
METHOD_KEYS = ("label", "paper", "sparsities", "chosen", *SECTIONS)
EXTRA_KEYS = ("methods", "sparsities", "seeds", "steps", "variants")
TUNE_KEYS = ("seed", "sparsity", "trials")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Trials change `settings`; cells have `chosen` on top of them, which is what the trials came to. So writing that
    down makes no trial another one.
    """

    label: str
    paper: str
    sparsities: list[float | None]
    settings: Settings  # the tier's and the method's own
    own: Settings  # of these, the method's own
    chosen: Settings


@dataclass(frozen=True, kw_only=True)
class Tier:
    name: str
    title: str
    hardware: str | None  # where its results were made, for the caption of its tables
    recipe: str
    seeds: list[int]
    threads: int
    jobs: int
    steps_per_epoch: int | None
    methods: dict[str, Method]
    cells: list[Cell]
    trials: list[Cell]


def load_tier(path: Path) -> Tier:
    """Read a tier file.

    Raises:
        GaPError: for unknown keys, wrong types, methods that are not there, and cells that would share a name.
    """
    found = load_yaml(path)
    _check_names(str(path), found, TIER_KEYS)
    recipe = _get(path, found, "recipe", str)
    base = load_yaml(ROOT / recipe)
    tier_settings = _sections("", found)
    methods: dict[str, Method] = {}
    for name, values in _get(path, found, "methods", dict).items():
        values = values or {}
        _check_names(f"methods.{name}", values, METHOD_KEYS)
        own = _sections(f"methods.{name}.", values)
        chosen = values.get("chosen") or {}
        _check_names(f"methods.{name}.chosen", chosen, SECTIONS)
        settings = _merge(tier_settings, own)
        if "method" not in own.get("gap", {}):
            if name not in METHODS:
                raise GaPError(
                    f"methods.{name}: no method of gap_hf, and gap.method is not set{nearest(name, METHODS)}"
                )
            settings = _merge(settings, {"gap": {"method": name}})
        dense = settings["gap"]["method"] == "dense"
        sparsities = values.get("sparsities", found.get("sparsities"))
        methods[name] = Method(
            label=str(values.get("label", name)),
            paper=str(values.get("paper", "")),
            sparsities=[None] if dense else _numbers(f"methods.{name}.sparsities", sparsities),
            settings=settings,
            own=own,
            chosen=_sections(f"methods.{name}.chosen.", chosen),
        )
    seeds = _numbers("seeds", found.get("seeds"))
    common = {"tier": path.stem, "recipe": recipe}
    cells = [
        _cell(base, methods, method, sparsity, seed, common)
        for method, m in methods.items()
        for sparsity, seed in product(m.sparsities, seeds)
    ]
    for extra, values in (found.get("extras") or {}).items():
        cells += _extra_cells(base, methods, extra, values, found, common)
    trials = _trials(base, methods, found.get("tune"), common)
    for group in (cells, trials):
        names = [cell.name for cell in group]
        if twice := [name for name in names if names.count(name) > 1]:
            raise GaPError(f"{path}: two cells are called {twice[0]}; expected cells that differ")
    return Tier(
        name=path.stem,
        title=str(found.get("title", path.stem)),
        hardware=found.get("hardware"),
        recipe=recipe,
        seeds=seeds,
        threads=_count("threads", found.get("threads", 1)),
        jobs=_count("jobs", found.get("jobs", 1)),
        steps_per_epoch=found.get("steps_per_epoch"),
        methods=methods,
        cells=cells,
        trials=trials,
    )


# --- cells -----------------------------------------------------------------------------------------------------------


def _cell(
    base: Mapping[str, Any],
    methods: Mapping[str, Method],
    method: str,
    sparsity: float | None,
    seed: int,
    common: Mapping[str, Any],
    *,
    steps: float = 1,
    extra: str = "",
    variant: str = "",
    tuned: bool = True,
    changes: Settings | None = None,
) -> Cell:
    settings = _merge(methods[method].settings, methods[method].chosen if tuned else {})
    settings = _merge(settings, changes or {})
    settings = _merge(settings, {"gap": {"sparsity": sparsity}, "training": {"seed": seed}})
    if steps != 1:
        settings = _merge(settings, {"training": _scaled(base, settings, steps)})
    words = [method, "" if sparsity is None else f"s{100 * sparsity:g}", variant, "" if steps == 1 else f"x{steps:g}"]
    return Cell(
        **common,
        name="-".join([*(word for word in words if word), f"seed{seed}"]),
        method=method,
        sparsity=sparsity,
        seed=seed,
        steps=steps,
        extra=extra,
        variant=variant,
        overrides=settings,
    )


def _scaled(base: Mapping[str, Any], settings: Settings, steps: float) -> dict[str, Any]:
    """A longer or shorter run of the same shape: its length, the learning rate's decay and the evaluations' distance."""
    training = {**base.get("training", {}), **settings.get("training", {})}
    length = "max_steps" if training.get("max_steps", -1) > 0 else "num_train_epochs"
    if length not in training:
        raise GaPError("extras: found steps, and no training.max_steps that they could be multiples of; expected it")
    out: dict[str, Any] = {} if length == "max_steps" else {length: training[length] * steps}
    for key in ("eval_steps", "max_steps"):
        if training.get(key, 0) >= 1:
            out[key] = max(1, round(training[key] * steps))
    decay = dict(training.get("lr_scheduler_kwargs") or {})
    if "num_decay_steps" in decay:
        out["lr_scheduler_kwargs"] = {**decay, "num_decay_steps": round(decay["num_decay_steps"] * steps)}
    return out


def _extra_cells(
    base: Mapping[str, Any],
    methods: Mapping[str, Method],
    extra: str,
    values: Any,
    tier: Mapping[str, Any],
    common: Mapping[str, Any],
) -> list[Cell]:
    where = f"extras.{extra}"
    if not isinstance(values, Mapping):
        raise GaPError(f"{where}: found {values!r}, expected a mapping with methods")
    _check_names(where, values, EXTRA_KEYS)
    names = values.get("methods") or []
    for name in names:
        if name not in methods:
            raise GaPError(f"{where}.methods: found '{name}', no method of this tier{did_you_mean(name, methods)}")
    sparsities = _numbers(f"{where}.sparsities", values.get("sparsities", tier.get("sparsities")))
    seeds = _numbers(f"{where}.seeds", values.get("seeds", tier.get("seeds")))
    steps = _numbers(f"{where}.steps", values.get("steps", [1]))
    variants = values.get("variants") or {"": {}}
    for variant, changes in variants.items():
        _check_names(f"{where}.variants.{variant}", changes, SECTIONS)
    return [
        _cell(
            *(base, methods, name, sparsity, seed, common),
            steps=multiple,
            extra=extra,
            variant=str(variant),
            changes=_sections("", changes),
        )
        for name in names
        for sparsity, multiple, (variant, changes), seed in product(
            [None] if methods[name].sparsities == [None] else sparsities, steps, variants.items(), seeds
        )
    ]


def _trials(base: Mapping[str, Any], methods: Mapping[str, Method], tune: Any, common: Mapping[str, Any]) -> list[Cell]:
    """Cells METHOD-K on one seed and sparsity, scored on dev: the test set has no say in any setting."""
    if not tune:
        return []
    _check_names("tune", tune, TUNE_KEYS)
    out = []
    for name, trials in (tune.get("trials") or {}).items():
        if name not in methods:
            raise GaPError(f"tune.trials.{name}: no method of this tier{did_you_mean(name, methods)}")
        sparsity = None if methods[name].sparsities == [None] else tune.get("sparsity")
        for number, changes in enumerate(trials, 1):
            _check_names(f"tune.trials.{name}[{number}]", changes, SECTIONS)
            changes = _merge(_sections("", changes), {"data": {"score": "dev"}})
            where = (base, methods, name, sparsity, tune.get("seed"), common)
            cell = _cell(*where, extra="tune", tuned=False, changes=changes)
            values = {**vars(cell), "name": f"{name}-{number}", "variant": str(number), "score": "dev"}
            out.append(Cell(**values))
    return out


# --- checks ----------------------------------------------------------------------------------------------------------


def _sections(where: str, values: Mapping[str, Any] | None) -> Settings:
    out: Settings = {}
    for name in SECTIONS:
        section = (values or {}).get(name)
        if section is not None and not isinstance(section, Mapping):
            raise GaPError(f"{where}{name}: found {section!r}, expected a mapping of keys to values")
        if section:
            out[name] = dict(section)
    return out


def _merge(first: Settings, second: Settings) -> Settings:
    return {s: {**first.get(s, {}), **second.get(s, {})} for s in SECTIONS if s in first or s in second}


def _check_names(where: str, values: Any, valid: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise GaPError(f"{where}: found {values!r}, expected a mapping with {', '.join(valid)}")
    for key in values:
        if key not in valid:
            raise GaPError(f"{where}: unknown key '{key}'{did_you_mean(str(key), valid)}")


def _get(path: Path, values: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    if not isinstance(values.get(key), kind):
        raise GaPError(f"{path}: {key} is {values.get(key)!r}, expected a {'mapping' if kind is dict else 'path'}")
    return values[key]


def _numbers(where: str, values: Any) -> list[Any]:
    good = isinstance(values, list) and values and all(isinstance(v, int | float) for v in values)
    if not good:
        raise GaPError(f"{where}: found {values!r}, expected a list of numbers")
    return values


def _count(where: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise GaPError(f"{where}: found {value!r}, expected a whole number of at least 1")
    return value
