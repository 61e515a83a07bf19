"""Two gloo processes under DDP: masks and weights are the same on both, with nothing sent for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
from toys import gap_trainer
from gap_hf import GaPConfig
config = GaPConfig(**json.loads(sys.argv[2]))
trainer = gap_trainer(Path(sys.argv[1]), config=config, gradient_accumulation_steps=2, save_strategy="steps", save_steps=20)
trainer.train()
total = sum(float(p.detach().double().sum()) for p in trainer.model.parameters())
Path(sys.argv[1], f"rank{trainer.args.process_index}.json").write_text(
    json.dumps([trainer.args.world_size, trainer.gap.masks.digest(), total, trainer.gap.at_target])
)
"""


CONFIGS = {
    "random, one pool": {"method": "random", "num_partitions": 2, "distribution": "global"},
    "by gradient": {"method": "rigl", "update_steps": 5, "drop_fraction": 0.5},
    "random growth": {"method": "mest", "update_steps": 5, "drop_fraction": 0.5},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_ranks_hold_the_same_masks(config: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    done = subprocess.run(
        [
            *torchrun,
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            str(script),
            str(tmp_path),
            json.dumps({"sparsity": 0.9, **config}),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == 2 and first[3] is True
    assert (tmp_path / "checkpoint-20/gap_masks.safetensors").is_file()
