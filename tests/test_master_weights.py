"""fp32 masters of a bf16 model's live weights: what whole masters would give, to the bit, through files too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_live_state import GAP, OPTIMIZERS, Lion, MakeOptimizer, network
from torch import Tensor, nn
from toys import CONFIG, assert_masked_weights_are_zero, causal_lm, gap_trainer, same_tensors

from gap_hf import GaPConfig, GaPError, Sparsifier
from gap_hf.live_state import release
from gap_hf.masks import Masks
from gap_hf.master_weights import MasterState

MASTERS = {"live_state": True, "master_weights": True}
MAKE: dict[str, MakeOptimizer] = {
    **{name: OPTIMIZERS[name] for name in ("adamw-fused", "adamw-loop", "sgd", "sgd-nesterov", "rmsprop")},
    "lion": lambda p: Lion(p, lr=1e-3),
}


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _ in range(2):  # two micro-batches
        inputs = torch.randn(3, 12, generator=generator).to(next(model.parameters()).dtype)
        (model(inputs).float() - 1).square().mean().backward()


def packed(
    make: MakeOptimizer, config: GaPConfig, steps: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], Sparsifier, Any]:
    model = network().to(dtype)
    optimizer = make(list(model.parameters()))
    sparsifier = Sparsifier(model, config.replace(**MASTERS), total_steps=steps, optimizer=optimizer)
    sparsifier.start()
    for step in range(steps):
        backward(model, step)
        sparsifier.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        sparsifier.mask_weights()
        optimizer.zero_grad()
        sparsifier.advance(step + 1)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, sparsifier, optimizer


def with_whole_masters(
    make: MakeOptimizer, config: GaPConfig, steps: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Sparsifier]:
    """The plain way: a second model of fp32 masters, masked as dense training is, and a bf16 one that is its rounding."""
    model, masters = network().to(dtype), network().to(dtype).float()
    pairs = list(zip(model.parameters(), masters.parameters(), strict=True))
    optimizer = make(list(masters.parameters()))
    sparsifier = Sparsifier(masters, config, total_steps=steps, optimizer=optimizer)
    sparsifier.start()
    for step in range(steps):
        with torch.no_grad():
            for low, master in pairs:
                low.copy_(master)
        backward(model, step)
        for low, master in pairs:  # masked before clipping, in bf16
            if (mask := next((m for p, m in sparsifier.masks.sparse_params() if p is master), None)) is not None:
                assert low.grad is not None
                low.grad.mul_(mask)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for low, master in pairs:
            assert low.grad is not None
            master.grad = low.grad.float()
        optimizer.step()
        sparsifier.mask_weights()
        model.zero_grad()
        with torch.no_grad():  # masks are chosen by what the model has, which is the rounding
            exact = [master.detach().clone() for _, master in pairs]
            for _, master in pairs:
                master.copy_(master.to(dtype).float())
            sparsifier.advance(step + 1)
            masked = {id(p): m for p, m in sparsifier.masks.sparse_params()}
            for (_, master), value in zip(pairs, exact, strict=True):
                master.copy_(value * masked.get(id(master), 1))
    return {n: p.detach().to(dtype) for n, p in masters.named_parameters()}, sparsifier


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in MAKE), ("adamw-fused", torch.float16)]
)
def test_three_hundred_steps_equal_training_with_whole_masters(name: str, dtype: torch.dtype) -> None:
    ours, sparsifier, optimizer = packed(MAKE[name], GAP, 300, dtype)
    theirs, plain = with_whole_masters(MAKE[name], GAP, 300, dtype)
    assert len(sparsifier.plan.phases) == 4  # three changes
    assert sparsifier.masks.digest() == plain.masks.digest()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    for param in sparsifier.model.parameters():
        assert all(v.dtype is torch.float32 for v in optimizer.state.get(param, {}).values() if isinstance(v, Tensor))


def test_small_updates_are_not_rounded_away() -> None:
    """An update of 1e-4 of a weight near 1 is less than bf16 can show: without a master it never moves."""

    def moved(masters: bool) -> float:
        weight = nn.Parameter(torch.ones(4, 16, dtype=torch.bfloat16))
        masks = Masks({"w": weight})
        masks.set("w", torch.ones(4, 16, dtype=torch.uint8).triu_())
        optimizer = torch.optim.SGD([weight], lr=1e-4)
        if masters:
            MasterState(optimizer, masks)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return float(weight.detach()[0, 0])

    assert moved(False) == 1.0
    assert moved(True) == pytest.approx(0.98, abs=0.004)


def test_bytes_are_those_of_live_entries() -> None:
    weight = nn.Parameter(torch.randn(200, 500, dtype=torch.bfloat16))
    masks = Masks({"w": weight})
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    live = MasterState(optimizer, masks)
    mask = (torch.rand(200, 500, generator=torch.Generator().manual_seed(0)) < 0.1).to(torch.uint8)
    for current, share in ((None, 1.0), (mask, 0.1), (None, 1.0)):
        masks.set("w", current)
        if current is not None:
            live.follow_mask(weight, current, "changed")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        # A master and two moments in fp32, and a byte for each live weight of a sparse one.
        assert live.num_bytes() == pytest.approx(share * 100_000 * (13 if share < 1 else 12), rel=0.02)


def test_what_somebody_else_writes_is_taken_over() -> None:
    weight, bias = (nn.Parameter(torch.full(shape, 1.0, dtype=torch.bfloat16)) for shape in ((4, 16), (4,)))
    masks = Masks({"w": weight})
    masks.set("w", torch.ones(4, 16, dtype=torch.uint8).triu_())
    optimizer = torch.optim.SGD([weight, bias], lr=1e-4)
    MasterState(optimizer, masks)

    def step() -> None:
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        optimizer.step()

    for _ in range(30):
        step()
    with torch.no_grad():
        weight[0, 0], bias[1] = 8.0, 8.0
    for _ in range(30):
        step()
    low = float(torch.tensor(1 - 60e-4).bfloat16())
    assert weight.detach()[0, :2].tolist() == [8.0, low]  # 30 steps of 1e-4 are less than bf16 shows at 8
    assert bias.detach()[:2].tolist() == [low, 8.0]


# --- the trainer -----------------------------------------------------------------------------------------------------


def run(folder: Path, config: GaPConfig, resume: Path | None = None, **changes: Any) -> Any:
    changes = {"max_steps": 24, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, **changes}
    trainer = gap_trainer(folder, config=config, model=causal_lm().bfloat16(), **changes)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, optim: str) -> None:
    config = CONFIG.replace(**MASTERS)
    changes = {"optim": optim, "learning_rate": 1e-3 if optim != "sgd" else 0.1}
    whole = run(tmp_path / "whole", config, **changes)
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    assert_masked_weights_are_zero(whole)
    for step in (4, 12, 20):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        saved = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        assert all(state["live_master"]["step"].dtype is torch.float32 for state in saved.values())
        resumed = run(tmp_path / str(step), config, folder, **changes)
        assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_a_trainer_that_has_trained_goes_back_to_a_checkpoint(tmp_path: Path) -> None:
    trainer = run(tmp_path, CONFIG.replace(**MASTERS))
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for step in (4, 12):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same_tensors(trainer.model.state_dict(), whole)


def test_released_state_is_the_optimizers_own() -> None:
    _, sparsifier, optimizer = packed(MAKE["adamw-fused"], GAP, 20)
    release(optimizer)
    for param in sparsifier.model.parameters():
        state = optimizer.state[param]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(
            state[key].shape == param.shape and state[key].dtype is torch.bfloat16 for key in state if key != "step"
        )
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_a_state_with_masters_is_loaded_without(tmp_path: Path) -> None:
    _, sparsifier, optimizer = packed(MAKE["adamw-fused"], GAP, 20)
    saved = optimizer.state_dict()
    model = network().bfloat16()
    plain = MAKE["adamw-fused"](list(model.parameters()))
    plain.load_state_dict(saved)
    other = Sparsifier(model, GAP, total_steps=20, optimizer=plain)
    masks = {name: sparsifier.masks[name] for name in sparsifier.weights}
    other.load(20, masks, {}, levels=sparsifier.levels, num_done=sparsifier.num_done)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
        assert plain.state[param]["exp_avg"].shape == param.shape
    plain.step()


def test_fp32_weights_have_none_and_are_trained_as_without(tmp_path: Path) -> None:
    results = []
    for changes in ({"live_state": True}, MASTERS):
        trainer = gap_trainer(tmp_path, config=CONFIG.replace(**changes), max_steps=12)
        trainer.train()
        results.append(trainer.model.state_dict())  # type: ignore[union-attr]
    assert same_tensors(*results)


def test_it_needs_live_state() -> None:
    with pytest.raises(GaPError, match=r"gap\.master_weights: needs live_state: true, found false"):
        GaPConfig(sparsity=0.9, master_weights=True)
