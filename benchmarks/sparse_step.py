"""What `sparse_compute` brings: one layer's output, and gradients of its input and weight, beside dense's, on this CPU.

    python benchmarks/sparse_step.py

A Linear with random live weights, in blocks of 16 outputs by one input or single ones, one thread, fp32. Every product in
turns with dense's; values are gathered from the weight anew each time, as after an optimizer step. Times are the shortest of
all turns. Results agree with dense's to rounding, which is checked first. The limits of density in `gap_hf.sparse_products`
rest on this; here all products run sparse whatever they say.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_hf import sparse_products
from gap_hf.bench.machine import machine
from gap_hf.sparse_products import Products

RESULT = Path(__file__).resolve().parent / "results/sparse_step.json"
SHAPES = ((512, 512), (2048, 512), (512, 2048), (768, 3072), (3072, 768))  # (outputs, inputs)
ROWS = {"16x1": 16, "single": 1}
PRODUCTS = ("output", "input", "weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sparse_products._OUTPUT = sparse_products._INPUT = sparse_products._WEIGHT = (1.0, 1.0)
    print(
        "| live | sparsity | outputs × inputs | tokens | dense, ms |",
        " | ".join(PRODUCTS),
        "| all | (dense / sparse) |",
    )
    rows = []
    with torch.no_grad():
        for kind in ROWS:
            for sparsity in args.sparsities:
                for shape in SHAPES:
                    for tokens in args.tokens:
                        rows.append(measure(kind, sparsity, shape, tokens, args.turns))
                        print(line(rows[-1]), flush=True)
    args.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def measure(kind: str, sparsity: float, shape: tuple[int, int], tokens: int, turns: int) -> dict[str, Any]:
    num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(num_out // ROWS[kind], num_in, generator=generator) > sparsity
    mask = blocks.repeat_interleave(ROWS[kind], 0).to(torch.uint8)
    weight = torch.randn(num_out, num_in, generator=generator) * mask
    x, gy = (torch.randn(tokens, n, generator=generator) for n in (num_in, num_out))
    products = Products(mask)

    def fresh(product: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        def call() -> Tensor | None:
            weight.mul_(1)  # the weight has changed
            return product()

        return call

    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor | None]]] = {
        "output": (lambda: x @ weight.t(), fresh(lambda: products.output(x, weight, None))),
        "input": (lambda: gy @ weight, fresh(lambda: products.input_gradient(gy, weight))),
        "weight": (lambda: gy.t() @ x, lambda: products.weight_gradient(gy, x, weight)),
    }
    seconds: dict[str, list[list[float]]] = {}
    for name, (dense, sparse) in ways.items():
        want = dense() * mask if name == "weight" else dense()
        torch.testing.assert_close(sparse(), want, rtol=1e-3, atol=1e-2)
        seconds[name] = [[], []]
    for _ in range(turns):
        for name, pair in ways.items():
            for i, call in enumerate(pair):
                begin = time.perf_counter()
                call()
                seconds[name][i].append(time.perf_counter() - begin)
    shortest = {name: [1e3 * min(way) for way in both] for name, both in seconds.items()}
    kept = products.num_bytes() / (4 * weight.numel())
    return {"live": kind, "sparsity": sparsity, "shape": shape, "tokens": tokens, "kept": kept, "ms": shortest}


def line(row: dict[str, Any]) -> str:
    dense, sparse = (sum(row["ms"][name][i] for name in PRODUCTS) for i in (0, 1))
    shares = " | ".join(f"{row['ms'][name][0] / row['ms'][name][1]:.2f}" for name in PRODUCTS)
    size = f"{row['shape'][0]} × {row['shape'][1]} | {row['tokens']}"
    return f"| {row['live']} | {row['sparsity']:.0%} | {size} | {dense:.2f} | {shares} | {dense / sparse:.2f} |"


if __name__ == "__main__":
    main()
