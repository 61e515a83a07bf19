"""The layers of the package: every module imports downward only, and those that need no torch have none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gap_hf

PACKAGE = Path(__file__).resolve().parent.parent / "gap_hf"

# What each module may import from gap_hf. A new module needs a line here, which is where its place is decided.
_PURE = {"errors", "config", "pattern_names", "phases"}
_PLAN = _PURE | {"ramps", "methods", "plan"}
_TARGETS = {"blocks", "errors", "config", "shards", "targets"}
_MASKS = {"largest", "patterns", "masks", "optimizer_state"}
_REPLICAS = {"distributed", "merging", "replica", "workers"}
_CORE = (
    _PLAN
    | _TARGETS
    | {"partition"}
    | _MASKS
    | {"kept_state", "density_rates", "live_state", "allocation", "change", "selection", "sparsifier"}
    | _REPLICAS
)
_STORED = {"stored_model", "inspection", "comparison", "tables"}
_FOLDERS = {
    "card",
    "card_facts",
    "card_loading",
    "card_section",
    "card_speed",
    "hub",
    "uploads",
    "packed",
    "folder_files",
    "recorded",
    "folders",
    "saving",
    "run_record",
    "run_html",
    "exporting",
    "bench",
}
_FILES = {"checkpoint", "lr", "planning", "recipe", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "after_import": set(),
    "errors": set(),
    "checks": {"errors"},
    "pattern_names": {"errors"},
    "config": {"errors", "checks", "pattern_names"},
    "coercion": {"errors"},
    "phases": {"errors", "config"},
    "ramps": _PURE,
    "methods": _PURE | {"ramps", "methods"},
    "plan": _PURE | {"methods"},
    "layouts": set(),
    # A network's file goes into every folder that it is saved in, and runs there without gap_hf.
    "models": {"models"},
    "shards": {"errors"},
    "blocks": {"layouts"},
    "targets": {"blocks", "errors", "config", "layouts", "shards"},
    "partition": _TARGETS,
    "largest": {"errors", "shards"},
    "patterns": _PURE | {"shards", "largest"},
    "masks": _PURE | {"shards"},
    "optimizer_state": _PURE | {"shards"},
    "elementwise": {"errors"},
    "live_state": _PURE | {"elementwise", "masks", "optimizer_state"},
    "master_weights": {"live_state", "masks"},
    "density_rates": {"errors", "masks"},
    "kept_state": _PURE | {"density_rates", "elementwise", "live_state", "master_weights", "masks", "optimizer_state"},
    "packed_gradients": {"errors", "live_state"},
    "sparse_products": {"inference"},
    "sparse_layers": {"errors", "inference", "sparse_products"},
    "allocation": _PLAN | _TARGETS | {"partition"} | _MASKS,
    "change": _PURE | {"shards", "largest"},
    "selection": _PLAN | _TARGETS | {"partition"} | _MASKS | {"allocation"},
    "distributed": {"errors", "masks"},
    "merging": _TARGETS | {"partition"},
    "replica": _TARGETS | _MASKS,
    "workers": _PURE | {"distributed", "merging", "replica"},
    "sparsifier": _CORE - {"sparsifier"},
    "checkpoint": _CORE,
    "lr": _CORE,
    "planning": _CORE | {"tables"},
    "memory": {
        "errors",
        "live_state",
        "master_weights",
        "masks",
        "packed_gradients",
        "sparse_layers",
        "sparse_products",
        "targets",
    },
    "step_times": {"config", "memory", "optimizer_state", "packed_gradients", "sparse_layers", "sparsifier"},
    "recipe": _CORE | {"coercion"},
    "report": _CORE | {"checkpoint", "planning", "recipe"},
    "output": _CORE | {"checkpoint"},
    "reduction": _CORE,
    "zero": _CORE,
    "refusals": _CORE | {"shards"},
    "callback": set(),
    "trainer": _CORE
    | _FILES
    | {"callback", "packed_gradients", "publishing", "reduction", "refusals", "resuming", "sparse_layers", "zero"},
    "packed": {"errors", "packed"},
    "folder_files": {"errors", "checkpoint", "packed"},
    "hub": {"errors"},
    "recorded": {"errors", "checkpoint", "packed", "folder_files", "hub"},
    "folders": {
        "errors",
        "config",
        "pattern_names",
        "checkpoint",
        "card_loading",
        "packed",
        "folder_files",
        "recorded",
    },
    "saving": _CORE | {"card_loading", "checkpoint", "folder_files", "folders", "packed"},
    "tensor_files": {"errors"},
    "stored_model": {"errors", "hub", "packed", "tensor_files"},
    "inspection": {"stored_model", "tensor_files"},
    "comparison": {"stored_model", "tensor_files"},
    "tables": {"errors"},
    "card_facts": {"errors", "checkpoint", "folder_files", "folders", "uploads", *_STORED},
    "card_loading": {"folder_files", "packed"},
    "card_section": {"card_facts", "card_loading", "tables"},
    "card": {"errors", "card_facts", "card_loading", "card_section", "tables"},
    "card_speed": {"errors", "folder_files", "packed"},
    "run_record": {"errors", "card_facts", "checkpoint", "plan"},
    "run_figures": {"plan", "report", "run_record"},
    "run_html": {"run_figures", "run_record", "tables"},
    "quiet": set(),
    "loaded": {"errors", "folder_files", "packed", "quiet"},
    "caches": set(),
    "onnx_graphs": {"errors", "caches"},
    "onnx_files": {"errors", "onnx_graphs", "quiet"},
    "ctranslate2_files": {"errors", "quiet"},
    "exporting": {"errors", "folder_files", "loaded", "onnx_files", "ctranslate2_files"},
    # Of the package itself, only optimize_for_inference, which is what is timed.
    "bench": {
        "errors",
        "bench",
        "ctranslate2_files",
        "inference",
        "loaded",
        "onnx_files",
        "onnx_graphs",
        "quiet",
        "tables",
    },
    "uploads": {"errors", "checkpoint", "packed"},
    "inference": {"errors", "inference", "targets", "caches"},
    "resuming": {"errors", "checkpoint", "distributed", "folder_files", "shards", "sparsifier"},
    "publishing": _CORE | {"errors", "shards", "folders", "saving", "uploads", "card", "card_facts", "card_section"},
    "commands": _CORE
    | _FILES
    | _FOLDERS
    | _STORED
    | {"trainer", "commands", "models", "memory", "refusals", "step_times"},
    "cli": {"errors", "commands"},
}
# Nothing here may need torch: a recipe is checked and planned before anything heavy is loaded.
NO_TORCH = {
    "after_import",
    "cli",
    "errors",
    "checks",
    "config",
    "pattern_names",
    "coercion",
    "phases",
    "ramps",
    "methods",
    "plan",
    "partition",
    "recipe",
}
HEAVY = {"torch", "transformers", "accelerate", "safetensors"}


def module_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_of(path: Path) -> str:
    """``gap_hf/plan.py`` -> ``plan``, ``gap_hf/methods/cyclic.py`` -> ``methods``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path, *, inside_functions: bool = True) -> list[tuple[str, int]]:
    """Absolute names and lines of the imports of a file, but not those under ``if TYPE_CHECKING``."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.FunctionDef) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # transformers copies what a network imports relatively along with it, and nothing else.
            allowed = 1 if path.parent.name == "models" and path.stem != "__init__" else 0
            assert node.level == allowed or not node.level, f"{path}:{node.lineno}: relative import; write gap_hf.…"
            if node.level:
                found.append((f"gap_hf.models.{node.module}", node.lineno))
            elif node.module == "gap_hf":
                found.extend((f"gap_hf.{alias.name}", node.lineno) for alias in node.names)
            else:
                found.append((node.module or "", node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_a_network_can_run_without_the_package(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    absolute += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in absolute if name.split(".")[0] == "gap_hf"]


def test_there_is_something_to_check() -> None:
    assert {layer_of(path) for path in module_files()} >= {"errors", "config", "plan", "methods", "sparsifier"}
    assert any(name == "torch" for name, _ in imports_of(PACKAGE / "masks.py"))


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    layer = layer_of(path)
    assert layer in MAY_IMPORT, f"{path.name}: give it a place in MAY_IMPORT"
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] != "gap_hf":
            continue
        assert len(parts) > 1, f"{path}:{line}: imports the package as a whole; import the module it needs"
        assert parts[1] in MAY_IMPORT[layer], f"{path}:{line}: {layer} may not import {name}"


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_must_do_without_torch(path: Path) -> None:
    if layer_of(path) in NO_TORCH:
        # An import inside a function waits until it is called, as recipe.py's of TrainingArguments does.
        found = imports_of(path, inside_functions=False)
        heavy = [f"{name} (line {line})" for name, line in found if name.split(".")[0] in HEAVY]
        assert not heavy, f"{path.name} imports {', '.join(heavy)}"


def test_few_modules_ask_other_processes() -> None:
    def asks(name: str) -> bool:
        # MemTracker lives among torch.distributed's tools, and is about one process.
        return name.startswith("torch.distributed") and not name.startswith("torch.distributed._tools")

    users = [p.stem for p in module_files() if any(asks(name) for name, _ in imports_of(p))]
    assert users == ["distributed", "reduction", "shards"]


def test_the_table_has_no_cycle() -> None:
    placed: set[str] = set()
    while len(placed) < len(MAY_IMPORT):
        ready = {m for m, below in MAY_IMPORT.items() if m not in placed and below - {m} <= placed}
        assert ready, f"cycle among {sorted(MAY_IMPORT.keys() - placed)}"
        placed |= ready


def test_the_package_itself_only_exports() -> None:
    """Type checkers see the imports, Python the table, users `__all__`: they are to be the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (seen,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = {a.name: node.module for node in seen.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imports == {name: f"gap_hf.{home}" for name, home in gap_hf._HOMES.items()}
    assert sorted(imports) == gap_hf.__all__
    for name in gap_hf.__all__:
        assert getattr(gap_hf, name).__module__ == imports[name]
    assert set(gap_hf.__all__) <= set(dir(gap_hf))
    with pytest.raises(AttributeError, match="module 'gap_hf' has no attribute 'GaPTrianer'"):
        _ = gap_hf.GaPTrianer  # type: ignore[attr-defined]


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# What every load imports, with or without gap_hf.
REGISTERED = "import transformers.modeling_utils; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('gap_hf' in m)"


@pytest.mark.parametrize(
    "code",
    [
        f"import gap_hf\nfrom transformers import AutoModel\nAutoModel.from_pretrained\n{REGISTERED}",
        f"from transformers import AutoModel\nAutoModel.from_pretrained\nimport gap_hf\n{REGISTERED}",
        f"import transformers, gap_hf\ntransformers.PreTrainedModel\n{REGISTERED}",
        f"from gap_hf import GaPTrainer\n{REGISTERED}",
    ],
)
def test_packed_models_load_whichever_library_is_imported_first(code: str) -> None:
    assert python(code).endswith("True")


def test_importing_the_package_imports_nothing_heavy_and_leaves_the_loader_alone() -> None:
    code = "import gap_hf, sys; print(sorted({'torch', 'transformers', 'numpy', 'gap_hf.models'} & set(sys.modules)))"
    assert python(code) == "[]"
    code = "import gap_hf, transformers.modeling_utils as m, inspect, sys; print(type(m.__loader__).__name__, type(m.__spec__.loader).__name__, len(inspect.getsource(m)) > 1000, [f for f in sys.meta_path if 'gap_hf' in type(f).__module__])"
    assert python(code).endswith("SourceFileLoader SourceFileLoader True []")
