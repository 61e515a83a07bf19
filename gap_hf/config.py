"""`GaPConfig`: everything that defines a grow-and-prune run except its length. No torch.

The length of training is `TrainingArguments`' alone; `gap_hf.plan` puts the two together.
"""

from __future__ import annotations

import dataclasses
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from gap_hf.checks import check_choice, check_int, check_number, to_overrides, to_partition, to_strings
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.pattern_names import cpu_pattern, parse_pattern

# A method is one file in gap_hf/methods; listing the folder keeps "add a file" the whole job.
METHODS: tuple[str, ...] = (
    "dense",
    *sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "methods")])),
)
DISTRIBUTIONS = ("uniform", "global", "erk")
INITIAL_MASKS = ("random", "magnitude")
OPTIMIZER_RESETS = ("changed", "all", "none")
LR_SCHEDULES = ("whole", "restart")
LR_PEAKS = ("constant", "linear", "cosine", "step")
PARTITIONS = ("balanced", "random")
WORKERS = ("processes", "sequential")

# How a method lays itself out over training. None means the method's own default; what it does not use is refused.
SCHEDULE_KEYS = (
    "num_rounds",
    "cyclic_rounds",
    "workers",
    "phase_steps",
    "phase_epochs",
    "fine_tune_share",
    "dense_share",
    "ramp_share",
    "prune_share",
    "update_steps",
    "drop_fraction",
)

DEFAULT_NUM_ROUNDS = 2
DEFAULT_FINE_TUNE_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class GaPConfig:
    """Scheduled grow-and-prune (Ma et al., ICLR 2022, arXiv 2106.09857), and what it is applied to.

    A *phase* is what the paper calls a step: a stretch of optimizer steps in which one group is grown. Training is one
    phase, then `num_rounds` rounds of `num_partitions` phases, then a fine-tune with every mask frozen. Of
    `num_rounds`, the length of a phase and `fine_tune_share`, give two; the third follows from the length of
    training. With none given, `num_rounds` is 2 and `fine_tune_share` 0.25.

    Args:
        sparsity: Target share of zeros of the prunable weights, 0 < s < 1. May be left out where the pattern gives it (``2:4``).
        method: ``cyclic`` (C-GaP), ``random`` (each phase draws its tensors anew), ``parallel`` (P-GaP: every
            group at the same time, each grown by its own worker, `gap_hf.methods.parallel`), one of the baselines
            ``static``, ``oneshot``, ``gmp``, ``set``, ``rigl``, ``acdc`` and ``mest`` (each in its file of
            `gap_hf.methods`), or ``dense`` (off: the trainer is then Trainer, bit for bit).
        num_partitions: The paper's kappa, the number of groups the prunable weights are split into.
        num_rounds: How often every group is grown and pruned.
        cyclic_rounds: Under ``parallel``: rounds of C-GaP after `num_rounds` of P-GaP (0).
        workers: Under ``parallel``: ``processes`` (the default: a multiple of `num_partitions` processes make as many
            worker groups), or ``sequential``: one process trains all replicas, one micro-batch each in turn, so
            `gradient_accumulation_steps` has to be a multiple of `num_partitions`. Both give the same model.
        phase_steps: Length of a phase in optimizer steps.
        phase_epochs: The same in epochs, fractions allowed.
        fine_tune_share: Share of the steps left to the fine-tune, 0 < share < 1: in every method the last stretch, masks frozen.
        dense_share: Share of the optimizer steps before the first prune, in methods that start dense.
        ramp_share: Share of the steps before the fine-tune over which the groups that are not grown go from
            dense to their target (1 by default; 0: they start at it with their first masks, as in the paper).
        prune_share: Share of a phase, at its end, over which the grown group is pruned gradually (0.5 by
            default; 0: at once where the phase ends, as in the paper).
        update_steps: Optimizer steps between mask updates inside a phase.
        drop_fraction: Share of the live weights that an update exchanges.
        distribution: How the target is spread: ``uniform`` (every tensor has it), ``global`` (each group is
            pooled under one magnitude threshold and meets it exactly), ``erk`` (Erdős–Rényi-Kernel, Evci et
            al. 2020: larger layers sparser, the whole set meets it exactly).
        pattern: ``unstructured``, ``N:M``, ``block:RxC`` (R outputs by C inputs), ``transposable:2:4``, or ``cpu``: blocks of as
            many outputs as this machine's vector registers hold, which is what is recorded (`gap_hf.pattern_names`).
        initial_mask: First masks of the groups that start sparse: ``random``, or ``magnitude`` for a model
            that is trained already. Groups that start dense, as all do under a ramp, need none.
        optimizer_reset: Which optimizer moments a change of masks clears: of the entries whose mask ``changed``, of ``all``
            parameters where a phase begins (as the authors), or of ``none``. docs/decisions.md tells of Adam's step count.
        lr_schedule: ``whole`` (one schedule over the run) or ``restart`` (one per phase, as the authors).
        lr_peaks: With ``restart``, the peak over the phases: ``constant``, ``linear``, ``cosine`` or ``step``
            (halved each round). The fine-tune always starts from the full peak.
        lr_density_power: Between 0 and 1: step a sparse tensor with the learning rate times ``density ** -lr_density_power``
            (`gap_hf.density_rates`); for Adam and its like. None: with the learning rate.
        include: Globs over module or parameter paths, or names of module types. Empty means every Linear,
            Conv1D (GPT-2's), convolution and expert weight inside the transformer blocks or network stages.
        exclude: The same, taken away from what `include` found.
        overrides: Glob (or module type) to sparsity, 0 for dense; the first that matches a weight counts.
        partition: ``balanced`` (the contiguous split of whole blocks with the smallest largest group), ``random``, or lists
            of globs, one for each group.
        best_model_at_target: Only a checkpoint at the final sparsity may become Trainer's best model.
        prune_if_stopped: If training is stopped before the fine-tune, prune to the target before it returns.
        live_state: Keep the optimizer's state of live weights only, and gradients where nothing needs them whole
            (`gap_hf.live_state`, `gap_hf.packed_gradients`).
        master_weights: With `live_state`: update weights that are bf16 or fp16 in fp32 copies, kept of live entries only
            (`gap_hf.master_weights`).
        sparse_compute: Compute outputs and gradients of sparse layers without their masked weights, on a CPU in fp32: in
            GaPTrainer, and in a loop of your own under ``with sparse_compute(sparsifier)`` (`gap_hf.sparse_layers`).
        live_gradients: Under DDP send only the gradients of live weights. None: with more than one process, if the
            target leaves less than 0.6 of the weights; true: with more than one process; false: DDP's own all-reduce.
        seed: Seed of random masks, partitions and draws; None takes `TrainingArguments.seed`.

    Raises:
        GaPError: on any value of wrong type or range, and on contradictions.
    """

    sparsity: float | None = None
    method: str = "cyclic"
    num_partitions: int = 3
    num_rounds: int | None = None
    cyclic_rounds: int | None = None
    workers: str | None = None
    phase_steps: int | None = None
    phase_epochs: float | None = None
    fine_tune_share: float | None = None
    dense_share: float | None = None
    ramp_share: float | None = None
    prune_share: float | None = None
    update_steps: int | None = None
    drop_fraction: float | None = None
    distribution: str = "uniform"
    pattern: str = "unstructured"
    initial_mask: str = "random"
    optimizer_reset: str = "changed"
    lr_schedule: str = "whole"
    lr_peaks: str = "constant"
    lr_density_power: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, float], ...] = ()
    partition: str | tuple[tuple[str, ...], ...] = "balanced"
    best_model_at_target: bool = True
    prune_if_stopped: bool = False
    live_state: bool = False
    master_weights: bool = False
    sparse_compute: bool = False
    live_gradients: bool | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            check_choice(name, getattr(self, name), valid)
        for name in ("best_model_at_target", "prune_if_stopped", "live_state", "master_weights", "sparse_compute"):
            if not isinstance(getattr(self, name), bool):
                raise GaPError(f"gap.{name}: found {getattr(self, name)!r}, expected true or false")
        if not (self.live_gradients is None or isinstance(self.live_gradients, bool)):
            raise GaPError(f"gap.live_gradients: found {self.live_gradients!r}, expected true, false or null")
        for name in ("num_partitions", "num_rounds", "phase_steps", "update_steps"):
            check_int(name, getattr(self, name), low=1, optional=name != "num_partitions")
        check_int("cyclic_rounds", self.cyclic_rounds, low=0, optional=True)
        if self.workers is not None:
            check_choice("workers", self.workers, WORKERS)
        check_int("seed", self.seed, low=0, optional=True)
        check_number("phase_epochs", self.phase_epochs, 0, math.inf)
        check_number("fine_tune_share", self.fine_tune_share, 0, 1)
        check_number("drop_fraction", self.drop_fraction, 0, 1)
        check_number("dense_share", self.dense_share, 0, 1, closed_low=True)
        for name in ("ramp_share", "prune_share"):
            check_number(name, getattr(self, name), 0, 1, closed_low=True, closed_high=True)
        check_number("sparsity", self.sparsity, 0, 1)
        check_number("lr_density_power", self.lr_density_power, 0, 1, closed_low=True, closed_high=True)
        if not isinstance(self.pattern, str):
            raise GaPError(f"gap.pattern: found {self.pattern!r}, expected a string such as '2:4' (quoted in YAML)")
        if self.pattern == "cpu":
            object.__setattr__(self, "pattern", cpu_pattern())
        # Lists and mappings from YAML become tuples, so that a config is immutable and can be compared.
        for name in ("include", "exclude"):
            object.__setattr__(self, name, to_strings(name, getattr(self, name)))
        object.__setattr__(self, "overrides", to_overrides(self.overrides))
        object.__setattr__(self, "partition", to_partition(self.partition, self.num_partitions, PARTITIONS))
        self._check_schedule()
        self._check_pattern()

    def _check_schedule(self) -> None:
        if self.phase_steps is not None and self.phase_epochs is not None:
            raise GaPError("gap.phase_epochs: phase_steps is set too; expected one of the two")
        length = "phase_steps" if self.phase_steps is not None else "phase_epochs"
        if getattr(self, length) is not None and self.num_rounds is not None and self.fine_tune_share is not None:
            raise GaPError(
                f"gap.fine_tune_share: num_rounds, {length} and fine_tune_share are all set; expected any two, "
                "the third follows from the length of training"
            )
        if self.live_state and (self.method == "parallel" or self.optimizer_reset == "none"):
            key = "method" if self.method == "parallel" else "optimizer_reset"
            raise GaPError(f"gap.live_state: cannot go with {key}: {getattr(self, key)}, found true; expected false")
        if self.master_weights and not self.live_state:
            raise GaPError("gap.master_weights: needs live_state: true, found false")
        if self.sparse_compute and self.workers == "sequential":
            raise GaPError(
                "gap.sparse_compute: cannot go with workers: sequential, whose masks change with every turn; expected false"
            )
        if self.lr_peaks != "constant" and self.lr_schedule != "restart":
            raise GaPError(f"gap.lr_peaks: '{self.lr_peaks}' needs lr_schedule: restart, found '{self.lr_schedule}'")

    def _check_pattern(self) -> None:
        pattern = parse_pattern(self.pattern)
        if (fixed := pattern.fixed_sparsity) is None:
            if self.sparsity is None and self.method != "dense":
                raise GaPError("gap.sparsity: not set; expected a number between 0 and 1, such as 0.8")
            return
        for key, value in (("sparsity", self.sparsity), *((f"overrides['{p}']", s) for p, s in self.overrides)):
            # Thirds have no decimal, so what the message below prints must be accepted too.
            meets = value is None or f"{float(value):g}" == f"{float(fixed):g}" or (key != "sparsity" and value == 0)
            if not meets:
                raise GaPError(
                    f"gap.{key}: found {value}, but pattern {self.pattern} can only be {float(fixed):g}; "
                    f"{'use that, or leave it out' if key == 'sparsity' else 'use that, or 0 for dense'}"
                )
        if self.distribution != "uniform":
            raise GaPError(
                f"gap.distribution: '{self.distribution}' contradicts pattern {self.pattern}, which gives every "
                "tensor the same sparsity; expected 'uniform'"
            )

    @property
    def is_off(self) -> bool:
        """True for method ``dense``: nothing is masked and nothing is added to Trainer."""
        return self.method == "dense"

    @property
    def target(self) -> Fraction:
        """The target sparsity as an exact fraction: 0.9 is nine tenths, not its binary neighbour."""
        fixed = parse_pattern(self.pattern).fixed_sparsity
        return fixed if fixed is not None else Fraction(str(self.sparsity))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GaPConfig:
        """Build from plain data, as YAML gives it.

        Raises:
            GaPError: on unknown keys (naming the nearest valid one), wrong types, ranges and contradictions.
        """
        if not isinstance(values, Mapping):
            raise GaPError(f"gap: found {type(values).__name__}, expected a mapping of keys to values")
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                hint = f"; it is called '{AUTHORS_NAMES[key]}' here" if key in AUTHORS_NAMES else None
                if key == "num_steps":
                    hint = "; the authors' num_steps is 1 + num_rounds × num_partitions here"
                raise GaPError(f"gap.{key}: unknown key{hint or did_you_mean(str(key), names)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> GaPConfig:
        """Read the `gap` section of a recipe, or a file that holds these keys alone.

        Raises:
            GaPError: if the file is missing, is not YAML, or holds bad values.
        """
        data = load_yaml(path)
        return cls.from_dict(data.get("gap", data))

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON and YAML types), every key included; `from_dict` gives an equal config."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["overrides"] = dict(self.overrides)
        out["include"], out["exclude"] = list(self.include), list(self.exclude)
        if not isinstance(self.partition, str):
            out["partition"] = [list(group) for group in self.partition]
        return out

    def to_yaml(self, path: str | Path) -> None:
        """Write a file that `from_yaml` reads."""
        Path(path).write_text(yaml.safe_dump({"gap": self.to_dict()}, sort_keys=False), encoding="utf-8")

    def replace(self, **changes: Any) -> GaPConfig:
        """A copy with some values changed, validated again."""
        return GaPConfig.from_dict({**self.to_dict(), **changes})


# The public code of the paper's authors (boone891214/GaP) to ours, for people who come from there.
AUTHORS_NAMES: dict[str, str] = {
    "num_parts": "num_partitions",
    "partition_type": "method",
    "ep_per_step": "phase_epochs",
    "num_steps": "num_rounds",
    "sparsity_type": "pattern",
    "kappa": "num_partitions",
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "distribution": DISTRIBUTIONS,
    "initial_mask": INITIAL_MASKS,
    "optimizer_reset": OPTIMIZER_RESETS,
    "lr_schedule": LR_SCHEDULES,
    "lr_peaks": LR_PEAKS,
}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping with the safe loader.

    Raises:
        GaPError: if the file is missing, cannot be read, is not valid YAML, or is not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise GaPError(f"{path}: no such file{did_you_mean(str(path), siblings) if siblings else ''}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GaPError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # of dates that there are not too
        raise GaPError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise GaPError(f"{path}: found {type(data).__name__} at the top, expected a mapping of keys to values")
    return data
