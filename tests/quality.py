"""A small tier of the quality benchmark, and its scripts as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / "benchmarks" / "quality"
sys.path[:0] = [str(QUALITY), str(ROOT / "scripts")]

from _quality.tier import Tier, load_tier  # noqa: E402


def load_script(name: str) -> Any:
    """By its path: `run` and `report` are names that others may have too."""
    spec = importlib.util.spec_from_file_location(f"quality_{name}", QUALITY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, report = load_script("run"), load_script("report")

TIER: dict[str, Any] = {
    "recipe": "recipes/translation/demo-dense.yaml",
    "sparsities": [0.8, 0.9],
    "seeds": [1, 2],
    "jobs": 2,
    "methods": {"dense": None, "gmp": {"label": "GMP"}, "mine": {"gap": {"method": "cyclic"}, "sparsities": [0.5]}},
    "extras": {
        "budget": {"methods": ["dense", "gmp"], "sparsities": [0.9], "seeds": [1], "steps": [2]},
        "structure": {"methods": ["gmp"], "sparsities": [0.5], "variants": {"2of4": {"gap": {"pattern": "2:4"}}}},
    },
    "tune": {"seed": 101, "sparsity": 0.9, "trials": {"gmp": [{"gap": {"fine_tune_share": 0.4}}, {}], "dense": [{}]}},
}


def write_tier(folder: Path, **changes: Any) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**TIER, **changes}, sort_keys=False), encoding="utf-8")
    return path


def make_tier(folder: Path, **changes: Any) -> Tier:
    return load_tier(write_tier(folder, **changes))
