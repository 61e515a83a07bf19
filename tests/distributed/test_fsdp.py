"""FSDP2 under gloo: what `fsdp_run.py` compares with a whole copy, for one, two and four processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("fsdp")
    done = subprocess.run(
        [sys.executable, str(HERE / "fsdp_run.py"), str(folder), "1,2,4"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in (1, 2, 4)}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_change_is_that_of_a_single_process(summaries: dict[int, Any], world: int) -> None:
    cases = summaries[world]["cases"]
    assert len(cases) >= 3
    for name, found in cases.items():
        assert found["compared"] >= 6, name
    # Some processes have nothing of a tensor, which is where off-by-ones hide.
    assert (summaries[world]["empty"] > 0) == (world == 4)


def test_trainer_on_a_model_that_is_sharded_when_loaded(summaries: dict[int, Any]) -> None:
    if not summaries[2]["trainer"]:
        pytest.skip("this transformers' Trainer takes no model that is sharded when it is loaded")
    assert summaries[2]["trainer"] is True


def test_masks_are_loaded_with_another_number_of_processes(summaries: dict[int, Any]) -> None:
    loaded = {world: {w for c in s["cases"].values() for w in c["loaded"]} for world, s in summaries.items()}
    assert loaded == {1: set(), 2: {"1"}, 4: {"1", "2"}}
