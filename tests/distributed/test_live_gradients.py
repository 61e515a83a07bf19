"""Gradients of live weights alone under gloo: bit for bit DDP's own all-reduce between two processes, close between four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "accelerate_configs"


def run_cases(world: int, folder: Path, cases: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Each case's results, by rank."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    launcher = [str(HERE / "forked.py"), str(world)]
    if world == 2:  # the way that docs/scaling.md names first
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "one_node_ddp.yaml")]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
    if world == 1:  # needs nobody to start it, and is up some seconds earlier without
        launcher = []
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        environment.update(alone)
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "live_gradients.py"), str(folder), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {c: [json.loads((folder / f"{c}-{r}.json").read_text()) for r in range(world)] for c in cases}


def assert_ranks_agree(case: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(r["digest"] == ranks[0]["digest"] and r["sum"] == ranks[0]["sum"] for r in ranks), case
    assert ranks[0]["moved"] and ranks[0]["masks_equal"], case
    return ranks[0]


LOOPS = ["plain", "bucket_view", "one_bucket", "accumulation", "unused", "static_graph", "bf16", "fp16", "rigl", "gmp"]
TRAINERS = [
    "trainer",
    "trainer_live_state",
    "trainer_sparse_compute",
    "trainer_rigl",
    "trainer_twice",
    "trainer_compiled",
]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {"fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds.get(path.stem, "MULTI_GPU")
    assert config.num_processes == 8 * config.num_machines
    assert (config.num_machines > 1) == path.stem.startswith("many_nodes")


def test_the_configs_are_there() -> None:
    assert [path.stem for path in sorted(CONFIGS.glob("*.yaml"))] == [
        "fsdp2",
        "many_nodes_ddp",
        "one_node_ddp",
        "zero2",
    ]


def test_two_processes(tmp_path: Path) -> None:
    others = [
        "counts",
        "zeros",
        "sparse_embedding",
        "groups",
        "order_of_addition",
        "trainer_plain",
        "trainer_other_hook",
    ]
    results = run_cases(2, tmp_path, [*LOOPS, *others, *TRAINERS])

    for case in LOOPS:
        found = assert_ranks_agree(case, results[case])
        assert found["losses_equal"] and found["weights_equal"], (case, found["largest_difference"])
        assert set(found["dense"]) == {found["dense"][0]}
        assert min(found["sent"]) < 0.25 * found["dense"][0], case
        # Where a phase begins the masks change and with them what is sent.
        assert len(set(found["sent"])) > 1, case
    # DDP rebuilt its buckets after the first step.
    first, second, _ = results["plain"][0]["buckets"]
    assert len(second) > 1 and [n for b in first for n in b] != [n for b in second for n in b]
    assert len(results["unused"][0]["buckets"][0]) > 1
    # Growth by gradient sees dense gradients; nothing else is sent whole.
    rigl = results["rigl"][0]
    assert rigl["whole_steps"] == [s for s, n in enumerate(rigl["sent"]) if n == rigl["dense"][s]] != []
    assert results["gmp"][0]["sent"][0] == results["gmp"][0]["dense"][0], "nothing is packed before the first prune"

    for found in results["counts"]:
        assert all(sent == expected for sent, expected, _ in found["counts"])
        assert {dense for *_, dense in found["counts"]} == {found["params"]}
        assert len({sent for sent, *_ in found["counts"]}) >= 3
    for found in results["zeros"]:
        assert found == {"masked_had_gradients": True, "masked_are_zero": True, "live_are_not": True}
    for found in results["sparse_embedding"]:
        assert found == {"equal": True, "num": 5}
    for found in results["groups"]:
        assert found["largest_difference"] == 0
    assert all(found["equal"] for found in results["order_of_addition"])

    for case in TRAINERS:
        for found in results[case]:
            assert found["weights_equal"] and found["log_equal"], (case, found["largest_difference"])
            assert found["own_has_none"] and found["live_has_one"] and found["current"] and found["at_target"], case
            assert found["num_records"] >= 15 and found["share_sent"] < 0.6, case
    for found in results["trainer_plain"]:
        assert found == {"off": 0, "dense": 0, "little": 0, "asked": 1, "on": 1}
    for found in results["trainer_other_hook"]:
        for words in ("gap.live_gradients", "hook", "only be called once", "live_gradients: false"):
            assert words in found["error"]


def test_four_processes(tmp_path: Path) -> None:
    results = run_cases(4, tmp_path, ["plain", "rigl", "groups", "order_of_addition", "trainer"])
    # An all-reduce adds three or more numbers in an order that depends on where they lie: not only the hook's doing.
    assert any(0 < found["difference"] < 1e-5 for found in results["order_of_addition"])
    for case in ("plain", "rigl"):
        assert assert_ranks_agree(case, results[case])["largest_difference"] < 1e-5
    for found in results["groups"]:
        assert found["largest_difference"] < 1e-6
    for found in results["trainer"]:
        assert found["largest_difference"] < 1e-4 and found["live_has_one"] and found["at_target"]


def test_one_process_registers_nothing(tmp_path: Path) -> None:
    results = run_cases(1, tmp_path, ["trainer_plain", "plain"])
    assert results["trainer_plain"][0] == {"off": 0, "dense": 0, "little": 0, "asked": 0, "on": 0}
    # In a loop of one's own a hook over one process is allowed, and does nothing.
    found = assert_ranks_agree("plain", results["plain"])
    assert found["losses_equal"] and found["weights_equal"]
