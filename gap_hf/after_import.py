"""Registering what belongs to a library when that library is imported, and not before: importing it here would take seconds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(first: str, then: str) -> None:
    """Import the module `then` as soon as `first` has been imported, which may be now."""
    if first in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Finder(first, then))


class _Finder(MetaPathFinder):
    """Finds one module as all other finders would, once, and makes its loader import another one at its end."""

    def __init__(self, first: str, then: str) -> None:
        self.first, self.then = first, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.first:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, then: str) -> None:
        self.loader, self.then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is to look as if nobody had stood between.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.then)
