import json
import random

import pytest

from orchestrator.config.search import Constraint
from orchestrator.errors import ConfigError, RunDirError, UnjudgedReportWarning
from orchestrator.pareto.asha import ParetoASHA
from orchestrator.pareto.front import non_dominated

OBJECTIVES = [("top1", "max"), ("latency_ms", "min")]


def metrics(top1: float, latency_ms: float | None, macs_ratio: float = 0.5, **more: object) -> dict[str, object]:
    return {"top1": top1, "latency_ms": latency_ms, "macs_ratio": macs_ratio, **more}


def make_rule(objectives=OBJECTIVES, **more: object) -> ParetoASHA:
    return ParetoASHA(objectives, **{"grace_epochs": 1, "reduction_factor": 3, "max_epochs": 27, **more})


def test_the_first_at_a_rung_goes_on():
    assert make_rule().report("a", 1, metrics(10, 9.0)) == "continue"


def test_a_dominated_second_is_stopped():
    # position 1 of n = 2: 1/2 > 1/3
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    assert rule.report("b", 1, metrics(80, 3.0)) == "stop"


def test_a_dominated_third_goes_on_at_one_third():
    # position 1 of n = 3: 1/3 <= 1/3
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    rule.report("b", 1, metrics(80, 4.0))
    assert rule.report("c", 1, metrics(85, 3.0)) == "continue"


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


@pytest.mark.parametrize("index", [0, 1])
def test_no_objectives_scale_matters(index: int):
    def decisions(factors: tuple[float, float]) -> list[str]:
        draw = random.Random(0)
        rule = make_rule()
        points = [(draw.random() * factors[0], draw.random() * factors[1]) for _ in range(60)]
        return [rule.report(str(i), 1, metrics(*point)) for i, point in enumerate(points)]

    scaled = [1.0, 1.0]
    scaled[index] = 1024.0  # a power of two: the scaled floats are the same
    assert decisions((1.0, 1.0)) == decisions(tuple(scaled))


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
    print(
        f"front newcomers stopped {num_on_front_stopped} of {num_on_front}, last front kept {num_last_kept} of {num_last}"
    )
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


def test_a_trial_that_is_to_stay_open_is_judged():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    assert rule.report("b", 1, metrics(80, 3.0, macs_ratio=0.99, target_ratio=0.98)) == "stop"


def test_a_trial_is_judged_once_a_rung():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    rule.report("b", 1, metrics(95, 3.0))
    assert rule.report("b", 2, metrics(0, 9.0)) == "continue"


def test_a_stopped_trial_that_reports_again_stays_stopped():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    assert [rule.report("b", epoch, metrics(80, 3.0)) for epoch in (1, 1, 2, 3)] == ["stop"] * 4


def test_a_lost_report_moves_the_judgement_to_the_next():
    rule = make_rule()
    rule.report("a", 3, metrics(90, 2.0))
    assert rule.report("b", 5, metrics(80, 3.0)) == "stop"  # epochs 3 and 4 never arrived; rung 3 all the same


def test_the_last_epoch_is_no_rung():
    rule = make_rule(max_epochs=9)
    rule.report("a", 9, metrics(90, 2.0))
    assert rule.state()["rungs"][0].keys() == {"1", "3"}


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")], ids=["missing", "nan", "inf"])
def test_what_is_not_measured_is_named_and_not_judged(value: float | None):
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    with pytest.warns(UnjudgedReportWarning, match=r"b: latency_ms is (None|nan|inf) in a report"):
        assert rule.report("b", 1, metrics(80, value)) == "continue"
    assert rule.report("b", 2, metrics(80, 3.0)) == "stop"


def test_three_objectives_are_ranked_together():
    rule = make_rule(objectives=[*OBJECTIVES, ("params", "min")])
    rule.report("a", 1, metrics(90, 2.0, params=100))
    assert rule.report("b", 1, metrics(80, 3.0, params=50)) == "continue"
    assert rule.report("c", 1, metrics(70, 4.0, params=200)) == "stop"


def test_what_cannot_meet_a_constraint_ranks_last():
    rule = make_rule(constraints=[Constraint(metric="latency_ms", max=5.0)])
    rule.report("a", 1, metrics(60, 4.0))
    assert rule.report("b", 1, metrics(99, 6.0, stage="finetune")) == "stop"  # a better top1, but too slow for good
    assert rule.report("c", 1, metrics(99, 7.0, stage="gate")) == "continue"  # gates may yet close


def test_among_those_that_break_a_constraint_the_nearest_to_it_comes_first():
    rule = make_rule(constraints=[Constraint(metric="latency_ms", max=5.0)], reduction_factor=2)
    latencies = [8.0, 9.0, 6.0]  # positions 0 of 1, 1 of 2, 0 of 3
    assert [rule.report(str(i), 1, metrics(90, x)) for i, x in enumerate(latencies)] == ["continue"] * 3
    assert rule.report("last", 1, metrics(99, 20.0)) == "stop"  # 3 of 4


def test_a_network_that_is_already_too_small_ranks_last_while_its_gates_are_open():
    rule = make_rule(constraints=[Constraint(metric="macs_ratio", min=0.4)])
    rule.report("a", 1, metrics(60, 4.0, stage="gate"))
    assert rule.report("b", 1, metrics(99, 1.0, macs_ratio=0.3, stage="gate")) == "stop"


def test_latencies_within_each_others_spread_count_as_equal():
    def decision(low: float, high: float) -> str:
        rule = make_rule()
        rule.report("a", 1, metrics(90, 2.0, latency_p10_ms=1.8, latency_p90_ms=2.2))
        return rule.report("b", 1, metrics(85, 1.9, latency_p10_ms=low, latency_p90_ms=high))

    assert decision(1.7, 2.1) == "stop"  # as fast, less accurate
    assert decision(1.88, 1.92) == "continue"  # faster


def test_equal_architectures_have_equal_latencies():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0, architecture="x"))
    assert rule.report("b", 1, metrics(85, 1.9, architecture="x")) == "stop"
    assert rule.report("c", 1, metrics(85, 1.9, architecture="y")) == "continue"


def test_trials_are_dealt_to_the_brackets_in_turn():
    rule = make_rule(num_brackets=2)
    reports = [("a", 90), ("b", 89), ("c", 80), ("d", 79)]  # a and c in the first bracket, b and d in the second
    assert [rule.report(name, 1, metrics(top1, top1 / 10)) for name, top1 in reports] == ["continue"] * 4
    assert rule.report("b", 3, metrics(90, 2.0)) == "continue"
    assert rule.report("d", 3, metrics(80, 3.0)) == "stop"
    assert {epoch: len(rung) for epoch, rung in rule.state()["rungs"][1].items()} == {"3": 2, "9": 0}


def test_a_state_goes_through_json_and_decides_alike():
    draw = random.Random(2)

    def report(rule: ParetoASHA, number: int, epoch: int) -> str:
        latency = draw.random()
        spread = {"latency_p10_ms": latency - 0.01, "latency_p90_ms": latency + 0.01}
        return rule.report(f"trial_{number}", epoch, metrics(draw.random(), latency, stage="finetune", **spread))

    first = make_rule(constraints=[Constraint(metric="latency_ms", max=0.9)], num_brackets=2)
    for number in range(40):
        report(first, number, epoch=1 + number % 3)
    second = make_rule(constraints=[Constraint(metric="latency_ms", max=0.9)], num_brackets=2)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    later = draw.getstate()
    expected = [report(first, number, epoch=3) for number in range(20, 80)]
    draw.setstate(later)
    assert [report(second, number, epoch=3) for number in range(20, 80)] == expected


def test_a_state_of_other_rungs_or_objectives_is_refused():
    state = make_rule().state()
    with pytest.raises(RunDirError, match="expected"):
        make_rule(max_epochs=3).restore(state)
    with pytest.raises(RunDirError, match="expected"):
        make_rule(objectives=[("top1", "max")]).restore(state)
    with pytest.raises(RunDirError, match="expected"):
        make_rule(constraints=[Constraint(metric="latency_ms", max=0.9)]).restore(state)
    with pytest.raises(RunDirError, match="expected"):
        make_rule(reduction_factor=3.1).restore(state)  # the rungs are rounded to the same epochs
    with pytest.raises(RunDirError, match="expected"):
        make_rule().restore({})


@pytest.mark.parametrize(
    "wrong",
    [
        {"objectives": []},
        {"objectives": [("top1", "up")]},
        {"objectives": [("top1",)]},
        {"grace_epochs": 0},
        {"reduction_factor": 1},
        {"reduction_factor": float("nan")},
    ],
    ids=["no objective", "no such mode", "no mode", "no epoch", "keeps all", "no number"],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]):
    with pytest.raises(ConfigError, match="expected"):
        make_rule(**wrong)


def test_what_is_fine_tuned_is_judged_however_much_is_left_of_it():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0, stage="finetune"))
    assert rule.report("b", 1, metrics(80, 3.0, macs_ratio=0.99, stage="finetune")) == "stop"


def test_a_metric_that_is_text_is_told_and_not_judged():
    rule = make_rule()
    rule.report("a", 1, metrics(90, 2.0))
    with pytest.warns(UnjudgedReportWarning, match="latency_ms is 'fast'"):
        assert rule.report("b", 1, {**metrics(80, 3.0), "latency_ms": "fast"}) == "continue"
