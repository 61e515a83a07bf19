"""Memory of a packed model that is loaded and made ready for inference, with its dense weights and with live ones alone.

    python benchmarks/live_weights.py

A GPT-2 of 110 M parameters, 90 % of its prunable weights 0, saved packed. In a process of its own for each way: anonymous
memory once the model is loaded and has made a forward pass of one token, above that before it was loaded. What a way gives is
compared with the first way's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from _memory import anonymous, from_child
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import gap_hf
from gap_hf import GaPConfig, Sparsifier
from gap_hf.bench.machine import machine

RESULT = Path(__file__).resolve().parent / "results/live_weights.json"
WAYS: dict[str, dict[str, Any] | None] = {
    "as loaded": None,
    "optimized": {},
    "live weights alone": {"keep_dense": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    rows = []
    for pattern in ("block:16x1", "unstructured"):
        with tempfile.TemporaryDirectory() as folder:
            save(folder, pattern)
            found = {way: from_child(__file__, folder, way) for way in WAYS}
        first = found["as loaded"]
        for way, of_way in found.items():
            largest = max(abs(a - b) for a, b in zip(of_way["outputs"], first["outputs"], strict=True))
            row = {"pattern": pattern, "way": way, "held": of_way["held"]}
            rows.append({**row, "share": of_way["held"] / first["held"], "largest_difference": largest})
            print(
                f"{pattern:13} {way:19} {of_way['held'] / 1e6:6.1f} MB, {rows[-1]['share']:.3f}; {largest:.1e}",
                flush=True,
            )
    args.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def save(folder: str, pattern: str) -> None:
    set_seed(0)
    sizes: Any = {"n_layer": 15, "n_embd": 768, "n_head": 12, "vocab_size": 4096, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    sparsifier = Sparsifier(model, GaPConfig(sparsity=0.9, method="static", pattern=pattern), total_steps=1)
    sparsifier.start()
    gap_hf.save_pretrained(model, folder, sparsifier, packed=True)


def measure(folder: str, way: str) -> dict[str, Any]:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=1, vocab_size=8))(torch.zeros(1, 1, dtype=torch.long))
    before = anonymous()
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    if (changes := WAYS[way]) is not None:
        gap_hf.optimize_for_inference(model, token_counts=[1], **changes)
    with torch.inference_mode():
        outputs = model(torch.tensor([[5]])).logits[0, 0, :64].tolist()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, and still with the allocator
    return {"held": anonymous() - before, "outputs": outputs}


if __name__ == "__main__":
    main()
