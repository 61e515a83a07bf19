"""Would a training step be faster if its products skipped masked weights? One layer's forward and backward, on this CPU.

    python benchmarks/sparse_step.py

A Linear with random weights, 90 % of them 0 in blocks of 16 outputs by one input, one thread, fp32. In turns, shortest and median
of all turns:

- ``dense``: output, gradient of the input, gradient of the weight, as torch makes them;
- ``forward``: the output by the inference kernel, its values gathered from the weight anew, as after an optimizer step;
- ``+ input``: the gradient of the input by the kernel for single weights on the transposed weight too;
- ``+ weight``: the gradient of live weights alone too, as one batch of products of 16 outputs with their live inputs.

Results agree with dense's to rounding, which is checked first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_hf.bench.machine import machine
from gap_hf.inference.forms import blocks, singles
from gap_hf.inference.zeros import Structure, structure_of

RESULT = Path(__file__).resolve().parent / "results/sparse_step.json"
SHAPES = ((512, 512), (2048, 512), (512, 2048), (768, 3072), (3072, 768))  # (outputs, inputs)
TOKENS = (256, 1024)
ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [measure(shape, tokens, args) for shape in SHAPES for tokens in TOKENS]
    args.output.write_text(json.dumps({"machine": machine(), "sparsity": args.sparsity, "rows": rows}, indent=1) + "\n")
    ways = list(rows[0]["ms"])
    print("| outputs × inputs | tokens | dense, ms |", " | ".join(ways[1:]), "| (dense / way, shortest) |")
    for row in rows:
        shares = " | ".join(f"{row['ms']['dense'] / row['ms'][way]:.2f}" for way in ways[1:])
        print(f"| {row['shape'][0]} × {row['shape'][1]} | {row['tokens']} | {row['ms']['dense']:.2f} | {shares} |")


def measure(shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    # The same number of blocks in each group, as `block:16x1` with a uniform distribution nearly has.
    kept = round(num_in * (1 - args.sparsity))
    groups = num_out // ROWS
    column = torch.rand(groups, num_in, generator=generator).topk(kept, dim=1).indices.sort(dim=1).values
    live = torch.zeros(groups, num_in, dtype=torch.bool).scatter_(1, column, True).repeat_interleave(ROWS, dim=0)
    weight = torch.randn(num_out, num_in, generator=generator) * live
    x, gy = (torch.randn(tokens, n, generator=generator) for n in (num_in, num_out))

    form: Any = blocks(weight, live, structure_of(live))
    # Positions of the kernel's values in the weight: (group, block, output).
    at = torch.arange(weight.numel()).view(groups, ROWS, num_in).transpose(1, 2)
    at = at.gather(1, column[:, :, None].expand(-1, -1, ROWS)).reshape(-1)
    turned = weight.t().contiguous()
    back: Any = singles(turned, turned != 0, Structure("unstructured", 1, 1 - args.sparsity))
    numbered = torch.arange(1, weight.numel() + 1).view(num_out, num_in).t().contiguous().float()
    places: Any = singles(numbered * (turned != 0), turned != 0, Structure("unstructured", 1, 1 - args.sparsity))
    of_back = (
        places.arrays[2].long().sub_(1).clamp_min_(0)
    )  # filling is multiplied by what is there: its value is 0 below
    filling = places.arrays[2] == 0
    flat, columns = weight.view(-1), column.view(-1)

    def output() -> Tensor:
        form.arrays[2].view(-1).copy_(flat.index_select(0, at))
        return form(x, None, 1)

    def input_gradient() -> Tensor:
        back.arrays[2].copy_(flat.index_select(0, of_back).masked_fill_(filling, 0))
        return back(gy, None, 1)

    def weight_gradient() -> Tensor:
        inputs = x.t().index_select(0, columns).view(groups, kept, tokens)
        return torch.bmm(inputs, gy.t().reshape(groups, ROWS, tokens).transpose(1, 2))  # (group, block, output)

    torch.testing.assert_close(output(), x @ weight.t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(input_gradient(), gy @ weight, rtol=1e-3, atol=1e-3)
    whole = (gy.t() @ x).view(-1)
    torch.testing.assert_close(weight_gradient().reshape(-1), whole[at], rtol=1e-3, atol=1e-2)

    ways: dict[str, Callable[[], object]] = {
        "dense": lambda: (x @ weight.t(), gy @ weight, gy.t() @ x),
        "forward": lambda: (output(), gy @ weight, gy.t() @ x),
        "+ input": lambda: (output(), input_gradient(), gy.t() @ x),
        "+ weight": lambda: (output(), input_gradient(), weight_gradient()),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.turns):
        for way, call in ways.items():
            begin = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - begin)
    return {
        "shape": list(shape),
        "tokens": tokens,
        "ms": {way: 1e3 * min(values) for way, values in seconds.items()},
        "median_ms": {way: 1e3 * statistics.median(values) for way, values in seconds.items()},
    }


if __name__ == "__main__":
    main()
