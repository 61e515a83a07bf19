"""Grow-and-prune in a plain loop: the invariants of the method that need no Trainer."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import reference
import schedulefree
import torch
from memory import PeakMemory
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.optimization import Adafactor

from gap_hf import change as change_module
from gap_hf import largest, patterns
from gap_hf import sparsifier as sparsifier_module
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.pattern_names import parse_pattern
from gap_hf.patterns import magnitude_mask, num_kept, num_units
from gap_hf.sparsifier import Change, Sparsifier

SIZES = (8, 16, 24, 16, 8)
NUM_STEPS = 40


def make_model(*, seed: int = 0) -> nn.Sequential:
    """Four Linear layers of different sizes, all divisible by 8, with activations and norms between."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU()]
    return nn.Sequential(*layers)


def config_of(**changes: Any) -> GaPConfig:
    """The paper's schedule; test_methods.py has the ramps."""
    schedule = {"num_partitions": 3, "num_rounds": 2, "ramp_share": 0, "prune_share": 0}
    values = {"sparsity": 0.8, **schedule, "include": ["Linear"], **changes}
    return GaPConfig.from_dict({k: v for k, v in values.items() if v is not None})


def batch_of(step: int) -> Tensor:
    return torch.randn(8, SIZES[0], generator=torch.Generator().manual_seed(1000 + step))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.flip(1)).square().mean()


class Lion(Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023): every step of a live weight is one learning rate long."""

    def __init__(self, params: Any, lr: float, *, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(torch.sign(0.9 * momentum + 0.1 * param.grad), alpha=group["lr"])
                momentum.lerp_(param.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd-momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, weight_decay=0.1),
    "lion": lambda p: Lion(p, 1e-3),
    "schedule-free": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2, weight_decay=0.1),
}


def make_run(
    config: GaPConfig | None = None, *, optimizer: str = "adamw", seed: int = 0, num_steps: int = NUM_STEPS
) -> Sparsifier:
    model = make_model()
    inner = OPTIMIZERS[optimizer](model.parameters())
    if isinstance(inner, schedulefree.AdamWScheduleFree):
        inner.train()
    return Sparsifier(model, config or config_of(), total_steps=num_steps, optimizer=inner, seed=seed)


def train_step(run: Sparsifier, step: int) -> None:
    """One optimizer step, all but `advance`."""
    loss_of(run.model, batch_of(step)).backward()
    run.mask_gradients()
    run.optimizer.step()
    run.mask_weights()
    run.optimizer.zero_grad()


def train(run: Sparsifier, check: Callable[[Change | None], None] | None = None) -> list[Change]:
    """The whole run; `check` is called after the start and after every step."""
    changes = [run.start()]
    if check:
        check(changes[0])
    for step in range(run.plan.total_steps):
        train_step(run, step)
        change = run.advance(step + 1)
        if change:
            changes.append(change)
        if check:
            check(change)
    return changes


def values(run: Sparsifier) -> dict[str, Tensor]:
    return {name: run.masks.params[name].detach().clone() for name in run.weights}


# --- invariant 1: exact counts ---------------------------------------------------------------------------------------

KINDS = [
    {"distribution": "uniform"},
    {"distribution": "erk"},
    {"distribution": "global"},
    {"pattern": "block:8x1"},
    {"pattern": "block:2x4", "distribution": "erk"},
    {"pattern": "block:2x4", "distribution": "global"},
    {"pattern": "2:4", "sparsity": None},
    {"pattern": "1:4", "sparsity": None},
    {"pattern": "transposable:2:4", "sparsity": None},
    {"method": "random", "num_partitions": 2},
    {"initial_mask": "magnitude"},
    {"num_partitions": 1},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_exact_counts_in_every_phase(kind: dict[str, Any]) -> None:
    config = config_of(**kind)
    run = make_run(config)
    pattern = parse_pattern(config.pattern)
    per_unit = pattern.rows * pattern.cols
    units = {name: num_units(w.shape, pattern) for name, w in run.weights.items()}
    total = num_kept(config.target, sum(units.values()))

    def check(change: Change | None) -> None:
        if change is None:
            return
        dense = {n for g in change.grown for n in run.groups[g].names}
        assert {n for n in run.weights if run.masks[n] is None} == dense
        for name in run.weights:
            mask = run.masks[name]
            if mask is None:
                continue
            live = int(mask.sum())
            if config.distribution == "uniform":
                assert live == reference.exact_keep(config.target, units[name]) * per_unit
            # The form of the pattern: pruning the mask itself changes nothing.
            layout = run.weights[name].layout
            assert torch.equal(magnitude_mask(mask.float(), pattern, live // per_unit, layout), mask)
        for index in change.pruned:
            names = run.groups[index].names
            if config.distribution == "global" and not dense & set(names):
                live = sum(run.masks.live(n) for n in names)
                assert live == num_kept(config.target, sum(units[n] for n in names)) * per_unit
        if config.distribution == "erk" and not dense:
            assert sum(run.masks.live(n) for n in run.weights) == total * per_unit
        live = sum(run.masks.live(n) for n in run.weights)
        assert change.sparsity == pytest.approx(1 - live / sum(w.numel for w in run.weights.values()))

    changes = train(run, check)
    assert [c.phase for c in changes] == list(run.plan.phases)
    assert [c.step for c in changes] == [p.start for p in run.plan.phases]
    assert run.at_target
    for name, param in run.masks.params.items():
        assert int((param != 0).sum()) == run.masks.live(name), name


def test_erk_counts_are_the_references() -> None:
    run = make_run(config_of(distribution="erk"))
    train(run)
    shapes = [w.shape for w in run.weights.values()]
    units = [o * i for o, i in shapes]
    raw = [Fraction(o + i, o * i) for o, i in shapes]
    wanted = reference.erk_counts(raw, units, reference.exact_keep(Fraction(4, 5), sum(units)))
    assert [run.masks.live(name) for name in run.weights] == wanted


def test_erk_of_convolutions_counts_the_sides_of_their_kernels() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 64, 1))
    config = GaPConfig(sparsity=0.8, method="static", distribution="erk", include=("*",))
    run = Sparsifier(model, config, total_steps=10)
    run.start()
    raw = [Fraction(16 + 16 + 3 + 3, 16 * 16 * 9)] * 2 + [Fraction(16 + 64 + 1 + 1, 16 * 64)]
    units = [2304, 2304, 1024]
    wanted = reference.erk_counts(raw, units, reference.exact_keep(Fraction(4, 5), sum(units)))
    assert [run.masks.live(name) for name in run.weights] == wanted


def test_a_prune_is_the_references_masks() -> None:
    """Uniform: by tensor; global: the group as one pool."""
    for distribution in ("uniform", "global"):
        run = make_run(config_of(distribution=distribution, num_partitions=2))
        run.start()
        for step in range(run.plan.phases[0].end):
            train_step(run, step)
        names = run.groups[0].names
        assert len(names) > 1
        weights = [v.double().numpy() for n, v in values(run).items() if n in names]
        if distribution == "global":
            wanted = reference.pooled_masks(weights, reference.exact_keep(Fraction(4, 5), sum(w.size for w in weights)))
        else:
            wanted = [reference.pooled_masks([w], reference.exact_keep(Fraction(4, 5), w.size))[0] for w in weights]
        run.advance(run.plan.phases[0].end)
        for name, mask in zip(names, wanted, strict=True):
            found = run.masks[name]
            assert found is not None
            assert found.tolist() == mask.tolist(), name


def test_overrides() -> None:
    config = config_of(overrides={"0": 0, "3": 0.5}, num_partitions=2, distribution="global")
    run = make_run(config)
    train(run)
    free = [n for n, w in run.weights.items() if w.override is None]
    assert [w.override for w in run.weights.values()] == [0.5, None, None]
    assert run.model.get_parameter("0.weight").all()  # 0 takes a weight out of the prunable set
    assert run.masks.live("3.weight") == 16 * 24 // 2
    assert sum(run.masks.live(n) for n in free) == reference.exact_keep(Fraction(4, 5), 24 * 16 + 16 * 8)


@pytest.mark.parametrize("pattern", ["2:4", "transposable:2:4", "block:8x4"])
def test_an_override_of_zero_is_dense_under_every_pattern(pattern: str) -> None:
    """And need not be divided by the pattern."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7), nn.Linear(7, 16), nn.Linear(16, 8))
    overrides = {"1": 0, "2": 0.0}
    sparsity = 0.5 if pattern.startswith("block") else None
    run = Sparsifier(
        model,
        config_of(pattern=pattern, sparsity=sparsity, overrides=overrides, num_partitions=2),
        total_steps=NUM_STEPS,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n[0] in "12"}
    run.start()
    run.prune_to_target()
    assert run.at_target
    assert {n: run.masks.live(n) for n in run.weights} == {"0.weight": 32, "3.weight": 64}
    assert all(torch.equal(model.get_parameter(n), v) for n, v in before.items())


# --- invariant 2: growing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["changed", "all"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_grow_changes_no_value_and_grown_zeros_leave_at_once(optimizer: str, reset: str) -> None:
    run = make_run(config_of(optimizer_reset=reset), optimizer=optimizer)
    run.start()
    num_grown = 0
    for step in range(run.plan.total_steps):
        train_step(run, step)
        before = values(run)
        change = run.advance(step + 1)
        if change is None:
            continue
        after = values(run)
        pruned = {n for g in change.pruned for n in run.groups[g].names}
        grown = {n for g in change.grown for n in run.groups[g].names}
        for name in run.weights:
            if name not in pruned:
                assert torch.equal(after[name], before[name]), name
            else:
                mask = run.masks[name]
                assert mask is not None
                assert torch.equal(after[name], before[name] * mask)
        masks = {n: run.previous[n] for n in grown}
        for name in grown:
            param = run.masks.params[name]
            assert not after[name][masks[name] == 0].any()
            for key, value in run.optimizer.state.get(param, {}).items():
                mean_of_survivors = optimizer == "schedule-free" and key == "exp_avg_sq"
                if isinstance(value, Tensor) and value.shape == param.shape and not mean_of_survivors:
                    assert not value[masks[name] == 0].any(), key
        if step + 1 == run.plan.total_steps:
            break
        loss_of(run.model, batch_of(step + 1)).backward()
        gradients = {n: run.masks.params[n].grad for n in grown}
        run.mask_gradients()
        run.optimizer.step()
        run.mask_weights()
        for name in grown:
            gradient = gradients[name]
            assert gradient is not None
            should_move = (masks[name] == 0) & (gradient != 0)
            num_grown += int(should_move.sum())
            assert values(run)[name][should_move].all()
        run.optimizer.zero_grad()
    assert num_grown > 500


@pytest.mark.parametrize(("reset", "grown_count"), [("changed", 1), ("all", None), ("none", 20)])
def test_what_a_phase_change_resets(reset: str, grown_count: int | None) -> None:
    """Adam's count restarts in grown tensors only; a pruned tensor's goes on, its pruned moments are cleared."""
    run = make_run(config_of(optimizer_reset=reset, phase_steps=20), num_steps=200)
    run.start()
    for step in range(20):
        train_step(run, step)
    change = run.advance(20)
    assert change is not None
    counts = {n: run.optimizer.state.get(run.masks.params[n], {}).get("step") for n in run.weights}
    grown = {n for g in change.grown for n in run.groups[g].names}
    for name, count in counts.items():
        expected = grown_count if name in grown else None if reset == "all" else 20
        assert (None if count is None else int(count)) == expected, name
    for name in (n for g in change.pruned for n in run.groups[g].names):
        mask = run.masks[name]
        assert mask is not None
        first = run.optimizer.state.get(run.masks.params[name], {}).get("exp_avg")
        assert (first is None) == (reset == "all")
        if first is not None:
            assert bool(first[mask == 0].any()) == (reset == "none")
            assert first[mask == 1].any()


# --- invariant 3: masked weights are 0 -------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["changed", "all", "none"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_masked_weights_are_zero_after_every_step(optimizer: str, reset: str) -> None:
    run = make_run(config_of(optimizer_reset=reset), optimizer=optimizer)
    num_copies = 0

    def check(change: Change | None) -> None:
        nonlocal num_copies
        for name, param in run.masks.params.items():
            mask = run.masks[name]
            if mask is None:
                continue
            assert not param.detach()[mask == 0].any(), name
            copy = run.optimizer.state.get(param, {}).get("z")
            if copy is not None:
                num_copies += 1
                assert not copy[mask == 0].any(), name

    train(run, check)
    assert (num_copies > 100) == (optimizer == "schedule-free")
    if isinstance(run.optimizer, schedulefree.AdamWScheduleFree):
        run.optimizer.eval()  # the averaged weights, which are what is evaluated and saved
        check(None)


def test_the_gradient_norm_is_of_live_gradients() -> None:
    run = make_run()
    run.start()
    loss_of(run.model, batch_of(0)).backward()
    run.mask_gradients()
    for name, param in run.masks.params.items():
        mask = run.masks[name]
        assert param.grad is not None
        assert param.grad.any()
        if mask is not None:
            assert not param.grad[mask == 0].any()


# --- invariant 4: against the plain algorithm ------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1, 2, 3, 6])
def test_stepped_beside_the_plain_reference(kappa: int) -> None:
    """Weights and masks after every step of SGD on a toy whose gradient is w - goal, R = 2."""
    torch.manual_seed(kappa)
    model = nn.Sequential(*(nn.Linear(5, 4 + i % 3, bias=False) for i in range(6))).double()
    goals = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    config = config_of(num_partitions=kappa, phase_steps=3)
    optimizer = SGD(model.parameters(), lr=0.1)
    run = Sparsifier(model, config, total_steps=3 * (1 + 2 * kappa) + 5, optimizer=optimizer)
    first_weights = {n: v.numpy() for n, v in values(run).items()}
    run.start()
    history = reference.cyclic_gap(
        first_weights,
        {n: m.numpy() for n in run.weights if (m := run.masks[n]) is not None},
        [group.names for group in run.groups],
        num_rounds=2,
        sparsity=Fraction(4, 5),
        phase_lengths=[3] * (1 + 2 * kappa),
        fine_tune_length=5,
        gradient=lambda name, w: w - goals[name].numpy(),
        learning_rate=0.1,
    )
    assert len(history) == run.plan.total_steps
    for step, (weights, masks) in enumerate(history):
        for name, param in model.named_parameters():
            param.grad = param.detach() - goals[name]
        run.mask_gradients()
        optimizer.step()
        run.mask_weights()
        run.advance(step + 1)
        for name, value in values(run).items():
            mask, wanted = run.masks[name], masks[name]
            assert (mask is None) == (wanted is None), (step, name)
            if mask is not None and wanted is not None:
                assert mask.numpy().tolist() == wanted.tolist(), (step, name)
            np.testing.assert_allclose(value.numpy(), weights[name], rtol=1e-12, atol=0)


# --- invariant 5: determinism ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"method": "random"}, {"partition": "random"}, {"distribution": "erk"}], ids=str)
def test_same_seed_same_masks(kind: dict[str, Any]) -> None:
    def digests(seed: int, *, config_seed: int | None = None, global_seed: int = 0) -> list[str]:
        run = make_run(config_of(**kind, seed=config_seed), seed=seed)
        torch.manual_seed(global_seed)
        found: list[str] = []
        train(run, lambda change: found.append(run.masks.digest()))
        return found

    first = digests(0)
    assert digests(0, global_seed=77) == first
    assert digests(1)[0] != first[0]
    assert digests(5, config_seed=0) == first


def test_starting_draws_nothing_from_the_global_generator() -> None:
    run = make_run()
    state = torch.get_rng_state()
    run.start()
    assert torch.equal(torch.get_rng_state(), state)


def test_random_masks_differ_between_tensors_of_one_shape() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    run = Sparsifier(model, config_of(), total_steps=NUM_STEPS)
    run.start()
    second, third = run.masks["1.weight"], run.masks["2.weight"]
    assert second is not None
    assert third is not None
    assert not torch.equal(second, third)


@pytest.mark.parametrize("reset", ["changed", "all"])
@pytest.mark.parametrize("stop", [1, 5, 8, 17, 38])
def test_loading_masks_continues_to_the_bit(stop: int, reset: str) -> None:
    whole = make_run(config_of(optimizer_reset=reset))
    train(whole)

    first = make_run(config_of(optimizer_reset=reset))
    first.start()
    for step in range(stop):
        train_step(first, step)
        first.advance(step + 1)
    second = make_run(config_of(optimizer_reset=reset))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    masks = {n: None if (m := first.masks[n]) is None else m.clone() for n in first.weights}
    second.load(stop, masks, dict(first.previous), levels=first.levels, num_done=first.num_done)
    for step in range(stop, NUM_STEPS):
        train_step(second, step)
        second.advance(step + 1)
    assert second.masks.digest() == whole.masks.digest()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


# --- starting --------------------------------------------------------------------------------------------------------


def test_magnitude_first_masks() -> None:
    run = make_run(config_of(initial_mask="magnitude"))
    before = values(run)
    run.start()
    for index, group in enumerate(run.groups):
        for name in group.names:
            mask = run.masks[name]
            if index == 0:
                assert mask is None
                assert torch.equal(values(run)[name], before[name])
            else:
                assert mask is not None
                keep = reference.exact_keep(Fraction(4, 5), mask.numel())
                wanted = reference.largest_mask(before[name].flatten().tolist(), keep)
                assert mask.flatten().tolist() == wanted.tolist()


def test_starting_again_keeps_old_masks_and_prunes_what_was_trained_dense() -> None:
    first = make_run()
    first.start()
    for step in range(8):
        train_step(first, step)
        first.advance(step + 1)
    dense = [n for n in first.weights if first.masks[n] is None]
    assert dense
    assert first.levels[0] == 1
    before, old = values(first), {n: first.masks[n] for n in first.weights}

    second = Sparsifier(first.model, first.config, total_steps=NUM_STEPS, optimizer=first.optimizer)
    second.start(masks=first.masks)
    after = values(second)
    for index, group in enumerate(second.groups):
        for name in group.names:
            mask = second.masks[name]
            if index == 0:
                assert mask is None
                assert torch.equal(after[name], before[name])
                assert second.previous[name] is old[name]
            elif name in dense:
                assert mask is not None
                keep = reference.exact_keep(Fraction(4, 5), mask.numel())
                wanted = reference.largest_mask(before[name].flatten().tolist(), keep)
                assert mask.flatten().tolist() == wanted.tolist()
            else:
                assert mask is not None
                assert mask is old[name]
                assert torch.equal(after[name], before[name])


def test_prune_to_target() -> None:
    run = make_run()
    run.start()
    for step in range(7):
        train_step(run, step)
        run.advance(step + 1)
    assert not run.at_target
    error = run.prune_to_target()
    assert error is not None
    assert 0 < error < 1
    assert run.at_target
    assert run.sparsity() == pytest.approx(0.8, abs=0.002)
    assert run.prune_to_target() is None


# --- what is measured ------------------------------------------------------------------------------------------------


def test_pruning_error_and_iou_against_numpy() -> None:
    run = make_run(config_of(num_partitions=2))
    run.start()
    last: dict[str, np.ndarray] = {}
    num_ious = 0
    for step in range(run.plan.total_steps):
        train_step(run, step)
        before = {n: v.double().numpy() for n, v in values(run).items()}
        change = run.advance(step + 1)
        if change is None:
            continue
        pruned = [n for g in change.pruned for n in run.groups[g].names]
        masks = {n: run.masks[n] for n in pruned}
        if any(mask is None for mask in masks.values()):  # pruned and grown at once
            continue
        new = {n: mask.numpy() for n, mask in masks.items() if mask is not None}
        dropped = sum(float((before[n][new[n] == 0] ** 2).sum()) for n in pruned)
        assert change.pruning_error == pytest.approx(
            dropped / sum(float((before[n] ** 2).sum()) for n in pruned), rel=1e-5
        )
        if all(n in last for n in pruned):
            both = sum(int((last[n] & new[n]).sum()) for n in pruned)
            either = sum(int((last[n] | new[n]).sum()) for n in pruned)
            assert change.mask_iou == pytest.approx(both / either)
            num_ious += 1
        last |= {n: mask.copy() for n, mask in new.items()}
    assert num_ious == 3  # group 0 twice after its first prune, group 1 once


def test_first_changes_have_nothing_to_compare_with() -> None:
    changes = train(make_run(config_of(num_partitions=2)))
    assert (changes[0].pruning_error, changes[0].mask_iou) == (None, None)
    assert changes[1].pruning_error is not None
    assert changes[1].mask_iou is None  # group 0 had no mask before
    assert changes[2].mask_iou is not None  # group 1 began with a random one


def test_advance_does_nothing_inside_a_phase() -> None:
    run = make_run()
    run.start()
    digest = run.masks.digest()
    begins = {p.start for p in run.plan.phases[1:]}
    for step in range(NUM_STEPS + 2):
        assert (run.advance(step) is not None) == (step in begins)
        assert (run.masks.digest() != digest) == (step in begins)
        digest = run.masks.digest()


def test_report() -> None:
    run = make_run()
    train(run)
    report = run.report()
    prunable = sum(a * b for a, b in itertools.pairwise(SIZES))
    assert report["num_prunable"] == prunable
    assert report["num_params"] == sum(p.numel() for p in run.model.parameters())
    assert report["at_target"] is True
    live = [reference.exact_keep(Fraction(4, 5), w.numel) for w in run.weights.values()]
    assert [layer["live"] for layer in report["layers"]] == live
    assert [layer["name"] for layer in report["layers"]] == ["0.weight", "3.weight", "6.weight", "9.weight"]
    assert report["layers"][0]["shape"] == [16, 8]
    assert report["layers"][0]["sparsity"] == pytest.approx(1 - live[0] / 128)
    assert report["sparsity"] == pytest.approx(1 - sum(live) / prunable)
    assert report["model_sparsity"] == pytest.approx((prunable - sum(live)) / report["num_params"])


# --- refusals, the example, memory -----------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(GaPError, match=r"gap\.pattern: '0\.weight' has 8 inputs, which 3 does not divide"):
        make_run(config_of(pattern="block:1x3"))
    with pytest.raises(GaPError, match=r"gap\.num_partitions: found 9.*4"):
        make_run(config_of(num_partitions=9))
    with pytest.raises(GaPError, match=r"gap\.num_partitions: found 9.*4 prunable tensors; expected at most 4"):
        make_run(config_of(num_partitions=9, method="random"))
    with pytest.raises(GaPError, match=r"gap\.partition: method 'random' draws single tensors"):
        make_run(config_of(method="random", partition="random"))
    with pytest.raises(GaPError, match="training has 5"):
        make_run(num_steps=5)


def test_diverged_training_is_named() -> None:
    run = make_run()
    run.start()
    with torch.no_grad():
        run.masks.params["0.weight"][0, 0] = float("nan")
    with pytest.raises(GaPError, match=r"0\.weight: holds NaN"):
        run.advance(run.plan.phases[1].start)


def test_the_example_of_the_module_runs_and_trains() -> None:
    doc = sparsifier_module.__doc__
    assert doc
    example = textwrap.dedent(doc.split("\n\n", 1)[1])
    model = make_model()
    batches = [batch_of(step % 4) for step in range(200)]
    names: dict[str, Any] = {
        "model": model,
        "optimizer": AdamW(model.parameters(), lr=1e-2),
        "batches": batches,
        "loss_of": loss_of,
        "GaPConfig": lambda **values: GaPConfig(**values, include=("Linear",)),
        "Sparsifier": Sparsifier,
    }
    before = loss_of(model, batches[0]).item()
    exec(compile(example, "example", "exec"), names)
    run = names["sparsifier"]
    assert run.at_target
    assert run.plan.total_steps == 200
    assert [run.masks.live(n) for n in run.weights] == [
        reference.exact_keep(Fraction(9, 10), w.numel) for w in run.weights.values()
    ]
    assert loss_of(model, batches[0]).item() < 0.6 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prune_with_its_measures_needs_little_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "CHUNK", 1 << 14)
    monkeypatch.setattr(patterns, "CHUNK", 1 << 14)
    monkeypatch.setattr(change_module, "CHUNK", 1 << 14)
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).to(dtype)
    run = Sparsifier(model, config_of(num_partitions=1), total_steps=NUM_STEPS)
    run.start()
    weight = run.masks.params["0.weight"].detach()
    with PeakMemory(weight) as memory:
        run.prune_to_target()
    assert memory.peak < 2 * weight.nbytes
    # So does one of a tensor that is sparse already, as in every ramp.
    run.masks.set("0.weight", torch.ones_like(weight, dtype=torch.uint8))
    run.levels[0] = 0.5
    with PeakMemory(weight) as memory:
        run.prune_to_target()
    assert memory.peak < 2 * weight.nbytes
