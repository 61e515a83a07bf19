"""Trains toys with GaPTrainer and writes what each process ends with: ``parallel_run.py FOLDER OPTIONS``, by forked.py or torchrun.

OPTIONS maps a run's name to its options, see `train`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from toys import Images, Tokens, arguments, causal_lm, image_classifier
from transformers import PreTrainedModel, TrainerCallback

from gap_hf import GaPConfig, GaPTrainer


class At(TrainerCallback):
    """Does something on one rank after one step."""

    def __init__(self, rank: int, step: int, what: str) -> None:
        self.rank, self.step, self.what = rank, step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index != self.rank or state.global_step != self.step:
            return
        if self.what == "die":
            os._exit(17)
        with torch.no_grad():
            kwargs["model"].transformer.h[2].mlp.c_fc.weight.normal_()


def model_of(kind: str) -> tuple[PreTrainedModel, Any]:
    # Without dropout, because one process and several draw different numbers.
    if kind == "vit":
        return image_classifier(), Images()
    return causal_lm(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), Tokens()


def train(folder: Path, options: dict[str, Any]) -> GaPTrainer:
    """`options`: gap, and optionally training, model, resume (a checkpoint) and at (arguments of `At`)."""
    model, data = model_of(options.get("model", "causal-lm"))
    trainer = GaPTrainer(
        model=model,
        args=arguments(folder, **options.get("training", {})),
        gap_config=GaPConfig(**options["gap"]),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[At(**options["at"])] if "at" in options else None,
    )
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return trainer


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def summary(trainer: GaPTrainer) -> dict[str, Any]:
    """What has to be the same on every process, and in another kind of run of the same method."""
    kept = ("gap_", "eval_loss")
    return {
        "weights": digest(trainer.model.state_dict()),
        "masks": trainer.gap.masks.digest(),
        "sparsity": trainer.gap.sparsity(),
        "at_target": trainer.gap.at_target,
        "log": [{k: v for k, v in e.items() if k.startswith(kept) or k == "step"} for e in trainer.state.log_history],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    for name, options in json.loads(sys.argv[2]).items():
        trainer = train(folder / name, options)
        path = folder / f"{name}-rank{trainer.args.process_index}.json"
        path.write_text(json.dumps({"world": trainer.args.world_size, **summary(trainer)}))
        torch.save(trainer.model.state_dict(), path.with_suffix(".pt"))


if __name__ == "__main__":
    main()
