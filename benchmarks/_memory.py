"""Anonymous memory of a process: what is not a mapped file. Linux only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def highest_anonymous(call: Callable[[], Any]) -> int:
    """Highest anonymous memory while `call` runs, above that before it, in bytes."""
    before = anonymous()
    highest, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            highest[0] = max(highest[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        stop.set()
        watcher.join()
    return highest[0] - before


def highest_allocated(call: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator has given out at a time while `call` runs, by its own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def from_child(script: str, *words: str) -> Any:
    """What `script` prints last when it is run with ``--child`` and these words: what is measured in a process of its own."""
    command = [sys.executable, script, "--child", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def anonymous() -> int:
    """Now, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")
