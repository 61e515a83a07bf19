"""Phases and plans: exact ends, the order of groups, and what a training that is too short is told."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from fractions import Fraction
from typing import Any

import pytest
import reference
from hypothesis import assume, given
from hypothesis import strategies as st

from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.phases import Phase, round_half_up
from gap_hf.plan import Plan, make_plan, peak_factor

PAPER: dict[str, Any] = {"sparsity": 0.9, "ramp_share": 0, "prune_share": 0}  # no update but where a phase begins
partitions = st.integers(1, 7)
rounds = st.integers(1, 5)
shares = st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.99])
totals = st.integers(1, 3000)


def plan_of(config: GaPConfig, total_steps: int, **more: Any) -> Plan:
    return make_plan(config, num_groups=config.num_partitions, total_steps=total_steps, **more)


def check_covers(plan: Plan, total_steps: int) -> None:
    """Phases cover 0 ... total_steps without gap or overlap and none is empty."""
    covered = [step for phase in plan.phases for step in range(phase.start, phase.end)]
    assert covered == list(range(total_steps))
    assert all(phase.num_steps == phase.end - phase.start >= 1 for phase in plan.phases)
    assert [phase.index for phase in plan.phases] == list(range(len(plan.phases)))
    assert plan.total_steps == total_steps
    kinds = [phase.kind for phase in plan.phases]
    assert kinds[0] == "initial"
    assert kinds[-1] == "fine-tune"
    assert "fine-tune" not in kinds[:-1]
    assert "initial" not in kinds[1:]


def fits(config: GaPConfig, total_steps: int, **more: Any) -> bool:
    try:
        plan_of(config, total_steps, **more)
    except GaPError:
        return False
    return True


def shortest_named(message: str) -> int:
    found = re.search(r"at least (\d+) optimizer steps", message)
    assert found, message
    return int(found[1])


# --- ends ------------------------------------------------------------------------------------------------------------


@given(kappa=partitions, num_rounds=rounds, share=shares, total=totals)
def test_rounds_and_share(kappa: int, num_rounds: int, share: float, total: int) -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=kappa, num_rounds=num_rounds, fine_tune_share=share)
    num_phases = 1 + num_rounds * kappa
    fine_tune = max(1, math.floor(Fraction(str(share)) * total + Fraction(1, 2)))
    assume(total - fine_tune >= num_phases)
    plan = plan_of(config, total)
    check_covers(plan, total)
    assert len(plan.phases) == num_phases + 1
    assert plan.fine_tune.num_steps == fine_tune
    lengths = [phase.num_steps for phase in plan.phases[:-1]]
    assert max(lengths) - min(lengths) <= 1
    assert [p.end for p in plan.phases[:-1]] == reference.even_phase_ends(num_phases, total - fine_tune)


@given(kappa=partitions, num_rounds=rounds, length=st.integers(1, 40), total=totals)
def test_rounds_and_length_leave_the_rest_to_the_fine_tune(
    kappa: int, num_rounds: int, length: int, total: int
) -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=kappa, num_rounds=num_rounds, phase_steps=length)
    num_phases = 1 + num_rounds * kappa
    assume(total > num_phases * length)
    plan = plan_of(config, total)
    check_covers(plan, total)
    assert [phase.num_steps for phase in plan.phases] == [length] * num_phases + [total - num_phases * length]


@given(kappa=partitions, share=shares, length=st.integers(1, 40), total=totals)
def test_length_and_share_give_the_most_rounds_that_fit(kappa: int, share: float, length: int, total: int) -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=kappa, phase_steps=length, fine_tune_share=share)
    budget = total - max(1, math.floor(Fraction(str(share)) * total + Fraction(1, 2)))
    # By counting: add whole rounds while they fit.
    num_rounds = 0
    while (1 + (num_rounds + 1) * kappa) * length <= budget:
        num_rounds += 1
    assert fits(config, total) == (num_rounds >= 1)
    assume(num_rounds >= 1)
    plan = plan_of(config, total)
    check_covers(plan, total)
    assert [p.num_steps for p in plan.phases[:-1]] == [length] * (1 + num_rounds * kappa)
    assert plan.fine_tune.num_steps >= total - budget


@given(
    kappa=partitions,
    num_rounds=rounds,
    epochs=st.sampled_from([0.1, 0.5, 1, 1.5, 2.25]),
    per_epoch=st.fractions(Fraction(10), Fraction(100), max_denominator=8),
    total=totals,
)
def test_phases_of_fractional_epochs_are_equal_to_within_one_step(
    kappa: int, num_rounds: int, epochs: float, per_epoch: Fraction, total: int
) -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=kappa, num_rounds=num_rounds, phase_epochs=epochs)
    length = Fraction(str(epochs)) * per_epoch
    num_phases = 1 + num_rounds * kappa
    assume(round_half_up(length * num_phases) < total)
    plan = plan_of(config, total, steps_per_epoch=per_epoch)
    check_covers(plan, total)
    for i, phase in enumerate(plan.phases[:-1]):
        # The nearest step to i + 1 exact lengths: rounding does not add up.
        assert abs(phase.end - (i + 1) * length) <= Fraction(1, 2)
        assert abs(phase.num_steps - length) < 1


def test_steps_per_epoch_may_be_a_float() -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=1, phase_epochs=0.3)
    plan = plan_of(config, 100, steps_per_epoch=33.333333333333336)
    assert plan == plan_of(config, 100, steps_per_epoch=Fraction(100, 3))
    assert [p.end for p in plan.phases] == [10, 20, 30, 100]


def test_defaults_are_two_rounds_and_a_quarter() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, num_partitions=3), 1000)
    assert len(plan.phases) == 1 + 2 * 3 + 1
    assert plan.fine_tune.num_steps == 250


@pytest.mark.parametrize(("value", "rounded"), [("0.5", 1), ("1.5", 2), ("2.5", 3), ("2.4999", 2), ("7", 7)])
def test_halves_round_up(value: str, rounded: int) -> None:
    assert round_half_up(Fraction(value)) == rounded


# --- too short -------------------------------------------------------------------------------------------------------

kinds_of_length = st.sampled_from(
    [
        {"num_rounds": 1},
        {"num_rounds": 4, "fine_tune_share": 0.9},
        {"num_rounds": 3, "fine_tune_share": 0.01},
        {"num_rounds": 2, "fine_tune_share": 1 / 3},
        {"num_rounds": 3, "phase_steps": 7},
        {"phase_steps": 5},
        {"phase_steps": 11, "fine_tune_share": 0.5},
        {"phase_epochs": 0.37},
        {"phase_epochs": 0.37, "num_rounds": 3},
    ]
)


@given(kappa=partitions, kind=kinds_of_length)
def test_too_short_names_the_shortest_that_works(kappa: int, kind: dict[str, Any]) -> None:
    config = GaPConfig.from_dict({"sparsity": 0.9, "num_partitions": kappa, **kind})
    more = {"steps_per_epoch": Fraction(31, 2)}
    with pytest.raises(GaPError) as error:
        plan_of(config, 1, **more)
    assert str(error.value).startswith("gap.")
    assert "training has 1" in str(error.value)
    shortest = shortest_named(str(error.value))
    assert next(n for n in range(1, 2 * shortest) if fits(config, n, **more)) == shortest
    check_covers(plan_of(config, shortest, **more), shortest)
    # Every shorter training is told the same, and is offered only what works.
    for total in range(2, shortest):
        with pytest.raises(GaPError) as error:
            plan_of(config, total, **more)
        assert shortest_named(str(error.value)) == shortest
        assert f"training has {total}" in str(error.value)
        offered = re.search(r"use num_rounds: (\d+)", str(error.value))
        num_rounds = int(offered[1]) if offered else 0
        if "num_rounds" in kind:
            assert num_rounds < kind["num_rounds"]
            assert num_rounds == 0 or fits(config.replace(num_rounds=num_rounds), total, **more)
            assert not fits(config.replace(num_rounds=num_rounds + 1), total, **more)


def test_epochs_without_their_length() -> None:
    config = GaPConfig(sparsity=0.9, phase_epochs=1)
    with pytest.raises(GaPError, match=r"gap\.phase_epochs: .* not known.*expected phase_steps"):
        plan_of(config, 100)
    with pytest.raises(
        GaPError, match=r"gap\.phase_epochs: 0\.01 epochs are 0\.5 optimizer steps; expected at least 1"
    ):
        plan_of(config.replace(phase_epochs=0.01), 100, steps_per_epoch=50)


def test_dense_has_no_plan() -> None:
    with pytest.raises(ValueError, match="'dense' has no plan"):
        plan_of(GaPConfig(method="dense"), 100)


# --- order -----------------------------------------------------------------------------------------------------------

# Written out from the paper's schedule by hand, R = 2: (pruned, grown) at each phase, groups counted from 0.
ORDER: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    1: [((), (0,)), ((0,), (0,)), ((0,), (0,)), ((0,), ())],
    2: [((), (0,)), ((0,), (1,)), ((1,), (0,)), ((0,), (1,)), ((1,), (0,)), ((0,), ())],
    3: [
        *[((), (0,)), ((0,), (1,)), ((1,), (2,)), ((2,), (0,))],
        *[((0,), (1,)), ((1,), (2,)), ((2,), (0,))],
        ((0,), ()),
    ],
    6: [
        *[((), (0,)), ((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((3,), (4,)), ((4,), (5,)), ((5,), (0,))],
        *[((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((3,), (4,)), ((4,), (5,)), ((5,), (0,))],
        ((0,), ()),
    ],
}


def pruned(plan: Plan, phase: Phase) -> tuple[int, ...]:
    """The groups that are pruned to the target where a phase begins."""
    assert all(update.prune_to in (None, 1.0) for update in plan.updates)
    return tuple(g for u in plan.updates if u.step == phase.start and u.prune_to is not None for g in u.groups)


def grown(plan: Plan, phase: Phase) -> tuple[int, ...]:
    """The groups that are grown where a phase begins; at the start those that begin dense."""
    if phase.start == 0:
        return tuple(g for g, level in enumerate(plan.first_levels) if level == 0)
    return tuple(g for u in plan.updates if u.step == phase.start and u.grow_to == 0 for g in u.groups)


@pytest.mark.parametrize("kappa", sorted(ORDER))
def test_order_of_pruned_and_grown_groups(kappa: int) -> None:
    plan = plan_of(GaPConfig(**PAPER, num_partitions=kappa, num_rounds=2), 200)
    assert [(pruned(plan, phase), grown(plan, phase)) for phase in plan.phases] == ORDER[kappa]
    assert [phase.round for phase in plan.phases] == [0, *[1] * kappa, *[2] * kappa, 2]
    assert [phase.kind for phase in plan.phases] == ["initial", *["cyclic"] * (2 * kappa), "fine-tune"]


@given(kappa=partitions, num_rounds=rounds)
def test_cyclic_has_exactly_one_dense_group_before_the_fine_tune(kappa: int, num_rounds: int) -> None:
    config = GaPConfig(**PAPER, num_partitions=kappa, num_rounds=num_rounds)
    plan = plan_of(config, 500)
    dense: set[int] = set()
    for phase in plan.phases:
        assert set(pruned(plan, phase)) <= dense
        dense = (dense - set(pruned(plan, phase))) | set(grown(plan, phase))
        assert dense == set(plan.grown(phase))
        assert plan.levels_at(phase.start) == plan.levels_at(phase.end - 1)
        assert len(dense) == (0 if phase is plan.fine_tune else 1)
    for group in range(kappa):
        assert sum(group in pruned(plan, phase) for phase in plan.phases) == num_rounds + (group == 0)


@given(kappa=partitions, num_tensors=st.integers(1, 30), seed=st.integers(0, 5))
def test_random_draws(kappa: int, num_tensors: int, seed: int) -> None:
    assume(kappa <= num_tensors)
    config = GaPConfig(**PAPER, method="random", num_partitions=kappa, num_rounds=3)

    def draw(seed: int) -> Plan:
        return make_plan(config, num_groups=num_tensors, total_steps=300, seed=seed)

    plan = draw(seed)
    check_covers(plan, 300)
    assert plan == draw(seed)
    size = max(1, num_tensors // kappa)
    previous: set[int] = set()
    for phase in plan.phases[:-1]:
        dense = set(grown(plan, phase))
        assert len(grown(plan, phase)) == len(dense) == size
        assert list(grown(plan, phase)) == sorted(dense)
        assert dense <= set(range(num_tensors))
        assert set(pruned(plan, phase)) == previous
        assert plan.grown(phase) == grown(plan, phase)
        if kappa > 1:
            assert not dense & previous
        previous = dense
    assert plan.grown(plan.fine_tune) == ()
    assert set(pruned(plan, plan.fine_tune)) == previous


def test_random_draws_depend_on_the_seed_and_reach_every_tensor() -> None:
    config = GaPConfig(sparsity=0.9, method="random", num_partitions=4, num_rounds=5)
    plans = [make_plan(config, num_groups=12, total_steps=300, seed=seed) for seed in range(3)]
    assert plans[0] != plans[1] != plans[2]
    assert {g for phase in plans[0].phases for g in plans[0].grown(phase)} == set(range(12))


# --- questions to a plan ---------------------------------------------------------------------------------------------


@given(kappa=partitions, total=st.integers(20, 200))
def test_phase_at_is_a_linear_scan(kappa: int, total: int) -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, num_partitions=kappa, num_rounds=1), total)
    lengths = [phase.num_steps for phase in plan.phases]
    for step in range(total + 3):
        phase = plan.phase_at(step)
        assert phase.index == reference.phase_index(lengths, step)
        assert plan.begins_at(step) == (phase if phase.start == step else None)
    assert plan.begins_at(total) is None
    with pytest.raises(ValueError, match="step is -1"):
        plan.phase_at(-1)


def test_with_total_steps() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=1, phase_steps=10), 50)
    assert plan.with_total_steps(50) == plan
    for total in (31, 49, 51, 1000):
        other = plan.with_total_steps(total)
        assert other.phases[:-1] == plan.phases[:-1]
        assert other.fine_tune == dataclasses.replace(plan.fine_tune, end=total)
        check_covers(other, total)
    with pytest.raises(GaPError, match="reaches the fine-tune at step 30; expected at least 31"):
        plan.with_total_steps(30)


@given(kappa=partitions, method=st.sampled_from(["cyclic", "random"]), seed=st.integers(0, 3))
def test_a_plan_survives_json(kappa: int, method: str, seed: int) -> None:
    config = GaPConfig(sparsity=0.9, method=method, num_partitions=kappa)
    plan = make_plan(config, num_groups=9, total_steps=200, seed=seed)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


RECORDED: dict[str, Any] = {
    "phases": [{"index": 0, "kind": "x", "round": 0, "start": 0, "end": 2}],
    "updates": [],
    "first_levels": [1.0],
}


def test_the_recorded_plan_that_the_next_test_spoils_is_one() -> None:
    assert Plan.from_dict(RECORDED).total_steps == 2


@pytest.mark.parametrize(
    "data",
    [
        {},
        {**RECORDED, "phases": []},
        {**RECORDED, "phases": 3},
        {**RECORDED, "phases": [{"index": 0}]},
        {**RECORDED, "phases": [3]},
        {**RECORDED, "phases": [{"index": 0, "kind": "x", "round": 0, "start": 1, "end": 2}]},
        {**RECORDED, "phases": [{"index": 0, "kind": "x", "round": 0, "start": 0, "end": 0}]},
        {"phases": RECORDED["phases"]},
        {**RECORDED, "first_levels": []},
        {**RECORDED, "first_levels": ["two"]},
        {**RECORDED, "first_levels": [0.5]},
        {**RECORDED, "updates": [{"step": 1, "groups": [0], "prune_to": 1.0}]},
        {**RECORDED, "updates": [{"step": 0, "groups": [0], "prune_to": 1.0}]},
        {**RECORDED, "updates": [{"step": 0, "groups": [0]}]},
        {**RECORDED, "updates": [{"groups": [0], "prune_to": 1.0}]},
        {**RECORDED, "updates": [{"step": 0, "groups": [7], "prune_to": 1.0}]},
        {**RECORDED, "updates": [{"step": 0, "groups": 0, "prune_to": 1.0}]},
    ],
)
def test_not_a_recorded_plan(data: dict[str, Any]) -> None:
    with pytest.raises(GaPError, match="plan: not a recorded plan"):
        Plan.from_dict(data)


@pytest.mark.parametrize("gap", [(0, 3, 4, 9), (0, 5, 4, 9), (0, 0, 0, 9)])
def test_a_plan_with_a_gap_an_overlap_or_an_empty_phase_cannot_be_made(gap: tuple[int, int, int, int]) -> None:
    first = Phase(index=0, kind="initial", round=0, start=gap[0], end=gap[1])
    second = Phase(index=1, kind="fine-tune", round=0, start=gap[2], end=gap[3])
    with pytest.raises(AssertionError):
        Plan((first, second), (), (1.0,))


def test_peak_factors_by_hand() -> None:
    plan = plan_of(GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=2), 100)
    expected = {
        "constant": [1, 1, 1, 1, 1, 1],
        "linear": [1, 0.8, 0.6, 0.4, 0.2, 1],
        "cosine": [1, 0.9045085, 0.6545085, 0.3454915, 0.0954915, 1],
        "step": [1, 1, 1, 0.5, 0.5, 1],
    }
    for peaks, factors in expected.items():
        assert [peak_factor(plan, phase, peaks) for phase in plan.phases] == pytest.approx(factors)


@given(kappa=partitions, sparsity=st.sampled_from([0.5, 0.8, 0.9]))
def test_live_share_over_a_round_is_the_papers(kappa: int, sparsity: float) -> None:
    """With equal groups: (1 - s) + s / kappa while one is dense, 1 - s in the fine-tune."""
    config = GaPConfig(**{**PAPER, "sparsity": sparsity}, num_partitions=kappa, num_rounds=2, phase_steps=10)
    plan = plan_of(config, 2 * 10 * (1 + 2 * kappa))
    sizes, densities = [1000] * kappa, [1 - sparsity] * kappa
    one_dense = (1 - sparsity) + sparsity / kappa
    shares = [plan.live_share(phase, sizes, densities) for phase in plan.phases]
    assert shares == pytest.approx([one_dense] * (len(shares) - 1) + [1 - sparsity])
    # Half of this training is fine-tune.
    assert plan.average_live_share(sizes, densities) == pytest.approx((one_dense + 1 - sparsity) / 2)


def test_live_share_of_unequal_groups() -> None:
    plan = plan_of(GaPConfig(**PAPER, num_partitions=2, num_rounds=1, phase_steps=10), 40)
    shares = [plan.live_share(phase, [100, 300], [0.1, 0.5]) for phase in plan.phases]
    assert shares == pytest.approx([250 / 400, 310 / 400, 250 / 400, 160 / 400])
    assert plan.average_live_share([100, 300], [0.1, 0.5]) == pytest.approx(sum(shares) / 4)
