"""The cost model of benchmarks/communication.py on made-up times, and the numbers that it puts into documents."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from _communication.cost_model import (  # noqa: E402
    SIZES,
    AllReduce,
    Cluster,
    fit_all_reduce,
    on_the_wire,
    packing_bytes,
    sharing,
    step_cost,
)
from _communication.tables import BEGIN, END, render, replace_block  # noqa: E402
from communication import cost_model, fit_packing  # noqa: E402


def test_a_ring_sends_twice_what_the_others_hold() -> None:
    assert on_the_wire(100, 1) == 0
    assert on_the_wire(100, 2) == 100
    assert on_the_wire(100, 4) == 150


def test_processes_take_turns_only_when_there_are_more_than_cores() -> None:
    assert [sharing(n, 2) for n in (1, 2, 4)] == [1, 1, 2]


@pytest.mark.parametrize("true", [AllReduce(5e-5, 1e-4, 1e-9), AllReduce(1e-5, 0.0, 3e-10)])
def test_the_fit_finds_what_made_the_times(true: AllReduce) -> None:
    sizes = (2**12, 2**18, 2**22, 2**24)
    fitted = fit_all_reduce({n: [(b, true.seconds(b, n)) for b in sizes] for n in (1, 2)}, num_cores=2)
    assert (fitted.call, fitted.message, fitted.byte) == pytest.approx((true.call, true.message, true.byte), rel=1e-6)


def test_a_fit_has_no_negative_message() -> None:
    fitted = fit_all_reduce({1: [(4, 1e-3)], 2: [(4, 1e-3), (1000, 2e-3), (2000, 4e-3)]}, num_cores=2)
    assert fitted.message == 0 and fitted.byte > 0


def packing_points(*points: tuple[int, int, float]) -> list[dict[str, float]]:
    return [{"num_entries": 100, "num_live": live, "num_whole": whole, "seconds": t} for live, whole, t in points]


def test_the_packing_fit_finds_what_made_the_times() -> None:
    mixed = [(10, 0), (40, 0), (5, 50), (20, 50)]
    points = packing_points(*((live, whole, 2.0 * 100 + 3.0 * live + 0.5 * whole) for live, whole in mixed))
    assert fit_packing({1: points}, num_cores=1) == pytest.approx({"entries": 2.0, "live": 3.0, "whole": 0.5})


def test_a_packing_fit_has_no_negative_cost() -> None:
    found = fit_packing({1: packing_points((10, 0, 1.0), (40, 0, 5.0))}, num_cores=1)
    assert found["entries"] == found["whole"] == 0 and 0.1 < found["live"] < 0.125
    found = fit_packing({1: packing_points((10, 0, 2.0), (40, 0, 1.0))}, num_cores=1)
    assert found["live"] == 0 and 0.01 < found["entries"] < 0.02


def test_a_prediction_of_four_processes_from_times_that_obey_the_model() -> None:
    """Two cores: four processes take twice as long for their own work, and send half as much again each."""
    truth = AllReduce(5e-5, 1e-4, 1e-9)
    entry, live, alone = 2e-9, 3e-9, 0.5
    rates = {"prune": 8e-8, "apply": 5e-10, "digest": 3e-10}
    pieces = {}
    for n in (1, 2, 4):
        shared = sharing(n, 2)
        buckets = [
            {"num_entries": 10**6, "num_live": 10**5, "num_whole": 0, "num_sent": 10**5, "packed": True},
            {"num_entries": 10**6, "num_live": 0, "num_whole": 10**6, "num_sent": 10**6, "packed": False},
        ]
        work = shared * (entry * 10**6 + live * 10**5)
        sent = sum(truth.seconds(4 * b["num_sent"], n, shared=shared) for b in buckets)
        update = {k: shared * rate * (10**6 if k == "prune" else 4 * 10**6) for k, rate in rates.items()}
        pieces[n] = {
            "all_reduce": [[b, truth.seconds(b, n, shared=shared)] for b in (2**12, 2**20, 2**24)],
            "packing": [
                {
                    "num_entries": 10**6,
                    "num_live": k,
                    "num_whole": w,
                    "seconds": shared * (entry * 10**6 + live * k + w * 1e-9),
                }
                for k, w in ((10**5, 0), (3 * 10**5, 0), (10**5, 5 * 10**5))
            ],
            "step": {"alone": shared * alone, "whole": shared * alone + work + sent},
            "update": {**update, "whole": sum(update.values()), "num_pruned": 10**6, "num_weights": 4 * 10**6},
            "communication": {"buckets": buckets, "seconds": work + sent},
        }
    model = cost_model(pieces, num_cores=2)
    for found in model["predictions"].values():
        assert [p["ratio"] for p in found.values()] == pytest.approx([1, 1, 1], rel=1e-6)
    assert model["packing"]["entries_ns"] == pytest.approx(2)
    assert model["update"]["digest_ns_per_weight"] == pytest.approx(0.3)


def test_bytes_of_a_step_by_hand() -> None:
    (size,) = [s for s in SIZES if s.name == "7 B"]
    dense = step_cost(size, 2, sparsity=0.9, packed=0)
    phase = step_cost(size, 2, sparsity=0.9, packed=0.75)
    assert dense.sent == 4 * 6.74e9 and dense.packing == 0
    # Of the prunable set a quarter is dense and three quarters have a tenth left: 0.325.
    assert phase.sent == pytest.approx(4 * 6.74e9 * (1 - 0.961 + 0.961 * 0.325))
    assert phase.packing == pytest.approx(6.74e9 * 0.961 * 0.75 * packing_bytes(0.1) / Cluster().memory)
    assert step_cost(size, 16, sparsity=0.9, packed=0).seconds > 6 * step_cost(size, 8, sparsity=0.9, packed=0).seconds


def test_documents_say_what_was_not_measured() -> None:
    text = render(None)
    assert "Nothing is recorded yet" in text and "Nothing in this table was measured" in text
    assert text.count("| 70 B |") == 5
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_block(document, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="expected the lines"):
        replace_block("no marks", "new")


def test_scaling_md_can_be_generated_anew() -> None:
    document = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert "new" in replace_block(document, "new")
