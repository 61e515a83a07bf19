"""What a mask change does to optimizers: moments of 0 where a weight changed, survivors as they were, no long step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer, RAdam
from transformers.optimization import Adafactor

from gap_hf.optimizer_state import clear_grown, clear_pruned, reset_all, unwrap, weight_copies

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

ADAMS: dict[str, MakeOptimizer] = {
    "adamw-loop": lambda p: AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "adamw-amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "adam-authors": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.997), eps=1e-9),
}
OTHERS: dict[str, MakeOptimizer] = {
    "radam": lambda p: RAdam(p, lr=1e-2),
    "nadam": lambda p: NAdam(p, lr=1e-2),
    "sgd-momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "sgd": lambda p: SGD(p, lr=1e-2),
    "adagrad": lambda p: Adagrad(p, lr=1e-2),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "adafactor-momentum": lambda p: Adafactor(p, lr=1e-2, relative_step=False, beta1=0.9),
    "schedule-free": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
}
ALL = ADAMS | OTHERS
DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (6, 8)


def trained(
    make: MakeOptimizer, *, dtype: torch.dtype = torch.float32, num_steps: int = 40
) -> tuple[nn.Parameter, Any]:
    """A parameter and an optimizer that has done some steps on noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))
    optimizer = make([param])
    if isinstance(optimizer, schedulefree.AdamWScheduleFree):
        optimizer.train()
    for _ in range(num_steps):
        param.grad = torch.randn(SHAPE, generator=generator).to(dtype)
        optimizer.step()
    return param, optimizer


def half_mask() -> Tensor:
    return torch.randint(2, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def entries(optimizer: Optimizer, param: nn.Parameter) -> dict[str, Tensor]:
    """Copies of the state that has one entry per weight."""
    state = optimizer.state[param]
    return {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape}


def corrected_moments(optimizer: Optimizer, param: nn.Parameter) -> dict[str, Tensor]:
    """Bias-corrected moments of an Adam."""
    state, (beta1, beta2) = optimizer.state[param], optimizer.param_groups[0]["betas"]
    count = float(state["step"])
    return {
        key: state[key].float() / (1 - (beta1 if key == "exp_avg" else beta2) ** count)
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        if key in state
    }


# --- pruning ---------------------------------------------------------------------------------------------------------


# Their early steps are not Adam's, or their count is the group's.
COUNT_OTHERWISE = ("schedule-free", "radam", "nadam")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_pruned_entries_are_zero_and_survivors_go_on(name: str, dtype: torch.dtype) -> None:
    param, optimizer = trained(ALL[name], dtype=dtype)
    mask = half_mask()
    before = entries(optimizer, param)
    count = optimizer.state[param].get("step")
    count = float(count) if count is not None else None
    clear_pruned(optimizer, param, mask)
    for key, value in entries(optimizer, param).items():
        assert not value[mask == 0].any(), key
        assert torch.equal(value[mask == 1], before[key][mask == 1]), key
    if count is not None:
        assert float(optimizer.state[param]["step"]) == count


@pytest.mark.parametrize("name", ["adamw-loop", "sgd-momentum", "schedule-free"])
def test_clearing_before_the_first_step_makes_no_state(name: str) -> None:
    param, optimizer = trained(ALL[name], num_steps=0)
    clear_pruned(optimizer, param, half_mask())
    clear_grown(optimizer, param, half_mask())
    assert not optimizer.state.get(param)


class Packed8Bit(Optimizer):
    """As bitsandbytes keeps moments: uint8 codes of the parameter's shape, in which 0 is not the number 0."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param in self.param_groups[0]["params"]:
            if not self.state[param]:
                self.state[param] = {"step": 0, "state1": torch.full_like(param, 127, dtype=torch.uint8)}
            self.state[param]["step"] += 1


def test_codes_of_8_bit_moments_are_never_written_into() -> None:
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = Packed8Bit([param])
    optimizer.step()
    clear_pruned(optimizer, param, half_mask())
    assert bool((optimizer.state[param]["state1"] == 127).all())
    clear_grown(optimizer, param, half_mask())
    assert param not in optimizer.state
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


# --- growing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_grown_entries_have_no_moments(name: str, dtype: torch.dtype) -> None:
    param, optimizer = trained(ALL[name], dtype=dtype)
    mask = half_mask()
    clear_grown(optimizer, param, mask)
    for key, value in entries(optimizer, param).items():
        if not (name in COUNT_OTHERWISE and key == "exp_avg_sq"):
            assert not value[mask == 0].any(), key


@pytest.mark.parametrize("name", COUNT_OTHERWISE)
def test_where_the_count_goes_on_a_second_moment_starts_from_the_survivors_mean(name: str) -> None:
    """At a count that cannot restart, 0 would make a first update far too long."""
    param, optimizer = trained(ALL[name])
    mask = half_mask()
    before = optimizer.state[param]["exp_avg_sq"].clone()
    clear_grown(optimizer, param, mask)
    second = optimizer.state[param]["exp_avg_sq"]
    assert torch.equal(second[mask == 1], before[mask == 1])
    assert second[mask == 0].tolist() == pytest.approx([float(before[mask == 1].mean())] * int((mask == 0).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_corrected_moments_of_survivors_do_not_change(name: str, dtype: torch.dtype, num_steps: int) -> None:
    param, optimizer = trained(ALL[name], dtype=dtype, num_steps=num_steps)
    mask = half_mask()
    before = corrected_moments(optimizer, param)
    clear_grown(optimizer, param, mask)
    assert float(optimizer.state[param]["step"]) == 1
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for key, value in corrected_moments(optimizer, param).items():
        torch.testing.assert_close(value[mask == 1], before[key][mask == 1], rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["sgd-momentum", "nadam", "radam", "adagrad", "adafactor-momentum"])
def test_other_state_of_survivors_does_not_change(name: str) -> None:
    param, optimizer = trained(ALL[name])
    mask = half_mask()
    before = entries(optimizer, param)
    others = {k: v for k, v in optimizer.state[param].items() if k not in before}
    clear_grown(optimizer, param, mask)
    for key, value in entries(optimizer, param).items():
        assert torch.equal(value[mask == 1], before[key][mask == 1])
    assert all(optimizer.state[param][k] is v for k, v in others.items())


@pytest.mark.parametrize("name", ADAMS)
def test_only_the_grown_tensor_starts_anew(name: str) -> None:
    first, second = nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(SHAPE))
    optimizer = ADAMS[name]([first, second])
    for _ in range(5):
        first.grad, second.grad = torch.ones(SHAPE), torch.ones(SHAPE)
        optimizer.step()
    before = entries(optimizer, second)
    clear_grown(optimizer, first, half_mask())
    assert float(optimizer.state[first]["step"]) == 1
    assert float(optimizer.state[second]["step"]) == 5
    after = entries(optimizer, second)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_betas_are_those_of_the_parameters_own_group() -> None:
    first, second = nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(SHAPE))
    optimizer = AdamW([{"params": [first]}, {"params": [second], "betas": (0.5, 0.75)}])
    for _ in range(3):
        first.grad, second.grad = torch.ones(SHAPE), torch.ones(SHAPE)
        optimizer.step()
    clear_grown(optimizer, second, torch.ones(SHAPE, dtype=torch.uint8))
    # Corrected moments of a gradient that was always 1 are 1, so after one step they are 1 - b.
    torch.testing.assert_close(optimizer.state[second]["exp_avg"], torch.full(SHAPE, 0.5))
    torch.testing.assert_close(optimizer.state[second]["exp_avg_sq"], torch.full(SHAPE, 0.25))


def update_lengths(optimizer: Optimizer, param: nn.Parameter, num_steps: int) -> Tensor:
    """Length of each entry's update in learning rates under a constant gradient of 1: (steps, *shape)."""
    lengths = []
    for _ in range(num_steps):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        lengths.append((param.detach() - before).abs() / optimizer.param_groups[0]["lr"])
    return torch.stack(lengths)


def constant_adam(num_steps: int, mask: Tensor) -> tuple[nn.Parameter, AdamW]:
    """AdamW after steps in which masked weights had gradients of 0 and the others of 1."""
    param = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer = AdamW([param], lr=1e-3, betas=(0.9, 0.999), weight_decay=0)
    for _ in range(num_steps):
        param.grad = mask.double()
        optimizer.step()
    return param, optimizer


def test_first_updates_of_grown_weights_are_never_long() -> None:
    mask = half_mask()
    param, optimizer = constant_adam(3000, mask)
    ideal = reference.EntryAdam(param.numel(), beta1=0.9, beta2=0.999)
    for _ in range(3000):
        ideal.step(mask.double().flatten().numpy())
    clear_grown(optimizer, param, mask)
    ideal.reset(mask.flatten().numpy() == 0)
    lengths = update_lengths(optimizer, param, 100).flatten(1).numpy()
    wanted = np.stack([ideal.step(np.ones(param.numel())) for _ in range(100)])
    np.testing.assert_allclose(wanted, 1, atol=1e-6)  # a fresh Adam's are one learning rate each
    grown = mask.flatten().numpy() == 0
    np.testing.assert_allclose(lengths[:, ~grown], wanted[:, ~grown], atol=1e-6)
    np.testing.assert_allclose(lengths[0, grown], 0.744, atol=1e-3)
    assert lengths[:, grown].max() < 1.013
    assert lengths[:, grown].min() > 0.74


def test_the_problem_exists_without_the_restart() -> None:
    """A moment of 0 under an old count: 3.2 learning rates at once, then up to 6.5."""
    mask = half_mask()
    param, optimizer = constant_adam(3000, mask)
    for value in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][value].masked_fill_(mask == 0, 0)
    lengths = update_lengths(optimizer, param, 30).flatten(1)[:, mask.flatten() == 0]
    # The count is 3000, so 1 - b2^t is 0.95: a little under the limit of an endless run.
    assert float(lengths[0].max()) == pytest.approx(3.16, rel=0.04)
    assert float(lengths.max()) == pytest.approx(6.5, rel=0.04)


@pytest.mark.parametrize("name", ["schedule-free"])
def test_a_grown_weight_takes_no_long_step_where_the_count_is_shared(name: str) -> None:
    param, optimizer = trained(ALL[name], num_steps=0)
    mask = half_mask()
    for _ in range(500):
        param.grad = mask.float()
        optimizer.step()
    clear_grown(optimizer, param, mask)
    start = optimizer.state[param]["z"].clone()
    param.grad = torch.ones(SHAPE)
    optimizer.step()
    step = (optimizer.state[param]["z"] - start).abs() / 1e-2
    assert float(step.max()) < 1.05


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_after_a_full_reset_the_optimizer_is_as_new(name: str) -> None:
    """The next steps are those of a new optimizer on the same weights, to the bit."""
    param, optimizer = trained(ALL[name])
    reset_all(optimizer)
    fresh_param = nn.Parameter(param.detach().clone())
    fresh = ALL[name]([fresh_param])
    if isinstance(fresh, schedulefree.AdamWScheduleFree):
        fresh.train()
    for seed in range(5):
        gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        param.grad, fresh_param.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        fresh.step()
        assert torch.equal(param, fresh_param), seed


# --- wrappers and copies ---------------------------------------------------------------------------------------------


def test_unwrap() -> None:
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW([param])
    assert unwrap(optimizer) is optimizer
    try:
        wrapped = Accelerator(cpu=True).prepare(optimizer)
        assert isinstance(wrapped, AcceleratedOptimizer)
        assert unwrap(wrapped) is optimizer
        assert unwrap(AcceleratedOptimizer(wrapped, device_placement=False)) is optimizer
    finally:  # a state of the whole process, which later tests must not find
        AcceleratorState._reset_state(reset_partial_state=True)


def test_weight_copies_are_schedule_free_ones_only() -> None:
    param, optimizer = trained(ALL["schedule-free"])
    assert [copy is optimizer.state[param]["z"] for copy in weight_copies(optimizer, param)] == [True]
    param, optimizer = trained(ALL["adamw-loop"])
    assert weight_copies(optimizer, param) == []
