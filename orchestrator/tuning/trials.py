"""The trials of a search: which are left, which config each gets, and whether the budget lets another one start."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.config.trial import with_values
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.records import read_metrics, seconds_columns
from orchestrator.tuning.budget import Budget
from orchestrator.tuning.descend import descended, parent_chooser
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.schedulers import make_scheduler, replay
from orchestrator.tuning.searchers import OptunaSearcher
from orchestrator.tuning.trainable import request_of
from orchestrator.tuning.tuner import Tuning


def run_trials(tuning: Tuning, base_weights: Path) -> None:
    """Run the trials that have no result."""
    plan = tuning.plan
    outcome = Outcome.so_far(plan.config, plan.run)
    if outcome.missing_trials == 0:
        return
    log = ReportLog(plan.run.reports, marker=plan.run.config)
    scheduler = make_scheduler(plan.config, log)
    replay(plan, scheduler, log, outcome)
    searcher = OptunaSearcher(
        plan.config,
        plan.run.study,
        outcome.rows,
        request_maker(plan, base_weights),
        may_start=budget_check(Budget.of(plan.config.search, plan.cluster), tuning),
        choose_parent=parent_chooser(plan, scheduler),
    )
    tuning.run(searcher, scheduler)


def request_maker(plan: SearchPlan, base_weights: Path) -> Callable[[str, dict[str, Any], str | None], dict[str, Any]]:
    """Return the function (trial id, values of its searched parameters, its parent) -> the config that Tune gives the trial."""

    def make(trial_id: str, params: dict[str, Any], parent: str | None) -> dict[str, Any]:
        """Return request_of the trial, or why its values do not make one."""
        try:
            config = descended(with_values(plan.config.base, params), parent, plan)
        except ValidationError as error:  # values that fit their fields one by one, but not together
            return {"trial_id": trial_id, "error": f"{trial_id}: {'; '.join(item['msg'] for item in error.errors())}"}
        return request_of(plan, trial_id, config, base_weights)

    return make


def budget_check(budget: Budget, tuning: Tuning) -> Callable[[], bool]:
    """Return the function that returns whether another trial may start, and prints once why none may any more."""
    is_said = False
    run = tuning.plan.run

    def may_start() -> bool:
        """Return whether the budget leaves room for another trial."""
        nonlocal is_said
        if not budget.is_limited:
            return True
        rows = Outcome.so_far(tuning.plan.config, run).rows
        under_way = set(run.trial_ids()) - {row["trial_id"] for row in rows}
        files = [path for trial_id in under_way if (path := run.trial(trial_id).metrics).exists()]
        reason = budget.why_spent([*rows, *(seconds_columns(read_metrics(path)) for path in files)], time.monotonic())
        if reason is not None and not is_said:
            tuning.recorder.progress.say(f"No further trial starts: {reason}; rerun the same command to run the rest")
            is_said = True
        return reason is None

    return may_start
