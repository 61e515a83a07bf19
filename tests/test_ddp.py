"""Two gloo processes under DDP: masks and weights are the same on both, with nothing sent for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
from toys import gap_trainer
from gap_hf import GaPConfig
for name, config in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1], name)
    trainer = gap_trainer(
        folder, config=GaPConfig(**config), gradient_accumulation_steps=2, save_strategy="steps", save_steps=20
    )
    trainer.train()
    total = sum(float(p.detach().double().sum()) for p in trainer.model.parameters())
    Path(folder, f"rank{trainer.args.process_index}.json").write_text(
        json.dumps([trainer.args.world_size, trainer.gap.masks.digest(), total, trainer.gap.at_target])
    )
"""


CONFIGS = {
    "random, one pool": {"method": "random", "num_partitions": 2, "distribution": "global"},
    "by gradient": {"method": "rigl", "update_steps": 5, "drop_fraction": 0.5},
    "random growth": {"method": "mest", "update_steps": 5, "drop_fraction": 0.5},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one launch: to start two processes takes longer than what they train."""
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    configs = {name: {"sparsity": 0.9, **config} for name, config in CONFIGS.items()}
    done = subprocess.run(
        [*torchrun, str(script), str(folder), json.dumps(configs)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ranks_hold_the_same_masks(runs: Path, name: str) -> None:
    first, second = (json.loads((runs / name / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == 2 and first[3] is True
    assert (runs / name / "checkpoint-20/gap_masks.safetensors").is_file()
