"""P-GaP and DDP on real processes: the same masks on all, the same model as one process that accumulates, or trains the
replicas in turn.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from parallel_run import summary, train

GAP = {"sparsity": 0.8, "method": "parallel", "num_partitions": 2, "num_rounds": 2}
HARD = {"ramp_share": 0, "prune_share": 0}
RUNS: dict[str, dict[str, Any]] = {
    "as published": {"gap": {**GAP, **HARD}},
    "ramps, then cyclic": {
        "gap": {**GAP, "cyclic_rounds": 1, "update_steps": 2, "lr_density_power": 0.5},
        "training": {
            "max_steps": 24,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    },
    "restarts, one pool": {
        "gap": {**GAP, **HARD, "optimizer_reset": "all", "lr_schedule": "restart", "distribution": "global"}
    },
    "ddp": {"gap": {"sparsity": 0.8, "num_partitions": 2, "update_steps": 3}},
    "ddp, rigl": {"gap": {"sparsity": 0.8, "method": "rigl", "update_steps": 3, "lr_density_power": 0.5}},
    "vit, random partition": {"model": "vit", "gap": {**GAP, "partition": "random", "update_steps": 3}},
}


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-rank*.json"))]


def without_log(found: dict[str, Any]) -> dict[str, Any]:
    """In a round, each worker logs what it did to its own replica; the first one's log is what is shown and saved."""
    return {key: value for key, value in found.items() if key != "log"}


def check_both(found: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    first, second = found
    assert first == whole and without_log(second) == without_log(whole)


def sequential(options: dict[str, Any], accumulation: int = 2) -> dict[str, Any]:
    """The same in one process, by accumulation; the replicas of P-GaP in turn."""
    training = {**options.get("training", {}), "gradient_accumulation_steps": accumulation}
    workers = {"workers": "sequential"} if options["gap"].get("method") == "parallel" else {}
    return {**options, "gap": {**options["gap"], **workers}, "training": training}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs on two processes, a worker each."""
    folder = tmp_path_factory.mktemp("two")
    done = launch("parallel_run.py", 2, folder, RUNS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name: str, two: Path, tmp_path: Path) -> None:
    first, second = results(two, name)
    assert without_log(first) == without_log(second)
    assert first["world"] == 2 and first["at_target"] is True
    assert first["sparsity"] == pytest.approx(0.8, abs=1e-3)
    # Bit for bit: with two of each there is one order to add in, and halves are exact.
    assert {"world": 2, **summary(train(tmp_path, sequential(RUNS[name])))} == first


def test_evaluations_in_a_round_are_of_the_merged_model(two: Path) -> None:
    log = results(two, "ramps, then cyclic")[0]["log"]
    assert [e["step"] for e in log if "eval_loss" in e] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert all(torch.isfinite(torch.tensor(e["eval_loss"])) for e in log if "eval_loss" in e)


# Phases end at 4, 9, 13 and 18: inside the rounds, at a merge with another round after it, at the last merge.
@pytest.mark.parametrize("where", ["processes", "sequential"])
def test_a_resume_in_a_round_is_exact(where: str, two: Path, tmp_path: Path) -> None:
    name = "ramps, then cyclic"
    options, whole = RUNS[name], results(two, name)[0]
    if where == "sequential":
        source, options = tmp_path / "whole", sequential(options)
        train(source, options)
    else:
        source = two / name
    steps = (2, 4, 6, 9)
    assert (source / "checkpoint-6/gap_worker_1.safetensors").is_file()
    assert not (source / "checkpoint-9/gap_worker_1.safetensors").exists()
    resumed = {str(step): {**options, "resume": str(source / f"checkpoint-{step}")} for step in steps}
    if where == "sequential":
        for step, changed in resumed.items():
            assert {"world": 2, **summary(train(tmp_path / step, changed))} == whole
        return
    done = launch("parallel_run.py", 2, tmp_path, resumed)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in steps:
        check_both(results(tmp_path, str(step)), whole)


def test_a_killed_process_and_a_resume_give_the_same_model(two: Path, tmp_path: Path) -> None:
    name = "ramps, then cyclic"
    killed = launch(
        "parallel_run.py", 2, tmp_path, {"run": {**RUNS[name], "at": {"rank": 1, "step": 7, "what": "die"}}}
    )
    assert killed.returncode != 0
    assert not results(tmp_path, "run")
    # The step that it died in may have been saved by one process and not by the other.
    shutil.rmtree(tmp_path / "run/checkpoint-7", ignore_errors=True)
    done = launch("parallel_run.py", 2, tmp_path, {"run": {**RUNS[name], "resume": True}})
    assert done.returncode == 0, done.stderr[-3000:]
    check_both(results(tmp_path, "run"), results(two, name)[0])


def test_masks_that_differ_stop_training_with_the_layer_named(tmp_path: Path) -> None:
    # In the fine-tune of P-GaP, and in any other method, all processes train one model.
    gap = {"sparsity": 0.8, "num_partitions": 2, **HARD}
    done = launch("parallel_run.py", 2, tmp_path, {"run": {"gap": gap, "at": {"rank": 1, "step": 4, "what": "break"}}})
    assert done.returncode != 0
    assert "transformer.h.2.mlp.c_fc.weight: the processes hold different masks" in done.stderr
    assert not results(tmp_path, "run")


def test_four_processes_are_two_workers(tmp_path: Path) -> None:
    options = {"gap": {**GAP, "update_steps": 3}, "training": {"per_device_train_batch_size": 2}}
    done = launch("parallel_run.py", 4, tmp_path, {"run": options})
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path, "run")
    assert len(found) == 4 and all(without_log(of_rank) == without_log(found[0]) for of_rank in found)
    alone = train(tmp_path / "alone", sequential(options, accumulation=4))
    assert alone.gap.masks.digest() == found[0]["masks"]
    # Four gradients are added in another order.
    for name, tensor in torch.load(tmp_path / "run-rank0.pt").items():
        torch.testing.assert_close(alone.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
