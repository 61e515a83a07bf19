"""Targets and groups of small hand-made models: the rules, the errors, and the split against brute force."""

from __future__ import annotations

import ast
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gap_hf.partition
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.partition import best_contiguous_split, make_partition
from gap_hf.targets import Targets, clean_name, find_targets


def config(**changes: Any) -> GaPConfig:
    return GaPConfig(**{"sparsity": 0.8, "num_partitions": 2} | changes)


def targets_of(model: nn.Module, **changes: Any) -> Targets:
    return find_targets(model, config(**changes))


def names(targets: Targets) -> list[str]:
    return [weight.name for weight in targets.weights]


def reasons(targets: Targets) -> dict[str, str]:
    return {skip.name: skip.reason for skip in targets.skipped}


class Block(nn.Module):
    def __init__(self, width: int = 4, inner: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)


class Net(nn.Module):
    """Embedding, blocks, tied output layer and a head of its own."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block(inner=6 + 2 * i) for i in range(num_blocks))
        self.pooler = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.embed.weight


# --- Targets ------------------------------------------------------------------------------------------------------


def test_default_takes_what_is_inside_blocks() -> None:
    targets = targets_of(Net(2))
    assert names(targets) == [f"blocks.{i}.fc{j}.weight" for i in (0, 1) for j in (1, 2)]
    assert targets.blocks == ("blocks.0", "blocks.1")
    assert reasons(targets) == {
        "embed.weight": "an embedding, tied to lm_head.weight",
        "pooler.weight": "outside the blocks and stages",
    }
    first = targets.weights[0]
    assert (first.shape, first.numel, first.layout, first.module_type) == ((6, 4), 24, "out_in", "Linear")
    assert first.override is None


def test_a_single_block_is_found() -> None:
    assert targets_of(Net(1)).blocks == ("blocks.0",)


def test_a_network_beside_its_head_is_not_a_block() -> None:
    model: Any = nn.Sequential(Net(2), nn.Linear(4, 3))
    assert targets_of(model).blocks == ("0.blocks.0", "0.blocks.1")


def test_numbered_siblings_are_stages() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
            self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))

    targets = targets_of(Stages())
    assert targets.blocks == ("layer1", "layer2")
    assert {weight.layout for weight in targets.weights} == {"conv"}


def test_input_projections_and_prediction_heads_are_not_blocks() -> None:
    model: Any = Net(2)
    model.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4)) for _ in range(3))
    model.bbox = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))
    assert targets_of(model).blocks == ("blocks.0", "blocks.1")


def test_weights_tied_between_modules_stay_dense() -> None:
    model: Any = Net(2)
    model.blocks[1].fc1 = nn.Linear(4, 6)
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    targets = targets_of(model)
    assert reasons(targets)["blocks.0.fc1.weight"] == "tied to blocks.1.fc1.weight"
    assert names(targets) == ["blocks.0.fc2.weight", "blocks.1.fc2.weight"]


def test_a_block_used_twice_counts_once() -> None:
    model: Any = nn.Module()
    model.layers = nn.ModuleList([Block()] * 3)
    model.alias = model.layers[0]
    targets = targets_of(model)
    assert names(targets) == ["layers.0.fc1.weight", "layers.0.fc2.weight"] and targets.blocks == ("layers.0",)


def test_frozen_and_quantised_weights_stay_dense() -> None:
    model: Any = Net(2)
    model.blocks[0].fc1.weight.requires_grad_(False)
    model.blocks[0].fc2.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    model.blocks[1].fc2.weight.data = torch.zeros(4, 8, dtype=torch.float8_e4m3fn)
    targets = targets_of(model)
    assert names(targets) == ["blocks.1.fc1.weight"]
    assert reasons(targets)["blocks.0.fc1.weight"] == "frozen (requires_grad is False)"
    assert reasons(targets)["blocks.0.fc2.weight"] == "quantised (torch.int8)"
    assert reasons(targets)["blocks.1.fc2.weight"] == "quantised (torch.float8_e4m3fn)"


class MixRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 3)


def test_what_stays_dense_inside_a_block_unless_included() -> None:
    model: Any = Net(1)
    block: Any = model.blocks[0]
    block.depthwise = nn.Conv1d(4, 8, 3, groups=4)
    block.grouped = nn.Conv1d(4, 8, 3, groups=2)
    block.up = nn.ConvTranspose1d(4, 8, 3)
    block.router = MixRouter()
    block.gate = nn.Linear(4, 1)
    block.table = nn.Parameter(torch.zeros(9, 2))
    block.bilinear = nn.Bilinear(4, 4, 4)
    targets = targets_of(model)
    assert names(targets) == [f"blocks.0.{n}.weight" for n in ("fc1", "fc2", "grouped")]
    found = {name.removeprefix("blocks.0."): reason for name, reason in reasons(targets).items()}
    assert found["depthwise.weight"] == "a depthwise convolution"
    assert found["up.weight"] == "a transposed convolution, which is not supported"
    assert found["router.classifier.weight"] == "a router"
    assert found["gate.weight"] == "a gate with a single output"
    assert found["table"] == "a parameter of Block that cannot be read as outputs by inputs"
    assert found["bilinear.weight"] == "a parameter of Bilinear that cannot be read as outputs by inputs"

    everything = targets_of(model, include=["*"])
    assert {n.split(".")[-2] for n in names(everything) if n.startswith("blocks")} == {
        "fc1", "fc2", "depthwise", "grouped", "classifier", "gate",
    }  # fmt: skip
    assert {s.name for s in everything.skipped} == {
        "embed.weight", "blocks.0.table", "blocks.0.up.weight", "blocks.0.bilinear.weight",
    }  # fmt: skip


def test_fused_attention_weights() -> None:
    block: Any = Block()
    block.attn = nn.MultiheadAttention(4, 2)
    block.cross = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, add_bias_kv=True)
    targets = targets_of(nn.ModuleList([block]))
    weights = {w.name: (w.shape, w.layout, w.module_type) for w in targets.weights}
    assert weights["0.attn.in_proj_weight"] == ((12, 4), "out_in", "MultiheadAttention")
    assert weights["0.cross.k_proj_weight"] == ((4, 6), "out_in", "MultiheadAttention")
    assert weights["0.attn.out_proj.weight"][1] == "out_in"
    assert reasons(targets) == {"0.cross.bias_k": "a bias", "0.cross.bias_v": "a bias"}


class Experts(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], **attributes: object) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("experts", "layout"),
    [
        (Experts({"up": (2, 6, 4), "down": (2, 4, 6)}, is_transposed=False), "expert_out_in"),
        (Experts({"up": (2, 4, 6), "down": (2, 6, 4)}, is_transposed=True), "expert_in_out"),
        (Experts({"gate_up_proj": (2, 12, 4), "down_proj": (2, 4, 6)}), "expert_out_in"),
        (Experts({"gate_up_proj": (2, 4, 12), "down_proj": (2, 6, 4)}), "expert_in_out"),
        (Experts({"weight": (2, 6, 4)}, output_size=6, input_size=4), "expert_out_in"),
        (Experts({"weight": (2, 4, 6)}, output_size=6, input_size=4), "expert_in_out"),
        (Experts({"weight": (2, 4, 4)}, output_size=4, input_size=4), None),
        (Experts({"weight": (2, 4, 6)}, input_size=4), None),
        (Experts({"up": (2, 6, 4), "down": (2, 4, 6)}), None),
    ],
)
def test_expert_layouts(experts: Experts, layout: str | None) -> None:
    block: Any = Block()
    block.experts = experts
    targets = targets_of(nn.ModuleList([block]))
    found = {w.layout for w in targets.weights if ".experts." in w.name}
    assert found == ({layout} if layout else set())
    if layout is None:
        assert set(reasons(targets).values()) == {"a parameter of Experts that cannot be read as outputs by inputs"}
        with pytest.raises(GaPError, match=r"gap.include\[0\]: 'Experts' matches no weight that can be pruned; '0.exp"):
            targets_of(nn.ModuleList([block]), include=["Experts"])


def test_names_are_clean_under_compile_and_ddp() -> None:
    assert clean_name("_orig_mod.blocks.0._orig_mod.fc1.weight") == "blocks.0.fc1.weight"
    assert clean_name("module._orig_mod.module.weight") == "module.weight"
    assert clean_name("encoder.module.weight") == "encoder.module.weight"
    assert clean_name("layers.0._checkpoint_wrapped_module.fc1.weight") == "layers.0.fc1.weight"
    plain = targets_of(Net(), overrides={"blocks.0.*": 0.5}, exclude=["blocks.2"])
    model: Any = Net()
    model.blocks[0] = torch.compile(model.blocks[0])
    wrapped: Any = nn.Module()
    wrapped.module = torch.compile(model)
    assert targets_of(wrapped, overrides={"blocks.0.*": 0.5}, exclude=["blocks.2"]) == plain


# --- include, exclude, overrides ------------------------------------------------------------------------------


def test_include_reaches_outside_blocks() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    targets = targets_of(model, include=["Linear"])
    assert names(targets) == ["0.weight", "2.weight"] and targets.blocks == ("0", "2")
    assert targets_of(Net(2), include=["pooler", "*.fc1"]).blocks == ("blocks.0", "blocks.1", "pooler")
    assert names(targets_of(Net(2), include=["blocks.1"])) == ["blocks.1.fc1.weight", "blocks.1.fc2.weight"]
    assert names(targets_of(Net(1), include=["*.fc2.weight"])) == ["blocks.0.fc2.weight"]
    assert len(names(targets_of(Net(3), include=["Block"]))) == 6


def test_include_skips_what_cannot_be_pruned() -> None:
    targets = targets_of(Net(1), include=["*"])
    assert names(targets) == ["blocks.0.fc1.weight", "blocks.0.fc2.weight", "pooler.weight"]
    assert reasons(targets) == {"embed.weight": "an embedding, tied to lm_head.weight"}
    assert reasons(targets_of(Net(1), include=["*.fc1"]))["blocks.0.fc2.weight"] == "not matched by gap.include"


def test_exclude_takes_away() -> None:
    targets = targets_of(Net(2), exclude=["lm_head", "blocks.0", "*.fc2.weight"])
    assert names(targets) == ["blocks.1.fc1.weight"]
    assert reasons(targets)["blocks.0.fc2.weight"] == "excluded by gap.exclude[1]"
    assert reasons(targets)["blocks.1.fc2.weight"] == "excluded by gap.exclude[2]"


def test_the_first_override_counts() -> None:
    targets = targets_of(Net(2), overrides={"blocks.0.fc1": 0.5, "*.fc1": 0.6, "Linear": 0})
    assert [weight.override for weight in targets.weights] == [0.5, 0.6]
    dense = {skipped.name: skipped.reason for skipped in targets.skipped}
    assert dense["blocks.0.fc2.weight"] == "sparsity 0 by gap.overrides['Linear']"


TIED = "'embed.weight' stays dense, reason: an embedding, tied to lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": ["*.fc1", "*.fc3"]}, "gap.exclude[1]: '*.fc3' matches no module; did you mean '*.fc2'?"),
        (
            {"include": ["blocks.*.fc3"]},
            "gap.include[0]: 'blocks.*.fc3' matches no module; did you mean 'blocks.*.fc2'?",
        ),
        ({"include": ["Linaer"]}, "gap.include[0]: 'Linaer' matches no module; did you mean 'Linear'?"),
        ({"overrides": {"pooller": 0.5}}, "gap.overrides: 'pooller' matches no module; did you mean 'pooler'?"),
        (
            {"include": ["zzz"]},
            "gap.include[0]: 'zzz' matches no module; expected a glob over module paths or a "
            "module type, such as 'Linear'",
        ),
        ({"include": ["*.fc1", "lm_head"]}, f"gap.include[1]: 'lm_head' matches no weight that can be pruned; {TIED}"),
        (
            {"include": ["LayerNorm"]},
            "gap.include[0]: 'LayerNorm' matches no weight that can be pruned; all it matches has one dimension "
            "or none",
        ),
        (
            {"overrides": {"pooler": 0.5}},
            "gap.overrides: 'pooler' matches no weight that can be pruned; 'pooler.weight' stays dense, reason: "
            "outside the blocks and stages",
        ),
        (
            {"exclude": ["Linear"]},
            "gap.include: found nothing to prune in Net (skipped 7 of 8 weights: excluded by gap.exclude[0]); "
            "expected a glob over module paths or a module type, such as 'Linear'",
        ),
    ],
)  # fmt: skip
def test_selection_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GaPError) as error:
        targets_of(Net(), **changes)
    assert str(error.value) == message


def test_nothing_to_prune_names_the_model() -> None:
    with pytest.raises(GaPError) as error:
        targets_of(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    assert str(error.value) == (
        "gap.include: found nothing to prune in Sequential (skipped 2 of 2 weights: outside the blocks and stages); "
        "expected a glob over module paths or a module type, such as 'Linear'"
    )
    with pytest.raises(GaPError) as error:
        targets_of(nn.LayerNorm(3))
    assert str(error.value) == (
        "gap.include: found nothing to prune in LayerNorm; the model has no weight that could be pruned"
    )


# --- The split ----------------------------------------------------------------------------------------------------


def brute_force(sizes: list[int], num_groups: int) -> list[range]:
    """Every split, the best by largest sum, sum of squares, then earliest cuts."""
    splits = [[0, *cuts, len(sizes)] for cuts in combinations(range(1, len(sizes)), num_groups - 1)]

    def key(cuts: list[int]) -> tuple[int, int, list[int]]:
        sums = [sum(sizes[a:b]) for a, b in pairwise(cuts)]
        return max(sums), sum(s * s for s in sums), cuts

    return [range(a, b) for a, b in pairwise(min(splits, key=key))]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.data())
def test_split_is_the_best_one(sizes: list[int], data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, len(sizes)))
    assert best_contiguous_split(sizes, num_groups) == brute_force(sizes, num_groups)


def test_split_beats_the_greedy_one() -> None:
    assert best_contiguous_split([3, 3, 3, 4, 4, 4], 3) == [range(2), range(2, 4), range(4, 6)]
    # The paper's Transformer: decoder layers are larger, so the thirds are not four layers each.
    split = best_contiguous_split([12] * 6 + [16] * 6, 3)
    assert [len(part) for part in split] == [5, 4, 3]


def test_split_of_many_tensors_is_quick() -> None:
    sizes = [1 + (i * 7919) % 1000 for i in range(5000)]
    split = best_contiguous_split(sizes, 6)
    assert max(sum(sizes[i] for i in part) for part in split) <= math.ceil(sum(sizes) / 6) + 1000


def test_too_many_groups_is_an_error() -> None:
    with pytest.raises(GaPError, match="found 3, but there are only 2 sizes; the largest that works is 2"):
        best_contiguous_split([1, 1], 3)


# --- Groups -------------------------------------------------------------------------------------------------------


def test_balanced_keeps_blocks_whole() -> None:
    groups = make_partition(targets_of(Net(3)), config())  # 48, 64 and 80 weights
    assert [group.blocks for group in groups] == [("blocks.0", "blocks.1"), ("blocks.2",)]
    assert [group.numel for group in groups] == [112, 80]
    assert groups[1].names == ("blocks.2.fc1.weight", "blocks.2.fc2.weight")


def test_random_groups_hold_every_tensor_once_in_network_order() -> None:
    targets = targets_of(Net(3))
    drawn = {make_partition(targets, config(partition="random"), seed=seed) for seed in range(8)}
    assert len(drawn) > 1
    for groups in drawn:
        order = names(targets)
        assert sorted(name for group in groups for name in group.names) == sorted(order)
        assert all(list(group.names) == sorted(group.names, key=order.index) for group in groups)
    assert make_partition(targets, config(partition="random"), seed=3) in drawn
    assert len(make_partition(targets, config(partition="random", num_partitions=6))) == 6


def test_explicit_groups() -> None:
    partition = [["blocks.2", "*.0.fc2"], ["blocks.1.*", "blocks.0.fc1.weight"]]
    groups = make_partition(targets_of(Net(3)), config(partition=partition))
    assert groups[0].names == ("blocks.0.fc2.weight", "blocks.2.fc1.weight", "blocks.2.fc2.weight")
    assert groups[0].blocks == ("blocks.0", "blocks.2")
    assert sum(group.numel for group in groups) == 192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_partitions": 5},
            "gap.num_partitions: found 5, but there are only 3 blocks with prunable weights; the largest "
            "that works is 3",
        ),
        (
            {"num_partitions": 7, "partition": "random"},
            "gap.num_partitions: found 7, but there are only 6 prunable tensors; the largest that works is 6",
        ),
        (
            {"partition": [["blocks.0"], ["block.1"]]},
            "gap.partition[1][0]: 'block.1' matches no prunable weight; did you mean 'blocks.1'?",
        ),
        (
            {"partition": [["blocks.0"], ["zzz"]]},
            "gap.partition[1][0]: 'zzz' matches no prunable weight; expected a glob such as 'blocks.0'",
        ),
        (
            {"partition": [["blocks.0", "blocks.1"], ["*.fc1", "*.fc2"]]},
            "gap.partition[1][0]: '*.fc1' matches 'blocks.0.fc1.weight', which is in gap.partition[0] already; "
            "expected it in one group only",
        ),
        (
            {"partition": [["blocks.0"], ["blocks.1", "blocks.2.fc2"]]},
            "gap.partition: 'blocks.2.fc1.weight' is in no group; add it to one, or to gap.exclude",
        ),
        ({"partition": [["*"], []]}, "gap.partition[1]: the group is empty; expected at least one glob"),
    ],
)  # fmt: skip
def test_partition_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GaPError) as error:
        make_partition(targets_of(Net(3)), config(**changes))
    assert str(error.value) == message


def test_partition_needs_no_torch() -> None:
    """Its imports at run time; those for type checking are inside an `if`."""
    tree = ast.parse(Path(str(gap_hf.partition.__file__)).read_text(encoding="utf-8"))
    modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert {m for m in modules if m.startswith(("gap_hf", "torch"))} == {"gap_hf.config", "gap_hf.errors"}
