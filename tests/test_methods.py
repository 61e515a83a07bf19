"""The methods: their schedules by hand, their masks on hand-worked weights and beside plain references."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import ON_GPU

from gap_hf.config import METHODS, SCHEDULE_KEYS, GaPConfig
from gap_hf.errors import GaPError
from gap_hf.methods import get_method
from gap_hf.phases import Update
from gap_hf.plan import Plan, make_plan
from gap_hf.sparsifier import Change, Sparsifier
from gap_hf.workers import SequentialWorkers

BASELINES = ("static", "oneshot", "gmp", "set", "rigl", "acdc", "mest")
# On short runs.
SHORT: dict[str, dict[str, Any]] = {name: {} for name in METHODS if name != "dense"} | {
    "rigl": {"update_steps": 5},
    "set": {"update_steps": 5},
    "mest": {"update_steps": 5, "drop_fraction": 0.5},
    "acdc": {"num_rounds": 2},
    "random": {"num_partitions": 2},
}


def plan_of(config: GaPConfig, total_steps: int, *, num_groups: int = 1, steps_per_epoch: int | None = None) -> Plan:
    return make_plan(config, num_groups=num_groups, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


def stretches(plan: Plan) -> list[tuple[str, int, int]]:
    return [(phase.kind, phase.start, phase.end) for phase in plan.phases]


# --- schedules by hand -----------------------------------------------------------------------------------------------


def test_static() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, method="static"), 100)
    assert stretches(plan) == [("fine-tune", 0, 100)]
    assert (plan.first_levels, plan.updates) == ((1.0,), ())


def test_oneshot() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, method="oneshot", fine_tune_share=0.4), 100)
    assert stretches(plan) == [("dense", 0, 60), ("fine-tune", 60, 100)]
    assert (plan.first_levels, plan.updates) == ((0.0,), (Update(60, (0,), prune_to=1.0),))


def test_gmp_is_zhu_and_guptas_cubic() -> None:
    config = GaPConfig(sparsity=0.8, method="gmp", dense_share=0.1, fine_tune_share=0.5, update_steps=10)
    plan = plan_of(config, 100)
    assert stretches(plan) == [("dense", 0, 10), ("gmp", 10, 50), ("fine-tune", 50, 100)]
    assert [u.step for u in plan.updates] == [20, 30, 40, 50]
    # s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 with s_i = 0
    sparsities = [0.8 - 0.8 * (1 - (u.step - 10) / 40) ** 3 for u in plan.updates]
    assert [0.8 * u.level for u in plan.updates] == pytest.approx(sparsities)
    assert plan.updates[-1].prune_to == 1.0


def test_gmp_ends_at_the_target_where_the_interval_does_not_divide() -> None:
    plan = plan_of(GaPConfig(sparsity=0.8, method="gmp", fine_tune_share=0.5, update_steps=15), 100)
    assert [u.step for u in plan.updates] == [15, 30, 45, 50]


def test_rigl_share_falls_as_a_cosine_until_three_quarters() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, method="rigl"), 1000)
    assert stretches(plan) == [("rigl", 0, 750), ("fine-tune", 750, 1000)]
    assert [u.step for u in plan.updates] == [100, 200, 300, 400, 500, 600, 700]
    for update in plan.updates:
        assert update.drop == pytest.approx(0.15 * (1 + math.cos(math.pi * update.step / 750)))
        assert (update.prune_to, update.grow_to, update.grow_by) == (None, 1.0, "gradient")
    assert plan.first_levels == (1.0,)


def test_set_changes_once_an_epoch() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, method="set"), 100, steps_per_epoch=30)
    assert [(u.step, u.drop, u.grow_to, u.grow_by) for u in plan.updates] == [
        (step, 0.3, 1.0, "random") for step in (30, 60, 90)
    ]
    assert stretches(plan) == [("set", 0, 90), ("fine-tune", 90, 100)]
    stopped = plan_of(GaPConfig(sparsity=0.9, method="set", fine_tune_share=0.5), 100, steps_per_epoch=30)
    assert [u.step for u in stopped.updates] == [30]


def test_acdc_at_the_papers_hundred_epochs() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, method="acdc"), 100)
    cuts = [0, *range(10, 76, 5), 85, 100]
    assert [(p.start, p.end) for p in plan.phases] == list(itertools.pairwise(cuts))
    kinds = [phase.kind for phase in plan.phases]
    assert kinds == ["initial", *["sparse", "dense"] * 7, "fine-tune"]
    levels = [plan.levels_at(phase.start) for phase in plan.phases]
    assert levels == [(0.0,), *[(1.0,), (0.0,)] * 7, (1.0,)]


def test_mest_trains_more_weights_than_the_target_until_the_fine_tune() -> None:
    config = GaPConfig(sparsity=0.8, method="mest", drop_fraction=0.5, update_steps=25)
    plan = plan_of(config, 100)
    assert [(u.step, u.prune_to) for u in plan.updates] == [(25, 1.0), (50, 1.0), (75, 1.0)]
    # Of 1,000 weights the target keeps 200; half as many more grow at first, fewer as time goes on.
    live = [1000 - 800 * level for level in (*plan.first_levels, *(u.level for u in plan.updates))]
    assert live == pytest.approx([300, 200 + 100 * (2 / 3), 200 + 100 / 3, 200])


def test_cyclic_with_ramps() -> None:
    config = GaPConfig(
        sparsity=0.9,
        num_partitions=2,
        num_rounds=1,
        fine_tune_share=0.4,
        ramp_share=0.5,
        prune_share=0.5,
        update_steps=5,
    )
    plan = plan_of(config, 100, num_groups=2)
    assert [phase.end for phase in plan.phases] == [20, 40, 60, 100]
    assert plan.first_levels == (0.0, 0.0)

    def cubic(x: float) -> float:
        return 1 - (1 - x) ** 3

    ramp = {step: cubic(min(1, step / 30)) for step in range(0, 65, 5)}
    wanted = {
        0: (0, 0),
        5: (0, ramp[5]),
        10: (0, ramp[10]),
        15: (ramp[20] * cubic(0.5), ramp[15]),
        20: (ramp[20], 0),
        25: (ramp[25], 0),
        30: (1, 0),
        35: (1, cubic(0.5)),
        40: (0, 1),
        45: (0, 1),
        50: (0, 1),
        55: (cubic(0.5), 1),
        60: (1, 1),
        99: (1, 1),
    }
    for step, levels in wanted.items():
        assert plan.levels_at(step) == pytest.approx(levels), step


def test_cyclic_without_ramps_has_no_update_inside_a_phase() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, ramp_share=0, prune_share=0), 700, num_groups=3)
    assert {u.step for u in plan.updates} == {p.start for p in plan.phases[1:]}


@pytest.mark.parametrize("method", SHORT)
def test_every_method_says_what_it_counts_and_uses(method: str) -> None:
    module = get_method(method)
    assert module.GROUPS in ("partition", "tensor", "all")
    assert set(module.USES) <= set(SCHEDULE_KEYS)
    assert set(BASELINES) | {"cyclic", "random", "parallel", "dense"} == set(METHODS)


REFUSED = [
    ({"method": "static", "fine_tune_share": 0.5}, ["gap.fine_tune_share", "0.5", "'static'", "no schedule keys"]),
    ({"method": "rigl", "num_rounds": 3}, ["gap.num_rounds", "3", "'rigl'", "drop_fraction, fine_tune_share"]),
    ({"method": "cyclic", "drop_fraction": 0.1}, ["gap.drop_fraction", "'cyclic'", "ramp_share"]),
    ({"method": "rigl", "update_steps": 75}, ["gap.update_steps", "every 75 steps", "from step 75 on", "at most 74"]),
    ({"method": "gmp", "dense_share": 0.8}, ["gap.dense_share", "begin at step 80", "begins at step 75"]),
    ({"method": "acdc", "num_rounds": 38}, ["gap.num_rounds", "need 77", "there are 75", "num_rounds: 37"]),
    ({"method": "acdc", "dense_share": 0}, ["gap.dense_share", "found 0", "0 of 100", "at least 1 step"]),
    ({"method": "acdc", "dense_share": 0.9}, ["gap.dense_share", "90 of 100", "fewer than the 85"]),
    ({"method": "oneshot", "fine_tune_share": 0.999}, ["gap.fine_tune_share", "0.999 of 100", "leaves none"]),
]


@pytest.mark.parametrize(("keys", "words"), REFUSED, ids=[str(k) for k, _ in REFUSED])
def test_refusals(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(GaPError) as error:
        plan_of(GaPConfig(sparsity=0.9, **keys), 100, num_groups=3)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# --- masks by hand ---------------------------------------------------------------------------------------------------


def one_layer(weight: list[list[float]], config: GaPConfig, *, total_steps: int = 12) -> Sparsifier:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return Sparsifier(model, config, total_steps=total_steps)


def config_of(method: str, **changes: Any) -> GaPConfig:
    return GaPConfig(**{"method": method, "sparsity": 0.5, "include": ("Linear",), **SHORT[method], **changes})


def with_gradient(run: Sparsifier, gradient: list[list[float]]) -> Change | None:
    """The first update of a plan that goes by gradient."""
    run.masks.params["0.weight"].grad = torch.tensor(gradient)
    assert run.advance(run.plan.updates[0].step) is None
    return run.mask_gradients()


def force(run: Sparsifier, weight: list[list[float]], mask: list[list[int]]) -> None:
    """Weights and a mask, whatever the random first mask was."""
    run.start()
    with torch.no_grad():
        run.masks.params["0.weight"].copy_(torch.tensor(weight))
    run.masks.set("0.weight", torch.tensor(mask, dtype=torch.uint8))


def mask_of(run: Sparsifier) -> list[list[int]]:
    mask = run.masks["0.weight"]
    assert mask is not None
    return mask.tolist()


def rewire_by_hand(drop: float, config: GaPConfig) -> Plan:
    plan = make_plan(config, num_groups=1, total_steps=12)
    update = Update(4, (0,), drop=drop, grow_to=1.0, grow_by="gradient")
    return Plan(plan.phases, (update,), plan.first_levels)


WEIGHT = [[4.0, 0.0, -3.0, 0.0], [0.5, 0.0, 0.0, -0.25]]
MASK = [[1, 0, 1, 0], [1, 0, 0, 1]]


def rigl_run(drop: float, mask: list[list[int]], **changes: Any) -> Sparsifier:
    config = config_of("rigl", **changes)
    rows = len(mask)
    model = nn.Sequential(nn.Linear(len(mask[0]), rows, bias=False))
    return Sparsifier(model, config, total_steps=12, plan=rewire_by_hand(drop, config))


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    run = rigl_run(0.5, MASK)
    force(run, WEIGHT, MASK)
    # Live are 4, -3, 0.5, -0.25: the last two go. Of the masked, gradients are 1, 9, 7, 2 and those dropped 8 and 0.1.
    change = with_gradient(run, [[100.0, 1.0, 100.0, -9.0], [-8.0, 7.0, 2.0, 0.1]])
    assert change is not None
    # -9 grows, and -8: a dropped weight that grows again at once keeps its value, as in the authors' code.
    assert mask_of(run) == [[1, 0, 1, 1], [1, 0, 0, 0]]
    weight = run.masks.params["0.weight"].detach()
    assert weight.tolist() == [[4.0, 0.0, -3.0, 0.0], [0.5, 0.0, 0.0, 0.0]]
    # Gradients are masked by the new mask, so what has grown moves in this very step.
    assert run.masks.params["0.weight"].grad.tolist() == [[100.0, 0.0, 100.0, -9.0], [-8.0, 0.0, 0.0, 0.0]]
    assert (change.pruned, change.grown, change.begins_phase) == ((0,), (0,), False)
    assert change.mask_iou == pytest.approx(3 / 5)
    assert change.pruning_error == pytest.approx(0.0625 / (16 + 9 + 0.25 + 0.0625))
    assert run.num_done == 1


def test_rigl_waits_where_a_gradient_is_not_finite() -> None:
    run = rigl_run(0.5, MASK)
    force(run, WEIGHT, MASK)
    assert with_gradient(run, [[1.0, math.inf, 1.0, 1.0], [1.0] * 4]) is None
    assert (mask_of(run), run.num_done) == (MASK, 0)
    run.masks.params["0.weight"].grad = torch.tensor([[0.0, 5.0, 0.0, 6.0], [0.0] * 4])
    assert run.advance(5) is None
    assert run.mask_gradients() is not None
    assert mask_of(run) == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_rigl_leaves_a_tensor_without_a_gradient_alone() -> None:
    run = rigl_run(0.5, MASK)
    force(run, WEIGHT, MASK)
    run.masks.params["0.weight"].grad = None
    run.advance(4)
    assert run.mask_gradients() is not None
    assert mask_of(run) == MASK


def test_rigl_does_nothing_before_its_step() -> None:
    run = rigl_run(0.5, MASK)
    force(run, WEIGHT, MASK)
    run.masks.params["0.weight"].grad = torch.ones(2, 4)
    run.advance(3)
    assert run.mask_gradients() is None
    assert mask_of(run) == MASK


def test_rigl_sees_the_gradient_accumulated_over_micro_batches() -> None:
    config = config_of("rigl")
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    run = Sparsifier(model, config, total_steps=12, plan=rewire_by_hand(0.5, config))
    force(run, WEIGHT, MASK)
    for inputs in ([0.0, 3.0, 0.0, 1.0], [0.0, -3.5, 0.0, 1.0]):  # input 1 is large in each, and cancels in the sum
        model(torch.tensor(inputs)).sum().backward()
    run.advance(4)
    run.mask_gradients()
    assert mask_of(run) == [[1, 0, 1, 1], [0, 0, 0, 1]]


def test_rigl_exchanges_whole_blocks() -> None:
    mask = [[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]
    run = rigl_run(0.25, mask, pattern="block:2x1")
    force(run, [[1.0, 0.0, 2.0, 0.0]] * 2 + [[0.0, 3.0, 0.0, 0.1]] * 2, mask)
    # The block of 0.1 is the smallest of four; the largest sum of gradients is that of row pair 0, column 3.
    gradient = [[9.0, 1.0, 9.0, 2.5], [9.0, 4.0, 9.0, -2.6], [4.9, 9.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]]
    with_gradient(run, gradient)
    assert mask_of(run) == [[1, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]


def test_rigl_keeps_n_of_m() -> None:
    mask = [[1, 1, 0, 0, 1, 1, 0, 0]]
    run = rigl_run(0.25, mask, pattern="2:4")
    force(run, [[4.0, 3.0, 0.0, 0.0, 2.0, 1.0, 0.0, 0.0]], mask)
    # The weight of 1 goes; the largest gradient of all is in the other group, which has nothing free.
    with_gradient(run, [[0.0, 0.0, 9.0, 9.0, 0.0, 0.5, 0.2, 0.7]])
    assert mask_of(run) == [[1, 1, 0, 0, 1, 0, 0, 1]]


def test_rigl_keeps_a_transposable_pattern_and_its_survivors() -> None:
    mask = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    run = rigl_run(0.5, mask, pattern="transposable:2:4")
    weight = [[8.0, 0.1, 0.0, 0.0], [0.2, 7.0, 0.0, 0.0], [0.0, 0.0, 6.0, 0.3], [0.0, 0.0, 0.4, 5.0]]
    force(run, weight, mask)
    gradient = [[0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 9.0, 0.0], [0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]
    with_gradient(run, gradient)
    assert mask_of(run) == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]


def test_gmp_prunes_what_is_smallest_and_never_brings_it_back() -> None:
    config = config_of("gmp", fine_tune_share=0.5, update_steps=2)
    run = one_layer([[1.0, -2.0, 3.0, 4.0], [-5.0, 6.0, 7.0, 8.0]], config, total_steps=8)
    run.start()
    assert run.masks["0.weight"] is None
    assert run.advance(1) is None
    # Half way the cubic is at 7/8 of the target, which prunes 4 of 8: 3.5, so 4 by halves upward.
    run.advance(2)
    assert mask_of(run) == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert not run.at_target
    change = run.advance(4)
    assert change is not None
    assert change.begins_phase
    assert run.at_target


def test_a_live_weight_of_zero_is_kept_before_a_masked_one() -> None:
    config = config_of("gmp", fine_tune_share=0.5, update_steps=1)
    run = one_layer([[1.0, 2.0, 3.0, 4.0]], config, total_steps=8)
    run.start()
    run.masks.set("0.weight", torch.tensor([[0, 1, 1, 1]], dtype=torch.uint8))
    with torch.no_grad():
        run.masks.params["0.weight"].copy_(torch.tensor([[0.0, 5.0, 0.0, 0.0]]))
    new = run.selection.by_magnitude(["0.weight"], 1.0, masks={"0.weight": run.masks["0.weight"]})
    assert new["0.weight"].tolist() == [[0, 1, 1, 0]]


def test_acdc_and_oneshot_prune_the_whole_model() -> None:
    for method in ("acdc", "oneshot"):
        run = one_layer([[1.0, -2.0, 3.0, 4.0], [-5.0, 6.0, 7.0, 8.0]], config_of(method), total_steps=40)
        run.start()
        first = run.plan.updates[0].step
        assert run.advance(first - 1) is None
        assert run.advance(first) is not None
        assert mask_of(run) == [[0, 0, 0, 0], [1, 1, 1, 1]]


# --- masks beside plain references -----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 9),
    drop=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9]),
    sparsity=st.sampled_from([0.5, 0.8, 0.9]),
    seed=st.integers(0, 10_000),
)
def test_rigl_equals_the_reference(rows: int, cols: int, drop: float, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties; zeros too.
    weight = torch.randint(-3, 4, (rows, cols), generator=generator).float()
    gradient = torch.randint(-3, 4, (rows, cols), generator=generator).float()
    keep = reference.exact_keep(Fraction(str(sparsity)), rows * cols)
    order = torch.randperm(rows * cols, generator=generator)[:keep]
    mask = torch.zeros(rows * cols, dtype=torch.uint8)
    mask[order] = 1
    run = rigl_run(drop, mask.view(rows, cols).tolist(), sparsity=sparsity)
    force(run, weight.tolist(), mask.view(rows, cols).tolist())
    held = run.masks.params["0.weight"].detach().clone()
    with_gradient(run, gradient.tolist())
    survivors = reference.dropped(held.flatten().tolist(), mask.tolist(), Fraction(str(drop)))
    wanted = reference.grown(survivors, gradient.flatten().tolist(), keep)
    assert [m for row in mask_of(run) for m in row] == wanted
    assert torch.equal(run.masks.params["0.weight"].detach().flatten(), held.flatten() * torch.tensor(wanted))


KINDS: list[dict[str, Any]] = [
    {},
    {"distribution": "erk"},
    {"distribution": "global"},
    {"pattern": "block:8x1"},
    {"pattern": "block:2x4", "distribution": "global"},
    {"pattern": "2:4", "sparsity": None},
    {"pattern": "transposable:2:4", "sparsity": None},
    {"overrides": {"0.weight": 0.5, "2.weight": 0.0}, "num_partitions": 2},
]


DEVICE = "cuda" if ON_GPU else "cpu"


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16)).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("method", SHORT)
def test_every_method_with_every_pattern_and_distribution(method: str, kind: dict[str, Any]) -> None:
    """Counts at every step, zeros everywhere, and the target at the end."""
    ramps = {"ramp_share": 0.7, "prune_share": 0.5} if method in ("cyclic", "random", "parallel") else {}
    config = GaPConfig.from_dict(
        {"sparsity": 0.8, "include": ["Linear"], "method": method, **SHORT[method], **ramps, **kind}
    )
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    total = 60
    # Only the first replica of P-GaP is trained here, which is enough to count by.
    workers = SequentialWorkers(config.num_partitions) if method == "parallel" else None
    run = Sparsifier(model, config, total_steps=total, optimizer=optimizer, workers=workers)
    run.start()
    uniform = "global" not in str(kind)
    per_unit = 8 if "block" in kind.get("pattern", "") else 1
    at_target = {w.name: run.selection.by_magnitude([w.name])[w.name].sum().item() for w in run.targets.weights}
    for step in range(total):
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        (model(inputs) - inputs.flip(1)).square().mean().backward()
        run.mask_gradients()
        assert run.levels == list(run.plan.levels_at(step))
        _check_zeros(run, gradients=True)
        if uniform and "pattern" not in kind:
            for group, level in zip(run.groups, run.levels, strict=True):
                for name in group.names:
                    numel = run.weights[name].numel
                    wanted = numel - int(Fraction(str(level)) * (numel - at_target[name]) + Fraction(1, 2))
                    assert run.masks.live(name) == wanted, (step, name)
        optimizer.step()
        run.mask_weights()
        optimizer.zero_grad()
        run.advance(step + 1)
        _check_zeros(run)
    assert run.at_target
    assert run.num_done == len(run.plan.updates)
    live = {name: run.masks.live(name) for name in run.weights}
    if uniform:
        assert live == at_target
    elif method == "cyclic":  # each group is a pool
        for group in run.groups:
            assert sum(live[n] for n in group.names) == per_unit * reference.exact_keep(
                Fraction(4, 5), group.numel // per_unit
            )
    else:
        numel = sum(w.numel for w in run.weights.values())
        assert sum(live.values()) == per_unit * reference.exact_keep(Fraction(4, 5), numel // per_unit)


def _check_zeros(run: Sparsifier, *, gradients: bool = False) -> None:
    for param, mask in run.masks.sparse_params():
        values: Tensor = param.grad if gradients else param.detach()  # type: ignore[assignment]
        assert not values[mask == 0].any()


@pytest.mark.parametrize("sparsity", [0.87, 0.913])
@pytest.mark.parametrize("method", ["static", "random", "rigl", "mest"])
def test_a_global_pool_meets_a_total_that_no_tensor_divides(method: str, sparsity: float) -> None:
    model = nn.Sequential(*[nn.Linear(16, 17) if i % 2 == 0 else nn.Linear(17, 16) for i in range(6)])
    config = config_of(method, sparsity=sparsity, distribution="global")
    if method == "random":
        config = config.replace(ramp_share=0, num_partitions=3, num_rounds=3)
    run = Sparsifier(model, config, total_steps=60)
    run.start()
    keep = reference.exact_keep(Fraction(str(sparsity)), 6 * 16 * 17)
    for step in range(60):
        model(torch.randn(4, 16)).square().mean().backward()
        if step == 20 and method == "rigl":  # a tensor that the loss did not reach
            run.masks.params["2.weight"].grad = None
        run.mask_gradients()
        with torch.no_grad():
            for param, grad in [(p, p.grad) for p in model.parameters() if p.grad is not None]:
                param.sub_(grad)
        run.mask_weights()
        model.zero_grad()
        run.advance(step + 1)
        if run.at_target:
            assert sum(run.masks.live(n) for n in run.weights) == keep, step
    assert run.at_target


def test_rigl_never_changes_masks_in_the_fine_tune() -> None:
    config = config_of("rigl", update_steps=10, fine_tune_share=0.25)
    run = Sparsifier(make_model(), config, total_steps=40)
    run.start()
    assert [u.step for u in run.plan.updates] == [10, 20]
    digests = []
    for step in range(40):
        for name in run.weights:  # not finite for long
            value = math.inf if step < 27 else 1.0 + step
            run.masks.params[name].grad = torch.full_like(run.masks.params[name], value)
        changed = run.mask_gradients() is not None
        # Of the two that had to wait only the last is done, at the first finite gradient.
        assert changed == (step == 27)
        digests.append(run.masks.digest())
        run.advance(step + 1)
    assert len(set(digests[:27])) == len(set(digests[27:])) == 1
    assert run.num_done == 2

    late = Sparsifier(make_model(), config, total_steps=40)
    late.start()
    digest = late.masks.digest()
    for step in range(40):
        for name in late.weights:
            value = math.inf if step < 35 else 1.0
            late.masks.params[name].grad = torch.full_like(late.masks.params[name], value)
        assert late.mask_gradients() is None
        late.advance(step + 1)
    assert (late.masks.digest(), late.num_done) == (digest, 2)


def test_mest_measures_what_it_pruned_and_the_masks_it_replaced() -> None:
    config = config_of("mest", update_steps=2, drop_fraction=0.5)
    run = Sparsifier(nn.Sequential(nn.Linear(4, 2, bias=False)), config, total_steps=12)
    force(run, [[4.0, 3.0, 2.0, 1.0], [0.5, 0.25, 0.0, 0.0]], [[1, 1, 1, 1], [1, 1, 0, 0]])
    before = run.masks["0.weight"]
    change = run.advance(2)
    assert change is not None
    after = run.masks["0.weight"]
    assert before is not None
    assert after is not None
    assert change.pruning_error == pytest.approx((0.25 + 0.0625) / (16 + 9 + 4 + 1 + 0.25 + 0.0625))
    assert change.mask_iou == pytest.approx(float((before & after).sum() / (before | after).sum()))


@pytest.mark.parametrize("method", ["rigl", "set", "mest"])
@pytest.mark.parametrize("reset", ["changed", "all"])
def test_what_grows_inside_a_phase_starts_with_moments_of_zero(method: str, reset: str) -> None:
    config = config_of(method, optimizer_reset=reset)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = Sparsifier(model, config, total_steps=60, optimizer=optimizer)
    run.start()
    grown = 0
    for step in range(40):
        before = {n: m.clone() for n in run.weights if (m := run.masks[n]) is not None}
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        (model(inputs) - inputs.flip(1)).square().mean().backward()
        run.mask_gradients()
        _check_moments(run, before, optimizer)
        optimizer.step()
        run.mask_weights()
        optimizer.zero_grad()
        before = {n: m.clone() for n in run.weights if (m := run.masks[n]) is not None}
        run.advance(step + 1)
        grown += _check_moments(run, before, optimizer)
    assert grown or method == "rigl"


def _check_moments(run: Sparsifier, before: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    grown = 0
    for name, old in before.items():
        new = run.masks[name]
        state = optimizer.state.get(run.masks.params[name], {})
        if new is not None and "exp_avg" in state:
            fresh = (new == 1) & (old == 0)
            assert not state["exp_avg"][fresh].any()
            assert not state["exp_avg_sq"][fresh].any()
            grown += int(fresh.sum())
    return grown


@pytest.mark.parametrize("method", ["set", "mest"])
def test_random_growth_depends_on_seed_step_and_name_only(method: str) -> None:
    def grow(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(7)
        run = Sparsifier(make_model(), config_of(method), total_steps=60, seed=seed)
        run.start()
        torch.rand(3)  # the global generator is neither read nor moved
        state = torch.get_rng_state()
        for step in range(1, 60):
            run.advance(step)
        assert torch.equal(state, torch.get_rng_state())
        return {n: run.masks[n] for n in run.weights}

    one, again, other = grow(1), grow(1), grow(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)
