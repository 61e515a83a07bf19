"""Which form is the fastest, measured once for each kind of layer and number of tokens, and remembered in a file.

A form is chosen only where it beats dense at both ends of a range of token counts, so that between them it hardly loses.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

DENSE = "dense"
VERSION = 2  # of the kernels: what was measured with others counts no more
MAX_RANGE = 10  # 2**10 tokens and more are one range, measured at its start
_WIN = 0.95  # a form's time by dense's must be at most this
_SECONDS, _MIN_ROUNDS, _MAX_ROUNDS = 0.03, 7, 100  # seconds for each that is timed


def range_of(tokens: int) -> int:
    """Ranges are [2**i, 2**(i + 1)) tokens."""
    return min(tokens.bit_length() - 1, MAX_RANGE)


def ends_of(range_: int) -> tuple[int, ...]:
    """Token counts at which a range is measured."""
    return (2**range_,) if range_ in (0, MAX_RANGE) else (2**range_, 2 ** (range_ + 1) - 1)


def fastest(runs: Sequence[Mapping[str, Callable[[], object]]]) -> str:
    """Name of the fastest, or `DENSE`.

    Args:
        runs: For each token count, by name, what to time; `DENSE` is one of them.
    """
    shares = [_shares_of_dense(run) for run in runs]
    names = [name for name in runs[0] if name != DENSE]
    worst = {name: max(share[name] for share in shares) for name in names}
    best = min(names, key=lambda name: worst[name], default=DENSE)
    return best if best != DENSE and worst[best] <= _WIN else DENSE


def _shares_of_dense(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Each one's time by dense's, shortest by shortest: whatever else the machine does only adds time. In a round each runs once."""
    for run in runs.values():
        run()
    shortest = dict.fromkeys(runs, float("inf"))
    begin, rounds = time.perf_counter(), 0
    while rounds < _MIN_ROUNDS or (time.perf_counter() - begin < _SECONDS * len(runs) and rounds < _MAX_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            shortest[name] = min(shortest[name], time.perf_counter() - start)
        rounds += 1
    return {name: seconds / shortest[DENSE] for name, seconds in shortest.items()}


class Memory:
    """Choices by key, in this process and in ``inference.json`` of a folder. A file that cannot be read is as good as none,
    and one that cannot be written is no error.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        self._read_from: Path | None = None

    def get(self, key: str, valid: Sequence[str]) -> str | None:
        """What was chosen, if it is one of `valid` or `DENSE`."""
        with self._lock:
            self._read()
            found = self._known.get(key)
        return found if found == DENSE or found in valid else None

    def set(self, key: str, name: str) -> None:
        with self._lock:
            self._read()
            self._known[key] = name
            self._write()

    def forget(self) -> None:
        """What this process knows; the file stays."""
        with self._lock:
            self._known, self._read_from = {}, None

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def _read(self) -> None:
        path = cache_file()
        if path == self._read_from:
            return
        self._read_from, self._known = path, {} if path is None else _entries(path)

    def _write(self) -> None:
        if (path := cache_file()) is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"version": VERSION, "choices": {**_entries(path), **self._known}}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, path)
        except OSError as error:
            logger.debug("Choices of sparse forms are not remembered: %s", error)


def cache_file() -> Path | None:
    """``$GAP_HF_CACHE/inference.json``; by default under ``~/.cache/gap_hf``, and None where there is no home."""
    try:
        folder = os.environ.get("GAP_HF_CACHE") or Path.home() / ".cache" / "gap_hf"
    except RuntimeError:
        return None
    return Path(folder) / "inference.json"


def _entries(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}
        return {str(key): name for key, name in data["choices"].items() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


MEMORY = Memory()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=MEMORY.after_fork)
