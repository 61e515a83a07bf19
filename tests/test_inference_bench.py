"""The benchmark runs, and its table is of what it recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_quick_run_and_its_table(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "inference.json"
    command = [sys.executable, str(ROOT / "benchmarks/inference.py"), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    runs = [
        subprocess.run([*command, flag], capture_output=True, text=True, timeout=300, env=environment)
        for flag in ("--quick", "--table")
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [(point["shape"], point["tokens"]) for point in result["points"]] == [
        ([256, 256], 1),
        ([256, 256], 8),
        ([256, 512], 1),
        ([256, 512], 8),
    ]
    for point in result["points"]:
        low, high = point["16x1"]["interval_95"]
        assert 0 < low <= point["16x1"]["ratio"] <= high
    assert runs[1].stdout.splitlines()[2].startswith("| tokens | 1 | 8 |")
    assert runs[1].stdout in runs[0].stdout
