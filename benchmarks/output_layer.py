"""What an output layer gains in int8 with its best outputs exact (`optimize_for_inference(model, output_layer="int8")`).

    python benchmarks/output_layer.py

Random layers and inputs, one thread, fp32. The dense layer, torch's dynamic int8 of all outputs (its own rival) and ours take
turns; times are the shortest of all turns. Then how often the largest output is that of the dense layer, over 2,000 inputs.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gap_hf.bench.machine import machine
from gap_hf.inference.int8 import INT8, int8
from gap_hf.inference.zeros import Structure

RESULT = Path(__file__).resolve().parent / "results/output_layer.json"
SHAPES = ((8000, 512), (32000, 768))  # (outputs, inputs)
TOKENS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [measure(shape, args.turns) for shape in SHAPES]
    args.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print("| outputs × inputs | way |", " | ".join(map(str, TOKENS)), "| the same largest output |")
    print("|---|---|" + "---|" * (len(TOKENS) + 1))
    for row in rows:
        for way in ("dense", "int8", "ours"):
            shown = " | ".join(f"{1e3 * seconds:.2f}" for seconds in row["seconds"][way])
            print(f"| {row['shape'][0]:,} × {row['shape'][1]} | {way}, ms | {shown} | {row['same_largest'][way]:.4f} |")


def measure(shape: tuple[int, int], turns: int) -> dict[str, Any]:
    num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(num_in, num_out, bias=False)
    layer.weight.normal_(0, num_in**-0.5, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        alone = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    form = int8(layer.weight, layer.weight != 0, Structure(INT8, 1, 1.0))
    assert form is not None
    ways = {"dense": layer, "int8": alone, "ours": lambda x: form(x, None, 1)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for tokens in TOKENS:
        x = torch.randn(tokens, num_in, generator=generator)
        shortest = dict.fromkeys(ways, float("inf"))
        for _ in range(turns):
            for way, call in ways.items():
                begin = time.perf_counter()
                call(x)
                shortest[way] = min(shortest[way], time.perf_counter() - begin)
        for way in ways:
            seconds[way].append(shortest[way])
    inputs = torch.randn(2000, num_in, generator=generator)
    largest: dict[str, Tensor] = {
        way: torch.cat([call(x).argmax(dim=-1) for x in inputs.split(16)])  # type: ignore[operator]
        for way, call in ways.items()
    }
    same = {way: float((found == largest["dense"]).float().mean()) for way, found in largest.items()}
    return {"shape": list(shape), "tokens": list(TOKENS), "seconds": seconds, "same_largest": same}


if __name__ == "__main__":
    main()
