"""GaPTrainer under DeepSpeed's ZeRO 1 and 2 on two gloo processes: what `zero_run.py` found. On a CPU, with torch's own Adam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from safetensors.torch import load_file

from gap_hf import checkpoint
from gap_hf.checkpoint import load

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra: pip install 'gap_hf[deepspeed]'")

GMP = {"sparsity": 0.8, "method": "gmp"}
CYCLIC = {"sparsity": 0.8, "num_partitions": 2, "num_rounds": 2, "update_steps": 1}
HARD = {**CYCLIC, "update_steps": None, "ramp_share": 0, "prune_share": 0}
# A clip so low that it bites at every step, and two micro-batches a step.
CLIPPED = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 5, "bf16": False}
RUNS: dict[str, dict[str, Any]] = {
    "gmp under ddp": {"gap": GMP, "training": CLIPPED},
    "gmp zero-1": {"zero": 1, "gap": GMP, "training": CLIPPED},
    "gmp zero-2": {"zero": 2, "gap": GMP, "training": CLIPPED},
    "softened zero-1": {"zero": 1, "gap": CYCLIC},
    "softened zero-2 bf16": {"zero": 2, "gap": CYCLIC, "training": {"bf16": True}},
    "hard zero-1 bf16": {"zero": 1, "gap": HARD, "training": {"bf16": True}},
    "hard zero-2 bf16 accumulated": {"zero": 2, "gap": HARD, "training": {"bf16": True, **CLIPPED}},
    "global zero-1": {"zero": 1, "gap": {**CYCLIC, "distribution": "global"}},
    "set zero-2": {"zero": 2, "gap": {"sparsity": 0.8, "method": "set", "update_steps": 2}},
    "off zero-2 bf16": {"zero": 2, "training": {**SAVED, "bf16": True}},
    "off resumed": {"zero": 2, "training": {**SAVED, "bf16": True}, "resume": "off zero-2 bf16/checkpoint-5"},
    "saved zero-2 bf16": {"zero": 2, "gap": CYCLIC, "training": {**SAVED, "bf16": True}},
    "resumed zero-2 bf16": {
        "zero": 2,
        "gap": CYCLIC,
        "training": {**SAVED, "bf16": True},
        "resume": "saved zero-2 bf16/checkpoint-5",
    },
    "saved zero-1": {"zero": 1, "gap": CYCLIC, "training": SAVED},
    "resumed zero-1": {"zero": 1, "gap": CYCLIC, "training": SAVED, "resume": "saved zero-1/checkpoint-5"},
}
SPARSE = [name for name, run in RUNS.items() if "zero" in run and "gap" in run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("zero")
    done = launch("zero_run.py", 2, made, RUNS)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in range(2)]
    assert all(f["deepspeed"] == ("zero" in RUNS[name]) and f["same_weights"] for f in found)
    return found


def same_weights(folder: Path, one: str, other: str) -> bool:
    a, b = (load_file(folder / f"{name}.safetensors") for name in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", SPARSE)
def test_masks_agree_zeros_are_exact_and_the_target_is_met(folder: Path, name: str) -> None:
    found = results(folder, name)
    bf16 = RUNS[name].get("training", {}).get("bf16", False)
    for of_rank in found:
        assert of_rank["engine"] == "DeepSpeedEngine"
        assert of_rank["dtype"] == ("torch.bfloat16" if bf16 else "torch.float32")
        assert of_rank["num_checked"] > 100_000 and of_rank["num_nonzero"] == 0
        assert of_rank["at_target"] and of_rank["digests"] == found[0]["digests"]
        # An exchange changes masks inside the run; all of these change them somewhere.
        assert len(set(of_rank["digests"])) > 1
        counts = of_rank["live"].values()
        pooled = RUNS[name]["gap"].get("distribution") == "global"
        assert sum(live for live, _, _ in counts) == round(0.2 * sum(numel for _, _, numel in counts)) or not pooled
        assert all(live == int(0.2 * numel + 0.5) for live, _, numel in counts) or pooled
        # What is live moved, so that almost nothing of it is 0.
        assert all(live * 0.98 <= nonzero <= live for live, nonzero, _ in counts)
    state = load(folder / f"{name}-saved")
    saved = load_file(folder / f"{name}-saved/model.safetensors")
    assert all(mask is not None and not saved[n][mask == 0].any() for n, mask in state.masks.items())


@pytest.mark.parametrize("name", ["gmp zero-1", "gmp zero-2"])
def test_it_is_what_ddp_trains_where_nothing_grows(folder: Path, name: str) -> None:
    """The norm before clipping is that of live gradients, as DDP's; Adam's step count plays no part in pruning."""
    ddp, zero = results(folder, "gmp under ddp")[0], results(folder, name)[0]
    assert ddp["engine"] == "DistributedDataParallel" and len(ddp["norms"]) == 12
    assert min(ddp["norms"]) > 0.05
    assert zero["norms"] == pytest.approx(ddp["norms"], rel=1e-3)
    a, b = (load_file(folder / f"{run}.safetensors") for run in ("gmp under ddp", name))
    assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_deepspeed_itself_resumes_to_the_bit(folder: Path) -> None:
    assert results(folder, "off resumed")[0]["norms"] and same_weights(folder, "off zero-2 bf16", "off resumed")


@pytest.mark.parametrize("kind", ["zero-2 bf16", "zero-1"])
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, kind: str) -> None:
    whole, resumed = results(folder, f"saved {kind}")[0], results(folder, f"resumed {kind}")[0]
    assert len(resumed["digests"]) == 7
    assert resumed["begin"] == {"digest": whole["digests"][4], "nonzero": 0}
    assert resumed["digests"] == whole["digests"][5:]
    assert same_weights(folder, f"saved {kind}", f"resumed {kind}")
    recorded = checkpoint.load(folder / f"saved {kind}/checkpoint-5")
    assert any(mask is None for mask in recorded.masks.values()), "saved while something was grown"
