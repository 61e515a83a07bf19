"""Learning rates by density: what one step does, and that nobody else sees it."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from test_live_state import OPTIMIZERS, equal, trained
from timm.optim.lookahead import Lookahead
from torch import nn
from toys import CONFIG, assert_masked_weights_are_zero, gap_trainer, same_tensors

from gap_hf import GaPConfig, GaPError, Sparsifier
from gap_hf.density_rates import join_groups, set_rates
from gap_hf.masks import Masks

GAP = GaPConfig(sparsity=0.75, num_partitions=2, num_rounds=1, ramp_share=0, prune_share=0, include=("*.weight",))
RATED = GAP.replace(lr_density_power=0.5)


def two_layers() -> tuple[nn.Module, Masks]:
    """Weights of ones with gradients of ones; a quarter of the first is live, and the second is dense."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    for param in model.parameters():
        nn.init.ones_(param)
        param.grad = torch.ones_like(param)
    masks = Masks({"0.weight": model[0].weight, "1.weight": model[1].weight})
    mask = torch.zeros(4, 8, dtype=torch.uint8)
    mask[:, :2] = 1
    masks.set("0.weight", mask)
    masks.apply_to_gradients()
    return model, masks


@pytest.mark.parametrize(("power", "factor"), [(0.5, 2.0), (1.0, 4.0), (0.0, 1.0), (None, 1.0)])
def test_one_step_by_hand(power: float | None, factor: float) -> None:
    model, masks = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, weight_decay=0.5)
    set_rates(optimizer, masks, power)
    optimizer.step()
    # lr · f · (g + wd / f · w): the decay, lr · wd · w, is everybody's.
    live = model[0].weight[:, :2]
    assert torch.equal(live, torch.full_like(live, 1 - 0.125 * factor - 0.0625))
    for param in (model[0].bias, model[1].weight, model[1].bias):
        assert torch.equal(param, torch.full_like(param, 1 - 0.125 - 0.0625))


def test_adam_moves_live_weights_by_the_scaled_rate() -> None:
    model, masks = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, eps=0.0)
    set_rates(optimizer, masks, 0.5)
    optimizer.step()
    assert (1 - model[0].weight[:, :2]).detach() == pytest.approx(0.02, rel=1e-4)
    assert (1 - model[1].weight).detach() == pytest.approx(0.01, rel=1e-4)


def test_groups_are_as_they_were_after_a_step() -> None:
    model, masks = two_layers()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight, model[0].bias]},
            {"params": [model[1].weight, model[1].bias], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    set_rates(optimizer, masks, 0.5)
    groups, before = optimizer.param_groups, copy.deepcopy(optimizer.state_dict()["param_groups"])
    optimizer.step()
    assert optimizer.param_groups is groups
    assert optimizer.state_dict()["param_groups"] == before
    schedule.step()
    assert schedule.get_last_lr() == [0.005, 0.005]
    set_rates(optimizer, masks, None)
    was = model[0].weight.detach().clone()
    optimizer.zero_grad()
    model[0].weight.grad = masks["0.weight"].float()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert (was - model[0].weight)[:, :2].detach() == pytest.approx(0.005, rel=0.01)  # no longer scaled


def raising(optimizer: torch.optim.Optimizer) -> None:
    """A step that fails between the hooks."""

    def closure() -> float:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        optimizer.step(closure)


def test_a_step_that_raises_leaves_no_trace() -> None:
    model, masks = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    set_rates(optimizer, masks, 0.5)
    groups, saved = optimizer.param_groups, copy.deepcopy(optimizer.state_dict())
    raising(optimizer)
    assert optimizer.state_dict() == saved and optimizer.param_groups is groups
    raising(optimizer)
    optimizer.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "lr": 0.25}]})
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and model[0].weight[0, 0] == 1 - 0.5
    groups = optimizer.param_groups
    for end in (lambda: join_groups(optimizer), optimizer.step, lambda: set_rates(optimizer, masks, None)):
        raising(optimizer)
        end()
        assert optimizer.param_groups is groups


def test_a_batch_that_is_too_large_for_a_step(tmp_path: Path) -> None:
    trainer = gap_trainer(
        tmp_path,
        config=GaPConfig(sparsity=0.9, method="static", lr_density_power=0.5),
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        optim="adamw_torch",
    )
    trainer.create_optimizer()
    update, failed = trainer.optimizer.step, []

    def too_big(*args: Any, **kwargs: Any) -> Any:
        if len(failed) < 2:
            failed.append(1)
            return update(lambda: (_ for _ in ()).throw(RuntimeError("CUDA out of memory.")))
        return update(*args, **kwargs)

    trainer.optimizer.step = too_big
    trainer.train()
    assert len(failed) == 2 and len(trainer.optimizer.param_groups) == 2
    assert_masked_weights_are_zero(trainer)


def test_masks_that_are_gone_scale_nothing() -> None:
    model, masks = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    set_rates(optimizer, masks, 0.5)
    del masks
    gc.collect()
    optimizer.step()
    assert model[0].weight[0, 0] == 1 - 0.125


def test_few_live_weights_count_too() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    nn.init.ones_(model[0].weight)
    masks = Masks({"0.weight": model[0].weight})
    mask = torch.zeros(100, 100, dtype=torch.uint8)
    mask[:2, :2] = 1
    masks.set("0.weight", mask)
    model[0].weight.grad = mask.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    set_rates(optimizer, masks, 0.5)
    optimizer.step()
    assert float(model[0].weight.detach()[0, 0]) == pytest.approx(1 - 0.125 * 50)


def test_two_sparsified_networks_in_one_optimizer() -> None:
    (first, one), (second, two) = two_layers(), two_layers()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.125)
    set_rates(optimizer, one, 0.5)
    set_rates(optimizer, two, 1.0)
    optimizer.step()
    assert first[0].weight[0, 0] == 1 - 0.25 and second[0].weight[0, 0] == 1 - 0.5
    set_rates(optimizer, two, None)
    optimizer.step()
    assert first[0].weight[0, 0] == 1 - 0.5 and second[0].weight[0, 0] == 1 - 0.625


def test_a_compiled_step() -> None:
    model, masks = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    set_rates(optimizer, masks, 0.5)
    torch.compile(optimizer.step, backend="eager")()
    assert model[0].weight[0, 0] == 1 - 0.25 and model[1].weight[0, 0] == 1 - 0.125


def test_a_tensor_without_live_weights_and_an_empty_group() -> None:
    model, masks = two_layers()
    masks.set("0.weight", torch.zeros(4, 8, dtype=torch.uint8))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": []}], lr=0.125)
    set_rates(optimizer, masks, 1.0)
    optimizer.step()
    assert len(optimizer.param_groups) == 2 and model[1].weight[0, 0] == 1 - 0.125


def test_masters_are_stepped_by_density_too() -> None:
    def moved(power: float | None) -> dict[str, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        config = GaPConfig(
            sparsity=0.75,
            method="static",
            include=("0.weight",),
            live_state=True,
            master_weights=True,
            lr_density_power=power,
        )
        sparsifier = Sparsifier(model, config, total_steps=10, optimizer=optimizer)
        sparsifier.start()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
        sparsifier.mask_gradients()
        optimizer.step()
        return {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}

    plain, rated = moved(None), moved(0.5)
    assert rated["0.weight"] == pytest.approx(2 * plain["0.weight"], rel=0.05)
    assert rated["1.weight"] == plain["1.weight"] > 0


@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd-nesterov"])
def test_live_state_gives_the_same_weights(name: str) -> None:
    dense, plain, _ = trained(OPTIMIZERS[name], RATED, steps=80)
    live, sparsifier, optimizer = trained(OPTIMIZERS[name], RATED.replace(live_state=True), steps=80)
    assert equal(live, dense) and sparsifier.masks.digest() == plain.masks.digest()
    assert len(optimizer.param_groups) == 2
    unscaled, _, _ = trained(OPTIMIZERS[name], GAP, steps=80)
    assert not equal(unscaled, dense)


def test_a_power_of_nought_is_none() -> None:
    assert equal(
        trained(OPTIMIZERS["adamw-fused"], GAP, steps=60)[0],
        trained(OPTIMIZERS["adamw-fused"], GAP.replace(lr_density_power=0.0), steps=60)[0],
    )


def test_the_trainer_logs_the_rate_that_was_asked_for(tmp_path: Path) -> None:
    plain, rated = (
        gap_trainer(tmp_path / str(power), config=CONFIG.replace(lr_density_power=power), logging_steps=1)
        for power in (None, 1.0)
    )
    for trainer in (plain, rated):
        trainer.train()
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (plain, rated)]
    assert rates[0] == rates[1] and len(rates[0]) > 5
    assert not same_tensors(plain.model.state_dict(), rated.model.state_dict())
    assert_masked_weights_are_zero(rated)


class Inner(torch.optim.Optimizer):
    """An optimizer around another one, whose groups it shares."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.base.step(closure)


class Counts(torch.optim.SGD):
    """Writes a rate of its own into its groups."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = group["lr"] / 2
        return super().step(closure)


def refused(make: Any, message: str, *, method: str = "gmp") -> None:
    """GMP is dense at first: its optimizer is refused in its first step all the same."""
    model, _ = two_layers()
    config = GaPConfig(sparsity=0.75, method=method, include=("*.weight",), lr_density_power=0.5)
    optimizer = make(model.parameters())
    with pytest.raises(GaPError, match=rf"gap\.lr_density_power: {message}; expected an optimizer such as"):
        Sparsifier(model, config, total_steps=100, optimizer=optimizer).start()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()


def test_optimizers_that_are_refused() -> None:
    def free(params: Any) -> Any:
        optimizer = schedulefree.AdamWScheduleFree(params, lr=0.01)
        optimizer.train()
        return optimizer

    def without_rate(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    refused(free, "AdamWScheduleFree keeps '.*' in its groups and changes it in a step")
    refused(Counts, "Counts keeps 'lr' in its groups and changes it in a step")
    refused(without_rate, "SGD has no learning rate to multiply", method="static")
    refused(lambda params: Lookahead(torch.optim.SGD(params, lr=0.1)), "Lookahead steps past torch's hooks")
    refused(Inner, "Inner steps through another optimizer")
    refused(
        lambda params: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), "SGD holds none of the prunable weights"
    )
    packed = type("Packed", (torch.optim.SGD,), {"__module__": "bitsandbytes.optim.adam"})
    refused(packed, "Packed finds its settings by places in its groups")


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", True])
def test_a_power_out_of_range(value: Any) -> None:
    with pytest.raises(GaPError, match=r"gap\.lr_density_power: found .*, expected"):
        GaPConfig.from_dict({"sparsity": 0.9, "lr_density_power": value})
