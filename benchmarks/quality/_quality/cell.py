"""One run of the benchmark: its overrides, and what makes a result this run's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from _translation.data import FILE_NAMES, SUFFIXES, DataSection
from _translation.model import ModelSection

from gap_hf.errors import GaPError
from gap_hf.methods import check_uses
from gap_hf.recipe import OVERWRITE, SECTIONS, Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[3]
# What the runner sets and no figure depends on.
NOT_IDENTITY = ("output_dir", OVERWRITE, "resume_from_checkpoint", "disable_tqdm", "save_total_limit")
# How the same weights are computed; and masters, of which fp32 models have none.
NOT_IDENTITY_OF_GAP = ("live_gradients", "live_state", "master_weights", "sparse_compute")
Settings = dict[str, dict[str, Any]]  # section to key to value


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. `steps` is a multiple of the recipe's; `overrides` holds all that differs from the recipe."""

    tier: str
    name: str
    recipe: str  # from the repository's root
    method: str
    sparsity: float | None
    seed: int
    extra: str = ""
    variant: str = ""
    steps: float = 1
    score: str = "test"
    overrides: Settings = field(default_factory=dict, hash=False)

    def words(self) -> list[str]:
        """The overrides for a command line. JSON is YAML, and keeps "2:4" a string."""
        pairs = [(s, key, value) for s in SECTIONS for key, value in self.overrides.get(s, {}).items()]
        return [f"--{s}.{key}={json.dumps(value)}" for s, key, value in pairs if key not in NOT_IDENTITY]

    def load(self) -> Recipe[ModelSection, DataSection]:
        """The checked recipe. Raises GaPError, naming the cell."""
        output = ["--training.output_dir=nowhere"]
        try:
            words = [*self.words(), *output]
            recipe = load_recipe(ROOT / self.recipe, words, model_cls=ModelSection, data_cls=DataSection)
            if not recipe.gap.is_off:
                check_uses(recipe.gap)  # otherwise found out only once the run has a model
            return recipe
        except GaPError as error:
            raise GaPError(f"cell {self.name} of tier {self.tier}: {error}") from None

    def identity(self) -> dict[str, Any]:
        """What a result must share to be this cell's. Values that are not set are left out, so that a new optional
        key makes no old result another one; paths start at the repository's root.
        """
        recipe = self.load()
        resolved = recipe.to_dict()
        resolved["training"] = {k: v for k, v in resolved["training"].items() if k not in NOT_IDENTITY}
        resolved["gap"] = {k: v for k, v in resolved["gap"].items() if k not in NOT_IDENTITY_OF_GAP}
        resolved = _portable(resolved)
        text = json.dumps(resolved, sort_keys=True)
        return {
            "tier": self.tier,
            "cell": self.name,
            "method": self.method,
            "sparsity": self.sparsity,
            "seed": self.seed,
            "extra": self.extra,
            "variant": self.variant,
            "steps_multiple": self.steps,
            "scored": self.score,
            "recipe": self.recipe,
            "overrides": self.overrides,
            "resolved": resolved,
            "resolved_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "data_sha256": _data_hash(recipe.data),
        }


def _portable(value: Any) -> Any:
    """Without what is not set, and without this machine's folders."""
    if isinstance(value, Mapping):
        inner = {str(k): _portable(v) for k, v in value.items()}
        return {k: v for k, v in inner.items() if v is not None and v != {} and v != []}
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if isinstance(value, str) and os.path.isabs(value):
        return Path(os.path.relpath(value, ROOT)).as_posix()
    return value


def _data_hash(data: DataSection) -> str | None:
    """Of the files' contents; None where they are not there or come from the Hub."""
    if data.folder is not None:
        return _folder_hash(data.folder)
    files = [path for path in (data.train, data.dev, data.test) if path is not None]
    return _files_hash(tuple(files)) if files else None


def _folder_hash(folder: Path) -> str | None:
    names = [f"{name}{suffix}" for names in FILE_NAMES.values() for name in names for suffix in SUFFIXES]
    files = tuple(folder / name for name in names if (folder / name).is_file())
    return _files_hash(files) if files else None


@cache
def _files_hash(files: tuple[Path, ...]) -> str:
    total = hashlib.sha256()
    for path in files:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
