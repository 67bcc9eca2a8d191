import random

import pytest

from orchestrator.pareto import non_dominated
from orchestrator.schedulers import AshaRule, NoRule, ParetoRule, RuleScheduler

OBJECTIVES = (("top1", "max"), ("latency_ms", "min"))


def metrics(top1: float, latency_ms: float, macs_ratio: float = 0.5, **more: object) -> dict[str, object]:
    return {"top1": top1, "latency_ms": latency_ms, "macs_ratio": macs_ratio, **more}


def make_rule(max_epochs: int = 27, objectives=OBJECTIVES) -> ParetoRule:
    return ParetoRule(objectives, grace_epochs=1, reduction_factor=3, max_epochs=max_epochs)


def test_the_first_at_a_rung_goes_on():
    assert make_rule().report("a", 1, metrics(10, 9.0)) == "continue"


def test_a_dominated_second_is_stopped():
    # position 1 of n = 2: 1/2 > 1/3
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    assert rule.report("b", 1, metrics(80, 3.0)) == "stop"


def test_a_newcomer_on_a_small_front_is_never_stopped():
    rule = make_rule()
    assert [rule.report(str(i), 1, metrics(80 + i, 1.0 + i)) for i in range(10)] == ["continue"] * 10


def test_the_eleventh_on_a_front_is_kept_by_its_place_in_farthest_point_order():
    # Points 0..9 and the newcomer lie on a line, all on the front. The order starts at the best top1 (9), then 0, then
    # the middle; one just beside 9 comes last: position 10 of 11 > 1/3. One far beyond the others comes first.
    def decision(top1: float, latency_ms: float) -> str:
        rule = make_rule()
        for i in range(10):
            rule.report(str(i), 1, metrics(80 + i, 1.0 + i))
        return rule.report("new", 1, metrics(top1, latency_ms))

    assert decision(88.99, 9.99) == "stop"
    assert decision(95.0, 20.0) == "continue"


def test_no_objectives_scale_matters():
    def decisions(factor: float) -> list[str]:
        draw = random.Random(0)
        rule = make_rule()
        points = [(draw.random(), draw.random()) for _ in range(30)]
        return [rule.report(str(i), 1, metrics(a, b * factor)) for i, (a, b) in enumerate(points)]

    assert decisions(1.0) == decisions(1024.0)  # a power of two: the scaled floats are the same


def test_from_the_eleventh_trial_on_the_front_goes_on_and_the_last_front_does_not():
    # 300 random streams of 30 trials at one rung; the first 10 of each are left out, see NUM_WITH_SAFE_FRONT.
    num_on_front = num_on_front_stopped = num_last = num_last_kept = 0
    draw = random.Random(0)
    for _ in range(300):
        rule, points = make_rule(), []
        for i in range(30):
            points.append((draw.random(), draw.random()))
            decision = rule.report(str(i), 1, metrics(*points[-1]))
            if i < 10:
                continue
            is_on_front, is_last = _front_place(points)
            num_on_front += is_on_front
            num_on_front_stopped += is_on_front and decision == "stop"
            num_last += is_last and not is_on_front
            num_last_kept += is_last and not is_on_front and decision == "continue"
    assert num_on_front > 500
    assert num_on_front_stopped / num_on_front < 0.03
    assert num_last > 500
    assert num_last_kept == 0


def _front_place(points: list[tuple[float, float]]) -> tuple[bool, bool]:
    """Return whether the last point is on the first front and whether it is on the last one."""
    remaining, depth = list(range(len(points))), 0
    while True:
        kept = non_dominated([points[i] for i in remaining], ["max", "min"])
        front = [i for i, is_kept in zip(remaining, kept, strict=True) if is_kept]
        remaining = [i for i in remaining if i not in front]
        if len(points) - 1 in front:
            return depth == 0, not remaining
        depth += 1


def test_a_trial_that_closed_nothing_is_judged_at_its_next_report():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    assert rule.report("b", 1, metrics(80, 3.0, macs_ratio=0.96)) == "continue"
    assert rule.report("b", 2, metrics(80, 3.0, macs_ratio=0.90)) == "stop"


def test_a_trial_is_judged_once_a_rung():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    rule.report("b", 1, metrics(95, 3.0))
    assert rule.report("b", 2, metrics(0, 9.0)) == "continue"


def test_a_lost_report_moves_the_judgement_to_the_next():
    rule = make_rule()
    rule.report("a", 3, metrics(90, 2.0))
    assert rule.report("b", 5, metrics(80, 3.0)) == "stop"  # epochs 3 and 4 never arrived; rung 3 all the same


@pytest.mark.parametrize("value", [None, float("nan")], ids=["missing", "nan"])
def test_what_is_not_measured_is_not_judged(value: float | None):
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    assert rule.report("b", 1, metrics(80, value)) == "continue"


def test_three_objectives_are_ranked_together():
    rule = make_rule(objectives=(*OBJECTIVES, ("params", "min")))
    rule.report("a", 1, metrics(90, 2.0, params=100))
    assert rule.report("b", 1, metrics(80, 3.0, params=50)) == "continue"
    assert rule.report("c", 1, metrics(70, 4.0, params=200)) == "stop"


def test_asha_judges_the_first_objective_alone():
    rule = AshaRule("top1", "max", grace_epochs=1, reduction_factor=3, max_epochs=9)
    reports = [("a", 90), ("b", 80), ("c", 70)]
    assert [rule.report(name, 1, metrics(top1, 1.0)) for name, top1 in reports] == ["continue", "stop", "stop"]


def test_asha_never_stops_before_the_final_measurement():
    rule = AshaRule("top1", "max", grace_epochs=1, reduction_factor=3, max_epochs=9)
    assert rule.report("a", 9, metrics(0, 1.0)) == "continue"


def test_asha_does_not_judge_a_trial_that_closed_nothing():
    rule = AshaRule("top1", "max", grace_epochs=1, reduction_factor=3, max_epochs=9)
    rule.report("a", 1, metrics(90, 1.0))
    assert rule.report("b", 1, metrics(0, 1.0, macs_ratio=1.0)) == "continue"


def test_a_replayed_scheduler_decides_as_the_first_one():
    draw = random.Random(1)
    stream = [
        (f"trial_{i:04d}", metrics(draw.random(), draw.random(), epoch=epoch, final=False))
        for i in range(20)
        for epoch in (1, 2, 3)
    ]
    undisturbed, first, second = (RuleScheduler(make_rule()) for _ in range(3))
    expected = [undisturbed.decide(*report) for report in stream]
    decided = [first.decide(*report) for report in stream[:31]]
    for report in stream[:31]:
        second.decide(*report)
    assert decided + [second.decide(*report) for report in stream[31:]] == expected
    assert second.stopped == undisturbed.stopped


def test_a_stopped_trial_that_reports_again_stays_stopped():
    scheduler = RuleScheduler(make_rule())
    scheduler.decide("a", metrics(90, 2.0, epoch=1))
    scheduler.decide("b", metrics(80, 3.0, epoch=1))
    assert scheduler.decide("b", metrics(99, 0.1, epoch=2)) == "stop"
    assert scheduler.stopped == {"b": 1}


def test_a_final_report_is_never_stopped():
    scheduler = RuleScheduler(make_rule())
    scheduler.decide("a", metrics(90, 2.0, epoch=1))
    assert scheduler.decide("b", metrics(80, 3.0, epoch=1, final=True)) == "continue"


def test_without_a_rule_nothing_stops():
    scheduler = RuleScheduler(NoRule())
    assert [scheduler.decide(str(i), metrics(-i, i, epoch=1)) for i in range(5)] == ["continue"] * 5
