"""What cannot work with grow-and-prune, said before anything is made: by the model, and by the arguments alone."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from gap_hf.allocation import keep_counts, make_groups
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
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
    if config.phase_epochs is not None and args.max_steps > 0:
        raise GaPError(
            "gap.phase_epochs: training is set by max_steps, not by epochs; expected gap.phase_steps, or num_train_epochs"
        )
    if config.phase_epochs is not None and args.num_train_epochs < 1:
        raise GaPError(
            f"gap.phase_epochs: num_train_epochs is {args.num_train_epochs:g}, less than the one that its length is "
            "measured by; expected phase_steps"
        )
