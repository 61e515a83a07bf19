"""What the packed form saves and costs: bytes, load time and memory, beside the dense file and zstd on it.

    make bench-format                       # or: python benchmarks/format.py
    python benchmarks/format.py --quick     # a small model and few repeats: does it run?

1. Bytes of the prunable weights as a share of dense, for each sparsity, pattern and dtype; zstd on the whole dense file.
2. Loading by `from_pretrained`, interleaved in one process: the dense file, the dense file with every weight read into memory of
   its own, and the packed one with raw, deflated and gap-coded bits. safetensors maps a dense file and reads nothing until a
   weight is used, so each time includes one sum over every weight. Files are in the page cache; then once more after they
   were dropped from it. The order turns, so that no way always follows the same one.
3. Memory: each way in five processes of its own, the median of the highest anonymous memory (what is not a mapped file) above that before loading.

Random weights, pruned by magnitude; a mask of trained weights takes the same room if it is as random.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import zstandard
from _memory import from_child, highest_anonymous
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gap_hf import GaPConfig, Sparsifier, save_pretrained
from gap_hf.packed import layout
from gap_hf.packed.loading import SUFFIX

RESULT = Path(__file__).resolve().parent / "results/format.json"
CASES = [
    ("unstructured", 0.8, torch.float32),
    ("unstructured", 0.9, torch.float32),
    ("unstructured", 0.95, torch.float32),
    ("block:16x1", 0.9, torch.float32),
    ("2:4", 0.5, torch.float32),
    ("unstructured", 0.9, torch.bfloat16),
]
CODINGS = ("raw", "deflate", "gaps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=18)
    parser.add_argument("--quick", action="store_true", help="a small model and few repeats")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.child:
        way, folder = args.child
        print(json.dumps(peak_of(way, Path(folder))))
        return
    if args.quick:
        args.layers, args.width, args.repeats = 2, 256, 3
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sizes = [measure_bytes(case, root / "sizes", args) for case in CASES]
        result = {
            "config": {"layers": args.layers, "width": args.width, "repeats": args.repeats, "threads": 1},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": platform.processor() or platform.machine(),
            "bytes": sizes,
            **measure_loading(root, args),
        }
    result["zstd"] = result.pop("zstd")
    print(table(result))
    if not args.quick or args.output != RESULT:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def pruned(args: argparse.Namespace, pattern: str, sparsity: float, dtype: torch.dtype) -> tuple[Any, Sparsifier]:
    torch.manual_seed(0)
    sizes = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 64, "vocab_size": 4096}
    config = GPT2Config(**sizes, n_positions=256, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    gap = GaPConfig(sparsity=sparsity, pattern=pattern, method="oneshot", initial_mask="magnitude")
    sparsifier = Sparsifier(model, gap, total_steps=4)
    sparsifier.start()
    sparsifier.prune_to_target()
    return model, sparsifier


def measure_bytes(case: tuple[str, float, torch.dtype], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The prunable weights and their masks in the packed file, as a share of the dense weights."""
    model, sparsifier = pruned(args, *case)
    save_pretrained(model, folder, sparsifier, packed=True)
    dense = sum(weight.numel * model.get_parameter(name).element_size() for name, weight in sparsifier.weights.items())
    packed = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sparsifier.weights:
            values, mask = file.get_tensor(name), file.get_tensor(name + SUFFIX)
            packed += values.numel() * values.element_size() + mask.numel()
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    file_bytes = (folder / "model.safetensors").stat().st_size
    return {
        "pattern": case[0],
        "sparsity": case[1],
        "dtype": str(case[2]).removeprefix("torch."),
        "prunable": packed / dense,
        "file": file_bytes / whole,
        "prunable_weights": dense // model.dtype.itemsize,
    }


def measure_loading(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    model, sparsifier = pruned(args, "unstructured", 0.9, torch.float32)
    save_pretrained(model, root / "dense", sparsifier)
    for coding in CODINGS:
        with forced(coding):
            save_pretrained(model, root / coding, sparsifier, packed=True)
    folders = {"dense": root / "dense", "dense, copied": root / "dense"} | {c: root / c for c in CODINGS}
    expected = checksum(model)
    warm: dict[str, list[float]] = {way: [] for way in folders}
    cold: dict[str, list[float]] = {way: [] for way in folders}
    for times, dropped, repeats in ((warm, False, args.repeats), (cold, True, max(3, args.repeats // 3))):
        for turn in range(repeats):
            # Each way begins with the memory that the one before it gave back, so none always follows the same.
            order = list(folders.items())
            for way, folder in order[turn % len(order) :] + order[: turn % len(order)]:
                if dropped:
                    drop_from_cache(folder / "model.safetensors")
                start = time.perf_counter()
                loaded = load(way, folder)
                found = checksum(loaded)
                times[way].append(time.perf_counter() - start)
                assert found == expected, way
                del loaded
                gc.collect()
    data = (root / "dense/model.safetensors").read_bytes()
    zstd = {level: len(zstandard.ZstdCompressor(level=level).compress(data)) / len(data) for level in (3, 19)}
    # The loader's threads read ahead more or less, so a peak differs from run to run.
    runs = {way: [from_child(__file__, way, str(folder)) for _ in range(5)] for way, folder in folders.items()}
    peaks = {way: statistics.median(values) for way, values in runs.items()}
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    return {
        "load": {"warm": summary(warm), "cold": summary(cold)},
        "memory": {"peak_bytes": peaks, "dense_bytes": len(data), "largest_tensor_bytes": largest},
        "file": {way: (folders[way] / "model.safetensors").stat().st_size / len(data) for way in CODINGS},
        "zstd": zstd,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class forced:
    """Inside, masks are written in one coding, not the smallest."""

    def __init__(self, coding: str) -> None:
        self.coding = layout.CODINGS[coding]

    def __enter__(self) -> None:
        self.original: Callable[..., dict[int, bytes]] = layout._payloads
        layout._payloads = lambda grid: {self.coding: self.original(grid)[self.coding]}

    def __exit__(self, *exc: object) -> None:
        layout._payloads = self.original


def load(way: str, folder: Path) -> Any:
    model = GPT2LMHeadModel.from_pretrained(folder)
    if way == "dense, copied":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
    return model


def checksum(model: Any) -> float:
    return float(sum(parameter.detach().sum(dtype=torch.float64) for parameter in model.parameters()))


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget the file; what is written must be on disk first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds, and the median of each round's ratio to the dense file."""
    return {
        way: {
            "seconds": statistics.median(values),
            "to_dense": statistics.median([v / d for v, d in zip(values, times["dense"], strict=True)]),
            "to_copied": statistics.median([v / d for v, d in zip(values, times["dense, copied"], strict=True)]),
        }
        for way, values in times.items()
    }


def peak_of(way: str, folder: Path) -> int:
    """Highest anonymous memory while loading, above that before it, in bytes."""
    small = GPT2Config(n_layer=1, n_embd=64, n_head=1, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=1)
    with tempfile.TemporaryDirectory() as warm:  # what loading imports is not what it costs
        GPT2LMHeadModel(small).save_pretrained(warm)
        GPT2LMHeadModel.from_pretrained(warm)
    return highest_anonymous(lambda: checksum(load(way, folder)))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| pattern | sparsity | dtype | prunable weights, of dense | whole file, of dense |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['pattern']} | {row['sparsity']:.0%} | {row['dtype']} | {row['prunable']:.4f} | {row['file']:.4f} |"
        for row in result["bytes"]
    ]
    dense = result["memory"]["dense_bytes"]
    lines += [
        "",
        "| 90 %, fp32 | file | load, warm | to dense | to copied | load, cold | to dense | peak anonymous memory |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for way, warm in result["load"]["warm"].items():
        cold = result["load"]["cold"][way]
        lines.append(
            f"| {way} | {result['file'].get(way, 1):.4f} | {warm['seconds'] * 1e3:.0f} ms | {warm['to_dense']:.2f} | "
            f"{warm['to_copied']:.2f} | {cold['seconds'] * 1e3:.0f} ms | {cold['to_dense']:.2f} | "
            f"{result['memory']['peak_bytes'][way] / dense:.3f} of the dense file |"
        )
    lines.append(f"\nzstd on the dense file: {', '.join(f'{v:.4f} (level {k})' for k, v in result['zstd'].items())}")
    lines.append(
        f"{result['parameters']:,} parameters; the largest tensor is {result['memory']['largest_tensor_bytes'] / dense:.3f} of the file"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
