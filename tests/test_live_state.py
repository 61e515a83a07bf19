"""State of live weights only: the weights of masked dense training to the bit, and a fraction of its state."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from toys import CONFIG, Tokens, assert_masked_weights_are_zero, causal_lm, gap_trainer, same_tensors
from transformers import Adafactor, Trainer, TrainerCallback

from gap_hf import GaPConfig, GaPError, Sparsifier
from gap_hf.live_state import LiveState, check_elementwise, release
from gap_hf.masks import Masks

MakeOptimizer = Callable[[Any], Optimizer]
O = torch.optim  # noqa: E741

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw-loop": lambda p: O.AdamW(p, lr=1e-2, foreach=False, weight_decay=0.1),
    "adamw-foreach": lambda p: O.AdamW(p, lr=1e-2, foreach=True, weight_decay=0.1),
    "adamw-fused": lambda p: O.AdamW(p, lr=1e-2, fused=True, weight_decay=0.1),
    "adamw-amsgrad": lambda p: O.AdamW(p, lr=1e-2, amsgrad=True),
    "adam-authors": lambda p: O.Adam(p, lr=1e-2, betas=(0.9, 0.997), eps=1e-9, weight_decay=0.01),
    "nadam": lambda p: O.NAdam(p, lr=1e-2),
    "radam": lambda p: O.RAdam(p, lr=1e-2),
    "adamax": lambda p: O.Adamax(p, lr=1e-2),
    "adagrad": lambda p: O.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: O.Adadelta(p, lr=1.0),
    "rmsprop": lambda p: O.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: O.Rprop(p, lr=1e-3),
    "asgd": lambda p: O.ASGD(p, lr=1e-2),
    "sgd": lambda p: O.SGD(p, lr=1e-2, weight_decay=0.1),
    "sgd-nesterov": lambda p: O.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}
GAP = GaPConfig(sparsity=0.8, num_partitions=2, num_rounds=1, ramp_share=0, prune_share=0, include=("*.weight",))


class Lion(Optimizer):
    """Chen et al. 2023: somebody's own optimizer, and one that looks at each weight alone."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(torch.sign(m * b1 + p.grad * (1 - b1)), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


class Normalised(Lion):
    """Divides by the root mean square of the whole gradient, zeros included."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad / p.grad.square().mean().sqrt(), alpha=-group["lr"])


def network(kind: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv":
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


def trained(
    make: MakeOptimizer, config: GaPConfig, *, steps: int = 300, kind: str = "linear", clip: float | None = None
) -> tuple[dict[str, Tensor], Sparsifier, Any]:
    model = network(kind)
    parameters = list(model.parameters())
    # Two groups, of which one decays: as Trainer makes them.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = make(groups if "weight_decay" in make(parameters).defaults else parameters)
    schedule = O.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * steps))
    sparsifier = Sparsifier(model, config, total_steps=steps, optimizer=optimizer)
    sparsifier.start()
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for _ in range(2):
            shape = (3, 4, 8, 8) if kind == "conv" else (3, 12)
            inputs = torch.randn(shape, generator=generator)
            (model(inputs) - 1).square().mean().backward()
        sparsifier.mask_gradients()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        sparsifier.mask_weights()
        for name, param in sparsifier.masks.params.items():
            if (mask := sparsifier.masks[name]) is not None:
                assert not param.detach()[mask == 0].any(), (step, name)
        optimizer.zero_grad()
        schedule.step()
        sparsifier.advance(step + 1)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, sparsifier, optimizer


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the same weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reset"), [*((name, "changed") for name in OPTIMIZERS), ("adamw-fused", "all"), ("adagrad", "all")]
)
def test_three_hundred_steps_equal_masked_dense_training(name: str, reset: str) -> None:
    config = GAP.replace(optimizer_reset=reset)
    dense, plain, _ = trained(OPTIMIZERS[name], config, clip=0.5)
    live, sparsifier, _ = trained(OPTIMIZERS[name], config.replace(live_state=True), clip=0.5)
    assert len(sparsifier.plan.phases) == 4  # three changes
    assert sparsifier.masks.digest() == plain.masks.digest()
    assert equal(live, dense)


@pytest.mark.parametrize(
    "config",
    [
        GAP.replace(ramp_share=0.8, prune_share=0.5, update_steps=10),
        GAP.replace(pattern="block:4x1"),
        GAP.replace(distribution="global", method="random"),
        GaPConfig(sparsity=0.8, method="rigl", update_steps=20, include=("*.weight",)),
        GaPConfig(sparsity=0.8, method="set", update_steps=20, include=("*.weight",)),
        GaPConfig(sparsity=0.8, method="mest", update_steps=20, drop_fraction=0.5, include=("*.weight",)),
        GaPConfig(sparsity=0.8, method="gmp", update_steps=20, include=("*.weight",)),
        GaPConfig(sparsity=0.8, method="acdc", include=("*.weight",)),
        GaPConfig(sparsity=0.8, method="static", include=("*.weight",)),
        GaPConfig(sparsity=0.8, method="oneshot", include=("*.weight",)),
    ],
    ids=lambda c: f"{c.method}-{c.pattern}-{c.ramp_share}",
)
@pytest.mark.parametrize("name", ["adamw-fused", "sgd-nesterov"])
def test_every_method_and_pattern(name: str, config: GaPConfig) -> None:
    dense, _, _ = trained(OPTIMIZERS[name], config, steps=120)
    live, _, _ = trained(OPTIMIZERS[name], config.replace(live_state=True), steps=120)
    assert equal(live, dense)


@pytest.mark.parametrize("name", ["adamw-fused", "sgd-nesterov"])
def test_convolutions_in_channels_last(name: str) -> None:
    config = GAP.replace(include=("0", "2"))
    dense, _, _ = trained(OPTIMIZERS[name], config, kind="conv", steps=60)
    live, sparsifier, _ = trained(OPTIMIZERS[name], config.replace(live_state=True), kind="conv", steps=60)
    assert any(not p.is_contiguous() for p in sparsifier.masks.params.values())
    assert equal(live, dense)


def test_a_strangers_optimizer_that_looks_at_each_weight_alone() -> None:
    dense, _, _ = trained(Lion, GAP)
    live, sparsifier, _ = trained(Lion, GAP.replace(live_state=True))
    assert isinstance(sparsifier.optimizer, LiveState)
    assert equal(live, dense)


TRAINERS: dict[str, dict[str, Any]] = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "decay": {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3},
    "no clipping": {"max_grad_norm": 0.0},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "foreach": {"optim": "adamw_torch"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


def run(folder: Path, config: GaPConfig, resume: Path | None = None, **changes: Any) -> Any:
    # A norm that no gradient reaches: the packed ones are summed in another order, so what is clipped agrees to rounding
    # only (test_packed_gradients.py).
    changes = {"max_steps": 24, "save_strategy": "no", "max_grad_norm": 10.0, **changes}
    trainer = gap_trainer(folder, config=config, **changes)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [e for e in trainer.state.log_history if "train_runtime" not in e]


# Dynamo reads .grad of every tensor that it wraps, and the loss of a causal LM is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_gives_the_same_weights_and_log(tmp_path: Path, name: str) -> None:
    dense = run(tmp_path / "dense", CONFIG, **TRAINERS[name])
    live = run(tmp_path / "live", CONFIG.replace(live_state=True), **TRAINERS[name])
    assert same_tensors(live.model.state_dict(), dense.model.state_dict())
    norms = [[entry.pop("grad_norm", 0.0) for entry in log_of(trainer)] for trainer in (live, dense)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and max(norms[1]) < 10
    assert log_of(live) == log_of(dense)
    assert_masked_weights_are_zero(live)


# --- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """A run with live state and one without, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("saved")
    every = {"save_strategy": "steps", "save_steps": 1}
    return {live: run(folder / str(live), CONFIG.replace(live_state=live), **every) for live in (True, False)}


@pytest.mark.parametrize("step", [2, 8, 9, 20])
def test_resumed_equals_uninterrupted_in_either_form(saved: dict[bool, Any], tmp_path: Path, step: int) -> None:
    for live, whole in saved.items():
        checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert any("live_exp_avg" in value for value in state.values()) == live
        for goes_on_live in (True, False):
            resumed = run(tmp_path / f"{live}-{goes_on_live}", CONFIG.replace(live_state=goes_on_live), checkpoint)
            assert same_tensors(resumed.model.state_dict(), whole.model.state_dict()), (live, goes_on_live)


def test_a_second_run_of_the_same_trainer(tmp_path: Path) -> None:
    def twice(config: GaPConfig) -> Any:
        trainer = run(tmp_path / str(config.live_state), config)
        trainer.train()
        return trainer

    live, dense = twice(CONFIG.replace(live_state=True)), twice(CONFIG)
    assert same_tensors(live.model.state_dict(), dense.model.state_dict())


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("step", [2, 9])
def test_a_trainer_that_has_trained_goes_back_to_a_checkpoint(tmp_path: Path, step: int, live: bool) -> None:
    trainer = run(tmp_path, CONFIG.replace(live_state=live), save_strategy="steps", save_steps=1)
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same_tensors(trainer.model.state_dict(), whole)


class Write(TrainerCallback):
    """Puts ones where the masks have zeros, as an average or a rollback of the weights may."""

    trainer: Any = None

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (7, 22):
            for param, mask in self.trainer.gap.masks.sparse_params():
                param.masked_fill_(mask == 0, 1.0)


def test_what_somebody_else_writes_to_masked_weights_is_zeroed(tmp_path: Path) -> None:
    found = []
    for live in (True, False):
        write = Write()
        write.trainer = gap_trainer(
            tmp_path, config=CONFIG.replace(live_state=live), max_steps=24, max_grad_norm=0.0, callbacks=[write]
        )
        write.trainer.train()
        assert_masked_weights_are_zero(write.trainer)
        found.append(dict(write.trainer.model.state_dict()))
    assert same_tensors(*found)


class Ten(IterableDataset):
    """Ten batches of four, of a length that nobody knows."""

    def __iter__(self) -> Any:
        data = Tokens()
        return (data[i] for i in range(40))


def test_micro_batches_that_come_to_no_step_count_in_the_next(tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 3, "max_steps": 12, "max_grad_norm": 0.0, "train_dataset": Ten()}
    live, dense = (run(tmp_path, CONFIG.replace(live_state=live), **changes) for live in (True, False))
    assert same_tensors(live.model.state_dict(), dense.model.state_dict())


class Own(O.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_calls_its_parents_step(tmp_path: Path) -> None:
    O.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # from now on its step has hooks too
    found = []
    for kind in (Own, O.SGD):
        model = causal_lm()
        trainer = run(
            tmp_path,
            CONFIG.replace(live_state=True),
            model=model,
            optimizers=(kind(model.parameters(), lr=0.1, momentum=0.9), None),
            max_grad_norm=0.0,
        )
        found.append(dict(trainer.model.state_dict()))
    assert same_tensors(*found)


def test_released_state_is_that_of_dense_training() -> None:
    _, _, dense = trained(OPTIMIZERS["adamw-fused"], GAP)
    _, _, optimizer = trained(OPTIMIZERS["adamw-fused"], GAP.replace(live_state=True))
    assert {v["exp_avg"].ndim for p, v in optimizer.state.items() if p.ndim > 1} == {1}
    release(optimizer)
    ours, theirs = optimizer.state_dict()["state"], dense.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i in ours:
        assert ours[i].keys() == theirs[i].keys()
        assert all(torch.equal(ours[i][key], theirs[i][key]) for key in ours[i])
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_an_optimizer_that_knows_nothing_of_it_says_what_it_misses() -> None:
    _, sparsifier, optimizer = trained(OPTIMIZERS["adamw-fused"], GAP.replace(live_state=True), steps=20)
    parameters = list(sparsifier.model.parameters())
    stranger = OPTIMIZERS["adamw-fused"](
        [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim == 1]}]
    )
    stranger.load_state_dict(optimizer.state_dict())
    for param in parameters:
        param.grad = torch.ones_like(param)
    with pytest.raises(KeyError, match="exp_avg"):
        stranger.step()


def test_state_is_loaded_in_the_middle_of_a_run() -> None:
    weights = []
    for config in (GAP, GAP.replace(live_state=True)):
        _, sparsifier, optimizer = trained(OPTIMIZERS["adamw-fused"], config, steps=20)
        saved = optimizer.state_dict()
        params = dict(sparsifier.model.named_parameters())
        for load in (False, True):
            for param in params.values():
                param.grad = torch.ones_like(param)
            sparsifier.mask_gradients()
            optimizer.step()
            sparsifier.mask_weights()
            if not load:
                optimizer.load_state_dict(saved)
        weights.append({n: p.detach().clone() for n, p in params.items()})
    assert equal(*weights)


def test_state_of_another_mask_is_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    masks = Masks({"w": weight})
    masks.set("w", torch.eye(4, 8, dtype=torch.uint8))
    optimizer = O.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(5)
    with pytest.raises(GaPError, match=r"momentum_buffer.*\(5,\).*\(4, 8\).*\(64,\).*4 live"):
        LiveState(optimizer, masks).sync()


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_bytes_of_the_state_follow_the_live_share() -> None:
    weight = nn.Parameter(torch.randn(200, 500))
    masks = Masks({"w": weight})
    optimizer = O.AdamW([weight], lr=1e-3)
    live = LiveState(optimizer, masks)
    for density in (0.2, 0.1):
        mask = (torch.rand(200, 500, generator=torch.Generator().manual_seed(0)) < density).to(torch.uint8)
        masks.set("w", mask)
        live.follow_mask(weight, mask, "changed")
        weight.grad = torch.randn(200, 500)
        optimizer.step()
        count = int(mask.sum())
        padded = -(-count // 64) * 64
        assert live.num_bytes() == padded * (4 + 4) + count + 4  # two moments, a byte to find it by, one step count
        assert weight.detach()[mask == 0].abs().max() == 0


@pytest.mark.parametrize("mask", ["empty", "far apart", "first and last", "full"])
def test_odd_masks(mask: str) -> None:
    shape = (3, 1024)
    flat = torch.zeros(3072, dtype=torch.uint8)
    where: dict[str, Any] = {"empty": [], "far apart": [0, 255, 511, 3071], "first and last": [0, 3071]}
    flat[where.get(mask, slice(None))] = 1
    results = []
    for live in (False, True):
        weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        masks = Masks({"w": weight})
        masks.set("w", flat.view(shape))
        optimizer = O.AdamW([weight], lr=0.1, fused=True)
        if live:
            LiveState(optimizer, masks)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            weight.grad = torch.randn(shape, generator=generator) * flat.view(shape)
            optimizer.step()
            masks.apply_to_weights()
        results.append(weight.detach())
    assert torch.equal(*results)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False), "each weight by itself"),
        (lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2), "outside its step"),
        (lambda p: O.LBFGS(p), "could not be tried"),
        (lambda p: O.Muon([x for x in p if x.ndim == 2]), "could not be tried"),
        (lambda p: Normalised(p), "each weight by itself"),
    ],
    ids=["adafactor", "schedule-free", "lbfgs", "muon", "normalised"],
)
def test_optimizers_that_look_at_more_than_one_weight(make: MakeOptimizer, why: str) -> None:
    optimizer = make(list(network().parameters()))
    before = torch.random.get_rng_state()
    with pytest.raises(GaPError, match=f"gap.live_state: .*{why}.*live_state: false"):
        check_elementwise(optimizer)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"live_state": True, "method": "parallel"}, "method: parallel"),
        ({"live_state": True, "optimizer_reset": "none"}, "optimizer_reset: none"),
        ({"live_state": "yes"}, "true or false"),
    ],
)
def test_configs_that_contradict_it(values: dict[str, Any], words: str) -> None:
    with pytest.raises(GaPError, match=f"gap.live_state: .*{words}"):
        GaPConfig(sparsity=0.8, **values)


def test_a_closure_is_refused_and_a_step_that_fails_leaves_the_groups_as_they_were() -> None:
    class Fails(O.SGD):
        def step(self, closure: Any = None) -> None:
            if self.param_groups[0]["params"][0].numel() == 64:  # the padded vector of four live entries
                raise RuntimeError("out of memory")

    weight = nn.Parameter(torch.randn(4, 8))
    masks = Masks({"w": weight})
    masks.set("w", torch.eye(4, 8, dtype=torch.uint8))
    weight.grad = torch.ones(4, 8)
    optimizer = O.SGD([weight], lr=0.1, momentum=0.9)
    LiveState(optimizer, masks)
    with pytest.raises(GaPError, match="closure"):
        optimizer.step(lambda: 0.0)
    failing = Fails([weight], lr=0.1)
    LiveState(failing, masks)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            failing.step()
    release(failing)
    assert failing.param_groups[0]["params"][0] is weight


def test_an_optimizer_is_freed_with_what_packs_it() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    masks = Masks({"w": weight})
    optimizer = O.SGD([weight], lr=0.1)
    LiveState(optimizer, masks)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_a_weight_with_holes_in_its_memory() -> None:
    weight = nn.Parameter(torch.randn(4, 16)[:, ::2])
    masks = Masks({"w": weight})
    masks.set("w", torch.eye(4, 8, dtype=torch.uint8))
    with pytest.raises(GaPError, match=r"strides \(16, 2\)"):
        LiveState(O.SGD([weight], lr=0.1), masks).sync()
