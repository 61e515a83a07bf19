"""What a Trainer user expects to go on working, with GaP on and with it off."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from toys import (
    CONFIG,
    KINDS,
    Tokens,
    arguments,
    assert_masked_weights_are_zero,
    causal_lm,
    gap_seq2seq_trainer,
    gap_trainer,
    same_tensors,
    seq2seq,
    zeros_per_tensor,
)
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gap_hf import GaPConfig, GaPError, GaPMixin, GaPTrainer, resuming
from gap_hf.patterns import num_kept
from gap_hf.refusals import check_deepspeed, check_setup

TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
# Its name since transformers 5.2x; the older one is deprecated there.
CHECKPOINTING = next(
    f.name for f in fields(TrainingArguments) if f.name in ("activation_checkpointing", "gradient_checkpointing")
)
EVAL_SPEED = ("eval_samples_per_second", "eval_steps_per_second")


def losses(trainer: Trainer) -> list[dict[str, Any]]:
    """The log without what the clock wrote."""
    skip = (*TIMINGS, *EVAL_SPEED)
    return [{k: v for k, v in entry.items() if k not in skip} for entry in trainer.state.log_history]


def assert_at_target(trainer: Any, sparsity: float = 0.9) -> None:
    """Every prunable tensor holds exactly k live weights, and the model's zeros are the masks'."""
    assert trainer.gap.at_target
    for name, weight in trainer.gap.weights.items():
        assert trainer.gap.masks.live(name) == num_kept(sparsity, weight.numel), name
    assert_masked_weights_are_zero(trainer)


class Watch(TrainerCallback):
    """Checks at every point where users look that masked weights are 0; keeps what it saw."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[int] = []
        self.sparsities: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert_masked_weights_are_zero(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert_masked_weights_are_zero(self.trainer)
        self.steps.append(state.global_step)
        self.sparsities.append(self.trainer.gap.sparsity())


def watched(folder: Path, **changes: Any) -> tuple[GaPTrainer, Watch]:
    watch = Watch()
    trainer = gap_trainer(folder, callbacks=[watch, *changes.pop("callbacks", [])], **changes)
    watch.trainer = trainer
    return trainer, watch


# --- off is Trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [None, GaPConfig(method="dense")], ids=["none", "dense"])
def test_off_is_trainer_to_the_bit(tmp_path: Path, kind: str, config: GaPConfig | None) -> None:
    make_model, make_data = KINDS[kind]
    common = {"save_strategy": "steps", "save_steps": 10, "max_steps": 12, "gradient_accumulation_steps": 2}
    plain = Trainer(model=make_model(), args=arguments(tmp_path / "plain", **common), train_dataset=make_data())
    plain.train()
    ours = gap_trainer(tmp_path / "ours", config=config, kind=kind, **common)
    ours.train()
    assert same_tensors(plain.model.state_dict(), ours.model.state_dict())
    assert losses(plain) == losses(ours)
    assert same_tensors(*(_moments(t) for t in (plain, ours)))
    assert [type(c) for c in plain.callback_handler.callbacks] == [type(c) for c in ours.callback_handler.callbacks]
    assert _files(tmp_path / "plain") == _files(tmp_path / "ours")


def test_off_seq2seq_is_seq2seq_trainer_to_the_bit(tmp_path: Path) -> None:
    args = arguments(tmp_path / "plain", Seq2SeqTrainingArguments)
    plain = Seq2SeqTrainer(model=seq2seq(), args=args, train_dataset=Tokens())
    plain.train()
    ours = gap_seq2seq_trainer(tmp_path / "ours", config=None)
    ours.train()
    assert same_tensors(plain.model.state_dict(), ours.model.state_dict())
    assert losses(plain) == losses(ours)


def test_gap_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    trainer = gap_trainer(tmp_path)
    trainer.create_optimizer()
    trainer.state.max_steps = 20
    before = torch.get_rng_state()
    trainer._gap_begin()
    assert torch.equal(before, torch.get_rng_state())


def _moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    states = trainer.optimizer.state_dict()["state"]
    return {f"{i}.{k}": v for i, state in states.items() for k, v in state.items()}


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- on --------------------------------------------------------------------------------------------------------------


# Masks that change inside a phase too: on ramps, by gradient, at random; and the whole model at once.
METHODS: dict[str, GaPConfig] = {
    "softened": GaPConfig(sparsity=0.9, num_partitions=2, update_steps=2),
    "gmp": GaPConfig(sparsity=0.9, method="gmp", update_steps=3),
    "rigl": GaPConfig(sparsity=0.9, method="rigl", update_steps=3),
    "mest": GaPConfig(sparsity=0.9, method="mest", update_steps=3),
    "acdc": GaPConfig(sparsity=0.9, method="acdc", num_rounds=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_through_the_trainer(tmp_path: Path, method: str) -> None:
    trainer, watch = watched(tmp_path, config=METHODS[method], gradient_accumulation_steps=3)
    trainer.train()
    assert_at_target(trainer)
    assert trainer.gap.num_done == len(trainer.gap.plan.updates) > 1
    changes = [e for e in trainer.state.log_history if "gap_sparsity" in e]
    assert {e["step"] for e in changes} == {0} | {u.step for u in trainer.gap.plan.updates} | {
        p.start for p in trainer.gap.plan.phases
    }
    assert watch.steps == list(range(1, 21))


@pytest.mark.parametrize("kind", KINDS)
def test_ends_at_exactly_the_target(tmp_path: Path, kind: str) -> None:
    trainer, watch = watched(tmp_path, kind=kind)
    trainer.train()
    assert_at_target(trainer)
    assert watch.steps == list(range(1, 21))
    assert max(watch.sparsities[:14]) < 0.6 < watch.sparsities[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "2:4", "sparsity": None},
        {"pattern": "transposable:2:4", "sparsity": None},
        {"pattern": "block:4x1"},
        {"pattern": "1:8", "sparsity": 0.875},
        {"distribution": "global"},
        {"distribution": "erk"},
        {"method": "random"},
        {"partition": "random"},
        {"initial_mask": "magnitude"},
        {"optimizer_reset": "all"},
        {"optimizer_reset": "none"},
        {"num_partitions": 1},
        {"overrides": {"*.c_fc": 0.5, "*.h.0.*": 0.0}},
    ],
    ids=str,
)
def test_every_option_trains_and_keeps_its_zeros(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer, _ = watched(tmp_path, config=CONFIG.replace(**changes))
    trainer.train()
    assert trainer.gap is not None and trainer.gap.at_target
    if "overrides" not in changes:
        # Each group (each tensor, but for `global` and `erk`) rounds its own count.
        assert trainer.gap.sparsity() == pytest.approx(float(trainer.gap_config.target), abs=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.0},
        {"weight_decay": 0.1},
        {"bf16": True},
        {CHECKPOINTING: True},
        {"optim": "sgd", "learning_rate": 0.1},
        {"optim": "adafactor"},
        {"optim": "rmsprop", "learning_rate": 1e-3},
        {"optim": "adamw_torch"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"num_train_epochs": 2, "max_steps": -1},
        {"average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_training_arguments_that_touch_the_update(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer, _ = watched(tmp_path, **changes)
    trainer.train()
    assert_at_target(trainer)


def test_bf16_parameters(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, model=causal_lm().to(torch.bfloat16))
    trainer.train()
    assert_at_target(trainer)


def test_clipping_sees_live_gradients_only(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, mask in ((n, trainer.gap.masks[n]) for n in trainer.gap.weights):
                grad = dict(trainer.model.named_parameters())[name].grad
                assert mask is None or not grad[mask == 0].any()
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append((float(torch.nn.utils.get_total_norm(grads)), 0.0))

    trainer = gap_trainer(tmp_path, callbacks=[Norms()], max_grad_norm=1e9)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx([n for n, _ in norms], rel=1e-6)


@pytest.mark.parametrize("config", [CONFIG, METHODS["softened"], METHODS["rigl"]], ids=["paper", "softened", "rigl"])
def test_accumulation_of_micro_batches_equals_one_batch(tmp_path: Path, config: GaPConfig) -> None:
    runs = []
    for name, sizes in (("1x8", (8, 1)), ("4x2", (2, 4))):
        batch, accumulate = sizes
        trainer = gap_trainer(
            tmp_path / name,
            config=config,
            model=causal_lm(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=15,
        )
        trainer.train()
        runs.append(trainer)
    # Masks can differ where two magnitudes are equal to rounding; the trajectories cannot differ by more.
    a, b = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in runs)
    assert a == pytest.approx(b, rel=2e-3)


# Dynamo reads .grad of every tensor that it wraps, and the loss of a causal LM is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_keeps_names_and_zeros(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert_at_target(trainer)
    assert not any("_orig_mod" in name for name in trainer.gap.weights)


@pytest.mark.parametrize("config", [CONFIG, METHODS["softened"], METHODS["rigl"]], ids=["paper", "softened", "rigl"])
def test_skipped_steps_of_a_gradient_scaler(tmp_path: Path, config: GaPConfig) -> None:
    """There is no fp16 on a CPU: a stand-in optimizer wrapper skips updates as the scaler does."""
    trainer, watch = watched(tmp_path, config=config)
    trainer.create_optimizer()
    inner = trainer.optimizer
    step, skipped = inner.step, []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        skipped.append(len(skipped) % 4 == 3)
        return None if skipped[-1] else step(*args, **kwargs)

    inner.step = sometimes
    trainer.train()
    assert sum(skipped) == 5
    assert watch.steps[-1] == 20
    assert_at_target(trainer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu(tmp_path: Path, precision: str) -> None:
    trainer, _ = watched(tmp_path, use_cpu=False, **{precision: True})
    trainer.train()
    assert_at_target(trainer)


# --- evaluation, best model, stopping --------------------------------------------------------------------------------


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


class Falling:
    """A metric that falls with every evaluation, so that the earliest eligible model is the best."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, _: Any) -> dict[str, float]:
        self.value -= 1.0
        return {"falling": self.value}


FALLING = {"load_best_model_at_end": True, "metric_for_best_model": "falling", "greater_is_better": True, **EVALUATED}


@pytest.mark.parametrize("config", [CONFIG, METHODS["softened"], METHODS["gmp"]], ids=["paper", "softened", "gmp"])
def test_best_model_is_one_at_the_target(tmp_path: Path, config: GaPConfig) -> None:
    trainer = gap_trainer(
        tmp_path, config=config, eval_dataset=Tokens(8), compute_metrics=Falling(), save_total_limit=2, **FALLING
    )
    trainer.train()
    first = next(s for s in range(2, 21, 2) if s >= trainer.gap.plan.fine_tune.start)
    assert trainer.state.best_global_step == first
    assert_at_target(trainer)
    saved = json.loads((Path(trainer.state.best_model_checkpoint) / "gap_config.json").read_text())
    assert saved["at_target"] and saved["step"] == first


def test_best_model_may_be_any_if_asked_and_brings_its_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = gap_trainer(
        tmp_path,
        config=CONFIG.replace(best_model_at_target=False),
        eval_dataset=Tokens(8),
        compute_metrics=Falling(),
        **FALLING,
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert not trainer.gap.at_target and "not the target" in caplog.text
    assert_masked_weights_are_zero(trainer)


def test_save_strategy_best(tmp_path: Path) -> None:
    trainer = gap_trainer(
        tmp_path,
        eval_dataset=Tokens(8),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    steps = sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    assert steps and steps[0] >= trainer.gap.plan.fine_tune.start


def test_early_stopping_waits_for_the_fine_tune(tmp_path: Path) -> None:
    trainer = gap_trainer(
        tmp_path,
        eval_dataset=Tokens(8),
        compute_metrics=Falling(),
        max_steps=40,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        **FALLING,
    )
    trainer.train()
    assert trainer.gap.plan.fine_tune.start < trainer.state.global_step < 40
    assert_at_target(trainer)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def test_a_run_stopped_midway_says_so_and_prunes_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = gap_trainer(tmp_path, callbacks=[StopAt(7)])
    trainer.train()
    assert "not the target of 0.9" in caplog.text and not trainer.gap.at_target
    trainer.prune_to_target()
    assert_at_target(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/gap_config.json").read_text())["at_target"]


@pytest.mark.parametrize("config", [CONFIG, *METHODS.values()], ids=["paper", *METHODS])
def test_prune_if_stopped(tmp_path: Path, config: GaPConfig) -> None:
    trainer = gap_trainer(tmp_path, config=config.replace(prune_if_stopped=True), callbacks=[StopAt(7)])
    trainer.train()
    assert_at_target(trainer)


def test_prune_to_target_before_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GaPError, match=r"no masks yet; expected GaP to be on and train\(\)"):
        gap_trainer(tmp_path).prune_to_target()


def test_evaluate_and_predict_leave_the_model_alone(tmp_path: Path) -> None:
    trainer = gap_trainer(tmp_path, eval_dataset=Tokens(8))
    trainer.evaluate()
    trainer.train()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.evaluate()
    trainer.predict(Tokens(8))
    assert same_tensors(before, trainer.model.state_dict())


# --- ways to run -----------------------------------------------------------------------------------------------------


def test_a_second_train_goes_on_from_the_masks(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path)
    trainer.train()
    first = {n: trainer.gap.masks[n].clone() for n in trainer.gap.weights}
    seen: list[bool] = []

    class AtBegin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sparse = trainer.gap.groups[1].names
            seen.append(all(torch.equal(first[n], trainer.gap.masks[n]) for n in sparse))

    trainer.add_callback(AtBegin())
    trainer.train()
    assert seen == [True]
    assert_at_target(trainer)


def test_optimizers_given_by_the_user(tmp_path: Path) -> None:
    model = causal_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    trainer, _ = watched(tmp_path, model=model, optimizers=(optimizer, scheduler))
    trainer.train()
    assert_at_target(trainer)


def test_phases_in_epochs(tmp_path: Path) -> None:
    config = CONFIG.replace(num_rounds=1, phase_epochs=0.5)
    trainer = gap_trainer(tmp_path, config=config, max_steps=-1, num_train_epochs=2.25)  # 10 steps an epoch, 23 in all
    trainer.train()
    assert [p.end for p in trainer.gap.plan.phases] == [5, 10, 15, 23]
    assert_at_target(trainer)


def test_reduce_lr_on_plateau(tmp_path: Path) -> None:
    trainer, _ = watched(
        tmp_path,
        eval_dataset=Tokens(8),
        eval_strategy="steps",
        eval_steps=2,
        lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    assert_at_target(trainer)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        data = Tokens()
        return (data[i % 40] for i in range(1000))


def test_iterable_dataset(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, train_dataset=Stream())
    trainer.train()
    assert_at_target(trainer)


def test_layers_that_thaw_before_a_second_run(tmp_path: Path) -> None:
    model: Any = causal_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.transformer.h[0].requires_grad_(False)
    trainer = gap_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    trainer.train()
    first = set(trainer.gap.weights)
    model.transformer.h[0].requires_grad_(True)
    trainer.train()
    assert set(trainer.gap.weights) > first
    assert_at_target(trainer)


def test_a_best_checkpoint_that_is_on_another_nodes_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = watched(tmp_path / "out", load_best_model_at_end=True, eval_dataset=Tokens(8), **EVALUATED)
    trainer.train()
    here = tmp_path / "checkpoint-2"
    here.mkdir()
    (here / "rng_state_1.pth").touch()
    (here / "gap_worker1.safetensors").touch()  # P-GaP's replicas lie on their own node's disk
    trainer.state.best_model_checkpoint = str(here)
    trainer._load_best_model()
    trainer._gap_end()
    assert "training.save_on_each_node: true" in caplog.text


def test_all_processes_hear_of_a_best_checkpoint_that_only_some_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = watched(tmp_path / "out", load_best_model_at_end=True, eval_dataset=Tokens(8), **EVALUATED)
    trainer.train()
    said = []
    monkeypatch.setattr(resuming, "is_sharded", lambda model: True)
    monkeypatch.setattr(resuming, "all_objects", lambda mine: said.append(mine) or [mine, not mine])
    with pytest.raises(GaPError, match="only some processes find the best checkpoint's masks"):
        trainer._gap_end()  # one that has it
    best = Path(trainer.state.best_model_checkpoint)
    (best / "gap_masks.safetensors").write_bytes(b"cut short")
    with pytest.raises(GaPError, match=r"gap_masks\.safetensors"):
        trainer._gap_end()  # one that cannot read it says so to the others before it stops
    assert said == [True, False]


def test_auto_find_batch_size_starts_over(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    step = GaPTrainer.training_step

    def too_big(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].shape[0] > 4 and self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")  # what Accelerate looks for
        return step(self, model, inputs, *args, **kwargs)

    trainer.training_step = too_big.__get__(trainer)
    trainer.train()
    assert watch.steps == [1, 2] * 4 + list(range(1, 21))  # Accelerate takes a tenth off at a time: 8, 7, 6, 5, 4
    assert_at_target(trainer)


def test_hyperparameter_search(tmp_path: Path) -> None:
    trainer = gap_trainer(
        tmp_path, model_init=lambda trial=None: causal_lm(), eval_dataset=Tokens(8), eval_strategy="no"
    )
    masks: list[str] = []
    models: list[int] = []

    class Keep(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert_at_target(trainer)
            masks.append(trainer.gap.masks.digest())
            models.append(id(trainer.gap.model))

    trainer.add_callback(Keep())
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert len(set(masks)) == 2


def test_a_mixin_for_any_trainer(tmp_path: Path) -> None:
    class Mine(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().compute_loss(*args, **kwargs)

    class GaPMine(GaPMixin, Mine):
        pass

    trainer = GaPMine(causal_lm(), arguments(tmp_path), train_dataset=Tokens(), gap_config=CONFIG.to_dict())
    trainer.train()
    assert trainer.calls == 20
    assert_at_target(trainer)


# --- learning rate ---------------------------------------------------------------------------------------------------


def test_restart_gives_every_phase_a_whole_schedule(tmp_path: Path) -> None:
    config = CONFIG.replace(lr_schedule="restart", lr_peaks="step", optimizer_reset="all", num_partitions=2)
    trainer = gap_trainer(tmp_path, config=config, lr_scheduler_type="linear", max_steps=40, learning_rate=1.0)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    for phase in trainer.gap.plan.phases:
        peak = 0.5 ** max(0, phase.round - 1) if phase.kind != "fine-tune" else 1.0
        expected = [peak * (1 - i / phase.num_steps) for i in range(phase.num_steps)]
        assert rates[phase.start : phase.end] == pytest.approx(expected)


def test_restart_takes_a_warmup_ratio_of_the_phase(tmp_path: Path) -> None:
    config = CONFIG.replace(lr_schedule="restart", phase_steps=20, num_rounds=1)
    trainer = gap_trainer(tmp_path, config=config, max_steps=80, learning_rate=1.0, warmup_steps=0.1)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert [rates.index(max(rates[s : s + 20]), s) - s for s in (0, 20, 40, 60)] == [2] * 4


def test_restart_refuses_a_decay_longer_than_a_phase(tmp_path: Path) -> None:
    config = CONFIG.replace(lr_schedule="restart")
    kwargs = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9}}
    with pytest.raises(GaPError, match="num_decay_steps is 9, but lr_schedule 'restart' has a phase of 3 steps"):
        gap_trainer(tmp_path, config=config, **kwargs).train()


def test_restart_needs_a_schedule_it_can_restart(tmp_path: Path) -> None:
    config = CONFIG.replace(lr_schedule="restart")
    trainer = gap_trainer(
        tmp_path, config=config, eval_dataset=Tokens(8), lr_scheduler_type="greedy", eval_strategy="steps", eval_steps=9
    )
    with pytest.raises(GaPError, match="'restart' cannot restart lr_scheduler_type"):
        trainer.train()


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, **changes: Any) -> None:
    with pytest.raises(GaPError, match=match):
        gap_trainer(folder / "out", **changes)


def test_a_model_with_nothing_to_prune_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    refused(tmp_path, "Sequential", model=torch.nn.Sequential(torch.nn.Linear(4, 4)))
    refused(tmp_path, "num_partitions", config=CONFIG.replace(num_partitions=9))
    refused(tmp_path, "include", config=CONFIG.replace(include=["*.nothing"]))
    refused(tmp_path, "48 outputs, which 5 does not divide", config=CONFIG.replace(pattern="block:5x1"))
    refused(tmp_path, "method: rigl changes masks already", config=METHODS["rigl"], enable_jit_checkpoint=True)
    assert not (tmp_path / "out").exists()
    plain = gap_trainer(tmp_path / "out", model=torch.nn.Sequential(torch.nn.Linear(4, 4)), config=None)
    assert plain.gap is None


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(GaPError, match="DataParallel over 2 GPUs"):
        GaPTrainer(model=causal_lm(), args=args, train_dataset=Tokens(), gap_config=CONFIG)


@pytest.mark.parametrize(
    ("flags", "plugin", "message"),
    [
        ({"is_fsdp_enabled": True}, 1, r"FSDP version 1 flattens .* set fsdp_version: 2"),
        ({"is_fsdp_enabled": True}, 2, None),
        ({"is_fsdp_xla_enabled": True}, None, r"FSDP under XLA flattens .* set fsdp_version: 2"),
    ],
)
def test_of_what_shards_weights_fsdp2_is_accepted(
    flags: dict[str, bool], plugin: int | None, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for what Trainer and accelerate say on a machine that has them: with `use_cpu` both fall back to DDP."""
    trainer = gap_trainer(tmp_path)
    for key, value in flags.items():
        monkeypatch.setattr(trainer, key, value)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=plugin), raising=False)
    if message is None:
        check_setup(trainer, CONFIG)
        with pytest.raises(GaPError, match=r"gap\.live_state: packs .* found a sharded model"):
            check_setup(trainer, CONFIG.replace(live_state=True))
        return
    with pytest.raises(GaPError, match=message):
        check_setup(trainer, CONFIG)


@pytest.mark.parametrize(
    ("deepspeed", "changes", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, {}, None),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, {}, None),
        ({"zero_optimization": {"stage": 3}}, {}, "stage: found 3, expected 1 or 2, .* use FSDP with fsdp_version: 2"),
        ({}, {}, "stage: found 0, expected 1 or 2, .* DDP to shard nothing"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            "offload_optimizer: found 'cpu', .* expected none",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "nvme"}}},
            {},
            "offload_param: found 'nvme', .* expected none",
        ),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, {}, "fp16.enabled: .* expected bf16: true"),
        (
            {"zero_optimization": {"stage": 1}},
            {"method": "rigl"},
            "'rigl' grows by gradients .* expected method: cyclic",
        ),
        (
            {"zero_optimization": {"stage": 1}},
            {"method": "parallel"},
            "'parallel' trains whole .* expected method: cyclic",
        ),
        (
            {"zero_optimization": {"stage": 1}},
            {"optimizer_reset": "all"},
            "optimizer_reset: found 'all', expected changed",
        ),
        ({"zero_optimization": {"stage": 1}}, {"lr_schedule": "restart"}, "'restart' was not tested .* expected whole"),
        (
            {"zero_optimization": {"stage": 1}},
            {"lr_density_power": 0.5},
            "gap.lr_density_power: found 0.5, .* expected null",
        ),
    ],
)
def test_of_deepspeed_zero_1_and_2_are_accepted(
    deepspeed: dict[str, Any], changes: dict[str, Any], message: str | None
) -> None:
    """By its config alone: what runs is in tests/distributed/test_zero.py."""
    config = GaPConfig.from_dict({"sparsity": 0.9, **changes})
    if message is None:
        check_deepspeed(deepspeed, config, mixed_precision="bf16")
        with pytest.raises(GaPError, match=r"fp16\.enabled"):
            check_deepspeed(deepspeed, config, mixed_precision="fp16")
        return
    with pytest.raises(GaPError, match=message):
        check_deepspeed(deepspeed, config)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(tmp_path: Path, optim: str) -> None:
    refused(tmp_path, f"'{optim}' updates weights inside backward", optim=optim)
    assert not (tmp_path / "out").exists()


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    model = causal_lm()
    model.hf_quantizer = object()
    refused(tmp_path, "is quantised", model=model)


def test_adapters_are_refused(tmp_path: Path) -> None:
    model = causal_lm()
    model.peft_config = {}  # what PEFT's wrapper and transformers' own adapters have
    refused(tmp_path, "trains adapters beside frozen weights", model=model)


def test_phase_epochs_needs_a_whole_epoch(tmp_path: Path) -> None:
    config = CONFIG.replace(num_rounds=None, phase_epochs=0.1)
    refused(tmp_path, "num_train_epochs is 0.5", config=config, max_steps=-1, num_train_epochs=0.5)


def test_phase_epochs_needs_epochs(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "gap.phase_epochs: training is set by max_steps",
        config=CONFIG.replace(num_rounds=None, phase_epochs=1.0),
    )


def test_restart_with_a_given_scheduler_is_refused(tmp_path: Path) -> None:
    model = causal_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    config = CONFIG.replace(lr_schedule="restart")
    refused(tmp_path, "'restart' makes its own", config=config, model=model, optimizers=(optimizer, scheduler))


def test_too_short_a_training_names_the_shortest(tmp_path: Path) -> None:
    trainer = gap_trainer(tmp_path, max_steps=4)
    with pytest.raises(GaPError, match="need at least 7 optimizer steps, but training has 4"):
        trainer.train()


# --- what others see -------------------------------------------------------------------------------------------------


def test_the_saved_model_loads_without_gap_hf(tmp_path: Path) -> None:
    trainer = gap_seq2seq_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    expected = zeros_per_tensor(trainer.model, trainer.gap.weights)
    code = (
        "import json, sys\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "assert 'gap_hf' not in sys.modules\n"
        "params = dict(model.named_parameters())\n"
        "print(json.dumps({n: int((params[n] == 0).sum()) for n in json.loads(sys.argv[2])}))\n"
    )
    names = json.dumps(list(expected))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), names], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    k = {n: w.numel - num_kept(0.9, w.numel) for n, w in trainer.gap.weights.items()}
    assert expected == k


def test_other_callbacks_begin_before_they_log(tmp_path: Path) -> None:
    events: list[str] = []

    class Events(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("begin")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            events.append("log")
            assert all(isinstance(value, int | float) for value in logs.values())

    gap_trainer(tmp_path, callbacks=[Events()]).train()
    assert events[:2] == ["begin", "log"]


def test_a_line_and_a_record_at_every_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = gap_trainer(tmp_path)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GaP: step")]
    records = [e for e in trainer.state.log_history if "gap_phase" in e]
    phases = trainer.gap.plan.phases
    assert len(lines) == len(records) == len(phases)
    assert [r["step"] for r in records] == [p.start for p in phases]
    assert records[-1]["gap_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert all("gap_pruning_error" in r for r in records[1:]) and "gap_mask_iou" in records[-1]
    assert "pruned group 2" in lines[2] and "grew group 1" in lines[2]
