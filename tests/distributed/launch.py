"""Starts a script of this folder under torchrun with gloo processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATHS = os.pathsep.join(str(path) for path in (HERE.parents[1], HERE.parent, HERE))


def launch(script: str, num_processes: int, folder: Path, options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``script FOLDER OPTIONS`` (options as JSON) on so many processes of one thread each, and wait for them."""
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return subprocess.run(
        [*torchrun, str(HERE / script), str(folder), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
