"""What a config wants of an optimizer: the form of its state, and rates by density."""

from __future__ import annotations

from typing import Any

from gap_hf.config import GaPConfig
from gap_hf.density_rates import set_rates
from gap_hf.elementwise import is_schedule_free
from gap_hf.errors import GaPError
from gap_hf.live_state import PREFIX, LiveState, release
from gap_hf.masks import Masks
from gap_hf.master_weights import MasterState
from gap_hf.optimizer_state import OwnState, unwrap


def own_state(optimizer: Any, config: GaPConfig, masks: Masks) -> Any:
    """What a sparsifier has to tell of its masks: the optimizer, or the `LiveState` on it if the config wants one.

    Raises:
        GaPError: if the optimizer does not update each weight by itself, a weight is sharded, rates cannot be set, or P-GaP is given a
            schedule-free one.
    """
    if optimizer is None or isinstance(optimizer, OwnState):
        return optimizer
    if config.method == "parallel" and is_schedule_free(unwrap(optimizer)):
        raise GaPError(
            f"gap.method: 'parallel' found {type(unwrap(optimizer)).__name__}, which moves the weights for each evaluation and back, by "
            "state that P-GaP's merged view does not have; expected an optimizer such as AdamW"
        )
    release(optimizer)
    # Before live state, whose hooks are to see the groups that these make.
    set_rates(unwrap(optimizer), masks, config.lr_density_power)
    if not config.live_state:
        return optimizer
    return _kind(masters=config.master_weights)(optimizer, masks)


def follow_load(optimizer: Any, masks: Masks) -> None:
    """After masks were loaded, and state before them: bring it into the form that is kept here."""
    if isinstance(optimizer, OwnState):
        optimizer.sync()
    elif optimizer is not None:
        ours = [v for state in unwrap(optimizer).state.values() for k, v in state.items() if k.startswith(PREFIX)]
        if ours:
            _kind(masters=any(isinstance(value, dict) for value in ours))(optimizer, masks).detach()


def _kind(*, masters: bool) -> type[LiveState]:
    return MasterState if masters else LiveState
