"""One process of a run under DeepSpeed's ZeRO, checked after every optimizer step; see test_zero.py.

    torchrun --nproc_per_node 2 zero_run.py FOLDER '{"NAME": {"zero": 1, "gap": {...}, "training": {...}}}'

Writes ``FOLDER/NAME-rank<n>.json``, and rank 0 the weights as ``FOLDER/NAME.safetensors``. Without ``zero`` it is plain DDP,
and without ``gap`` plain Trainer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from toys import Tokens, arguments, causal_lm, same_tensors
from transformers import TrainerCallback

from gap_hf import GaPTrainer


class Watch(TrainerCallback):
    """After each step and each change of masks: exact zeros in weights, masters and moments."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.num_checked = self.num_nonzero = 0
        self.digests: list[str] = []
        self.resumed_with: dict[str, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.gap is not None:
            masks = self.trainer.gap.masks
            self.resumed_with = {"digest": masks.digest(), "nonzero": self.count(moments=False)}

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.num_nonzero += self.count()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_nonzero += self.count()
        if self.trainer.gap is not None:
            self.digests.append(self.trainer.gap.masks.digest())

    @torch.no_grad()
    def count(self, *, moments: bool = True) -> int:
        """Masked entries that are not 0."""
        if self.trainer.gap is None:
            return 0
        found = 0
        for param, mask in self.trainer.gap.masks.sparse_params():
            copies = [param]
            if self.trainer.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

                copies.append(safe_get_full_fp32_param(param))
                if moments:
                    copies += [safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
            for copy in copies:
                found += int(copy[mask == 0].count_nonzero())
                self.num_checked += int((mask == 0).sum())
        return found


def train(folder: Path, name: str, options: dict[str, Any]) -> None:
    training = {"max_steps": 12, "per_device_train_batch_size": 2, **options.get("training", {})}
    if stage := options.get("zero"):
        training["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": stage},
        }
    watch = Watch()
    trainer = watch.trainer = GaPTrainer(
        model=causal_lm(),
        args=arguments(folder / name, **training),
        train_dataset=Tokens(),
        gap_config=options.get("gap"),
        callbacks=[watch],
    )
    trainer.train(resume_from_checkpoint=str(folder / options["resume"]) if "resume" in options else None)
    rank = int(os.environ["RANK"])
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    found: dict[str, Any] = {
        "deepspeed": trainer.is_deepspeed_enabled,
        "engine": type(trainer.model_wrapped).__name__,
        "dtype": str(next(iter(weights.values())).dtype),
        "norms": [record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record],
        "num_checked": watch.num_checked,
        "num_nonzero": watch.num_nonzero,
        "digests": watch.digests,
        "begin": watch.resumed_with,
    }
    if trainer.gap is not None:
        gap = trainer.gap
        found["at_target"] = gap.at_target
        found["live"] = {
            n: [gap.masks.live(n), int(weights[n].count_nonzero()), weights[n].numel()] for n in gap.weights
        }
        trainer.save_model(str(folder / f"{name}-saved"))
    if rank == 0:
        save_file({n: w for n, w in weights.items() if n != "lm_head.weight"}, folder / f"{name}.safetensors")
    others: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(others, weights)
    found["same_weights"] = all(same_tensors(weights, other) for other in others)
    (folder / f"{name}-rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for run_name, run_options in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1]), run_name, run_options)
