"""A finished or stopped run as it lies on disk: its trainer's log, its plan, and the masks of every save. Reads only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gap_hf.card_facts import CardFacts, facts_of
from gap_hf.checkpoint import CONFIG_NAME, MASKS_NAME, load_masks, read_record
from gap_hf.errors import GaPError
from gap_hf.plan import Plan

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Save:
    """A save of the run.

    Attributes:
        step: Optimizer steps done.
        live: Share of live weights by tensor, in order of the model.
        iou: Intersection over union of a tensor's mask with that of the last save before in which it was sparse too.
    """

    step: int
    live: Mapping[str, float]
    iou: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        name: Of its folder.
        facts: Of the newest save.
        plan: None where the masks were saved without a run.
        log: Numbers that Trainer logged, by ``step``; those that are not finite are left out.
        saves: By step; the last is the newest.
    """

    name: str
    facts: CardFacts
    plan: Plan | None
    log: tuple[dict[str, float], ...]
    saves: tuple[Save, ...]

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a number of the log."""
        return [(entry["step"], entry[key]) for entry in self.log if key in entry]

    def scores(self) -> list[str]:
        """Names of what the evaluations scored, in order of appearance."""
        found = dict.fromkeys(key for entry in self.log for key in entry if key.startswith("eval_"))
        dull = ("_runtime", "_per_second", "_loss", "_compilation_time")
        return [key.removeprefix("eval_") for key in found if not key.endswith(dull)]


def read_run(folder: Path, *, measure: bool = True) -> RunRecord:
    """Read a run's folder: the model at its top if there is one, and its checkpoints.

    Args:
        measure: Read the newest save's weights too (`facts_of`).

    Raises:
        GaPError: if GaP was off, nothing was logged, or a file cannot be read.
    """
    if not folder.is_dir():
        raise GaPError(f"{folder}: is no folder; expected the output_dir of a run")
    places = [p for p in [*folder.glob("checkpoint-*"), folder] if (p / CONFIG_NAME).is_file()]
    if not places:
        raise GaPError(
            f"{folder}: has no {CONFIG_NAME}, nor has a checkpoint in it; expected the output_dir of a run with GaP on"
        )
    headers = {place: read_record(place) for place in places}
    # Of two saves of one step, the one at the top is the run's result.
    places.sort(key=lambda place: (_step(headers[place]), place == folder))
    newest = places[-1]
    # The longest log: the one at the top may be from before training went on, and one may be cut short.
    states = [place / STATE for place in {folder: None, **dict.fromkeys(reversed(places))} if (place / STATE).is_file()]
    log = max(_logs(folder, states), key=lambda entries: entries[-1]["step"] if entries else -1.0, default=())
    if not log:
        raise GaPError(f"{folder}: has no {STATE} with a log, which trainer.save_state() and every checkpoint write")
    by_step = {_step(headers[place]): place for place in places}
    plan = headers[newest].get("plan")
    return RunRecord(
        name=folder.resolve().name,
        facts=facts_of(newest, measure=measure),
        plan=None if plan is None else Plan.from_dict(plan),
        log=log,
        saves=_saves([(step, place, headers[place]) for step, place in sorted(by_step.items())]),
    )


def _step(header: Mapping[str, Any]) -> int:
    step = header.get("step")
    return step if isinstance(step, int) else 0


def _saves(places: list[tuple[int, Path, dict[str, Any]]]) -> tuple[Save, ...]:
    saves: list[Save] = []
    before: dict[str, Tensor] = {}
    for step, place, header in places:
        masks = load_masks(place).masks if len(places) > 1 and (place / MASKS_NAME).is_file() else {}
        iou = {name: _iou(mask, before[name]) for name, mask in masks.items() if name in before}
        live = {w["name"]: w["live"] / math.prod(w["shape"]) for w in header["weights"]}
        saves.append(Save(step, live, iou))
        before |= masks
    return tuple(saves)


def _iou(mask: Tensor, other: Tensor) -> float:
    union = int((mask.bool() | other.bool()).sum())
    return int((mask.bool() & other.bool()).sum()) / union if union else 1.0


def _logs(folder: Path, paths: list[Path]) -> list[tuple[dict[str, float], ...]]:
    """Those that can be read: a checkpoint's may be cut short, by a kill, but not the folder's own nor all of them."""
    logs, errors = [], []
    for path in paths:
        try:
            logs.append(_log(path))
        except GaPError as error:
            if path.parent == folder:
                raise
            errors.append(error)
    if errors and not logs:
        raise errors[0]
    return logs


def _log(path: Path) -> tuple[dict[str, float], ...]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        out = []
        for entry in entries:
            numbers = {k: v for k, v in entry.items() if type(v) in (int, float) and math.isfinite(v)}
            if "step" in numbers:
                out.append(numbers)
        return tuple(out)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GaPError(f"{path}: is no trainer's state ({type(error).__name__})") from None
