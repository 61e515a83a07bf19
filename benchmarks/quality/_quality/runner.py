"""Runs cells as processes of scripts/translate.py, some at a time; a cell that was stopped goes on where it was saved."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _quality.cell import ROOT, Cell
from _quality.results import code_hash, difference, make_result, result_path, write_json
from _quality.tier import Tier
from gap_hf.errors import GaPError

LOG_LINES = 5
# A step frees and asks for the same large buffers again. By default glibc gives them back to the system each time, and the
# system clears every page anew: 12 % of a step of `small` (docs/lab-notebook.md). Other C libraries ignore the variable.
KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000"


def command(words: Sequence[str]) -> list[str]:
    """What runs a recipe; tests put a stub in its place."""
    return [sys.executable, str(ROOT / "scripts" / "translate.py"), *words]


def environment(threads: int) -> dict[str, str]:
    """This repository's gap_hf, whichever is installed; so many threads; freed memory kept; BLEU from sacrebleu itself."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_EVALUATE_OFFLINE": "1"}
    return {"TOKENIZERS_PARALLELISM": "false", "GLIBC_TUNABLES": KEEP_MEMORY, **os.environ, **fixed}


@dataclass
class Runner:
    """Runs cells until all are done, `stop` is set, or no time is left for another one."""

    tier: Tier
    runs: Path
    results: Path
    jobs: int
    deadline: float = float("inf")  # of time.monotonic()
    longest: float = 0.0  # seconds of the longest cell so far
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    left: list[Cell] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, cells: Sequence[Cell], *, done: int = 0) -> None:
        """Fills `failed` and `left` (not begun, or stopped). Ctrl-C stops what runs, and is raised again."""
        total, self._done = done + len(cells), done
        waiting = list(reversed(cells))

        def work() -> None:
            while not self.stop.is_set():
                with self._lock:
                    if not waiting:
                        return
                    cell = waiting.pop()
                    # Too little time for this one is too little for the rest, which are as long.
                    if time.monotonic() + self.longest > self.deadline:
                        self.left.append(cell)
                        continue
                try:
                    self._one(cell, total)
                except Exception as error:
                    self._fail(cell, f"{type(error).__name__}: {error}")

        workers = [threading.Thread(target=work, daemon=True) for _ in range(self.jobs)]
        for worker in workers:
            worker.start()
        try:
            # No join here: interrupted in Python 3.11, it takes the thread for finished.
            while any(worker.is_alive() for worker in workers):
                time.sleep(0.1)
        finally:
            self.stop.set()  # without an interrupt, nothing is left that it could stop
            for worker in workers:
                worker.join()
            self.left += waiting

    def _one(self, cell: Cell, total: int) -> None:
        folder = self.runs / cell.tier / ("tune" if cell.extra == "tune" else "")
        folder.mkdir(parents=True, exist_ok=True)
        output, identity = folder / cell.name, cell.identity()
        begin = time.monotonic()
        # The child holds the lock too: one that outlives a killed runner is not joined by a second one.
        with open(folder / f"{cell.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return self._fail(cell, "another process is running this cell")
            known = _read(folder / f"{cell.name}.identity.json")
            same = known is not None and difference(known["identity"], identity) is None
            started = dict(known) if known is not None and same else {}
            run, wall = _read(output / "results.json") if same else None, None
            if run is None:
                checkpoint = last_checkpoint(output) if same else None
                step = None if checkpoint is None else int(checkpoint.name.split("-")[1])
                codes = [] if checkpoint is None else list(started.get("code_sha256", []))
                # Now, not when the run ends: by then the sources may be others than it was started with.
                if (code := code_hash()) not in codes[-1:]:
                    codes.append(code)
                started = {"identity": identity, "resumed_from": step, "code_sha256": codes}
                write_json(folder / f"{cell.name}.identity.json", started)
                status = self._process(cell, output, folder / f"{cell.name}.log", checkpoint, lock.fileno())
                if self.stop.is_set() or (status != 0 and time.monotonic() >= self.deadline):
                    with self._lock:
                        self.left.append(cell)
                    return None
                run = _read(output / "results.json") if status == 0 else None
                if run is None:
                    return self._fail(cell, f"exit code {status}", folder / f"{cell.name}.log")
                wall = time.monotonic() - begin
            resumed_from, codes = started.get("resumed_from"), started.get("code_sha256", [])
            result = make_result(self.tier, identity, run, wall=wall, resumed_from=resumed_from, code=codes)
            write_json(result_path(self.results, cell), result)
            for path in output.glob("checkpoint-*"):
                shutil.rmtree(path, ignore_errors=True)
        with self._lock:
            self._done += 1
            self.longest = max(self.longest, wall or 0.0)
            line = f"[{self._done}/{total}] {cell.name}: BLEU {result['bleu']:.2f} on {result['scored']}"
            print(f"{line}, {result['seconds']:,.0f} s", flush=True)
        return None

    def _process(self, cell: Cell, output: Path, log: Path, checkpoint: Path | None, lock: int) -> int:
        resume = (
            ["--training.overwrite_output_dir=true"]
            if checkpoint is None
            else [f"--training.resume_from_checkpoint={json.dumps(str(checkpoint))}"]
        )
        out = [f"--training.output_dir={json.dumps(str(output))}", "--training.disable_tqdm=true"]
        out.append("--training.save_total_limit=2")  # one more than the one that may be from the end
        words = command([str(ROOT / cell.recipe), *cell.words(), *out, *resume])
        with open(log, "wb" if checkpoint is None else "ab") as file:
            # A session of its own: Ctrl-C reaches the runner alone, which then stops the child.
            child = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(self.tier.threads),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(lock,),
            )
            while True:
                try:
                    return child.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    if self.stop.is_set() or time.monotonic() >= self.deadline:
                        break
            child.terminate()
            try:
                return child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                return child.wait()

    def _fail(self, cell: Cell, why: str, log: Path | None = None) -> None:
        if log is not None and log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            why = "\n".join([f"{why}; {log} ends with", *(f"    {line}" for line in lines[-LOG_LINES:])])
        with self._lock:
            self.failed.append((cell, why))
            print(f"{cell.name}: failed", flush=True)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete one (what Trainer writes last is its state) from before the end of training, because Trainer
    resumes one from the end with a step too many.
    """
    found: dict[int, Path] = {}
    for path in output.glob("checkpoint-*"):
        state = _read(path / "trainer_state.json")
        if state is not None and state["global_step"] < state["max_steps"]:
            found[state["global_step"]] = path
    return found[max(found)] if found else None


def _read(path: Path) -> Mapping[str, Any] | None:
    """None where it is missing or was cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        raise GaPError(f"{path}: found {type(found).__name__}, expected an object")
    return found
