"""GaPConfig: what it accepts, what it refuses and with which words, and that it survives YAML."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gap_hf import config as config_module
from gap_hf.config import AUTHORS_NAMES, METHODS, GaPConfig
from gap_hf.errors import GaPError, did_you_mean
from gap_hf.pattern_names import Pattern, parse_pattern

# Values -> words that the one-line message must hold: the key, what was found, what was expected, the nearest.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"sparsty": 0.9}, ["gap.sparsty", "unknown key", "did you mean 'sparsity'?"]),
    ({"zzzzzzzz": 1}, ["gap.zzzzzzzz", "unknown key", "valid names: "]),
    ({}, ["gap.sparsity", "not set", "between 0 and 1"]),
    ({"sparsity": "0.9"}, ["gap.sparsity", "found '0.9'", "above 0 and below 1"]),
    ({"sparsity": True}, ["gap.sparsity", "found True"]),
    ({"sparsity": 0}, ["gap.sparsity", "found 0", "above 0"]),
    ({"sparsity": 1.0}, ["gap.sparsity", "found 1.0", "below 1"]),
    ({"sparsity": float("nan")}, ["gap.sparsity", "found nan"]),
    ({"method": "cylic"}, ["gap.method", "found 'cylic'", "dense, acdc, cyclic", "did you mean 'cyclic'?"]),
    ({"method": 3}, ["gap.method", "found 3", "expected one of"]),
    ({"distribution": "unifrm"}, ["gap.distribution", "did you mean 'uniform'?"]),
    ({"initial_mask": "magnitud"}, ["gap.initial_mask", "did you mean 'magnitude'?"]),
    ({"optimizer_reset": "some"}, ["gap.optimizer_reset", "'some'", "changed, all, none"]),
    ({"lr_schedule": "restarts"}, ["gap.lr_schedule", "did you mean 'restart'?"]),
    ({"lr_schedule": "restart", "lr_peaks": "cosin"}, ["gap.lr_peaks", "did you mean 'cosine'?"]),
    ({"lr_peaks": "linear"}, ["gap.lr_peaks", "needs lr_schedule: restart", "found 'whole'"]),
    ({"num_partitions": 0}, ["gap.num_partitions", "found 0", "at least 1"]),
    ({"num_partitions": None}, ["gap.num_partitions", "found None", "whole number"]),
    ({"num_partitions": 2.0}, ["gap.num_partitions", "found 2.0", "whole number"]),
    ({"num_rounds": True}, ["gap.num_rounds", "found True", "whole number"]),
    ({"num_rounds": -1}, ["gap.num_rounds", "found -1", "at least 1"]),
    ({"phase_steps": 0}, ["gap.phase_steps", "found 0", "at least 1"]),
    ({"phase_epochs": 0}, ["gap.phase_epochs", "found 0", "above 0"]),
    ({"phase_epochs": float("inf")}, ["gap.phase_epochs", "found inf"]),
    ({"fine_tune_share": 1}, ["gap.fine_tune_share", "found 1", "below 1"]),
    ({"seed": -1}, ["gap.seed", "found -1", "at least 0"]),
    ({"phase_steps": 5, "phase_epochs": 1}, ["gap.phase_epochs", "phase_steps is set too", "one of the two"]),
    (
        {"phase_steps": 5, "num_rounds": 2, "fine_tune_share": 0.2},
        ["gap.fine_tune_share", "num_rounds, phase_steps and fine_tune_share are all set", "any two"],
    ),
    ({"phase_epochs": 5, "num_rounds": 2, "fine_tune_share": 0.2}, ["gap.fine_tune_share", "num_rounds, phase_epochs"]),
    ({"pattern": "unstructred"}, ["gap.pattern", "'unstructred'", "did you mean 'unstructured'?"]),
    ({"pattern": "block:16"}, ["gap.pattern", "'block:16'", "did you mean 'block:16x1'?"]),
    ({"pattern": "block:0x4"}, ["gap.pattern", "'block:0x4'", "empty block", "at least 1"]),
    ({"pattern": "4:2"}, ["gap.pattern", "'4:2'", "keeps 4 of every 2", "0 < N < M"]),
    ({"pattern": "transposable:1:4"}, ["gap.pattern", "'transposable:1:4'", "'transposable:2:4'"]),
    ({"pattern": 124}, ["gap.pattern", "found 124", "'2:4'", "quoted in YAML"]),
    ({"pattern": "2:4", "sparsity": 0.9}, ["gap.sparsity", "found 0.9", "2:4 can only be 0.5", "leave it out"]),
    ({"pattern": "2:4", "overrides": {"a": 0.7}}, ["gap.overrides['a']", "found 0.7", "only be 0.5", "0 for dense"]),
    ({"pattern": "2:4", "distribution": "erk"}, ["gap.distribution", "'erk' contradicts pattern 2:4", "'uniform'"]),
    ({"include": "Linear"}, ["gap.include", "found 'Linear'", "list of strings"]),
    ({"exclude": [1]}, ["gap.exclude", "found [1]", "list of strings"]),
    ({"overrides": 0.5}, ["gap.overrides", "found 0.5", "mapping of glob to sparsity"]),
    ({"overrides": "a"}, ["gap.overrides", "found 'a'", "mapping of glob to sparsity"]),
    ({"overrides": [5]}, ["gap.overrides", "found 5", "a glob and its sparsity"]),
    ({"overrides": ["ab"]}, ["gap.overrides", "found 'ab'", "a glob and its sparsity"]),
    ({"overrides": [["a", 0.5, 1]]}, ["gap.overrides", "a glob and its sparsity"]),
    ({"overrides": [["a", 0.5], ["a", 0.6]]}, ["gap.overrides['a']", "given twice"]),
    ({"overrides": {"a": 1.0}}, ["gap.overrides['a']", "found 1.0", "at least 0 and below 1"]),
    ({"overrides": {"a": None}}, ["gap.overrides['a']", "no sparsity given"]),
    ({"overrides": {"a": "0.5"}}, ["gap.overrides['a']", "found '0.5'"]),
    ({"partition": "balancd"}, ["gap.partition", "did you mean 'balanced'?"]),
    ({"partition": []}, ["gap.partition", "found []", "list of lists of globs"]),
    ({"partition": 4}, ["gap.partition", "found 4", "list of lists of globs"]),
    ({"partition": ["a", "b", "c"]}, ["gap.partition[0]", "found 'a'", "list of strings"]),
    ({"partition": [["a"], ["b"]]}, ["gap.partition", "lists 2 groups", "num_partitions is 3"]),
    ({"best_model_at_target": "yes"}, ["gap.best_model_at_target", "found 'yes'", "true or false"]),
    ({"live_gradients": 1}, ["gap.live_gradients", "found 1", "true, false or null"]),
    ({"prune_if_stopped": 1}, ["gap.prune_if_stopped", "found 1", "true or false"]),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=lambda v: str(v)[:60])
def test_refusals_name_key_found_and_expected(values: dict[str, Any], words: list[str]) -> None:
    if values and "sparsity" not in values and values.get("pattern") != "2:4":
        values = {"sparsity": 0.8, **values}
    with pytest.raises(GaPError) as error:
        GaPConfig.from_dict(values)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("theirs", "ours"), AUTHORS_NAMES.items())
def test_the_authors_names_are_explained(theirs: str, ours: str) -> None:
    assert ours in {f.name for f in dataclasses.fields(GaPConfig)}
    # num_steps counts phases, so its value must not simply be moved to num_rounds.
    hint = "num_steps is 1 \\+ num_rounds" if theirs == "num_steps" else f"it is called '{ours}' here"
    with pytest.raises(GaPError, match=rf"gap\.{theirs}: unknown key; .*{hint}"):
        GaPConfig.from_dict({"sparsity": 0.9, theirs: 2})


def test_from_dict_wants_a_mapping() -> None:
    with pytest.raises(GaPError, match="gap: found list, expected a mapping"):
        GaPConfig.from_dict([("sparsity", 0.9)])  # pyright: ignore[reportArgumentType]


def test_defaults_and_frozen() -> None:
    config = GaPConfig(sparsity=0.9)
    assert (config.method, config.num_partitions, config.is_off) == ("cyclic", 3, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(GaPConfig(sparsity=0.9))


def test_dense_needs_no_sparsity() -> None:
    config = GaPConfig(method="dense")
    assert config.is_off
    assert config.sparsity is None


def test_target_is_the_decimal_as_written() -> None:
    assert GaPConfig(sparsity=0.9).target == Fraction(9, 10)
    assert GaPConfig(sparsity=1e-05).target == Fraction(1, 100_000)
    assert GaPConfig(pattern="2:4").target == Fraction(1, 2)
    assert GaPConfig(pattern="1:3").target == Fraction(2, 3)
    assert GaPConfig(pattern="transposable:2:4", sparsity=0.5).target == Fraction(1, 2)


@pytest.mark.parametrize("pattern", ["1:3", "2:4", "5:7"])
def test_the_sparsity_that_a_message_offers_is_accepted(pattern: str) -> None:
    with pytest.raises(GaPError) as error:
        GaPConfig(pattern=pattern, sparsity=0.9)
    offered = float(str(error.value).split("can only be ")[1].split(";")[0])
    assert GaPConfig(pattern=pattern, sparsity=offered).target == parse_pattern(pattern).fixed_sparsity


def test_methods_are_the_files_of_the_folder() -> None:
    folder = Path(config_module.__file__).parent / "methods"
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert files >= {"cyclic", "random"}
    assert METHODS[0] == "dense"
    assert set(METHODS) == files | {"dense"}
    assert list(METHODS[1:]) == sorted(files)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("unstructured", Pattern("unstructured")),
        ("1:4", Pattern("n:m", n=1, m=4)),
        ("block:16x2", Pattern("block", rows=16, cols=2)),
        ("transposable:2:4", Pattern("transposable", n=2, m=4)),
    ],
)
def test_patterns(text: str, parsed: Pattern) -> None:
    assert parse_pattern(text) == parsed


@pytest.mark.parametrize("text", ["", "2:4 ", "a2:4", "0:4", "4:4", "block:1x", "block:-1x2", "Unstructured"])
def test_bad_patterns(text: str) -> None:
    with pytest.raises(GaPError, match=r"gap\.pattern"):
        parse_pattern(text)


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_unquoted_pattern_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads 2:4 as a number to base 60."""
    path = tmp_path / "recipe.yaml"
    path.write_text("gap:\n  pattern: 2:4\n")
    with pytest.raises(GaPError, match="quoted in YAML"):
        GaPConfig.from_yaml(path)
    path.write_text("gap:\n  pattern: '2:4'\n")
    assert GaPConfig.from_yaml(path).target == Fraction(1, 2)


def test_yaml_with_and_without_a_section(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsity: 0.8\n")
    assert GaPConfig.from_yaml(path) == GaPConfig(sparsity=0.8)
    path.write_text("gap: {sparsity: 0.8}\ntraining: {max_steps: 3}\n")
    assert GaPConfig.from_yaml(path) == GaPConfig(sparsity=0.8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gap: [", "not valid YAML"),
        ("gap: !!python/object:os.system {}", "not valid YAML"),
        ("- 1", "found list at the top, expected a mapping"),
        ("", "found NoneType at the top"),
        ("gap:", "gap: found NoneType, expected a mapping"),
        ("training: {}", "gap.training: unknown key"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(GaPError) as error:
        GaPConfig.from_yaml(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GaPError, match="not valid YAML"):
        GaPConfig.from_yaml(tmp_path / "recipe.yaml")


def test_missing_yaml_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("sparsity: 0.8")
    with pytest.raises(GaPError, match=r"demmo\.yaml: no such file; did you mean '.*demo\.yaml'\?"):
        GaPConfig.from_yaml(tmp_path / "demmo.yaml")
    with pytest.raises(GaPError, match="no such file"):
        GaPConfig.from_yaml(tmp_path / "nowhere" / "demo.yaml")


def test_overrides_keep_their_order(tmp_path: Path) -> None:
    pairs = (("z.*", 0.5), ("a.*", 0.0), ("m.*", 0.75))
    config = GaPConfig(sparsity=0.9, overrides=pairs)
    config.to_yaml(tmp_path / "config.yaml")
    assert GaPConfig.from_yaml(tmp_path / "config.yaml").overrides == pairs
    assert GaPConfig(sparsity=0.9, overrides=pairs[::-1]) != config


def test_replace_validates_again() -> None:
    config = GaPConfig(sparsity=0.9, overrides=(("a", 0.5),))
    assert config.replace(sparsity=0.8) == GaPConfig(sparsity=0.8, overrides=(("a", 0.5),))
    with pytest.raises(GaPError, match=r"gap\.sparsity"):
        config.replace(sparsity=2)


@pytest.mark.parametrize(
    ("capability", "pattern"), [("AVX512", "block:16x1"), ("AVX2", "block:8x1"), ("DEFAULT", "block:8x1")]
)
def test_the_pattern_of_this_machine_is_what_is_recorded(
    monkeypatch: pytest.MonkeyPatch, capability: str, pattern: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = GaPConfig(sparsity=0.9, pattern="cpu")
    assert config.pattern == pattern
    assert config.to_dict()["pattern"] == pattern
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE")
    assert GaPConfig.from_dict(config.to_dict()) == config  # on another machine


globs = st.text("ab.*[]/: é'\"#-", min_size=1, max_size=8)
shares = st.sampled_from([0.05, 0.5, 0.75, 0.9, 0.99, 1e-7, 1 / 3])


@st.composite
def configs(draw: st.DrawFn) -> GaPConfig:
    """Any valid config."""
    num_partitions = draw(st.integers(1, 4))
    length = draw(st.sampled_from([{}, {"phase_steps": 7}, {"phase_epochs": 0.5}, {"phase_epochs": 2}]))
    rest = draw(st.sampled_from([{}, {"num_rounds": 3}, {"fine_tune_share": 0.3}]))
    pattern = draw(st.sampled_from(["unstructured", "2:4", "1:3", "block:16x1", "transposable:2:4"]))
    fixed = parse_pattern(pattern).fixed_sparsity
    lr_schedule = draw(st.sampled_from(["whole", "restart"]))
    method, reset = draw(st.sampled_from(METHODS)), draw(st.sampled_from(["changed", "all", "none"]))
    group = st.lists(globs, min_size=0, max_size=3)
    explicit = st.lists(group, min_size=num_partitions, max_size=num_partitions)
    return GaPConfig.from_dict(
        {
            **length,
            **rest,
            "sparsity": draw(shares) if fixed is None else draw(st.sampled_from([None, float(fixed)])),
            "method": method,
            "num_partitions": num_partitions,
            "pattern": pattern,
            "distribution": "uniform" if fixed is not None else draw(st.sampled_from(["uniform", "global", "erk"])),
            "initial_mask": draw(st.sampled_from(["random", "magnitude"])),
            "optimizer_reset": reset,
            "lr_schedule": lr_schedule,
            "lr_peaks": "constant" if lr_schedule == "whole" else draw(st.sampled_from(["linear", "cosine", "step"])),
            "include": draw(st.lists(globs, max_size=3)),
            "exclude": draw(st.lists(globs, max_size=3)),
            "overrides": draw(
                st.lists(
                    st.tuples(globs, st.just(0.0) if fixed else shares), max_size=3, unique_by=lambda pair: pair[0]
                )
            ),
            "partition": draw(st.one_of(st.sampled_from(["balanced", "random"]), explicit)),
            "best_model_at_target": draw(st.booleans()),
            "prune_if_stopped": draw(st.booleans()),
            "live_gradients": draw(st.sampled_from([None, True, False])),
            "live_state": draw(st.booleans()) if method != "parallel" and reset != "none" else False,
            "seed": draw(st.one_of(st.none(), st.integers(0, 2**63))),
        }
    )


@given(configs())
def test_every_config_survives_plain_data_and_yaml(config: GaPConfig) -> None:
    data = config.to_dict()
    assert set(data) == {f.name for f in dataclasses.fields(GaPConfig)}
    again = GaPConfig.from_dict(data)
    assert again == config
    assert list(again.overrides) == list(config.overrides)
    text = yaml.safe_dump({"gap": data}, sort_keys=False)
    assert GaPConfig.from_dict(yaml.safe_load(text)["gap"]) == config
    assert config.replace() == config


def test_did_you_mean() -> None:
    assert did_you_mean("sparsty", ["sparsity", "seed"]) == "; did you mean 'sparsity'?"
    assert did_you_mean("qqqq", ["b", "a", "a"]) == "; valid names: a, b"
    assert did_you_mean("qqqq", []) == ""
    assert did_you_mean("qqqq", [f"n{i:02}" for i in range(30)]).endswith("n19, …")
