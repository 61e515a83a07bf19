"""The authors' learning-rate policy: a whole schedule, warm-up included, in each phase."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from gap_hf.errors import GaPError
from gap_hf.plan import Plan, peak_factor


def warmup_steps(requested: int, num_steps: int) -> int:
    """Warm-up of a phase: as requested, but at most a quarter of the phase, since phases may be short."""
    return min(requested, num_steps // 4)


def restarted_schedule(args: TrainingArguments, optimizer: torch.optim.Optimizer, plan: Plan, peaks: str) -> LambdaLR:
    """`args.lr_scheduler_type` restarted at every phase of `plan`, with the peaks of `peak_factor`.

    It is a function of the step alone, so a resumed run needs no state beyond the scheduler's own count.

    Raises:
        GaPError: if the schedule is not a function of the step (reduce_lr_on_plateau, greedy).
    """
    # TrainingArguments turns a JSON string into a mapping when it is made.
    assert not isinstance(args.lr_scheduler_kwargs, str)
    kwargs = args.lr_scheduler_kwargs
    factors: dict[int, Callable[[int], float]] = {}

    def factor_of(num_steps: int) -> Callable[[int], float]:
        if num_steps not in factors:
            # Schedules such as polynomial read the base rate from an optimizer; this one is never stepped.
            stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
            warmup = warmup_steps(args.get_warmup_steps(num_steps), num_steps)
            decay = (kwargs or {}).get("num_decay_steps", 0)
            if warmup + decay > num_steps:
                raise GaPError(
                    f"training.lr_scheduler_kwargs: num_decay_steps is {decay}, but lr_schedule 'restart' has a phase of "
                    f"{num_steps} steps with {warmup} of warm-up; expected at most {num_steps - warmup}"
                )
            schedule = get_scheduler(
                args.lr_scheduler_type,
                optimizer=stand_in,
                num_warmup_steps=warmup,
                num_training_steps=num_steps,
                scheduler_specific_kwargs=kwargs,
            )
            if not isinstance(schedule, LambdaLR):
                raise GaPError(
                    f"gap.lr_schedule: 'restart' cannot restart lr_scheduler_type '{args.lr_scheduler_type}', which is not a "
                    "function of the step; expected one such as linear, cosine or inverse_sqrt, or lr_schedule: whole"
                )
            factors[num_steps] = schedule.lr_lambdas[0]
        return factors[num_steps]

    def factor(step: int) -> float:
        phase = plan.phase_at(step)
        return peak_factor(plan, phase, peaks) * factor_of(phase.num_steps)(step - phase.start)

    for phase in plan.phases:
        factor_of(phase.num_steps)  # refuse before training, not at a restart
    return LambdaLR(optimizer, factor)
