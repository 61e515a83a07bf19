"""Print pip constraints that pin every dependency of pyproject.toml to its lower bound."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
requirements = [*project["dependencies"]]
for name in ("translation", "detection", "inference", "lm", "vision", "test"):
    requirements += project["optional-dependencies"][name]
for requirement in sorted(set(requirements)):
    if match := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print(f"{match[1]}=={match[2]}")
