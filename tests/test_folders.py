"""From one form of a folder to the other and back, and what verify finds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_saving import gpt2, mixtral, pruned, same
from transformers import AutoModelForCausalLM

import gap_hf.checkpoint
from gap_hf import GaPError, save_pretrained
from gap_hf.cli import main
from gap_hf.folders import pack_folder, unpack_folder
from gap_hf.packed.loading import sha256
from gap_hf.recorded import load_masks, verify_folder


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("model*.safetensors"))}


@pytest.mark.parametrize("shards", ["50GB", "100KB"])
def test_there_and_back_again(tmp_path: Path, shards: str) -> None:
    model = gpt2()
    sparsifier = pruned(model)
    save_pretrained(model, tmp_path / "dense", sparsifier, max_shard_size=shards)
    (tmp_path / "dense" / "README.md").write_text("a card")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    assert (tmp_path / "packed" / "README.md").read_text() == "a card"
    save_pretrained(model, tmp_path / "straight", sparsifier, packed=True, max_shard_size=shards)
    assert weights(tmp_path / "packed") == weights(tmp_path / "straight")
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert weights(tmp_path / "back") == weights(tmp_path / "dense")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in (tmp_path / "dense").iterdir()}
    config, back = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("dense", "back"))
    assert config == back
    # It is a checkpoint as before, but for the masks of earlier prunes.
    before, after = (gap_hf.checkpoint.load(tmp_path / d) for d in ("dense", "back"))
    assert before.config == after.config and before.plan == after.plan
    assert all(torch.equal(m, after.masks[n]) for n, m in before.masks.items() if m is not None)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), model)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [gpt2, mixtral], ids=["gpt2", "mixtral"])
def test_masks_come_back_by_parameter(tmp_path: Path, packed: bool, make) -> None:
    model = make()
    sparsifier = pruned(model)
    save_pretrained(model, tmp_path, sparsifier, packed=packed)
    masks = load_masks(tmp_path)
    assert masks.keys() == set(sparsifier.weights)
    for name, mask in masks.items():
        assert mask.dtype == torch.uint8 and torch.equal(mask, sparsifier.masks[name]), name


def test_masks_without_a_run(tmp_path: Path) -> None:
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.get_parameter(name)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[::3] = True
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)
    for packed in (False, True):
        save_pretrained(model, tmp_path, {name: mask}, packed=packed)
        assert list(load_masks(tmp_path)) == [name]
        assert torch.equal(load_masks(tmp_path)[name], mask.to(torch.uint8))
        assert verify_folder(tmp_path)["live"] == int(mask.sum())
        assert (tmp_path / "gap_masks.safetensors").exists() != packed  # nothing of the other form is left
        assert (tmp_path / "gap_hf_packed.py").exists() == packed


@pytest.mark.parametrize("packed", [False, True])
def test_verify_says_what_there_is(tmp_path: Path, packed: bool) -> None:
    model = gpt2()
    sparsifier = pruned(model)
    save_pretrained(model, tmp_path, sparsifier, packed=packed)
    found = verify_folder(tmp_path)
    assert found["form"] == ("packed" if packed else "dense")
    assert found["tensors"] == len(sparsifier.weights) == 8
    assert found["weights"] == 2 * 12 * 64 * 64
    assert found["live"] == sum(sparsifier.masks.live(n) for n in sparsifier.weights)


def test_verify_finds_a_masked_weight_that_is_not_zero(tmp_path: Path) -> None:
    model = gpt2()
    save_pretrained(model, tmp_path, pruned(model))
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors["transformer.h.1.attn.c_attn.weight"]
    weight[weight == 0] = torch.where(torch.arange(int((weight == 0).sum())) == 5, 1e-30, 0.0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GaPError, match=r"h\.1\.attn\.c_attn\.weight' has 1 masked weights that are not 0"):
        verify_folder(tmp_path)
    with pytest.raises(GaPError, match=r"h\.1\.attn\.c_attn\.weight': a masked weight is not 0"):
        pack_folder(tmp_path, tmp_path.parent / "packed")
    assert not (tmp_path.parent / "packed").exists()


def test_verify_and_unpack_refuse_a_changed_file(tmp_path: Path) -> None:
    model = gpt2()
    save_pretrained(model, tmp_path / "a", pruned(model), packed=True)
    path = tmp_path / "a" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    for call in (verify_folder, load_masks, lambda f: unpack_folder(f, tmp_path / "b")):
        with pytest.raises(GaPError, match=r"SHA-256 is not what config\.json records"):
            call(tmp_path / "a")
    assert not (tmp_path / "b").exists()


def test_an_average_beside_the_weights_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    save_pretrained(model, tmp_path / "dense", pruned(model))
    shutil.copy(tmp_path / "dense" / "model.safetensors", tmp_path / "dense" / "average.safetensors")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)
    for folder in ("dense", "packed"):
        assert verify_folder(tmp_path / folder)["form"] == folder
        assert main(["inspect", str(tmp_path / folder)]) == 0, capsys.readouterr().err


def test_zeros_may_be_taken_for_masks_if_that_is_said(tmp_path: Path) -> None:
    model = gpt2()
    pruned(model)
    for layer in model.transformer.h:
        layer.mlp.c_fc.weight.data.mul_(-1)  # as products with a mask do, this leaves -0
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(GaPError, match=r"has no gap_config.json"):
        pack_folder(tmp_path / "plain", tmp_path / "packed")
    pack_folder(tmp_path / "plain", tmp_path / "packed", from_zeros=True)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)
    assert len(load_masks(tmp_path / "packed")) == 8
    assert verify_folder(tmp_path / "packed")["form"] == "packed"


def test_what_cannot_be_packed_or_unpacked(tmp_path: Path) -> None:
    model = gpt2()
    save_pretrained(model, tmp_path / "dense", pruned(model))
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(GaPError, match="is packed already"):
        pack_folder(tmp_path / "packed", tmp_path / "x")
    with pytest.raises(GaPError, match="is not packed"):
        unpack_folder(tmp_path / "dense", tmp_path / "x")
    with pytest.raises(GaPError, match=r"has no config.json"):
        verify_folder(tmp_path)
    experts = mixtral()
    save_pretrained(experts, tmp_path / "experts", pruned(experts))
    with pytest.raises(GaPError, match=r"under another name; load the model and call gap_hf.save_pretrained"):
        pack_folder(tmp_path / "experts", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    shutil.rmtree(tmp_path / "packed")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text("[]")
    with pytest.raises(GaPError, match="holds list, expected an object"):
        verify_folder(tmp_path / "packed")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    save_pretrained(model, tmp_path / "dense", pruned(model))
    dense, packed, back = (str(tmp_path / name) for name in ("dense", "packed", "back"))
    assert main(["pack", dense, packed]) == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "packed")]
    assert f"{sizes[1]:,} bytes, {sizes[1] / sizes[0]:.3f} of that" in capsys.readouterr().out
    assert main(["unpack", packed, back]) == 0
    capsys.readouterr()
    for folder in (dense, packed, back):
        assert main(["verify", folder]) == 0
        assert "8 masked tensors, 98,304 weights in them, 9,830 live (90.00% are zero)" in capsys.readouterr().out
    assert main(["verify", packed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"form": "packed", "tensors": 8, "weights": 98304, "live": 9830}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards, dense and packed."""
    folder = tmp_path_factory.mktemp("saved")
    model = gpt2()
    sparsifier = pruned(model)
    for form in ("dense", "packed"):
        save_pretrained(model, folder / form, sparsifier, packed=form == "packed", max_shard_size="100KB")
    return folder


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    """Sets keys of a JSON file; those that are set to `...` go."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return edit


def written(name: str, data: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(data)

    return write


def with_a_huge_shape(folder: Path) -> None:
    """Elements that are none in 64 bits, and as many bits."""
    data = json.loads((folder / "gap_config.json").read_text())
    entry = data["weights"][0] | {"shape": [2**32, 2**32], "live": 0}
    save_file({f"mask/{entry['name']}": torch.zeros(0, dtype=torch.uint8)}, folder / "gap_masks.safetensors")
    digest = hashlib.sha256((folder / "gap_masks.safetensors").read_bytes()).hexdigest()
    (folder / "gap_config.json").write_text(json.dumps(data | {"weights": [entry], "masks_sha256": digest}))


def with_a_nested_header(folder: Path) -> None:
    """In a weight file, recorded as it is."""
    path = min(folder.glob("model-*.safetensors"))
    header = DEEP.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    data = json.loads((folder / "config.json").read_text())
    if "quantization_config" in data:
        data["quantization_config"]["files"][path.name] = {"size": 8 + len(header), "sha256": sha256(path)}
        (folder / "config.json").write_text(json.dumps(data))


DEEP = "[" * 100_000
QUANTIZATION = {"quant_method": "gap_hf", "version": 1, "files": ["model.safetensors"]}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("form", "damage", "commands", "message"),
    [
        ("dense", edited("gap_config.json", masks_sha256=...), "verify pack", "expected None"),
        ("dense", edited("gap_config.json", config=None), "verify pack", "'config' is NoneType, expected dict"),
        ("dense", edited("gap_config.json", config=[1]), "verify pack", "'config' is list, expected dict"),
        ("dense", with_a_huge_shape, "verify pack", "expected (2305843009213693952,) of torch.uint8"),
        ("dense", written("gap_config.json", DEEP), "verify pack inspect", "gap_config.json: not valid JSON"),
        ("dense", written("config.json", DEEP), "verify pack", "config.json: not valid JSON"),
        ("dense", written(INDEX, DEEP), "pack inspect", "index.json: not valid JSON"),
        ("dense", edited(INDEX, metadata=...), "pack", "index.json: has no metadata"),
        ("dense", with_a_nested_header, "verify pack inspect", "model-00001"),
        ("packed", with_a_nested_header, "verify unpack inspect", "model-00001"),
        ("packed", edited("config.json", quantization_config=QUANTIZATION), "verify unpack", "files is list, expected"),
        ("packed", edited("config.json", quantization_config=QUANTIZATION | {"self": 1}), "verify", "files is list"),
        ("packed", written("gap_config.json", DEEP), "verify", "gap_config.json: not valid JSON"),
    ],
)
def test_damaged_json_is_one_sentence(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
    damage: Callable[[Path], None],
    commands: str,
    message: str,
) -> None:
    folder = Path(shutil.copytree(saved / form, tmp_path / "damaged"))
    damage(folder)
    for command in commands.split():
        output = [str(tmp_path / "x")] if command in ("pack", "unpack") else []
        assert main([command, str(folder), *output]) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("gap-hf: error: ") and error.count("\n") == 1 and message in error, error
        assert not (tmp_path / "x").exists()
    if damage is not with_a_nested_header or form == "packed":
        with pytest.raises(GaPError) if "verify" in commands else nullcontext():
            load_masks(folder)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pack", "nowhere", "x"], "nowhere: is no folder"),
        (["pack", "dense", "dense"], "dense: is the folder that is read"),
        (["pack", "dense", "dense/config.json"], "config.json: is a file"),
        (["unpack", "dense", "x"], "dense: is not packed"),
        (["verify", "nowhere"], "nowhere: is no folder"),
    ],
)
def test_what_the_commands_refuse(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    message: str,
) -> None:
    model = gpt2()
    save_pretrained(model, tmp_path / "dense", pruned(model))
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2  # one line, after the progress that saving shows
    assert not (tmp_path / "x").exists()
