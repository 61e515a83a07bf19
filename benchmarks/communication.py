"""What DDP sends when only live gradients travel: bytes, time per step, and a cost model with its prediction.

    make bench-communication                        # or: python benchmarks/communication.py
    python benchmarks/communication.py --quick      # a small model and few repeats: does it run?
    python benchmarks/communication.py --table      # Markdown of the recorded results and of the cost model, and no run
    python benchmarks/communication.py --table --into docs/scaling.md

Processes talk over loopback by gloo, one thread each.

1. Two processes train two replicas of one model in turn, step by step: one under DDP's own all-reduce, one with the hook,
   first in a phase of C-GaP (90 %, four partitions, one of them dense), then at the target as in the fine-tune. Reported
   are medians and the median ratio of a round with a 95 % bootstrap interval.
2. The hook counts what it sends over a whole run of the paper's schedule.
3. One, two and four processes time the pieces of the cost model (_communication/cost_model.py). It is fitted on one and two
   and predicts a step's communication and a mask change at four.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(path) for path in (HERE, ROOT) if str(path) not in sys.path]

from _communication.cost_model import (  # noqa: E402
    AllReduce,
    fit_all_reduce,
    fit_rate,
    on_the_wire,
    sharing,
)
from _communication.tables import render, replace_block  # noqa: E402

RESULT = HERE / "results/communication.json"
WORLDS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="rows on each process")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of two steps, at each of the two live shares")
    parser.add_argument("--seconds", type=float, default=75, help="and no longer than this at each")
    parser.add_argument("--repeats", type=int, default=20, help="of each piece of the cost model")
    parser.add_argument("--quick", action="store_true", help="a small model and few repeats")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print Markdown of what is recorded, and stop")
    parser.add_argument("--into", type=Path, help="with --table: replace the generated part of this file instead")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.into is not None and not args.table:
        parser.error("--into needs --table")
    if args.table:
        text = render(json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else None)
        if args.into is None:
            print(text)
        else:
            args.into.write_text(replace_block(args.into.read_text(encoding="utf-8"), text), encoding="utf-8")
        return
    if args.quick:
        args.layers, args.width, args.batch, args.length = 4, 128, 2, 32
        args.rounds, args.repeats = 6, 4
    if args.worker is not None:
        from _communication.worker import Settings
        from _communication.worker import main as work

        settings = Settings(args.layers, args.width, args.batch, args.length, args.rounds, args.seconds, args.repeats)
        work(args.worker[0], settings, Path(args.worker[1]))
        return

    begin = time.perf_counter()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        pair = launch("pair", 2, Path(folder))
        pieces = {n: launch("pieces", n, Path(folder)) for n in WORLDS}
    result = {
        "settings": {k: getattr(args, k) for k in ("layers", "width", "batch", "length", "rounds", "repeats")},
        "bytes": bytes_figures(pair["bytes"]),
        "steps": {stage: step_figures(values) for stage, values in pair["stages"].items()},
        "weights_equal": pair["weights_equal"],
        "cost_model": cost_model(pieces, num_cores=machine["cores"]),
        "pieces": {str(n): found for n, found in pieces.items()},
        "machine": machine,
        "run_seconds": time.perf_counter() - begin,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(render(result))


def launch(part: str, num_processes: int, folder: Path) -> dict[str, Any]:
    """Run one part of this command's own settings in so many processes."""
    output = folder / f"{part}-{num_processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(Path(__file__).resolve()), *sys.argv[1:], "--worker", part, str(output)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    print(f"{part}, {num_processes} process(es) …", flush=True)
    subprocess.run(command, env=environment, check=True)
    return json.loads(output.read_text(encoding="utf-8"))


def describe_machine() -> dict[str, Any]:
    import torch
    import transformers

    from gap_hf.bench.machine import processor

    return {
        "cpu": processor(),
        "cores": os.cpu_count() or 1,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def bytes_figures(counted: dict[str, Any]) -> dict[str, Any]:
    """Shares of the dense all-reduce's bytes, and megabytes that each of two processes sends in a step."""
    params, prunable = counted["num_params"], counted["num_prunable"]
    out: dict[str, Any] = {"num_params": params, "num_prunable": prunable}
    out["dense_megabytes"] = on_the_wire(4 * params, 2) / 1e6
    for stage in ("phase", "fine_tune", "run"):
        steps = [s for s in counted["steps"] if stage in ("run", s["stage"])]
        sent = float(np.mean([s["sent"] for s in steps]))
        out[stage] = {
            "megabytes": on_the_wire(4 * sent, 2) / 1e6,
            "share_of_model": sent / params,
            "share_of_prunable": float(np.mean([s["sent_of_prunable"] for s in steps])) / prunable,
        }
    return out


def step_figures(stage: dict[str, Any]) -> dict[str, Any]:
    own, live = np.array(stage["seconds"]).T
    ratios = live / own
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(4000, len(ratios))), axis=1)
    return {
        "live_share": stage["live_share"],
        "rounds": len(ratios),
        "own_ms": 1e3 * float(np.median(own)),
        "live_ms": 1e3 * float(np.median(live)),
        "median_ratio": float(np.median(ratios)),
        "interval_95": [float(x) for x in np.percentile(medians, [2.5, 97.5])],
    }


# --- the cost model --------------------------------------------------------------------------------------------------


def cost_model(pieces: dict[int, dict[str, Any]], *, num_cores: int) -> dict[str, Any]:
    """Constants from one and two processes, and what they say of each number of processes beside what was measured."""
    all_reduce = fit_all_reduce({n: [tuple(p) for p in pieces[n]["all_reduce"]] for n in (1, 2)}, num_cores=num_cores)
    packing = fit_packing({n: pieces[n]["packing"] for n in (1, 2)}, num_cores=num_cores)
    update = pieces[1]["update"]
    units = {"prune": update["num_pruned"], "apply": update["num_weights"], "digest": update["num_weights"]}
    rates = {k: fit_rate({n: pieces[n]["update"][k] for n in (1, 2)}, units[k], num_cores=num_cores) for k in units}
    alone = fit_rate({n: pieces[n]["step"]["alone"] for n in (1, 2)}, 1, num_cores=num_cores)
    predictions = {}
    for n, found in pieces.items():
        shared = sharing(n, num_cores)
        messages = sum(
            all_reduce.seconds(4 * b["num_sent"], n, shared=shared)
            + shared * sum(rate * b[f"num_{kind}"] for kind, rate in packing.items() if b["packed"])
            for b in found["communication"]["buckets"]
        )
        predictions[str(n)] = {
            "communication": beside(messages, found["communication"]["seconds"]),
            "update": beside(shared * sum(rates[k] * units[k] for k in units), found["update"]["whole"]),
            "step": beside(shared * alone + messages, found["step"]["whole"]),
        }
    return {
        "all_reduce": {"call_us": 1e6 * all_reduce.call, "message_us": 1e6 * all_reduce.message}
        | {"byte_ns": 1e9 * all_reduce.byte, "fit": fit_errors(all_reduce, pieces[2]["all_reduce"], num_cores)},
        "packing": {f"{kind}_ns": 1e9 * rate for kind, rate in packing.items()},
        "update": {f"{k}_ns_per_weight": 1e9 * rate for k, rate in rates.items()},
        "step_alone_ms": 1e3 * alone,
        "predictions": predictions,
    }


PACKING_KINDS: tuple[str, ...] = ("entries", "live", "whole")


def fit_packing(points: dict[int, list[dict[str, Any]]], *, num_cores: int) -> dict[str, float]:
    """Seconds of packing and unpacking with every core busy: per entry of a bucket, per live entry that is gathered and
    scattered, per entry of a stretch that goes whole. Least squares of relative errors, none below 0.
    """
    busy = max(n for n in points if n <= num_cores)
    seconds = np.array([p["seconds"] for p in points[busy]])
    rows = (
        np.array([[p[f"num_{kind}"] for kind in PACKING_KINDS] for p in points[busy]], dtype=float) / seconds[:, None]
    )
    best: tuple[float, dict[str, float]] | None = None
    # So few columns that every choice of those above 0 can be tried.
    for number in range(1, len(PACKING_KINDS) + 1):
        for columns in itertools.combinations(range(len(PACKING_KINDS)), number):
            rates = np.linalg.lstsq(rows[:, columns], np.ones(len(seconds)), rcond=None)[0]
            error = float(np.square(rows[:, columns] @ rates - 1).sum())
            if (rates >= 0).all() and (best is None or error < best[0]):
                found = dict.fromkeys(PACKING_KINDS, 0.0)
                found.update({PACKING_KINDS[c]: float(rate) for c, rate in zip(columns, rates, strict=True)})
                best = error, found
    assert best is not None
    return best[1]


def fit_errors(all_reduce: AllReduce, points: list[list[float]], num_cores: int) -> list[dict[str, float]]:
    """The fitted all-reduce of two processes beside what was measured, by size."""
    shared = sharing(2, num_cores)
    return [{"bytes": size, **beside(all_reduce.seconds(size, 2, shared=shared), seconds)} for size, seconds in points]


def beside(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted_ms": 1e3 * predicted, "measured_ms": 1e3 * measured, "ratio": predicted / measured}


if __name__ == "__main__":
    main()
