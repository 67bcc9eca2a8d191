import itertools
import json
import math
import random

import pytest

from orchestrator.config.search import Constraint
from orchestrator.pareto.asha import Mode
from orchestrator.pareto.front import hypervolume, non_dominated
from orchestrator.reporting.outcome import Outcome, meets
from tests.orchestrator import planted

AT_MOST_HALF = (Constraint(metric="macs_ratio", max=0.5),)
MODES: list[Mode] = ["max", "min"]


def trial(
    number: int, top1: float | None, latency_ms: float | None, macs_ratio: float = 0.4, **more: object
) -> dict[str, object]:
    return {
        "trial_id": f"trial_{number:04d}", "kind": "trial", "status": "finished", "top1": top1,
        "latency_ms": latency_ms, "macs_ratio": macs_ratio, "macs": 1000, "params": 10, **more,
    }  # fmt: skip


def unpruned(top1: float = 98.0, latency_ms: float = 4.0) -> dict[str, object]:
    row = trial(0, top1, latency_ms, macs_ratio=1.0)
    return {**row, "trial_id": "unpruned", "kind": "unpruned"}


def outcome(rows: list[dict[str, object]], constraints: tuple[Constraint, ...] = ()) -> Outcome:
    return Outcome(planted.search_config(constraints=constraints), rows)


def test_dominated_points_are_dropped() -> None:
    assert non_dominated([(90, 2), (80, 1), (80, 3), (90, 3)], MODES) == [True, True, False, False]


def test_equal_points_are_both_kept() -> None:
    assert non_dominated([(90, 2), (90, 2)], MODES) == [True, True]


def test_nan_is_never_kept_and_dominates_nothing() -> None:
    assert non_dominated([(math.nan, 0), (90, 2)], MODES) == [False, True]


def test_no_points_no_front() -> None:
    assert non_dominated([], MODES) == []


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([], 0, id="empty"),
        pytest.param([(90, 2)], 80 * 2, id="one point"),
        pytest.param([(90, 2), (80, 1)], 80 * 2 + 70 * 1, id="two points"),
        pytest.param([(90, 2), (80, 1), (85, 3), (70, 2)], 230, id="dominated points add nothing"),
        pytest.param([(90, 2), (90, 2)], 160, id="a point twice adds nothing"),
        pytest.param([(90, 4), (10, 1), (5, 1)], 0, id="not better than the reference"),
    ],
)
def test_hypervolume_in_two_objectives(points: list[tuple[float, float]], expected: float) -> None:
    assert hypervolume(points, MODES, (10, 4)) == expected


def test_hypervolume_in_one_objective_is_a_length() -> None:
    assert hypervolume([(3.0,), (1.0,)], ["min"], (5.0,)) == 4.0


def test_hypervolume_in_three_objectives_equals_counted_cells() -> None:
    draw = random.Random(0)
    points = [tuple(float(draw.randrange(8)) for _ in range(3)) for _ in range(12)]
    cells = itertools.product(range(8), repeat=3)  # the unit cell at c is dominated when some point is <= c everywhere
    counted = sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)
    assert hypervolume(points, ["min"] * 3, (8, 8, 8)) == counted


def test_bounds_of_a_constraint_are_met() -> None:
    assert meets({"macs_ratio": 0.5}, AT_MOST_HALF)
    assert not meets({"macs_ratio": 0.51}, AT_MOST_HALF)
    assert not meets({"macs_ratio": None}, AT_MOST_HALF)
    assert not meets({}, AT_MOST_HALF)
    assert meets({"top1": 90.0}, [Constraint(metric="top1", min=90.0)])


def test_front_is_sorted_by_the_first_objective() -> None:
    rows = [trial(0, 80, 1), trial(1, 90, 2), trial(2, 79, 2)]
    assert [row["trial_id"] for row in outcome(rows).front] == ["trial_0001", "trial_0000"]


@pytest.mark.parametrize(
    "change", [{"status": "stopped"}, {"status": "failed"}, {"kind": "uniform"}, {"top1": None}], ids=str
)
def test_only_finished_and_measured_trials_stand_on_the_front(change: dict[str, object]) -> None:
    rows = [trial(0, 80, 2), {**trial(1, 99, 1), **change}]
    assert [row["trial_id"] for row in outcome(rows).front] == ["trial_0000"]


def test_what_breaks_a_constraint_neither_stands_on_the_front_nor_dominates() -> None:
    rows = [trial(0, 99, 1, macs_ratio=0.6), trial(1, 80, 2)]
    assert [row["trial_id"] for row in outcome(rows, AT_MOST_HALF).front] == ["trial_0001"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([unpruned()], "The front is empty: no trial has finished.", id="none finished"),
        pytest.param(
            [trial(0, 80, 2, macs_ratio=0.7), trial(1, 80, 2, macs_ratio=0.6)],
            "The front is empty: none of 2 finished trials meets the constraints "
            "(macs_ratio must be at most 0.5, the smallest is 0.6).",
            id="none small enough",
        ),
        pytest.param(
            [trial(0, 80, None), trial(1, 80, None)],
            "The front is empty: none of 2 finished trials has latency_ms.",
            id="an objective that nobody reports",
        ),
    ],
)
def test_an_empty_front_is_explained(rows: list[dict[str, object]], message: str) -> None:
    found = outcome(rows, AT_MOST_HALF)
    assert found.front == []
    assert found.why_empty == message


def test_best_under_takes_the_most_accurate_that_is_fast_enough() -> None:
    rows = [trial(0, 90, 3), trial(1, 85, 2), trial(2, 84, 1.5), trial(3, 99, 2, status="stopped")]
    best = outcome(rows).best_under({"latency_ms": 2.0})
    assert best is not None
    assert best["trial_id"] == "trial_0001"
    assert outcome(rows).best_under({"latency_ms": 1.0}) is None


def test_knee_gives_up_least() -> None:
    # scaled losses: (0, 1), (0.1, 0.25), (1, 0): sums 1, 0.35, 1
    rows = [trial(0, 90, 5), trial(1, 89, 2), trial(2, 80, 1)]
    chosen = outcome(rows).knee
    assert chosen is not None
    assert chosen["trial_id"] == "trial_0001"
    assert outcome([]).knee is None


def test_reference_point_is_guessing_at_the_cost_of_the_unpruned_network() -> None:
    assert outcome([unpruned(latency_ms=4.0), trial(0, 99, 9)]).reference_point == [10.0, 4.0]
    assert outcome([trial(0, 99, 9)]).reference_point is None


def test_pareto_json_holds_the_documented_keys() -> None:
    rows = [unpruned(98, 4), trial(0, 90, 2, **{"gating.loss_weight": 0.1})]
    document = json.loads(outcome(rows, AT_MOST_HALF).pareto_json)
    assert list(document) == [
        "version",
        "objectives",
        "constraints",
        "reference_point",
        "hypervolume",
        "unpruned",
        "front",
    ]
    assert document["objectives"] == [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}]
    assert document["constraints"] == [{"metric": "macs_ratio", "max": 0.5}]
    assert document["reference_point"] == [10.0, 4.0]
    assert document["hypervolume"] == (90 - 10) * (4 - 2)
    assert document["unpruned"] == {"top1": 98, "latency_ms": 4, "macs": 1000, "params": 10}
    assert [(entry["trial_id"], entry["gating.loss_weight"]) for entry in document["front"]] == [("trial_0000", 0.1)]


def test_pareto_json_without_the_unpruned_network_has_no_reference() -> None:
    document = json.loads(outcome([trial(0, 90, 2)]).pareto_json)
    assert (document["unpruned"], document["reference_point"], document["hypervolume"]) == (None, None, None)
    assert len(document["front"]) == 1
