"""Save a Marian with random weights, 90 % of its layers 0 in 16×1 blocks: the model of docs/bench.md.

python benchmarks/sparse_marian.py marian && gap-hf bench marian --batch 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import MarianConfig, MarianMTModel, set_seed

from gap_hf import GaPConfig, Sparsifier, save_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--pattern", default="block:16x1")
    parser.add_argument("--sparsity", type=float, default=0.9)
    args = parser.parse_args()
    set_seed(0)
    last = args.vocabulary - 1
    side = {"layers": args.layers, "attention_heads": args.width // 64, "ffn_dim": 4 * args.width}
    model = MarianMTModel(
        MarianConfig(
            vocab_size=args.vocabulary,
            d_model=args.width,
            activation_function="swish",
            scale_embedding=True,
            pad_token_id=last,
            decoder_start_token_id=last,
            eos_token_id=0,
            forced_eos_token_id=None,
            **{f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()},
        )
    )
    model.generation_config.bad_words_ids = [[last]]
    config = GaPConfig(method="oneshot", sparsity=args.sparsity, pattern=args.pattern)
    sparsifier = Sparsifier(model, config, total_steps=10)
    sparsifier.start()
    for step in range(10):
        sparsifier.mask_weights()
        sparsifier.advance(step + 1)
    save_pretrained(model, args.folder, sparsifier, packed=True)


if __name__ == "__main__":
    main()
