"""P-GaP's merge, by hand: where each tensor comes from, in the model, in the optimizer and in the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset
from toys import Tokens, arguments, causal_lm, gap_trainer
from transformers import TrainerCallback

from gap_hf import GaPConfig, GaPError, GaPTrainer, Sparsifier, make_plan
from gap_hf.allocation import make_groups
from gap_hf.merging import merge_rules
from gap_hf.phases import PARALLEL
from gap_hf.planning import summarize
from gap_hf.replica import live_replica, load_replica, save_replica
from gap_hf.report import describe
from gap_hf.targets import find_targets
from gap_hf.workers import SequentialWorkers

HARD = {"ramp_share": 0, "prune_share": 0}
CONFIG = GaPConfig(sparsity=0.75, method="parallel", num_partitions=2, num_rounds=1, workers="sequential", **HARD)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.point = nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.point(self.conv(x))))


class Net(nn.Module):
    """Two blocks that a partition in two keeps whole, and a stem and a head that belong to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(self.stem(x) if x.shape[1] == 3 else x)
        return self.head(self.norm(x).mean((2, 3)))


def rules_of(model: nn.Module, config: GaPConfig) -> dict[str, int | None]:
    targets = find_targets(model, config)
    return merge_rules(model, targets, make_groups(targets, config, seed=0))


def test_each_tensor_has_the_one_place_that_it_comes_from() -> None:
    rules = rules_of(Net(), CONFIG)
    assert set(rules) == {n for n, _ in Net().named_parameters()} | {n for n, _ in Net().named_buffers()}
    for i in (0, 1):
        assert {rule for name, rule in rules.items() if name.startswith(f"blocks.{i}.")} == {i}
    assert rules["blocks.1.norm.running_var"] == 1
    means = {name for name, rule in rules.items() if rule is None}
    assert means == {
        *("stem.weight", "stem.bias", "head.weight", "head.bias"),
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
    }
    assert rules["norm.num_batches_tracked"] == 0 and rules["frozen"] == 0


def test_a_block_that_the_partition_cuts_has_its_norms_averaged_and_its_biases_by_module() -> None:
    first = ["transformer.h.*.attn.*"]
    rules = rules_of(causal_lm(), CONFIG.replace(partition=[first, ["transformer.h.*.mlp.*"]]))
    assert rules["transformer.h.0.attn.c_attn.bias"] == 0 and rules["transformer.h.0.mlp.c_fc.bias"] == 1
    assert rules["transformer.h.0.ln_1.weight"] is None and rules["transformer.wte.weight"] is None


def forked(
    num_steps: int = 2, memory_format: torch.memory_format = torch.preserve_format
) -> tuple[Net, torch.optim.Optimizer, Sparsifier]:
    """Two replicas in the middle of a round, each after some steps of its own."""
    torch.manual_seed(0)
    model = Net().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    gap = Sparsifier(model, CONFIG, total_steps=20, optimizer=optimizer, workers=SequentialWorkers(2))
    gap.start()
    for step in range(num_steps):
        for worker in (0, 1):
            gap.workers.activate(gap, worker)
            x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(10 * step + worker))
            model(x).square().sum().backward()
            gap.mask_gradients()
            optimizer.step()
            gap.mask_weights()
            optimizer.zero_grad()
    return model, optimizer, gap


def snapshot(gap: Sparsifier, worker: int):
    gap.workers.activate(gap, worker)
    return live_replica(gap).clone()


def test_a_merge_takes_each_tensor_from_its_place() -> None:
    model, optimizer, gap = forked()
    replicas = [snapshot(gap, worker) for worker in (0, 1)]
    assert not torch.equal(replicas[0].tensors["head.weight"], replicas[1].tensors["head.weight"])
    gap.workers.merge(gap)
    assert not gap.workers.apart
    live = live_replica(gap)
    for name, rule in rules_of(model, CONFIG).items():
        expected = (
            (replicas[0].tensors[name].double() + replicas[1].tensors[name].double()).div(2).float()
            if rule is None
            else replicas[rule].tensors[name]
        )
        assert torch.equal(live.tensors[name], expected), name
        if name not in live.params or name == "frozen":
            continue
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found = [replica.optimizer[name][key].double() for replica in replicas]
            wanted = (found[0] + found[1]) / 2 if rule is None else found[rule]
            assert torch.equal(optimizer.state[live.params[name]][key], wanted.float()), (name, key)
    # Each group came dense from its own worker.
    assert all(gap.masks[name] is None for name in gap.weights) and gap.levels == [0.0, 0.0]


def test_replicas_part_at_the_grow_and_do_not_touch_each_other() -> None:
    model, _, gap = forked(num_steps=0)
    first, second = (snapshot(gap, worker) for worker in (0, 1))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert [first.levels, second.levels] == [[0.0, 1.0], [1.0, 0.0]]
    assert first.masks["blocks.0.conv.weight"] is None and second.masks["blocks.1.conv.weight"] is None
    gap.workers.activate(gap, 0)
    with torch.no_grad():
        model.head.weight.add_(1)
    gap.workers.activate(gap, 1)
    assert torch.equal(model.head.weight, second.tensors["head.weight"])
    gap.workers.activate(gap, 0)
    assert torch.equal(model.head.weight, first.tensors["head.weight"] + 1)


def test_the_merged_view_leaves_everything_as_it_was() -> None:
    model, optimizer, gap = forked()
    before = [snapshot(gap, worker) for worker in (0, 1)]
    with gap.workers.merged(gap):
        assert torch.equal(model.blocks[0].conv.weight, before[0].tensors["blocks.0.conv.weight"])
        assert torch.equal(model.blocks[1].conv.weight, before[1].tensors["blocks.1.conv.weight"])
        assert gap.sparsity() == 0.0
        # What is changed in the view stays in it, through a view within it too: evaluation may re-estimate batch norms first.
        with torch.no_grad():
            model.head.weight.fill_(5)
        with gap.workers.merged(gap):
            assert bool((model.head.weight == 5).all())
        assert bool((model.head.weight == 5).all())
    for worker in (0, 1):
        after = snapshot(gap, worker)
        assert all(torch.equal(after.tensors[n], t) for n, t in before[worker].tensors.items())
        for name, state in before[worker].optimizer.items():
            assert all(torch.equal(after.optimizer[name][k], v) for k, v in state.items()), name
        assert after.levels == before[worker].levels
    gap.workers.merge(gap)
    assert optimizer.state[model.head.weight]["step"] == 2


def test_a_merge_and_a_prune_end_the_round() -> None:
    _, _, gap = forked()
    end = gap.plan.phases[0].end
    change = gap.advance(end)
    assert change is not None and change.pruned == (0, 1) and not gap.workers.apart
    assert gap.at_target and gap.sparsity() == 0.75
    line = describe(gap.start(), gap.plan)
    assert "each of 2 workers grew its own group" in line


def test_optimizer_state_that_has_no_mean_is_refused() -> None:
    model, optimizer, gap = forked()
    optimizer.state[model.head.weight]["exp_avg"] = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(GaPError, match=r"head\.weight: the workers' optimizer state 'exp_avg' has no mean"):
        gap.workers.merge(gap)


def test_a_replica_survives_its_file(tmp_path: Path) -> None:
    _, _, gap = forked()
    replica = snapshot(gap, 1)
    save_replica(tmp_path / "w.safetensors", replica)
    back = load_replica(tmp_path / "w.safetensors", gap)
    assert all(torch.equal(back.tensors[n], t) for n, t in replica.tensors.items())
    assert back.levels == replica.levels
    for name, mask in replica.masks.items():
        assert back.masks[name] is None if mask is None else torch.equal(back.masks[name], mask)
    for name, state in replica.optimizer.items():
        assert all(torch.equal(back.optimizer[name][k], v) for k, v in state.items())
    assert load_file(tmp_path / "w.safetensors")["mask/blocks.0.conv.weight"].dtype == torch.uint8


def test_optimizer_state_lies_in_memory_as_its_weight_does(tmp_path: Path) -> None:
    model, optimizer, gap = forked(memory_format=torch.channels_last)
    weight = model.blocks[0].conv.weight
    assert not weight.is_contiguous()
    replica = snapshot(gap, 0)
    save_replica(tmp_path / "w.safetensors", replica)
    back = load_replica(tmp_path / "w.safetensors", gap).optimizer["blocks.0.conv.weight"]
    assert torch.equal(back["exp_avg"], replica.optimizer["blocks.0.conv.weight"]["exp_avg"])
    assert back["exp_avg"].stride() == weight.stride()
    # A merge gives state to a weight that has none in the model's own replica.
    gap.workers.activate(gap, 1)
    del optimizer.state[weight]
    gap.workers.merge(gap)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "not a replica of this model"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a replica of this model"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"head.weight", b"heat.weight")),
            "holds 'heat.weight', which the model has not",
        ),
    ],
    ids=["gone", "cut", "another model"],
)
def test_a_replica_that_is_not_one_is_refused(damage, message: str, tmp_path: Path) -> None:
    _, _, gap = forked()
    path = tmp_path / "w.safetensors"
    save_replica(path, snapshot(gap, 0))
    damage(path)
    with pytest.raises(GaPError, match=message):
        load_replica(path, gap)


# --- plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_as_published() -> None:
    config = GaPConfig(sparsity=0.9, method="parallel", num_partitions=3, num_rounds=2, **HARD)
    plan = make_plan(config, num_groups=3, total_steps=100)
    assert [(p.kind, p.start, p.end) for p in plan.phases] == [
        *((PARALLEL, 0, 37), (PARALLEL, 37, 75)),
        ("fine-tune", 75, 100),
    ]
    for worker in range(3):
        assert plan.levels_at(0, worker) == tuple(0.0 if g == worker else 1.0 for g in range(3))
    # (1 - s) + s / kappa, as the paper has it.
    assert plan.live_share(plan.phases[0], [1, 1, 1], [0.1] * 3) == pytest.approx(0.4)
    kinds = [
        ("merge" if u.merge else "prune" if u.prune_to else "grow", u.worker) for u in plan.updates if u.step == 37
    ]
    assert kinds == [("merge", None), *[("prune", None)] * 3, ("grow", 0), ("grow", 1), ("grow", 2)]
    assert type(plan).from_dict(plan.to_dict()) == plan


def test_ramps_come_to_the_target_at_the_last_merge() -> None:
    config = GaPConfig(sparsity=0.9, method="parallel", num_partitions=2, num_rounds=2)
    plan = make_plan(config, num_groups=2, total_steps=400)
    levels = [[plan.levels_at(step, w) for w in (0, 1)] for step in range(0, 300, 10)]
    assert levels[0] == [(0.0, 0.0), (0.0, 0.0)]
    assert plan.levels_at(150, 0) == (0.0, pytest.approx(0.875)) and plan.levels_at(150, 1) == (
        pytest.approx(0.875),
        0.0,
    )
    assert 0 < plan.levels_at(290, 0)[0] < 1 and plan.levels_at(300) == (1.0, 1.0)


def test_cyclic_rounds_follow() -> None:
    config = GaPConfig(sparsity=0.9, method="parallel", num_partitions=2, num_rounds=2, cyclic_rounds=1, **HARD)
    plan = make_plan(config, num_groups=2, total_steps=100)
    assert [(p.kind, p.round) for p in plan.phases] == [
        *((PARALLEL, 1), (PARALLEL, 2), ("cyclic", 3), ("cyclic", 3)),
        ("fine-tune", 3),
    ]
    assert [plan.grown(p) for p in plan.phases] == [(0, 1), (0, 1), (0,), (1,), ()]


def test_phase_steps_leave_the_rest_to_the_fine_tune() -> None:
    config = GaPConfig(sparsity=0.9, method="parallel", num_partitions=2, num_rounds=3, phase_steps=20)
    assert [p.end for p in make_plan(config, num_groups=2, total_steps=100).phases] == [20, 40, 60, 100]
    with pytest.raises(GaPError, match=r"3 phases of 20 steps and a fine-tune need at least 61 .* use num_rounds: 2"):
        make_plan(config, num_groups=2, total_steps=50)


def test_the_printed_plan_knows_workers() -> None:
    summary = summarize(causal_lm(), CONFIG, total_steps=40)
    assert [p["dense_groups"] for p in summary["phases"]] == [[1, 2], []]
    assert summary["phases"][0]["live_share"] == pytest.approx(0.25 + 0.75 / 2, abs=0.01)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            {"workers": None},
            {},
            r"with 2 partitions found 1 process, .* accelerate launch --multi_gpu --num_processes 2, or set gap.workers: sequential",
        ),
        ({}, {}, r"gradient_accumulation_steps: found 1, expected a multiple of gap.num_partitions \(2\)"),
        ({}, {"gradient_accumulation_steps": 2, "optim": "adamw_bnb_8bit"}, "'adamw_bnb_8bit' keeps quantised moments"),
        (
            {},
            {"gradient_accumulation_steps": 2, "optim": "schedule_free_adamw"},
            "moves the weights for each evaluation",
        ),
        (
            {},
            {"gradient_accumulation_steps": 2, "enable_jit_checkpoint": True},
            "enable_jit_checkpoint: saves in the middle",
        ),
        ({"workers": "threads"}, {}, "gap.workers: found 'threads', expected one of processes, sequential"),
        ({"cyclic_rounds": -1}, {}, "gap.cyclic_rounds: found -1, expected at least 0"),
    ],
)
def test_refused(config, changes, message: str, tmp_path: Path) -> None:
    with pytest.raises(GaPError, match=message):
        gap_trainer(tmp_path / "out", config={**CONFIG.to_dict(), **config}, **changes)
    assert not (tmp_path / "out").exists()


def test_a_schedule_free_optimizer_that_the_trainer_makes_is_refused(tmp_path: Path) -> None:
    import schedulefree

    class Trainer(GaPTrainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = schedulefree.AdamWScheduleFree(self.model.parameters(), lr=1e-2)
            return self.optimizer

    trainer = Trainer(
        model=causal_lm(),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=Tokens(),
        gap_config=CONFIG,
    )
    with pytest.raises(GaPError, match="'parallel' found AdamWScheduleFree, which moves the weights"):
        trainer.train()


def test_an_optimizer_that_accelerate_has_wrapped(tmp_path: Path) -> None:
    first = gap_trainer(tmp_path / "a", config=CONFIG, gradient_accumulation_steps=2)
    first.train()
    assert callable(first.optimizer.eval)
    again = gap_trainer(
        tmp_path / "b",
        config=CONFIG,
        model=first.model,
        gradient_accumulation_steps=2,
        optimizers=(first.optimizer, None),
    )
    again.train()
    assert again.gap.report()["sparsity"] == first.gap.report()["sparsity"]


def test_a_run_that_is_stopped_in_a_round_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    stopped = gap_trainer(
        tmp_path / "b", config=CONFIG.replace(prune_if_stopped=True), gradient_accumulation_steps=2, callbacks=[Stop()]
    )
    stopped.train()
    assert not stopped.gap.workers.apart and stopped.gap.at_target
    assert "the workers' replicas were merged" in capsys.readouterr().out


def test_the_best_model_is_kept_where_a_run_is_stopped_in_a_round(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 5

    values = iter((2.0, 1.0, 0.0))
    trainer = gap_trainer(
        tmp_path,
        config=CONFIG.replace(best_model_at_target=False),
        gradient_accumulation_steps=2,
        callbacks=[Stop()],
        eval_dataset=Tokens(8),
        compute_metrics=lambda _: {"falling": next(values)},
        load_best_model_at_end=True,
        metric_for_best_model="falling",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    weights = dict(trainer.model.named_parameters())  # type: ignore[union-attr]
    assert not trainer.gap.workers.apart
    assert all(torch.equal(weights[name].detach(), value) for name, value in best.items())


def test_data_that_end_within_a_step(tmp_path: Path) -> None:
    class Five(IterableDataset):
        def __iter__(self):
            data = Tokens()
            return (data[i] for i in range(20))

    trainer = gap_trainer(tmp_path, config=CONFIG, gradient_accumulation_steps=2, train_dataset=Five(), max_steps=12)
    trainer.train()
    assert trainer.state.global_step == 12 and trainer.gap.at_target


def test_other_methods_have_no_workers() -> None:
    with pytest.raises(GaPError, match=r"gap.workers: found 'sequential', but method 'cyclic' does not use it"):
        make_plan(GaPConfig(sparsity=0.9, workers="sequential"), num_groups=3, total_steps=100)
    with pytest.raises(GaPError, match="'parallel' with 2 groups needs as many workers, found 1"):
        Sparsifier(causal_lm(), CONFIG, total_steps=20)
