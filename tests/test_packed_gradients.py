"""Gradients of live weights only: packed in backward, clipped as they are, and the weights of masked dense training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import CONFIG, Tokens, assert_masked_weights_are_zero, gap_trainer, same_tensors
from transformers import TrainerCallback

from gap_hf import GaPConfig, GaPError, GaPTrainer, Sparsifier
from gap_hf.packed_gradients import PackedGradients

LIVE = CONFIG.replace(live_state=True)
RIGL = GaPConfig(sparsity=0.8, method="rigl", update_steps=4, drop_fraction=0.5, fine_tune_share=0.2)


def run(folder: Path, config: GaPConfig, **changes: Any) -> GaPTrainer:
    trainer = gap_trainer(folder, config=config, **{"max_steps": 24, "save_strategy": "no", **changes})
    trainer.train()
    return trainer


def norms(trainer: GaPTrainer) -> list[float]:
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


class Watch(TrainerCallback):
    """Notes, before each optimizer step, which sparse weights have a dense gradient, and which dense ones have none."""

    def __init__(self) -> None:
        self.wrong: list[tuple[int, str]] = []
        self.num_packed = self.num_whole = 0
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gap = self.trainer.gap
        for name, param in gap.masks.params.items():
            sparse = gap.masks[name] is not None
            self.num_packed += sparse and param.grad is None
            self.num_whole += sparse and param.grad is not None
            if not sparse and param.grad is None:
                self.wrong.append((state.global_step, name))


def watched(folder: Path, config: GaPConfig) -> Watch:
    watch = Watch()
    watch.trainer = gap_trainer(folder, config=config, max_steps=24, save_strategy="no", callbacks=[watch])
    watch.trainer.train()
    return watch


def test_a_sparse_weight_has_no_dense_gradient_after_backward(tmp_path: Path) -> None:
    watch = watched(tmp_path, LIVE)
    assert watch.num_packed > 100 and watch.num_whole == 0 and watch.wrong == []
    assert watched(tmp_path, CONFIG).num_packed == 0


def test_updates_by_gradient_see_it_whole(tmp_path: Path) -> None:
    watch = watched(tmp_path, RIGL.replace(live_state=True))
    assert 0 < watch.num_whole < watch.num_packed
    live = run(tmp_path, RIGL.replace(live_state=True), max_grad_norm=0.0)
    dense = run(tmp_path, RIGL, max_grad_norm=0.0)
    assert same_tensors(live.model.state_dict(), dense.model.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_not_clipped_the_weights_are_those_of_masked_dense_training(
    tmp_path: Path, accumulation: int, precision: str
) -> None:
    changes = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation, "bf16": precision == "bf16"}
    dense, live = run(tmp_path, CONFIG, **changes), run(tmp_path, LIVE, **changes)
    assert same_tensors(live.model.state_dict(), dense.model.state_dict())  # type: ignore[union-attr]
    assert_masked_weights_are_zero(live)
    torch.testing.assert_close(norms(live), norms(dense), rtol=1e-5, atol=0)


def test_clipped_they_agree_to_rounding_over_three_hundred_steps(tmp_path: Path) -> None:
    changes = {"max_grad_norm": 0.05, "max_steps": 300, "logging_steps": 10, "optim": "sgd", "learning_rate": 0.5}
    dense, live = run(tmp_path, CONFIG, **changes), run(tmp_path, LIVE, **changes)
    assert min(norms(dense)) > 0.05, "no step was clipped"
    assert live.gap is not None and dense.gap is not None
    assert live.gap.masks.digest() == dense.gap.masks.digest()
    weights: Any = dense.model.state_dict()  # type: ignore[union-attr]
    for name, weight in live.model.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms(live), norms(dense), rtol=1e-4, atol=0)


def test_frozen_layers_are_left_alone(tmp_path: Path) -> None:
    def weights(config: GaPConfig) -> Any:
        trainer = gap_trainer(tmp_path, config=config, max_steps=24, save_strategy="no", max_grad_norm=0.0)
        frozen = next(p for n, p in trainer.model.named_parameters() if ".h.0." in n and p.ndim == 2)  # type: ignore[union-attr]
        frozen.requires_grad_(False)
        trainer.train()
        return trainer.model.state_dict()  # type: ignore[union-attr]

    assert same_tensors(weights(LIVE), weights(CONFIG))


def test_clipping_that_is_not_trainers_is_refused(tmp_path: Path) -> None:
    class Own(GaPTrainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    plain = gap_trainer(tmp_path, config=LIVE)
    trainer = Own(model=plain.model, args=plain.args, train_dataset=Tokens(), gap_config=LIVE)
    with pytest.raises(GaPError, match=r"gap\.live_state: max_grad_norm is set and gradients were not clipped"):
        trainer.train()


def test_a_step_that_was_left_out_leaves_nothing(tmp_path: Path) -> None:
    """Trainer leaves steps out under a scaler, and so may a subclass: the next begins with new gradients."""

    class Skip(TrainerCallback):
        trainer: Any = None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = self.trainer.optimizer
            if state.global_step in (5, 12):
                self.step, optimizer.step = optimizer.step, lambda *a, **k: None

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (5, 12):
                self.trainer.optimizer.step = self.step

    def weights(config: GaPConfig) -> dict[str, Any]:
        skip = Skip()
        skip.trainer = gap_trainer(
            tmp_path, config=config, max_steps=24, save_strategy="no", callbacks=[skip], max_grad_norm=0.0
        )
        skip.trainer.train()
        return skip.trainer.model.state_dict()

    assert same_tensors(weights(LIVE), weights(CONFIG))


def linear() -> tuple[Any, Any, Sparsifier]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GaPConfig(sparsity=0.5, method="static", include=("*.weight",), live_state=True)
    sparsifier = Sparsifier(model, config, total_steps=10, optimizer=optimizer)
    sparsifier.start()
    return model, optimizer, sparsifier


def test_gradients_of_a_backward_of_ones_own_are_added() -> None:
    """A packed gradient and a dense one, from a backward outside the training step, count as their sum."""
    weights = []
    for packs in (True, False):
        model, optimizer, sparsifier = linear()
        packed = PackedGradients(sparsifier, clips=False)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        if packs:
            with packed.packing():
                model(x).square().sum().backward()
            assert model[0].weight.grad is None
        else:
            model(x).square().sum().backward()
        model(x).abs().sum().backward()
        optimizer.step()
        assert not packed._packed
        packed.detach()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert same_tensors(*weights)


def test_there_is_one_hook_for_each_weight_while_training_lasts(tmp_path: Path) -> None:
    class Count(TrainerCallback):
        trainer: Any = None

        def __init__(self) -> None:
            self.seen: set[int] = set()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen |= {len(p._post_accumulate_grad_hooks) for p in self.trainer.gap.masks.params.values()}

    count = Count()
    trainer = count.trainer = gap_trainer(
        tmp_path, config=LIVE, max_steps=24, save_strategy="no", callbacks=[count], max_grad_norm=0.0
    )
    trainer.train()
    trainer.train()
    assert count.seen == {1}
    weights: Any = trainer.gap.masks.params.values()  # type: ignore[union-attr]
    assert not any(w._post_accumulate_grad_hooks for w in weights)
    # A backward of the user's own leaves ordinary gradients.
    trainer.model(
        input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
    ).loss.backward()  # type: ignore[misc]
    assert all(w.grad is not None and w.grad.shape == w.shape for w in weights)
