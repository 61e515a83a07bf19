"""A resumed run equals one that was never stopped, bit for bit; what cannot be resumed is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_saving import mixtral
from toys import CONFIG, Tokens, arguments, assert_masked_weights_are_zero, causal_lm, gap_trainer, same_tensors
from transformers import Trainer, set_seed

from gap_hf import GaPConfig, GaPError, GaPTrainer

STEPS = 27
# Phases of CONFIG over 27 steps end at 4, 8, 12, 16 and 20: steps inside phases, at changes, around both, and in the
# fine-tune. The dataset of 40 rows, 4 in a batch, 3 accumulated, ends an epoch in the middle of an accumulation.
RESUME_AT = (1, 3, 4, 5, 8, 10, 12, 15, 16, 20, 21, 25)
SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": STEPS,
    "gradient_accumulation_steps": 3,
}
CONFIGS = {
    "default": CONFIG,
    "restart-global-random": CONFIG.replace(
        method="random", distribution="global", lr_schedule="restart", lr_peaks="cosine", optimizer_reset="all"
    ),
    # Masks change inside a phase, some of them by the gradient of the step after a checkpoint, some by a random draw.
    "ramps": CONFIG.replace(ramp_share=0.8, prune_share=0.5, update_steps=2, lr_density_power=0.5),
    "rigl": GaPConfig(sparsity=0.9, method="rigl", update_steps=4, distribution="erk"),
    "mest": GaPConfig(sparsity=0.9, method="mest", update_steps=3, drop_fraction=0.5),
}


def trained(folder: Path, config: GaPConfig, resume: Path | None = None, **changes: Any) -> GaPTrainer:
    # Dropout is on, so the generators' state has to come back too.
    trainer = gap_trainer(folder, config=config, **{**SAVING, **changes})
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    """All but timings and the closing record, whose train_loss Trainer itself restarts on resuming."""
    return [e for e in trainer.state.log_history if "train_runtime" not in e]


@pytest.fixture(scope="module", params=CONFIGS)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GaPTrainer:
    return trained(tmp_path_factory.mktemp("whole"), CONFIGS[request.param])


def test_the_plan_is_what_the_steps_were_chosen_for(uninterrupted: GaPTrainer) -> None:
    plan = uninterrupted.gap.plan
    if uninterrupted.gap_config.method in ("cyclic", "random"):
        assert [p.end for p in plan.phases] == [4, 8, 12, 16, 20, 27]
    elif uninterrupted.gap_config.method == "rigl":
        assert [u.step for u in plan.updates] == [4, 8, 12, 16]
    else:
        assert [u.step for u in plan.updates] == [3, 6, 9, 12, 15, 18, 20]
    assert uninterrupted.gap.num_done == len(plan.updates)


@pytest.mark.parametrize("step", RESUME_AT)
def test_resumed_equals_uninterrupted(uninterrupted: GaPTrainer, tmp_path: Path, step: int) -> None:
    checkpoint = Path(uninterrupted.args.output_dir) / f"checkpoint-{step}"
    resumed = trained(tmp_path, uninterrupted.gap_config, checkpoint, save_strategy="no")
    assert same_tensors(uninterrupted.model.state_dict(), resumed.model.state_dict())
    assert uninterrupted.gap.masks.digest() == resumed.gap.masks.digest()
    assert _same_state(uninterrupted.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert uninterrupted.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    assert log_of(uninterrupted) == log_of(resumed)


def _same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a["param_groups"] == b["param_groups"]
    return a["state"].keys() == b["state"].keys() and all(
        same_tensors(a["state"][i], b["state"][i]) for i in a["state"]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> GaPTrainer:
    """With a checkpoint of every step, which nobody changes."""
    return trained(tmp_path_factory.mktemp("a"), CONFIG)


def saved(whole: GaPTrainer, step: int) -> Path:
    return Path(str(whole.args.output_dir)) / f"checkpoint-{step}"


def test_the_last_checkpoint_is_found(whole: GaPTrainer, tmp_path: Path) -> None:
    shutil.copytree(saved(whole, 9), tmp_path / "b/checkpoint-9")
    resumed = gap_trainer(tmp_path / "b", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same_tensors(whole.model.state_dict(), resumed.model.state_dict())


@pytest.mark.parametrize("step", [6, 22], ids=["in a phase", "in the fine-tune"])
def test_more_steps_go_to_the_fine_tune(
    whole: GaPTrainer, tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    longer = trained(tmp_path, CONFIG, saved(whole, step), max_steps=40, save_strategy="no")
    assert longer.gap.plan.phases[:-1] == whole.gap.plan.phases[:-1]
    assert longer.gap.plan.fine_tune.end == 40
    assert "planned for 27 optimizer steps and training now has 40" in caplog.text
    assert_masked_weights_are_zero(longer)


def test_too_few_steps_to_reach_the_fine_tune_are_refused(whole: GaPTrainer, tmp_path: Path) -> None:
    with pytest.raises(GaPError, match="fine-tune at step 20; expected at least 21"):
        trained(tmp_path, CONFIG, saved(whole, 6), max_steps=18)


def test_a_plain_trainer_checkpoint_is_refused(tmp_path: Path) -> None:
    plain = Trainer(model=causal_lm(), args=arguments(tmp_path / "a", **SAVING), train_dataset=Tokens())
    plain.train()
    trainer = gap_trainer(tmp_path / "b", **SAVING)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(GaPError, match=r"has no gap_config.json, .* initial_mask: magnitude"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-5"))
    assert same_tensors(before, trainer.model.state_dict())


@pytest.mark.parametrize(
    ("key", "value"), [("sparsity", 0.8), ("num_rounds", 1), ("distribution", "global"), ("overrides", {"*.c_fc": 0.5})]
)
def test_another_config_is_refused_by_name(whole: GaPTrainer, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(GaPError, match=rf"gap\.{key}: found .* was trained with"):
        trained(tmp_path, CONFIG.replace(**{key: value}), saved(whole, 5))


def test_another_model_is_refused_by_weight(whole: GaPTrainer, tmp_path: Path) -> None:
    shutil.copytree(saved(whole, 5), tmp_path / "a/checkpoint-5")
    header = tmp_path / "a/checkpoint-5/gap_config.json"
    header.write_text(header.read_text().replace("transformer.h.0.", "transformer.h.7."))
    masks = tmp_path / "a/checkpoint-5/gap_masks.safetensors"
    masks.write_bytes(masks.read_bytes().replace(b"transformer.h.0.", b"transformer.h.7."))
    data = json.loads(header.read_text())
    data["masks_sha256"] = hashlib.sha256(masks.read_bytes()).hexdigest()
    header.write_text(json.dumps(data))
    with pytest.raises(GaPError, match=r"'transformer\.h\.0\.attn\.c_attn\.weight' is prunable in the model only"):
        trained(tmp_path / "b", CONFIG, tmp_path / "a/checkpoint-5")


def test_what_a_resume_may_change(whole: GaPTrainer, tmp_path: Path) -> None:
    config = CONFIG.replace(prune_if_stopped=True, best_model_at_target=False)
    resumed = trained(tmp_path, config, saved(whole, 9), save_strategy="no")
    assert torch.equal(
        whole.model.transformer.h[0].attn.c_attn.weight, resumed.model.transformer.h[0].attn.c_attn.weight
    )


def moe(
    folder: Path, gap: GaPConfig | None, resume: Path | None = None, dtype: torch.dtype | None = None, **changes: Any
) -> GaPTrainer:
    """Mixtral, which is saved under the names of its first release; `dtype` is what its config says."""
    set_seed(0)
    args = arguments(folder, **{"max_steps": 12, "save_strategy": "steps", "save_steps": 6, **changes})
    model = mixtral()
    model.config.dtype = dtype or model.config.dtype
    trainer = GaPTrainer(model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(8), gap_config=gap)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_weights_that_are_saved_under_other_names_are_resumed_too(tmp_path: Path, dtype: torch.dtype | None) -> None:
    config = GaPConfig(sparsity=0.8, num_partitions=2, num_rounds=1)
    whole = moe(tmp_path, config, dtype=dtype)
    resumed = moe(tmp_path, config, resume=tmp_path / "checkpoint-6", dtype=dtype)
    assert same_tensors(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert_masked_weights_are_zero(resumed)
    saved = {
        key for path in tmp_path.glob("checkpoint-6/*.safetensors") if "gap" not in path.name for key in load_file(path)
    }
    assert saved - whole.model.state_dict().keys()  # else this is not about names


def test_the_best_model_is_loaded_too_where_it_has_other_names(tmp_path: Path) -> None:
    config = GaPConfig(sparsity=0.8, num_partitions=2, num_rounds=1)
    best = {"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = moe(tmp_path, config, **best)
    assert trainer.state.best_model_checkpoint is not None
    saved = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert same_tensors(dict(saved.state_dict()), dict(trainer.model.state_dict()))


def test_a_checkpoint_without_some_of_these_weights_is_refused(tmp_path: Path) -> None:
    config = GaPConfig(sparsity=0.8, num_partitions=2, num_rounds=1)
    moe(tmp_path, config)
    file = tmp_path / "checkpoint-6" / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "layers.1.block_sparse_moe.gate" not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GaPError, match=r"has no weights for 'model.layers.1.mlp.gate.weight'"):
        moe(tmp_path, config, resume=tmp_path / "checkpoint-6")
