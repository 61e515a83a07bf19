"""Masks, config and plan on disk: what is saved comes back, and nothing that was touched does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gap_hf import checkpoint
from gap_hf.checkpoint import CONFIG_NAME, MASKS_NAME, check_same_config, check_same_weights
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.sparsifier import Sparsifier

CONFIG = GaPConfig(
    sparsity=0.8, num_partitions=3, num_rounds=2, phase_steps=4, include=("Linear",), overrides=(("0", 0.5),)
)


def make_sparsifier(config: GaPConfig = CONFIG, *, size: int = 7, num_layers: int = 3) -> Sparsifier:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(num_layers)))
    return Sparsifier(model, config, total_steps=50, seed=3)


def run_to(sparsifier: Sparsifier, step: int) -> Sparsifier:
    """Start, and make every change up to `step`, with weights that differ from phase to phase."""
    sparsifier.start()
    for i in range(1, step + 1):
        with torch.no_grad():
            for param in sparsifier.model.parameters():
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(i)), alpha=0.1)
        sparsifier.mask_weights()
        sparsifier.advance(i)
    return sparsifier


@pytest.mark.parametrize("step", [0, 3, 4, 9, 28, 40])
def test_round_trip(tmp_path: Path, step: int) -> None:
    saved = run_to(make_sparsifier(), step)
    checkpoint.save(tmp_path / "new" / "folder", saved, step=step)
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {CONFIG_NAME, MASKS_NAME}
    state = checkpoint.load(tmp_path / "new" / "folder")
    assert (state.config, state.plan, state.seed, state.step) == (CONFIG, saved.plan, 3, step)

    other = make_sparsifier()
    other.load(state.step, state.masks, state.previous, levels=state.levels, num_done=state.num_done)
    assert other.masks.digest() == saved.masks.digest()
    assert other.phase == saved.phase
    assert other.previous.keys() == saved.previous.keys()
    assert all(torch.equal(other.previous[name], saved.previous[name]) for name in saved.previous)
    assert [name for name in saved.weights if saved.masks[name] is None] == [
        name for name in other.weights if other.masks[name] is None
    ]


def test_something_is_dense_and_has_a_previous_mask(tmp_path: Path) -> None:
    """That the round trip above covers these cases is not left to chance."""
    sparsifier = run_to(make_sparsifier(), 9)
    assert sum(sparsifier.masks[name] is None for name in sparsifier.weights) == 1
    assert len(sparsifier.previous) == 1
    assert run_to(make_sparsifier(), 40).at_target


def test_the_header_says_what_a_reader_wants_to_know(tmp_path: Path) -> None:
    sparsifier = run_to(make_sparsifier(), 30)
    checkpoint.save(tmp_path, sparsifier, step=30)
    header = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert header["at_target"] is True
    assert header["sparsity"] == sparsifier.sparsity()
    assert header["model_sparsity"] == sparsifier.model_sparsity()
    assert [entry["live"] for entry in header["weights"]] == [25, 10, 10]


def test_bits_cost_an_eighth_of_a_byte(tmp_path: Path) -> None:
    config = GaPConfig(sparsity=0.8, num_partitions=1, include=("Linear",))
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(512, 512)), config, total_steps=50)
    sparsifier.start()
    sparsifier.prune_to_target()
    checkpoint.save(tmp_path, sparsifier, step=0)
    assert (tmp_path / MASKS_NAME).stat().st_size < 512 * 512 / 8 + 500


def test_saving_again_replaces(tmp_path: Path) -> None:
    sparsifier = make_sparsifier()
    sparsifier.start()
    checkpoint.save(tmp_path, sparsifier, step=0)
    run_to(sparsifier, 10)
    checkpoint.save(tmp_path, sparsifier, step=10)
    assert checkpoint.load(tmp_path).step == 10


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, run_to(make_sparsifier(), 9), step=9)
    return tmp_path


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(GaPError) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)
    for word in (str(folder), *words):
        assert word in str(error.value)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header = json.loads((folder / CONFIG_NAME).read_text())
    change(header)
    (folder / CONFIG_NAME).write_text(json.dumps(header))


def edit_masks(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors and make the recorded hash fit, so that the deeper checks are reached."""
    tensors = load_file(folder / MASKS_NAME)
    change(tensors)
    save_file(tensors, folder / MASKS_NAME)
    edit_header(folder, lambda h: h.update(masks_sha256=checkpoint._sha256(folder / MASKS_NAME)))


@pytest.mark.parametrize("name", [CONFIG_NAME, MASKS_NAME])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"has no {name}", "initial_mask: magnitude")


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", f"has no {CONFIG_NAME}")


def test_any_changed_byte_of_the_masks(folder: Path) -> None:
    original = (folder / MASKS_NAME).read_bytes()
    for place in range(0, len(original), 37):
        changed = bytearray(original)
        changed[place] ^= 1
        (folder / MASKS_NAME).write_bytes(changed)
        refused(folder, MASKS_NAME, "SHA-256")
    for changed in (original[:-1], original + b"\0", b""):
        (folder / MASKS_NAME).write_bytes(changed)
        refused(folder, MASKS_NAME, "SHA-256")


def test_masks_that_are_no_safetensors_file(folder: Path) -> None:
    (folder / MASKS_NAME).write_bytes(b"nonsense")
    edit_header(folder, lambda h: h.update(masks_sha256=checkpoint._sha256(folder / MASKS_NAME)))
    refused(folder, MASKS_NAME, "not a safetensors file")


@pytest.mark.parametrize("text", ["", "{", '{"format": "gap_hf"', "\x00"])
def test_bad_json(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text)
    refused(folder, CONFIG_NAME, "not valid JSON")


def test_json_that_is_not_text(folder: Path) -> None:
    (folder / CONFIG_NAME).write_bytes(b"\xff\xfe")
    refused(folder, CONFIG_NAME, "not valid JSON")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, ["not written by gap_hf"]),
        ({"version": 99}, ["version is 99, expected 2"]),
        ({"version": None}, ["version is None"]),
        ({"config": []}, ["'config' is list, expected dict"]),
        ({"step": "9"}, ["'step' is str, expected int"]),
        ({"seed": None}, ["'seed' is NoneType, expected int"]),
        ({"plan": None}, ["'plan' is NoneType"]),
        ({"weights": {}}, ["'weights' is dict"]),
        ({"masks_sha256": None}, ["'masks_sha256' is NoneType"]),
        ({"weights": [{"name": "0.weight"}]}, ["'weights' holds", "expected name, shape, live and dense"]),
        ({"weights": [3]}, ["'weights' holds 3"]),
        ({"weights": [{"name": "a", "shape": [-1], "live": 1, "dense": False}]}, ["'weights' holds"]),
        ({"weights": [{"name": "a", "shape": ["7"], "live": 1, "dense": False}]}, ["'weights' holds"]),
    ],
)
def test_bad_header(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    edit_header(folder, lambda h: h.update(change))
    refused(folder, CONFIG_NAME, *words)


def test_header_that_is_a_list(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("[]")
    refused(folder, CONFIG_NAME, "not written by gap_hf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"sparsty": 0.8}}, "gap.sparsty"),
        ({"config": {"sparsity": 8}}, "gap.sparsity"),
        ({"plan": {"phases": []}}, "plan: not a recorded plan"),
    ],
)
def test_header_with_a_bad_config_or_plan(folder: Path, change: dict[str, Any], words: str) -> None:
    edit_header(folder, lambda h: h.update(change))
    with pytest.raises(GaPError, match=words):
        checkpoint.load(folder)


def test_masks_and_header_that_disagree(folder: Path) -> None:
    dense = next(e["name"] for e in json.loads((folder / CONFIG_NAME).read_text())["weights"] if e["dense"])
    sparse = next(e["name"] for e in json.loads((folder / CONFIG_NAME).read_text())["weights"] if not e["dense"])
    kept = (folder / MASKS_NAME).read_bytes(), (folder / CONFIG_NAME).read_bytes()

    def restore() -> None:
        (folder / MASKS_NAME).write_bytes(kept[0])
        (folder / CONFIG_NAME).write_bytes(kept[1])

    edit_masks(folder, lambda t: t.update({"mask/extra": torch.zeros(3, dtype=torch.uint8)}))
    refused(folder, "holds 'mask/extra'", "does not name")
    restore()
    edit_masks(folder, lambda t: t.pop(f"mask/{sparse}"))
    refused(folder, f"'{sparse}' lacks its mask")
    restore()
    edit_masks(folder, lambda t: t.update({f"mask/{dense}": torch.zeros(7, dtype=torch.uint8)}))
    refused(folder, f"'{dense}' has a mask")
    restore()
    edit_masks(folder, lambda t: t[f"mask/{sparse}"].fill_(1))
    with pytest.raises(GaPError, match=f"{sparse}.*(ones beyond|keeps)"):
        checkpoint.load(folder)
    restore()
    edit_masks(folder, lambda t: t[f"mask/{sparse}"].zero_())
    refused(folder, f"mask of '{sparse}' keeps 0 weights")
    restore()
    edit_masks(folder, lambda t: t.update({f"mask/{sparse}": torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(GaPError, match=rf"{sparse}: its mask holds \(3,\)"):
        checkpoint.load(folder)
    restore()
    assert checkpoint.load(folder).step == 9


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparsity", 0.9),
        ("num_partitions", 2),
        ("num_rounds", 3),
        ("pattern", "block:1x1"),
        ("optimizer_reset", "all"),
        ("exclude", ["1"]),
        ("overrides", {"0": 0.6}),
        ("seed", 5),
    ],
)
def test_resuming_under_another_config_names_the_key(folder: Path, key: str, value: Any) -> None:
    state = checkpoint.load(folder)
    other = CONFIG.replace(**{key: value})
    with pytest.raises(GaPError) as error:
        check_same_config(state, other, folder)
    assert str(error.value).startswith(f"gap.{key}: found {other.to_dict()[key]!r}, but the checkpoint {folder}")
    assert f"trained with {CONFIG.to_dict()[key]!r}" in str(error.value)


def test_the_order_of_overrides_matters(tmp_path: Path) -> None:
    config = CONFIG.replace(overrides=[["0", 0.5], ["Linear", 0.7]])
    checkpoint.save(tmp_path, run_to(make_sparsifier(config), 2), step=2)
    state = checkpoint.load(tmp_path)
    check_same_config(state, config, tmp_path)
    with pytest.raises(GaPError, match=r"gap\.overrides"):
        check_same_config(state, config.replace(overrides=[["Linear", 0.7], ["0", 0.5]]), tmp_path)


def test_resuming_under_the_same_config_or_what_is_free(folder: Path) -> None:
    state = checkpoint.load(folder)
    check_same_config(state, CONFIG, folder)
    free = {"best_model_at_target": False, "prune_if_stopped": True, "live_gradients": False, "live_state": True}
    check_same_config(state, CONFIG.replace(**free), folder)


def test_other_weights_are_named(folder: Path) -> None:
    state = checkpoint.load(folder)
    check_same_weights(state, make_sparsifier(), folder)
    with pytest.raises(GaPError, match=r"'3\.weight' is prunable in the model only"):
        check_same_weights(state, make_sparsifier(num_layers=4), folder)
    fewer = make_sparsifier(CONFIG.replace(num_partitions=2, exclude=["2"]))
    with pytest.raises(GaPError, match=r"'2\.weight' is prunable in the checkpoint only"):
        check_same_weights(state, fewer, folder)
    with pytest.raises(GaPError, match=r"the mask of '\d\.weight' has shape \(7, 7\), expected \(8, 8\)"):
        check_same_weights(state, make_sparsifier(size=8), folder)


# --- safety ----------------------------------------------------------------------------------------------------------


def test_nothing_of_pickle(folder: Path) -> None:
    """Both files are what they say, by their first bytes; a pickle or a zip of one is neither."""
    json.loads((folder / CONFIG_NAME).read_text())
    start = (folder / MASKS_NAME).read_bytes()
    assert json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG_NAME, MASKS_NAME])


@pytest.mark.parametrize("fails_at", ["masks", "config", "first replace", "second replace"])
@pytest.mark.parametrize("onto_an_older_one", [False, True])
def test_a_save_that_breaks_off_leaves_nothing_that_loads_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str, onto_an_older_one: bool
) -> None:
    sparsifier = run_to(make_sparsifier(), 2)
    if onto_an_older_one:
        checkpoint.save(tmp_path, sparsifier, step=2)
    run_to(sparsifier, 9)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    real_replace = checkpoint.os.replace
    with monkeypatch.context() as patch:
        if fails_at == "masks":
            patch.setattr(checkpoint, "save_file", broken)
        elif fails_at == "config":
            patch.setattr(Path, "write_text", broken)
        elif fails_at == "first replace":
            patch.setattr(checkpoint.os, "replace", broken)
        else:
            patch.setattr(
                checkpoint.os, "replace", lambda a, b: broken() if CONFIG_NAME in str(b) else real_replace(a, b)
            )
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tmp_path, sparsifier, step=9)
    if onto_an_older_one and fails_at != "second replace":
        assert checkpoint.load(tmp_path).step == 2  # whole, as it was
    else:
        refused(tmp_path)
    checkpoint.save(tmp_path, sparsifier, step=9)
    assert checkpoint.load(tmp_path).step == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CONFIG_NAME, MASKS_NAME])
