"""What cannot work with grow-and-prune, said before anything is made: by the model, and by the arguments alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from gap_hf.allocation import keep_counts, make_groups
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.optimizer_state import unwrap
from gap_hf.targets import find_targets

# These update weights inside backward(), layer by layer, before anything could mask a gradient.
_STEPS_IN_BACKWARD = ("lomo", "adalomo")


def check_model(model: nn.Module | None, config: GaPConfig) -> None:
    """Everything that can be wrong about a model and a config before the length of training is known.

    Raises:
        GaPError: if the model is quantised, nothing is prunable, the pattern does not divide a weight, or the groups
            cannot be made.
    """
    assert model is not None
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise GaPError(
            f"{type(model).__name__} is quantised, and its packed weights can be neither grown nor pruned; load it "
            "without a quantization_config"
        )
    targets = find_targets(model, config)
    keep_counts(targets, config)
    make_groups(targets, config, seed=config.seed or 0)


def check_arguments(args: TrainingArguments, config: GaPConfig) -> None:
    """What cannot work whatever the model is.

    Raises:
        GaPError: for optimizers that step in backward, and for `phase_epochs` without whole epochs to measure by.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _STEPS_IN_BACKWARD or optim.endswith("_layerwise"):
        raise GaPError(
            f"training.optim: '{optim}' updates weights inside backward, before their gradients can be masked; expected "
            "one that steps after it, such as adamw_torch_fused or adafactor"
        )
    if config.method == "parallel":
        _check_parallel(args, config, optim)
    if getattr(args, "enable_jit_checkpoint", False) and (config.method == "rigl" or config.workers == "sequential"):
        what = (
            "method: rigl changes masks"
            if config.method == "rigl"
            else "workers: sequential has stepped other replicas"
        )
        raise GaPError(
            f"training.enable_jit_checkpoint: saves in the middle of a step, where {what} already, so that a resumed run is another; "
            "expected false, with save_steps"
        )
    if config.sparse_compute:
        _check_sparse_compute(args)
    if config.phase_epochs is not None and args.max_steps > 0:
        raise GaPError(
            "gap.phase_epochs: training is set by max_steps, not by epochs; expected gap.phase_steps, or num_train_epochs"
        )
    if config.phase_epochs is not None and args.num_train_epochs < 1:
        raise GaPError(
            f"gap.phase_epochs: num_train_epochs is {args.num_train_epochs:g}, less than the one that its length is "
            "measured by; expected phase_steps"
        )


def check_setup(trainer: Trainer, config: GaPConfig) -> None:
    """What only a made trainer knows: how it spreads the model, and what it was given.

    Raises:
        GaPError: for DataParallel, adapters, what DeepSpeed cannot do, FSDP version 1, P-GaP on a sharded model, and two schedulers.
    """
    # Only now: Trainer itself sets n_gpu to 1 for a model that is spread over several.
    if trainer.args.n_gpu > 1:
        raise GaPError(
            f"DataParallel over {trainer.args.n_gpu} GPUs keeps short-lived replicas that no mask reaches; start the "
            "script with `accelerate launch` or `torchrun`, or show it one GPU"
        )
    if hasattr(trainer.model, "peft_config"):
        raise GaPError(
            f"{type(trainer.model).__name__} trains adapters beside frozen weights, and merging them would fill the zeros; "
            "train the model itself, or prune it first and keep the adapters apart"
        )
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        assert plugin is not None
        check_deepspeed(plugin.deepspeed_config, config, mixed_precision=trainer.accelerator.mixed_precision)
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if trainer.is_fsdp_xla_enabled or (plugin is not None and plugin.fsdp_version != 2):
        found = "FSDP under XLA" if trainer.is_fsdp_xla_enabled else "FSDP version 1"
        raise GaPError(
            f"{found} flattens weights into vectors that hold no mask; set fsdp_version: 2 in training.fsdp_config, or "
            "in accelerate's own config"
        )
    # transformers 5.17 does not shard models while it loads them, and has no name for it.
    sharded_by_transformers = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if config.method == "parallel" and (trainer.is_fsdp_enabled or sharded_by_transformers):
        raise GaPError(
            "gap.method: 'parallel' trains whole replicas, and found a sharded model; expected DDP, or method: cyclic"
        )
    if config.live_state and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or sharded_by_transformers):
        raise GaPError(
            "gap.live_state: packs the state of whole weights, and found a sharded model or optimizer; expected one process or DDP, "
            "or live_state: false"
        )
    if config.sparse_compute and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or sharded_by_transformers):
        raise GaPError(
            "gap.sparse_compute: computes with whole weights, and found a sharded model or optimizer; expected one process or DDP, or "
            "sparse_compute: false"
        )
    # Accelerate's wrapper has an `eval` whatever is inside it.
    if config.method == "parallel" and callable(getattr(unwrap(trainer.optimizer), "eval", None)):
        raise GaPError(
            f"optimizers=: {type(trainer.optimizer).__name__} moves the weights for each evaluation and back, by state that P-GaP's "
            "merged view does not have; expected one such as AdamW"
        )
    if config.lr_schedule == "restart" and trainer.lr_scheduler is not None:
        raise GaPError(
            "gap.lr_schedule: 'restart' makes its own scheduler, but one was given through optimizers=; pass "
            "(optimizer, None), or use lr_schedule: whole"
        )


def check_deepspeed(deepspeed: Mapping[str, Any], config: GaPConfig, *, mixed_precision: str = "no") -> None:
    """What cannot work under DeepSpeed, by its own config as it was given and accelerate's precision, which completes it.

    Raises:
        GaPError: for stages but 1 and 2, fp16, offloading, replicas, growth by gradient, restarted rates, rates by density, and
            other resets than ``changed``.
    """
    zero = deepspeed.get("zero_optimization", {})
    if (stage := zero.get("stage", 0)) not in (1, 2):
        raise GaPError(
            f"DeepSpeed's zero_optimization.stage: found {stage}, expected 1 or 2, where every process has whole weights; to "
            "shard weights too use FSDP with fsdp_version: 2, and DDP to shard nothing"
        )
    for key in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(key) or {}).get("device", "none")) not in ("none", None):
            raise GaPError(
                f"DeepSpeed's zero_optimization.{key}: found {device!r}, under which masks were not tested; expected none, or FSDP "
                "with fsdp_version: 2 and its own CPU offload"
            )
    if mixed_precision == "fp16" or deepspeed.get("fp16", {}).get("enabled") is True:
        raise GaPError(
            "DeepSpeed's fp16.enabled: it skips steps inside backward, where masks cannot follow; expected bf16: true, or DDP"
        )
    if config.method in ("parallel", "rigl"):
        why = (
            "trains whole replicas" if config.method == "parallel" else "grows by gradients that DeepSpeed never shows"
        )
        raise GaPError(f"gap.method: '{config.method}' {why}; under DeepSpeed expected method: cyclic, or use DDP")
    if config.lr_schedule == "restart":
        raise GaPError(
            "gap.lr_schedule: 'restart' was not tested with DeepSpeed's own scheduling; expected whole, or use DDP"
        )
    if config.lr_density_power is not None:
        raise GaPError(
            f"gap.lr_density_power: found {config.lr_density_power:g}, but DeepSpeed steps many tensors as one vector with one rate; "
            "expected null, or use DDP"
        )
    if config.optimizer_reset != "changed":
        raise GaPError(
            f"gap.optimizer_reset: found '{config.optimizer_reset}', expected changed: DeepSpeed keeps one step count for many "
            "tensors, and a pruned weight that kept its moments would go on moving in the fp32 master; or use DDP"
        )


def _check_sparse_compute(args: TrainingArguments) -> None:
    for key in ("bf16", "fp16", "torch_compile"):
        if getattr(args, key):
            raise GaPError(
                f"gap.sparse_compute: its products are in fp32 and not compiled by torch, found training.{key}: true; expected "
                f"{key}: false, or sparse_compute: false"
            )
    check_sparse_compute_device(args.device)


def check_sparse_compute_device(device: torch.device) -> None:
    """Refuse `sparse_compute` anywhere but on a CPU. Raises GaPError."""
    if device.type != "cpu":
        raise GaPError(
            f"gap.sparse_compute: computes on a CPU, found device '{device}'; expected use_cpu: true, or sparse_compute: false"
        )


def _check_parallel(args: TrainingArguments, config: GaPConfig, optim: str) -> None:
    num = config.num_partitions
    if config.workers == "sequential":
        if args.world_size > 1:
            raise GaPError(
                f"gap.workers: 'sequential' trains all replicas in one process, found {args.world_size} processes; expected 1, or "
                "workers: processes"
            )
        if args.gradient_accumulation_steps % num:
            raise GaPError(
                f"training.gradient_accumulation_steps: found {args.gradient_accumulation_steps}, expected a multiple of "
                f"gap.num_partitions ({num}): with workers: sequential each replica takes its turn at the micro-batches"
            )
    elif args.world_size % num or args.world_size == 1 < num:
        # Accelerate's launcher starts a single process there, whatever --num_processes says.
        flag = "--multi_gpu " if args.device.type == "cpu" else ""
        raise GaPError(
            f"gap.method: 'parallel' with {num} partitions found {args.world_size} process{'es' if args.world_size > 1 else ''}, "
            f"expected a multiple of {num}: accelerate launch {flag}--num_processes {num}, or set gap.workers: sequential"
        )
    if args.fp16:
        raise GaPError(
            "training.fp16: its loss scale skips steps of one worker and not of another, which sets their schedules apart; "
            "expected bf16: true with method: parallel"
        )
    if optim.startswith("schedule_free"):
        raise GaPError(
            f"training.optim: '{optim}' moves the weights for each evaluation and back, by state that P-GaP's merged view does not "
            "have; expected one such as adamw_torch_fused"
        )
    if any(bits in optim for bits in ("8bit", "4bit")):
        raise GaPError(
            f"training.optim: '{optim}' keeps quantised moments, of which P-GaP's merge can take no mean; expected one such "
            "as adamw_torch_fused"
        )
