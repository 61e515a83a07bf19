"""Starts a script of this folder on several gloo processes of this machine."""

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
    command = [sys.executable, str(HERE / "forked.py"), str(num_processes), str(HERE / script)]
    return subprocess.run(
        [*command, str(folder), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
