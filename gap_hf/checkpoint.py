"""Config, masks and plan position on disk, beside a model. Safetensors and JSON only; loading is strict.

`gap_config.json` says what the masks belong to; `gap_masks.safetensors` holds one bit per weight: ``mask/NAME``
for every sparse tensor, ``previous/NAME`` for the last-prune mask of every tensor that was grown since.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gap_hf.config import GaPConfig
from gap_hf.distributed import all_objects
from gap_hf.errors import GaPError
from gap_hf.masks import pack_bits, unpack_bits
from gap_hf.phases import PARALLEL
from gap_hf.plan import Plan
from gap_hf.replica import Replica, load_replica, save_replica
from gap_hf.sparsifier import Sparsifier

CONFIG_NAME = "gap_config.json"
MASKS_NAME = "gap_masks.safetensors"
VERSION = 2  # 2: a plan has updates and levels
# What a resume may change: it bears on how training ends or how the same is computed, not on any mask.
_FREE_KEYS = ("best_model_at_target", "prune_if_stopped", "live_gradients", "live_state", "sparse_compute")


@dataclass(frozen=True)
class GaPState:
    """What a checkpoint records: enough to go on exactly, with the weights and optimizer that Trainer saves."""

    config: GaPConfig
    plan: Plan
    seed: int
    step: int
    masks: dict[str, Tensor | None]
    previous: dict[str, Tensor]
    levels: tuple[float, ...]
    num_done: int
    replicas: dict[str, str]  # file of each worker's replica to its SHA-256, where they were apart


def save(
    folder: str | Path,
    sparsifier: Sparsifier,
    *,
    step: int,
    replicas: Mapping[str, str] | None = None,
    write: bool = True,
) -> None:
    """Write the two files into `folder`, which is made if need be; each is complete or absent.

    Where weights are sharded, call it on all ranks, with `write` on the one that writes: the masks are gathered, one tensor
    at a time, and the files are those of a single process. `replicas` is what `save_replicas` gave.
    """
    masks = {name: sparsifier.masks[name] for name in sparsifier.weights}
    keyed = [(f"mask/{name}", name, mask) for name, mask in masks.items() if mask is not None]
    keyed += [(f"previous/{name}", name, mask) for name, mask in sparsifier.previous.items()]
    bits: dict[str, Tensor] = {}
    for key, name, mask in keyed:
        gathered = sparsifier.masks.parts[name].gather(mask)
        if write:
            bits[key] = pack_bits(gathered)
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    masks_file = folder / f".{MASKS_NAME}.part"
    save_file(bits, masks_file, metadata={"format": "pt"})
    header = {
        "format": "gap_hf",
        "version": VERSION,
        "config": sparsifier.config.to_dict(),
        "seed": sparsifier.seed,
        "step": step,
        "at_target": sparsifier.at_target,
        "levels": list(sparsifier.levels),
        "updates_done": sparsifier.num_done,
        "sparsity": sparsifier.sparsity(),
        "model_sparsity": sparsifier.model_sparsity(),
        "masks_sha256": _sha256(masks_file),
        "weights": [
            {
                "name": weight.name,
                "shape": list(weight.shape),
                "live": sparsifier.masks.live(weight.name),
                "dense": masks[weight.name] is None,
            }
            for weight in sparsifier.weights.values()
        ],
        "plan": sparsifier.plan.to_dict(),
        **({"replicas": dict(replicas)} if replicas else {}),
    }
    config_file = folder / f".{CONFIG_NAME}.part"
    config_file.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    os.replace(masks_file, folder / MASKS_NAME)
    os.replace(config_file, folder / CONFIG_NAME)


def save_replicas(folder: str | Path, sparsifier: Sparsifier) -> dict[str, str]:
    """Write the replicas of P-GaP's workers while they are apart. Every process has to call it; one of each worker writes.

    Returns:
        Each file's name and SHA-256, on every process.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for worker, replica in sparsifier.workers.replicas(sparsifier).items():
        path = Path(folder) / replica_name(worker)
        save_replica(path, replica)
        written[path.name] = _sha256(path)
    return {name: digest for of_process in all_objects(written) for name, digest in of_process.items()}


def load_replicas(folder: str | Path, state: GaPState, sparsifier: Sparsifier) -> None:
    """Give the workers back what `save_replicas` wrote; nothing to do where their replicas were not apart.

    Raises:
        GaPError: if a file is missing, was changed, or is not of this model.
    """
    if state.plan.phase_at(state.step).kind != PARALLEL:
        return
    found: dict[int, Replica] = {}
    for worker in sparsifier.workers.held:
        name = replica_name(worker)
        path = Path(folder) / name
        if name not in state.replicas or not path.is_file():
            raise GaPError(
                f"{folder}: was saved in the middle of a parallel round without {name}, so no exact resume is possible; "
                "resume from a checkpoint of a fine-tune, or save with save_only_model: false on a folder that every process sees"
            )
        if _sha256(path) != state.replicas[name]:
            raise GaPError(f"{path}: SHA-256 is not what {CONFIG_NAME} records; the file was changed")
        found[worker] = load_replica(path, sparsifier)
    sparsifier.workers.adopt(sparsifier, found)


def replica_name(worker: int) -> str:
    return f"gap_worker_{worker}.safetensors"


def load(folder: str | Path) -> GaPState:
    """Read and check both files.

    Raises:
        GaPError: if a file is missing, cannot be read, was changed, or disagrees with the other.
    """
    folder = Path(folder)
    _check_there(folder)
    header = _read_header(folder / CONFIG_NAME)
    masks, previous = _read_masks(folder, header)
    plan = Plan.from_dict(header["plan"])
    levels, num_done = header["levels"], header["updates_done"]
    if len(levels) != plan.num_groups or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in levels):
        raise GaPError(f"{folder / CONFIG_NAME}: 'levels' is {levels}, expected {plan.num_groups} numbers from 0 to 1")
    if not 0 <= num_done <= len(plan.updates):
        raise GaPError(f"{folder / CONFIG_NAME}: 'updates_done' is {num_done}, expected 0 to {len(plan.updates)}")
    return GaPState(
        config=GaPConfig.from_dict(header["config"]),
        plan=plan,
        seed=header["seed"],
        step=header["step"],
        masks=masks,
        previous=previous,
        levels=tuple(float(level) for level in levels),
        num_done=num_done,
        replicas=_digests(folder, header.get("replicas", {})),
    )


@dataclass(frozen=True)
class Recorded:
    """Masks beside a model, and the pattern that they have, if it is recorded."""

    masks: dict[str, Tensor]
    pattern: str | None


def load_masks(folder: str | Path) -> Recorded:
    """The masks alone, by parameter name; they need not be those of a run that can go on.

    Raises:
        GaPError: as `load`.
    """
    folder = Path(folder)
    _check_there(folder)
    header = _read_header(folder / CONFIG_NAME, to_resume=False)
    masks, _ = _read_masks(folder, header)
    pattern = header.get("config", {}).get("pattern")
    return Recorded({n: m for n, m in masks.items() if m is not None}, pattern if isinstance(pattern, str) else None)


def read_record(folder: str | Path) -> dict[str, Any]:
    """`gap_config.json` as it is. Raises GaPError if it cannot be read, or says of its weights what cannot be."""
    return _read_header(Path(folder) / CONFIG_NAME, to_resume=False)


def live_counts(folder: str | Path) -> dict[str, int]:
    """Live weights of every tensor with a mask, as `gap_config.json` records them.

    Raises:
        GaPError: if it cannot be read.
    """
    return {entry["name"]: entry["live"] for entry in read_record(folder)["weights"] if not entry["dense"]}


def write_masks(folder: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks by parameter name beside a model; what `gap_config.json` says of a run stays, if it is there."""
    folder = Path(folder)
    header: dict[str, Any] = {"format": "gap_hf", "version": VERSION}
    if (folder / CONFIG_NAME).is_file():
        header = _read_header(folder / CONFIG_NAME, to_resume=False)
    else:
        weights = [(name, mask, int(mask.sum())) for name, mask in masks.items()]
        header["weights"] = [
            {"name": name, "shape": list(mask.shape), "live": live, "dense": False} for name, mask, live in weights
        ]
        header["sparsity"] = 1 - sum(w[2] for w in weights) / max(1, sum(w[1].numel() for w in weights))
    save_file({f"mask/{n}": pack_bits(m) for n, m in masks.items()}, folder / MASKS_NAME, metadata={"format": "pt"})
    header["masks_sha256"] = _sha256(folder / MASKS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def check_same_config(state: GaPState, config: GaPConfig, folder: str | Path) -> None:
    """Refuse to resume under another config, naming the first difference.

    Raises:
        GaPError: if any key that bears on the masks or the plan differs.
    """
    recorded, given = state.config.to_dict(), config.to_dict()
    for key, value in given.items():
        # The attributes are compared: in a dict of overrides the order, which decides between matches, is lost.
        if key not in _FREE_KEYS and getattr(state.config, key) != getattr(config, key):
            raise GaPError(
                f"gap.{key}: found {value!r}, but the checkpoint {folder} was trained with {recorded[key]!r}; resume with "
                "that, or start a new run from its weights"
            )


def check_same_weights(state: GaPState, sparsifier: Sparsifier, folder: str | Path) -> None:
    """Refuse masks that belong to other tensors than the model's.

    Raises:
        GaPError: naming the first weight that one side lacks or whose shape differs.
    """
    for name in [*sparsifier.weights, *state.masks]:
        if name not in state.masks or name not in sparsifier.weights:
            where = "the model" if name in sparsifier.weights else "the checkpoint"
            raise GaPError(f"{folder}: '{name}' is prunable in {where} only; expected the same weights in both")
        mask, shape = state.masks[name], sparsifier.weights[name].shape
        if mask is not None and tuple(mask.shape) != shape:
            raise GaPError(f"{folder}: the mask of '{name}' has shape {tuple(mask.shape)}, expected {shape}")


def _check_there(folder: Path) -> None:
    for name in (CONFIG_NAME, MASKS_NAME):
        if not (folder / name).is_file():
            raise GaPError(
                f"{folder}: has no {name}, so it is not a checkpoint of a GaP run; to start GaP from its weights, load "
                "the model from it and train anew with initial_mask: magnitude"
            )


def _read_masks(folder: Path, header: dict[str, Any]) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Masks and last-prune masks of a folder, compared with what its header says."""
    recorded = header.get("masks_sha256")
    if (found := _sha256(folder / MASKS_NAME)) != recorded:
        raise GaPError(
            f"{folder / MASKS_NAME}: SHA-256 is {found[:12]}…, expected {str(recorded)[:12]}… as {CONFIG_NAME} records"
        )
    try:
        tensors = load_file(folder / MASKS_NAME)
    except SafetensorError as error:
        raise GaPError(f"{folder / MASKS_NAME}: not a safetensors file ({error})") from None
    masks: dict[str, Tensor | None] = {}
    previous: dict[str, Tensor] = {}
    for entry in header["weights"]:
        name, shape = entry["name"], entry["shape"]
        key = f"mask/{name}"
        if (key in tensors) == entry["dense"]:
            raise GaPError(f"{folder / MASKS_NAME}: '{name}' {'has a' if entry['dense'] else 'lacks its'} mask")
        masks[name] = unpack_bits(tensors.pop(key), shape, name) if key in tensors else None
        mask = masks[name]
        if mask is not None and int(mask.sum()) != entry["live"]:
            raise GaPError(
                f"{folder / MASKS_NAME}: the mask of '{name}' keeps {int(mask.sum())} weights, expected {entry['live']}"
            )
        if f"previous/{name}" in tensors:
            previous[name] = unpack_bits(tensors.pop(f"previous/{name}"), shape, name)
    if tensors:
        raise GaPError(f"{folder / MASKS_NAME}: holds '{min(tensors)}', which {CONFIG_NAME} does not name")
    return masks, previous


def _read_header(path: Path, *, to_resume: bool = True) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GaPError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != "gap_hf":
        raise GaPError(f'{path}: not written by gap_hf; expected "format": "gap_hf"')
    if header.get("version") != VERSION:
        raise GaPError(f"{path}: version is {header.get('version')!r}, expected {VERSION}, which this gap_hf writes")
    run = {
        "config": dict,
        "seed": int,
        "step": int,
        "plan": dict,
        "masks_sha256": str,
        "levels": list,
        "updates_done": int,
    }
    types = {"weights": list, **(run if to_resume else {"config": dict} if "config" in header else {})}
    for key, kind in types.items():
        if not isinstance(header.get(key), kind):
            raise GaPError(f"{path}: '{key}' is {type(header.get(key)).__name__}, expected {kind.__name__}")
    for entry in header["weights"]:
        valid = (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("live"), int)
            and isinstance(entry.get("dense"), bool)
            and isinstance(entry.get("shape"), list)
            and all(isinstance(n, int) and 0 < n < 2**40 for n in entry["shape"])
        )
        if not valid:
            raise GaPError(f"{path}: 'weights' holds {entry!r}, expected name, shape, live and dense")
    return header


def _digests(folder: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for pair in found.items() for v in pair):
        raise GaPError(f"{folder / CONFIG_NAME}: 'replicas' is {found!r}, expected file names and digests")
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
