"""Result files: one small JSON per cell, the same on every machine but for its seconds."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _quality.cell import ROOT, Cell
from _quality.tier import Tier
from gap_hf.errors import GaPError
from gap_hf.recipe import one_line

# A difference in any of these is another run; the rest of an identity follows from them or is for readers.
COMPARED = ("method", "sparsity", "seed", "steps_multiple", "scored", "recipe", "resolved", "data_sha256")


def result_path(results: Path, cell: Cell) -> Path:
    folder = results / cell.tier
    return (folder / "tune" if cell.extra == "tune" else folder) / f"{cell.name}.json"


def read_result(path: Path) -> dict[str, Any] | None:
    """None where there is no file. Raises GaPError if it is no result."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        float(found["bleu"])
        found["identity"]["resolved"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GaPError(
            f"{path}: no result of a cell ({one_line(repr(error))}); expected bleu and identity in it"
        ) from None


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first value in which two identities differ, in words; None where they are the same run.

    Data that is not on this machine cannot be compared, and is taken to be the same.
    """
    for key in COMPARED:
        old, new = found.get(key), expected.get(key)
        if key == "data_sha256" and (old is None or new is None):
            continue
        if where := _first_difference(key, old, new):
            return where.removeprefix("resolved.")
    return None


def _first_difference(where: str, old: Any, new: Any) -> str | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if found := _first_difference(f"{where}.{key}", old.get(key), new.get(key)):
                return found
        return None
    shown = [text if len(text) <= 60 else f"{text[:57]}…" for text in (repr(old), repr(new))]
    return None if old == new else f"{where}: found {shown[0]}, expected {shown[1]}"


def is_done(results: Path, cell: Cell, *, redo: bool = False) -> bool:
    """Whether the cell has its result.

    Raises:
        GaPError: if there is one of another run under its name, unless it may be replaced.
    """
    path = result_path(results, cell)
    if (found := read_result(path)) is None:
        return False
    if differs := difference(found["identity"], cell.identity()):
        if redo:
            return False
        raise GaPError(f"{_show(path)} is of another run: {differs}; expected the same, or --redo to replace it")
    return True


def make_result(
    tier: Tier,
    identity: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    wall: float | None,
    resumed_from: int | None,
    code: Sequence[str],
) -> dict[str, Any]:
    """The result file of a run from its results.json. `code`: of every state of the sources it ran under, in order."""
    if run["scored"] != identity["scored"]:
        raise GaPError(f"results.json: scored on {run['scored']}, expected {identity['scored']}")
    keep = (
        *("bleu", "chrf", "scored", "signatures", "sparsity", "model_sparsity"),
        *("num_params", "steps", "seconds", "cpu_seconds"),
    )
    return {
        "identity": dict(identity),
        **{key: run[key] for key in keep if key in run},
        "scored_pairs": run[f"{run['scored']}_pairs"],
        "bleu_by_origin": run.get("bleu_by_origin", {}),
        "dev": [
            {
                "step": e["step"],
                **{k.removeprefix("eval_"): e[k] for k in ("eval_bleu", "eval_chrf", "eval_loss") if k in e},
            }
            for e in run["dev"]
        ],
        "cost": run.get("cost"),
        "wall_seconds": None if wall is None else round(wall, 1),
        "resumed_from": resumed_from,
        "threads": tier.threads,
        "versions": run["versions"],
        "code_sha256": list(code),
        "sentence_statistics": pack(run["sentence_statistics"]),
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def pack(statistics: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Counts per sentence as zlib-compressed uint16, little-endian, in base64."""
    values = np.asarray(statistics, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise GaPError(f"sentence_statistics: found {values.max()}, expected counts of 0 to 65535")
    data = base64.b64encode(zlib.compress(values.astype("<u2").tobytes(), 9)).decode()
    return {"encoding": "base64(zlib(uint16 little-endian))", "shape": list(values.shape), "data": data}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """Inverse of `pack`: int64, one row per sentence."""
    data = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(data, dtype="<u2").astype(np.int64).reshape(packed["shape"])


def code_hash() -> str:
    """Of the sources that a run executes, so that results of two versions can be told apart."""
    total = hashlib.sha256()
    for path in sorted([*(ROOT / "gap_hf").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]):
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def _show(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
