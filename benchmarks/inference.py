"""What sparse layers gain on this CPU: `gap_hf.optimize_for_inference` against the best dense fp32 of torch and ONNX Runtime.

    make bench-inference                       # or: python benchmarks/inference.py
    python benchmarks/inference.py --quick     # two small layers, few rounds: does it run?
    python benchmarks/inference.py --table     # Markdown of the recorded results, and no run

Linear layers with a bias and random weights, of which blocks of 16 outputs by one input, or single weights, are kept. At each
number of tokens torch, ONNX Runtime and both optimized layers take turns, of one call or a millisecond. A layer is called as in a model,
so Python, checks and the choice between sparse and dense are in its time. A ratio is the time of the dense engine with
the lower median by the layer's in the same round; given are the median over rounds and its 95 % bootstrap interval, and,
as other work on the machine only adds time, the shortest time of any dense engine by the layer's shortest.
Then the 16x1 layers with 1 and 2 threads take turns of ten calls at 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from gap_hf import inference_report, optimize_for_inference
from gap_hf.bench.machine import processor
from gap_hf.bench.timing import ratio as paired_ratio

RESULT = Path(__file__).resolve().parent / "results/inference.json"
SHAPES = ((512, 512), (512, 2048), (2048, 512), (1024, 4096), (4096, 1024))  # (outputs, inputs)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PATTERNS = {"16x1": 16, "unstructured": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="at each layer and number of tokens, if rounds allow"
    )
    parser.add_argument("--rounds", type=int, nargs=2, default=(15, 400), metavar=("MIN", "MAX"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(render(json.loads(args.output.read_text(encoding="utf-8"))))
        return
    shapes: Sequence[tuple[int, int]] = SHAPES
    if args.quick:
        shapes, args.tokens, args.seconds, args.rounds = ((256, 256), (256, 512)), (1, 8), 0.02, (3, 10)
    begin = time.perf_counter()
    load = os.getloadavg()[0]
    # Choices are measured in this run.
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        os.environ["GAP_HF_CACHE"] = folder
        torch.set_num_threads(1)
        points = [point for shape in shapes for point in measure(shape, args)]
        threads = [measure_threads(shape, args) for shape in shapes]
    result = {
        "settings": {"sparsity": args.sparsity, "seconds": args.seconds, "rounds": list(args.rounds), "dtype": "fp32"},
        "machine": describe_machine() | {"load_before": load},
        "summary": summary(points, threads),
        "points": points,
        "threads": threads,
        "run_seconds": time.perf_counter() - begin,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(render(result))


def measure(shape: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One layer at every number of tokens, on one thread."""
    layers = {name: make_layer(shape, rows, args.sparsity) for name, rows in PATTERNS.items()}
    session = onnx_session(layers["16x1"])
    dense = {name: nn.Linear(shape[1], shape[0]) for name in layers}
    for name, layer in layers.items():
        dense[name].load_state_dict(layer.state_dict())
        optimize_for_inference(layer, token_counts=args.tokens)
    points = []
    for tokens in args.tokens:
        x = torch.randn(tokens, shape[1])
        feed = {"x": x.numpy()}
        runs: dict[str, Callable[[], object]] = {
            "torch": lambda x=x: dense["16x1"](x),
            "onnxruntime": lambda feed=feed: session.run(None, feed),
            **{name: lambda x=x, layer=layer: layer(x) for name, layer in layers.items()},
        }
        for name, layer in layers.items():
            torch.testing.assert_close(layer(x), dense[name](x), rtol=1e-4, atol=1e-4)
        took = in_turns(runs, args)
        engine = min(("torch", "onnxruntime"), key=lambda name: float(np.median(took[name])))
        point: dict[str, Any] = {
            "shape": list(shape),
            "tokens": tokens,
            "rounds": len(took[engine]),
            "best_dense": engine,
        }
        point["microseconds"] = {name: 1e6 * float(np.median(values)) for name, values in took.items()}
        shortest = {name: min(values) for name, values in took.items()}
        for name, layer in layers.items():
            (report,) = inference_report(layer)
            form = max((count, form) for (_, count), form in report.forms.items() if count <= tokens)[1]
            point[name] = {"form": form, **ratio(took[engine], took[name])}
            point[name]["to_torch"] = ratio(took["torch"], took[name])
            point[name]["shortest"] = min(shortest["torch"], shortest["onnxruntime"]) / shortest[name]
        points.append(point)
        print(line(point), flush=True)
    return points


def measure_threads(shape: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    tokens = 256
    layer = make_layer(shape, 16, args.sparsity)
    x = torch.randn(tokens, shape[1])

    def at(threads: int) -> Callable[[], object]:
        torch.set_num_threads(threads)
        optimize_for_inference(layer, token_counts=[tokens])
        return lambda: layer(x)

    runs = {threads: at(threads) for threads in (1, 2)}
    took: dict[str, list[float]] = {"1": [], "2": []}
    stop = time.perf_counter() + args.seconds
    while len(took["1"]) < args.rounds[0] or (time.perf_counter() < stop and len(took["1"]) < args.rounds[1]):
        for threads, run in runs.items():
            torch.set_num_threads(threads)
            for _ in range(3):  # OpenMP starts its threads
                run()
            for _ in range(10):
                start = time.perf_counter()
                run()
                took[str(threads)].append(time.perf_counter() - start)
    torch.set_num_threads(1)
    (report,) = inference_report(layer)
    forms = {str(threads): form for (threads, _), form in report.forms.items()}
    times = {name: 1e6 * float(np.median(values)) for name, values in took.items()}
    return {
        "shape": list(shape),
        "tokens": tokens,
        "forms": forms,
        "microseconds": times,
        "shortest": min(took["1"]) / min(took["2"]),
        **ratio(took["1"], took["2"]),
    }


def make_layer(shape: tuple[int, int], rows: int, sparsity: float) -> nn.Linear:
    """Random weights, of which the blocks of `rows` outputs by one input with the largest sums are kept."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    score = layer.weight.abs().view(shape[0] // rows, rows, shape[1]).sum(dim=1)
    kept = score >= score.flatten().sort().values[int(sparsity * score.numel())]
    layer.weight.mul_(kept.repeat_interleave(rows, dim=0))
    return layer


def onnx_session(layer: nn.Linear) -> onnxruntime.InferenceSession:
    """The same product in ONNX Runtime, on one thread."""
    weights = {"w": layer.weight.t().contiguous(), "b": layer.bias}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", layer.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", layer.out_features])],
        [numpy_helper.from_array(value.numpy().copy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_turns(runs: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a call of each in each round. Which is the first moves on from round to round. A turn is one call, or, where
    calls are short, as many for everybody as take torch a millisecond.
    """
    names = list(runs)
    took: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    start = time.perf_counter()
    runs[names[0]]()
    calls = max(1, round(1e-3 / (time.perf_counter() - start)))
    stop, rounds = time.perf_counter() + args.seconds, 0
    while rounds < args.rounds[0] or (time.perf_counter() < stop and rounds < args.rounds[1]):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            run = runs[name]
            start = time.perf_counter()
            for _ in range(calls):
                run()
            took[name].append((time.perf_counter() - start) / calls)
        rounds += 1
    return took


def ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    found = paired_ratio(slow, fast)
    return {"ratio": found.median, "interval_95": [found.low, found.high]}


def summary(points: list[dict[str, Any]], threads: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in PATTERNS:
        by_tokens = {}
        for tokens in sorted({point["tokens"] for point in points}):
            here = [point for point in points if point["tokens"] == tokens]
            by_tokens[str(tokens)] = {
                "against_best": geometric_mean(point[name]["ratio"] for point in here),
                "against_torch": geometric_mean(point[name]["to_torch"]["ratio"] for point in here),
                "shortest": geometric_mean(point[name]["shortest"] for point in here),
                "lowest_lower_end": min(point[name]["interval_95"][0] for point in here),
            }
        out[name] = by_tokens
    out["two_threads"] = {key: geometric_mean(entry[key] for entry in threads) for key in ("ratio", "shortest")}
    return out


def geometric_mean(values: Any) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def line(point: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {value:.0f}" for name, value in point["microseconds"].items())
    ratios = ", ".join(f"{name} {point[name]['ratio']:.2f} ({point[name]['form']})" for name in PATTERNS)
    return f"{tuple(point['shape'])}, {point['tokens']} tokens: {shown} us; {ratios}"


def render(result: dict[str, Any]) -> str:
    machine, sums = result["machine"], result["summary"]
    tokens = list(sums["16x1"])
    rows = ["| tokens | " + " | ".join(tokens) + " |", "|---|" + "---|" * len(tokens)]
    for name in PATTERNS:
        shown = {
            "against_best": "the best of torch and ORT",
            "shortest": "it, shortest times",
            "against_torch": "torch",
        }
        for key, what in shown.items():
            rows.append(f"| {name}, against {what} | " + " | ".join(f"{sums[name][t][key]:.1f}" for t in tokens) + " |")
        lowest = " | ".join(f"{sums[name][t]['lowest_lower_end']:.2f}" for t in tokens)
        rows.append(f"| {name}, lowest lower end of any layer's 95 % interval | {lowest} |")
    where = f"{machine['cpu']}, {machine['vectors']}, torch {machine['torch']}, onnxruntime {machine['onnxruntime']}"
    return "\n".join(
        [
            f"Dense time by sparse time at {result['settings']['sparsity']:.0%}, fp32, 1 thread; geometric means over the layers. {where}.",
            "",
            *rows,
            "",
            f"16x1 at 256 tokens with 2 threads: {sums['two_threads']['ratio']:.2f} x the speed of 1; shortest times {sums['two_threads']['shortest']:.2f}.",
        ]
    )


def describe_machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    vectors = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": processor(),
        "vectors": vectors,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


if __name__ == "__main__":
    main()
