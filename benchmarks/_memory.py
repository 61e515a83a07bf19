"""Anonymous memory of a process: what is not a mapped file. Linux only."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def highest_anonymous(call: Callable[[], Any]) -> int:
    """Highest anonymous memory while `call` runs, above that before it, in bytes."""
    before = _anonymous()
    highest, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            highest[0] = max(highest[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        stop.set()
        watcher.join()
    return highest[0] - before


def peak_in_child(script: str, *words: str) -> int:
    """What `script` prints last when it is run with ``--child`` and these words: a peak, measured in a process of its own."""
    command = [sys.executable, script, "--child", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")
