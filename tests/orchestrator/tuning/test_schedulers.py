"""Every scheduler through the same life, and what sets Ray's own apart."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.search import SearchConfig
from orchestrator.pareto.asha import ParetoASHA
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.schedulers import NoRule, RuleScheduler, StoppingRule, asha, make_rule, median
from tests.orchestrator import planted

KINDS = ("pareto_asha", "asha", "median", "none")
Report = tuple[str, int, dict[str, object]]


def metrics(top1: float, latency_ms: float, macs_ratio: float = 0.5, **more: object) -> dict[str, object]:
    return {"top1": top1, "latency_ms": latency_ms, "macs_ratio": macs_ratio, **more}


def config_of(kind: str) -> SearchConfig:
    return SearchConfig.model_validate(
        {
            "name": "test",
            "base": planted.tiny_base(6, 3),
            "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
            "scheduler": {"type": kind, "grace_epochs": 1},
        }
    )


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[], StoppingRule]:
    return lambda: make_rule(config_of(request.param))


def life(num_trials: int = 24, num_epochs: int = 9, num_at_once: int = 4) -> list[Report]:
    """Return the reports of a search in which nobody is stopped, a few trials taking turns."""
    draw = random.Random(3)
    waiting = [f"trial_{number:04d}" for number in range(num_trials)]
    quality = {trial_id: draw.random() for trial_id in waiting}
    running: dict[str, int] = {}
    reports: list[Report] = []
    while waiting or running:
        while waiting and len(running) < num_at_once:
            running[waiting.pop(0)] = 0
        trial_id = draw.choice(sorted(running))
        running[trial_id] += 1
        epoch = running[trial_id]
        top1 = 50 + 40 * quality[trial_id] + epoch + draw.random()
        reports.append((trial_id, epoch, metrics(top1, 5 - 3 * quality[trial_id] ** 2 + draw.random())))
        if epoch == num_epochs:
            del running[trial_id]
            reports.append((trial_id, epoch, metrics(top1, 3.0, final=True)))
    return reports


def test_the_same_reports_give_the_same_decisions(make: Callable[[], StoppingRule]):
    first, second = make(), make()
    assert [first.report(*report) for report in life()] == [second.report(*report) for report in life()]


def test_a_stopped_trial_stays_stopped_and_a_final_report_is_never_stopped(make: Callable[[], StoppingRule]):
    rule = make()
    stopped: set[str] = set()
    for trial_id, epoch, report in life():
        decision = rule.report(trial_id, epoch, report)
        if report.get("final"):
            assert decision == "continue"
        elif trial_id in stopped:
            assert decision == "stop"
        elif decision == "stop":
            stopped.add(trial_id)
    assert bool(stopped) == (not isinstance(rule, NoRule))


def test_what_closed_nothing_is_not_judged(make: Callable[[], StoppingRule]):
    rule = make()
    for i in range(5):
        rule.report(str(i), 1, metrics(90, 2.0))
    assert rule.report("open", 1, metrics(0, 9.0, macs_ratio=0.99)) == "continue"


def test_one_that_is_behind_all_others_is_stopped_by_each_rule_that_stops():
    for kind in KINDS[:-1]:
        rule = make_rule(config_of(kind))
        for i in range(5):
            rule.report(str(i), 1, metrics(90 + i, 2.0))
        assert rule.report("behind", 1, metrics(10, 9.0)) == "stop", kind


def test_asha_and_median_judge_the_first_objective_alone():
    reports = [("a", 90), ("b", 80), ("c", 70)]
    rule = asha("top1", "max", grace_epochs=1, reduction_factor=3, max_epochs=9)
    assert [rule.report(name, 1, metrics(top1, 1.0)) for name, top1 in reports] == ["continue", "stop", "stop"]
    rule = median("top1", "max", grace_epochs=1, max_epochs=9)
    assert [rule.report(name, 1, metrics(top1, 1.0)) for name, top1 in reports] == [
        "continue"
    ] * 3  # Ray wants 3 to compare
    assert rule.report("d", 1, metrics(79, 1.0)) == "stop"


def heard(scheduler: RuleScheduler, reports: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, int]]:
    """Return the reports that a rule is to hear of: those of epochs, up to the one after which the trial is stopped."""
    return [
        (trial_id, report["epoch"])
        for trial_id, report in reports
        if not report.get("final") and report["epoch"] <= scheduler.stopped.get(trial_id, math.inf)
    ]


def test_a_scheduler_that_replays_its_decisions_decides_as_the_first_one(
    make: Callable[[], StoppingRule], tmp_path: Path
):
    reports = [(trial_id, {**report, "epoch": epoch}) for trial_id, epoch, report in life()]
    undisturbed, first = RuleScheduler(make()), RuleScheduler(make(), ReportLog(tmp_path / "reports.jsonl"))
    expected = [undisturbed.take(*report) for report in reports]
    before = [first.take(*report) for report in reports[:31]]
    with open(tmp_path / "reports.jsonl", "a") as file:
        file.write('{"trial_id": "trial_00')  # the process dies while it writes
    second = RuleScheduler(make(), ReportLog(tmp_path / "reports.jsonl"))
    for told in ReportLog(tmp_path / "reports.jsonl").read():
        second.decide(told["trial_id"], told)
    assert before + [second.take(*report) for report in reports[31:]] == expected
    assert second.stopped == undisturbed.stopped
    kept = [(report["trial_id"], report["epoch"]) for report in ReportLog(tmp_path / "reports.jsonl").read()]
    assert kept == heard(undisturbed, reports)


def test_an_epoch_that_is_reported_again_is_judged_once(make: Callable[[], StoppingRule], tmp_path: Path):
    """The worker of a trial died before its checkpoint was kept: the epochs since the last one come again."""
    reports = [(trial_id, {**report, "epoch": epoch}) for trial_id, epoch, report in life()]
    undisturbed = RuleScheduler(make())
    repeating = RuleScheduler(make(), ReportLog(tmp_path / "reports.jsonl"))
    earlier: dict[str, list[tuple[dict[str, object], str]]] = {}
    for trial_id, report in reports:
        decision = undisturbed.take(trial_id, report)
        assert repeating.take(trial_id, report) == decision
        earlier.setdefault(trial_id, []).append((report, decision))
        for again, said in earlier[trial_id][-2:]:
            assert repeating.take(trial_id, again) == said
    kept = [(report["trial_id"], report["epoch"]) for report in ReportLog(tmp_path / "reports.jsonl").read()]
    assert kept == heard(undisturbed, reports)
    assert repeating.stopped == undisturbed.stopped


def test_what_a_trial_reports_behind_its_end_is_not_heard(tmp_path: Path):
    """Its workers train on until the end reaches them; the search may die in between, and find those epochs recorded."""
    scheduler = RuleScheduler(
        median("top1", "max", grace_epochs=1, max_epochs=9), ReportLog(tmp_path / "reports.jsonl")
    )
    for trial_id in ("a", "b", "c"):
        scheduler.take(trial_id, {"epoch": 1, **metrics(90, 1.0)})
    assert [scheduler.take("d", {"epoch": epoch, **metrics(10, 1.0)}) for epoch in (1, 2)] == ["stop", "stop"]
    assert scheduler.stopped == {"d": 1}
    assert [told["epoch"] for told in ReportLog(tmp_path / "reports.jsonl").read() if told["trial_id"] == "d"] == [1]


def epoch_of_child(epoch: int, top1: float) -> dict[str, Any]:
    """Return what a trial reports that goes on from another: three epochs of gating and two of fine-tuning."""
    stage = "gate" if epoch <= 3 else "finetune"
    return {"epoch": epoch, "stage": stage, "gating_epochs": 3, "num_epochs": 5, **metrics(top1, 2.0)}


def test_a_trial_with_fewer_epochs_is_judged_as_long_after_its_cut_as_the_others():
    rule = ParetoASHA([("top1", "max"), ("latency_ms", "min")], grace_epochs=7, max_epochs=9)  # an epoch after the cut
    scheduler = RuleScheduler(rule, gating_epochs=6)
    for i in range(5):
        scheduler.take(str(i), {"epoch": 7, "stage": "finetune", "gating_epochs": 6, **metrics(90 + i, 2.0)})
    told = [scheduler.take("child", epoch_of_child(epoch, 10.0)) for epoch in (1, 2, 3, 4)]
    assert told == ["continue", "continue", "continue", "stop"]
    assert scheduler.stopped["child"] == 4


def test_a_trial_is_not_stopped_after_its_own_last_epoch():
    """Nothing is saved, and its measurement would be lost; those behind it are compared with it all the same."""
    rule = ParetoASHA([("top1", "max"), ("latency_ms", "min")], grace_epochs=8, max_epochs=20)
    scheduler = RuleScheduler(rule, gating_epochs=6)
    for i in range(5):
        scheduler.take(str(i), {"epoch": 8, "stage": "finetune", "gating_epochs": 6, **metrics(90 + i, 2.0)})
    assert scheduler.take("short", epoch_of_child(5, 10.0)) == "continue"
    assert scheduler.stopped.keys().isdisjoint({"short"})
    assert len(rule.state()["rungs"][0]["8"]) == 6
