"""A packed model is the model: saved and loaded through transformers, to the bit, and never anything else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import Tokens, causal_lm
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedModel,
    TrainingArguments,
)

from gap_hf import GaPConfig, GaPError, GaPTrainer, Sparsifier, load_masks
from gap_hf import save_pretrained as save
from gap_hf.packed.layout import PackedError
from gap_hf.packed.loading import _COMPARES_SHAPES, PackedQuantizer, sha256
from gap_hf.recorded import verify_folder


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=200, n_positions=32, bos_token_id=0, eos_token_id=1)
    )


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=100,
            max_position_embeddings=64,
        )
    )


def dinov2() -> Dinov2ForImageClassification:
    torch.manual_seed(0)
    return Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            num_labels=3,
            use_swiglu_ffn=True,
        )
    )


def nomic() -> NomicBertModel:
    torch.manual_seed(0)
    return NomicBertModel(
        NomicBertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
    )


def pruned(model: torch.nn.Module, **config: object) -> Sparsifier:
    """The masks of a run that has ended, its weights pruned with them."""
    gap = GaPConfig.from_dict({"sparsity": 0.9, "method": "static", **config})
    sparsifier = Sparsifier(model, gap, total_steps=4, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.start()
    return sparsifier


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("shards", ["50GB", "100KB"])
def test_a_packed_model_loads_to_the_bit_and_is_an_ordinary_one(tmp_path: Path, shards: str) -> None:
    model = gpt2()
    save(model, tmp_path / "packed", pruned(model), max_shard_size=shards, packed=True)
    model.save_pretrained(tmp_path / "dense")
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "100KB")
    packed, dense = (sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("packed", "dense"))
    assert packed < 0.4 * dense  # the embeddings are a sixth of it, and stay dense
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert same(loaded, model)
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded.config, "quantization_config")
    assert loaded.transformer.h[0].mlp.c_fc.weight.requires_grad
    loaded.save_pretrained(tmp_path / "again")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_dtype_and_device_map(tmp_path: Path) -> None:
    model = gpt2()
    save(model, tmp_path, pruned(model), packed=True)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert same(half, model.to(torch.bfloat16))
    disk = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    disk |= {"transformer.h.0": "cpu", "transformer.h.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map=disk, offload_folder=tmp_path / "offload"
    )
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, half(ids).logits)


def test_experts_that_a_file_holds_one_by_one(tmp_path: Path) -> None:
    model = mixtral()
    save(model, tmp_path / "a", pruned(model), packed=True)
    assert b"experts.3.w2.weight_mask" in (tmp_path / "a" / "model.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "b")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), model)


@pytest.mark.parametrize("make", [dinov2, nomic])
def test_weights_that_a_file_holds_fused(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    save(model, tmp_path / "a", pruned(model), packed=True)
    keys = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert any(key.endswith(("weights_in.weight_mask", "Wqkv.weight_mask")) for key in keys)
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "b")
    assert same(type(model).from_pretrained(tmp_path / "b"), model)
    model.save_pretrained(tmp_path / "c")
    assert (
        load_file(tmp_path / "b" / "model.safetensors").keys() == load_file(tmp_path / "c" / "model.safetensors").keys()
    )


def test_what_could_not_be_loaded_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nomic()
    sparsifier = pruned(model)
    own = PackedQuantizer.update_weight_conversions

    def without(self: PackedQuantizer, rules: list[object], model: object = None) -> list[object]:
        """As if no fused weight were known; the rest is unpacked."""
        return [*rules, *own(self, [], model)]

    monkeypatch.setattr(PackedQuantizer, "update_weight_conversions", without)
    with pytest.raises(
        GaPError, match=r"NomicBertModel: its files name a weight '.*Wqkv\.weight', which transformers would not"
    ):
        save(model, tmp_path / "packed", sparsifier, packed=True)
    assert not (tmp_path / "packed").exists()
    save(model, tmp_path / "packed", sparsifier, packed=True, save_original_format=False)
    assert same(NomicBertModel.from_pretrained(tmp_path / "packed"), model)


@pytest.mark.skipif(not _COMPARES_SHAPES, reason="this transformers compares no shapes where there is a quantizer")
@pytest.mark.parametrize("masked", [False, True])
def test_a_head_of_another_size_is_a_mismatch_as_it_is_of_a_dense_model(tmp_path: Path, masked: bool) -> None:
    model = dinov2()
    sparsifier = pruned(model)
    masks: dict[str, torch.Tensor] = {n: m for n in sparsifier.weights if (m := sparsifier.masks[n]) is not None}
    if masked:
        masks["classifier.weight"] = torch.ones_like(model.classifier.weight)
    save(model, tmp_path, masks, packed=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=10)
    loaded = type(model).from_pretrained(tmp_path, num_labels=10, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (10, 64)
    assert loaded.classifier.weight.isfinite().all() and loaded.classifier.weight.any()
    assert same(loaded.dinov2, model.dinov2)


def test_experts_under_the_names_of_the_model(tmp_path: Path) -> None:
    model = mixtral()
    sparsifier = pruned(model)
    save(model, tmp_path, sparsifier, packed=True, save_original_format=False)
    assert verify_folder(tmp_path)["tensors"] == len(sparsifier.weights)
    masks = load_masks(tmp_path)
    assert all(torch.equal(masks[name], sparsifier.masks[name]) for name in sparsifier.weights)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_masks_that_the_files_do_not_hold_are_not_made_up(tmp_path: Path) -> None:
    model = mixtral()
    save(model, tmp_path, pruned(model), packed=True)
    path = tmp_path / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "experts" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["files"] = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        GaPError, match=r"records a mask of 'model\.layers\.0\.mlp\.experts\.down_proj', which its files do"
    ):
        load_masks(tmp_path)


def test_what_is_for_other_processes_or_for_the_hub_is_not_written(tmp_path: Path) -> None:
    model = gpt2()
    sparsifier = pruned(model)
    for packed in (False, True):
        save(model, tmp_path / "none", sparsifier, packed=packed, is_main_process=False)
        with pytest.raises(GaPError, match=r"push_to_hub: found True.*trainer\.push_to_hub or `gap-hf push`"):
            save(model, tmp_path / "none", sparsifier, packed=packed, push_to_hub=True)
    assert not (tmp_path / "none").exists()
    save(model, tmp_path / "there", sparsifier)
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    save(model, tmp_path / "there", sparsifier, packed=True, is_main_process=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before


def test_blocks_take_a_bit_each(tmp_path: Path) -> None:
    sizes = []
    for pattern in ("unstructured", "block:16x1"):
        model = gpt2()
        save(model, tmp_path / pattern[:5], pruned(model, pattern=pattern), packed=True)
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / pattern[:5]), model)
        sizes.append((tmp_path / pattern[:5] / "model.safetensors").stat().st_size)
    num_prunable = 2 * 12 * 64 * 64
    assert sizes[0] - sizes[1] > 0.8 * num_prunable * 0.469 / 8 * 15 / 16


CHILD = """
import hashlib, sys
{first}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}{trust})
assert ("gap_hf" in sys.modules) == {imported}
digest = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
print(digest.hexdigest())
{last}
"""


@pytest.mark.parametrize("way", ["import", "trust", "both", "import last", "neither"])
def test_every_way_to_load_gives_the_same_bits_or_a_loud_error(tmp_path: Path, way: str) -> None:
    model = gpt2()
    save(model, tmp_path / "packed", pruned(model), packed=True)
    model.save_pretrained(tmp_path / "dense")
    code = CHILD.format(
        folder=str(tmp_path / "packed"),
        first="import gap_hf" if way in ("import", "both") else "",
        last="import gap_hf" if way == "import last" else "",
        trust=", trust_remote_code=True" if way in ("trust", "both", "import last") else "",
        imported=way in ("import", "both"),
    )
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    if way == "neither":
        assert run.returncode != 0 and not run.stdout and "size" in run.stderr, run.stderr
        return
    assert run.returncode == 0, run.stderr
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert run.stdout.split()[-1] == digest.hexdigest()


def test_a_changed_file_is_refused_before_anything_is_used(tmp_path: Path) -> None:
    model = gpt2()
    save(model, tmp_path / "a", pruned(model), max_shard_size="100KB", packed=True)
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[0].name

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "a", tmp_path / name))

    flipped = damaged("flipped") / shard
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(PackedError, match=f"{shard}: SHA-256"):
        AutoModelForCausalLM.from_pretrained(flipped.parent)
    cut = damaged("cut") / shard
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(PackedError, match=f"{shard}: has "):
        AutoModelForCausalLM.from_pretrained(cut.parent)
    index = damaged("index") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != shard}
    index.write_text(json.dumps(content))
    with pytest.raises(PackedError, match=f"{shard}: is recorded in config.json, and missing"):
        AutoModelForCausalLM.from_pretrained(index.parent)
    config = damaged("version") / "config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(PackedError, match="version is 9, expected 1"):
        AutoModelForCausalLM.from_pretrained(config.parent)


class Moves:
    """os.replace of a machine where `folder` is a file system of its own; so many files can be moved into it."""

    real = staticmethod(os.replace)

    def __init__(self, folder: Path, allowed: int) -> None:
        self.folder, self.allowed = folder.resolve(), allowed

    def __call__(self, source: str | Path, target: str | Path) -> None:
        inside = [Path(path).resolve().is_relative_to(self.folder) for path in (source, target)]
        if inside[0] != inside[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if Path(target).parent.resolve() == self.folder:
            self.allowed -= 1
            if self.allowed < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.real(source, target)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    model = gpt2()
    sparsifier = pruned(model)
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    (tmp_path / "mount" / "notes.txt").write_text("of somebody")
    save(model, tmp_path / "link", sparsifier, max_shard_size="100KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mount").iterdir()}
    # Nothing can be moved in, or one file: what was there is still there.
    for allowed in (0, 1):
        monkeypatch.setattr(os, "replace", Moves(tmp_path / "link", allowed))
        with pytest.raises(GaPError, match=r"link: cannot be written: \[Errno 5\]"):
            save(model, tmp_path / "link", sparsifier, packed=packed)
        after = {path.name: path.read_bytes() for path in (tmp_path / "mount").iterdir()}
        assert before.keys() <= after.keys() and len(after.keys() - before.keys()) <= allowed
        assert sum(after[name] != data for name, data in before.items()) <= allowed
    monkeypatch.setattr(os, "replace", Moves(tmp_path / "link", 100))
    save(model, tmp_path / "link", sparsifier, packed=packed)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "mount"), model)
    assert [path.name for path in (tmp_path / "mount").glob("model*")] == ["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"mount", "link"}


def test_a_folder_that_nothing_came_of_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    monkeypatch.setattr(os, "replace", Moves(tmp_path / "new", 0))
    with pytest.raises(GaPError, match="new: cannot be written"):
        save(model, tmp_path / "new", pruned(model))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(GaPError, match="file: cannot be written"):
        save(model, tmp_path / "file", pruned(model))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_masks_that_are_not_the_models_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.get_parameter(name)
    with pytest.raises(GaPError, match="16384 masked weights that are not 0"):
        save(model, tmp_path / "x", {name: torch.zeros_like(weight)}, packed=True)
    with pytest.raises(GaPError, match=r"c_fx.*c_fc"):
        save(model, tmp_path / "x", {name.replace("c_fc", "c_fx"): torch.ones_like(weight)}, packed=True)
    with pytest.raises(GaPError, match="expected \\(64, 256\\)"):
        save(model, tmp_path / "x", {name: torch.ones(3)}, packed=True)
    assert list(tmp_path.iterdir()) == []


def test_masked_weights_that_training_left_at_negative_zero(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    gap = GaPConfig(sparsity=0.8, method="gmp", optimizer_reset="none")
    sparsifier = Sparsifier(model, gap, total_steps=20, optimizer=optimizer)
    sparsifier.start()
    ids = torch.arange(16).unsqueeze(0)
    for step in range(20):
        model(input_ids=ids).logits.square().mean().backward()
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.mask_weights()
        optimizer.zero_grad()
        sparsifier.advance(step + 1)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert (weight[sparsifier.masks["transformer.h.0.mlp.c_fc.weight"] == 0].signbit()).any()
    save(model, tmp_path, sparsifier, packed=True)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("packed", [False, True])
def test_masks_come_back_for_training(tmp_path: Path, packed: bool) -> None:
    model = causal_lm()
    before = pruned(model)
    name = next(iter(before.weights))
    with torch.no_grad():  # a live weight that happens to be 0 stays live, which no look at the zeros could tell
        live = before.masks[name].nonzero()[0]
        model.get_parameter(name)[tuple(live)] = 0
    save(model, tmp_path / "saved", before, packed=packed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    args = TrainingArguments(
        tmp_path / "out", max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no"
    )
    config = GaPConfig(sparsity=0.9, method="static")
    masks = load_masks(tmp_path / "saved")
    trainer = GaPTrainer(model=loaded, args=args, train_dataset=Tokens(), gap_config=config, gap_masks=masks)
    trainer.train()
    assert trainer.gap is not None
    for name in before.weights:
        assert torch.equal(trainer.gap.masks[name], before.masks[name])
        weight = loaded.get_parameter(name)
        assert not weight[before.masks[name] == 0].any()
        assert not torch.equal(weight, model.get_parameter(name))


def test_masks_of_another_model_are_refused_for_training() -> None:
    model = causal_lm()
    sparsifier = Sparsifier(model, GaPConfig(sparsity=0.9, method="static"), total_steps=4)
    name = next(iter(sparsifier.weights))
    with pytest.raises(GaPError, match=r"c_attm.* is no prunable weight here.*c_attn"):
        sparsifier.start(masks={name.replace("c_attn", "c_attm"): torch.ones(3)})
    with pytest.raises(GaPError, match=r"has shape \(3,\), expected \(16, 48\)"):
        sparsifier.start(masks={name: torch.ones(3)})


def test_a_repository_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GaPError, match=r"^no/such/place: is no folder, and no repository's id"):
        load_masks("no/such/place")
    monkeypatch.setattr("gap_hf.hub.snapshot_download", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        GaPError, match=r"^user/model: is no folder here, and the Hub does not give it: division by zero$"
    ):
        load_masks("user/model")
