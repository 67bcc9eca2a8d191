"""Which trials are stopped early: rules that decide from reported metrics alone, and the Tune scheduler that asks them.

A rule depends neither on Tune nor on time: the same reports give the same decisions, in Tune, in a simulator or in a test. Tune
never saves a scheduler's state, so a search keeps every report in reports.jsonl, and a resumed one asks a new rule again, in the
same order.

    RuleScheduler ── ParetoASHA   all objectives together (orchestrator/pareto/asha.py)
                  ├─ RayRule      the first objective, by Ray's own ASHA or median stopping
                  └─ NoRule       every trial runs to its end
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.config.rungs import max_gating_epochs, max_num_epochs, num_grace_epochs
from orchestrator.config.search import SearchConfig
from orchestrator.pareto.asha import Decision, Mode, ParetoASHA, Report, is_judged, judged_epoch
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.records import read_metrics
from orchestrator.tuning.report_log import ReportLog


class StoppingRule(Protocol):
    """Decides from what trials report."""

    def report(self, trial_id: str, epoch: int, metrics: Report) -> Decision:
        """Take note of an epoch's metrics and decide whether the trial continues; a stopped trial stays stopped."""


class RayTrial(NamedTuple):
    """All that Ray's schedulers read of a Tune trial."""

    trial_id: str


class RayRule:
    """One of Ray's schedulers for a single metric, asked outside Tune."""

    def __init__(self, scheduler: FIFOScheduler, metric: str, *, max_epochs: int) -> None:
        """scheduler: with time_attr "epoch" and the metric, not used before."""
        self._scheduler = scheduler
        self._metric = metric
        self._max_epochs = max_epochs
        self._trials: dict[str, RayTrial] = {}
        self._stopped: set[str] = set()

    def report(self, trial_id: str, epoch: int, metrics: Report) -> Decision:
        """Ask Ray's scheduler, except after the last epoch, where ASHA would stop every trial before its measurement."""
        value = metrics.get(self._metric)
        if metrics.get("final"):
            return "continue"
        is_due = trial_id not in self._stopped and epoch < self._max_epochs and is_judged(metrics)
        if is_due and value is not None and math.isfinite(value):
            self._ask(trial_id, epoch, float(value))
        return "stop" if trial_id in self._stopped else "continue"

    def _ask(self, trial_id: str, epoch: int, value: float) -> None:
        if trial_id not in self._trials:
            self._trials[trial_id] = RayTrial(trial_id)
            self._scheduler.on_trial_add(None, self._trials[trial_id])
        result = {"epoch": epoch, self._metric: value}
        if self._scheduler.on_trial_result(None, self._trials[trial_id], result) == TrialScheduler.STOP:
            self._stopped.add(trial_id)


def asha(metric: str, mode: Mode, *, grace_epochs: int, reduction_factor: float, max_epochs: int) -> RayRule:
    """Return Ray's ASHA on one metric."""
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=metric,
        mode=mode,
        max_t=max(max_epochs, grace_epochs),
        grace_period=grace_epochs,
        reduction_factor=reduction_factor,
    )
    return RayRule(scheduler, metric, max_epochs=max_epochs)


def median(metric: str, mode: Mode, *, grace_epochs: int, max_epochs: int) -> RayRule:
    """Return Ray's median stopping on one metric: a trial whose best value is behind the median of the means is stopped."""
    scheduler = MedianStoppingRule(
        time_attr="epoch",
        metric=metric,
        mode=mode,
        grace_period=grace_epochs,
        min_time_slice=math.inf,  # never pause a trial: its workers would have to start again
    )
    return RayRule(scheduler, metric, max_epochs=max_epochs)


class NoRule:
    """Lets every trial run to its end."""

    def report(self, trial_id: str, epoch: int, metrics: Report) -> Decision:
        """Return "continue"."""
        return "continue"


class RuleScheduler(FIFOScheduler):
    """Stops the trials that the rule says to stop; starts them in the order of their suggestion."""

    def __init__(self, rule: StoppingRule, log: ReportLog | None = None, gating_epochs: int = 0) -> None:
        """log: where every report is kept; None keeps none.    gating_epochs: of the search's longest trial."""
        super().__init__()
        self._rule = rule
        self._log = log
        self._gating_epochs = gating_epochs
        self.stopped: dict[str, int] = {}
        """Trial id -> the epoch after which it was stopped."""
        self.going_on: dict[str, int] = {}
        """Trial id -> the last epoch after which the rule let it continue, as judged_epoch counts."""
        self._judged: dict[str, int] = {}
        """Trial id -> the last epoch that the rule has judged."""
        self._to_end: set[str] = set()
        """The trials that a person has asked to end."""

    def decide(self, trial_id: str, metrics: Mapping[str, Any]) -> Decision:
        """Return the rule's decision on a trial's report; on one that it has judged before, the same again.

        A trial whose worker dies before an epoch's checkpoint is kept trains and reports that epoch again.
        """
        if metrics.get("final"):
            return "continue"
        epoch = metrics["epoch"]
        if self._is_new(trial_id, metrics):
            self._judged[trial_id] = epoch
            judged = judged_epoch(metrics, self._gating_epochs)
            decision = self._rule.report(trial_id, judged, metrics)
            has_trained = epoch >= (metrics.get("num_epochs") or math.inf)  # only its measurement is left
            if decision == "continue" or has_trained:
                self.going_on[trial_id] = judged
            else:
                self.stopped.setdefault(trial_id, epoch)
        return "stop" if epoch >= self.stopped.get(trial_id, math.inf) else "continue"

    def take(self, trial_id: str, metrics: Mapping[str, Any]) -> Decision:
        """Keep a report, unless it is kept, then decide on it."""
        if self._log is not None and not metrics.get("final") and self._is_new(trial_id, metrics):
            self._log.append(trial_id, metrics)
        return self.decide(trial_id, metrics)

    def _is_new(self, trial_id: str, metrics: Mapping[str, Any]) -> bool:
        """Return whether the rule has to judge it; what workers report after their trial was stopped does not count."""
        return trial_id not in self.stopped and bool(metrics["epoch"] > self._judged.get(trial_id, 0))

    def end(self, trial_id: str) -> None:
        """Stop a trial soon, after the last epoch that it has reported; one that is yet to start, when it has."""
        self._to_end.add(trial_id)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Called by Tune many times a second: the place where a scheduler may stop trials between their reports."""
        for trial in tune_controller.get_trials() if self._to_end else ():
            trial_id = trial.config["trial_id"]
            if trial_id in self._to_end and trial.status == Trial.RUNNING:
                self._to_end.remove(trial_id)
                self.stopped.setdefault(trial_id, self._judged.get(trial_id, 0))
                tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune with every report."""
        decision = self.take(trial.config["trial_id"], result)
        return str(TrialScheduler.STOP if decision == "stop" else TrialScheduler.CONTINUE)


def make_scheduler(config: SearchConfig, log: ReportLog) -> RuleScheduler:
    """Return the scheduler that the config names."""
    return RuleScheduler(make_rule(config), log, max_gating_epochs(config))


def make_rule(config: SearchConfig) -> StoppingRule:
    """Return the rule that the config names."""
    objectives: list[tuple[str, Mode]] = [(objective.metric, objective.mode) for objective in config.objectives]
    scheduler, grace_epochs, max_epochs = config.scheduler, num_grace_epochs(config), max_num_epochs(config)
    if scheduler.type == "pareto_asha":
        return ParetoASHA(
            objectives,
            grace_epochs=grace_epochs,
            reduction_factor=scheduler.reduction_factor,
            max_epochs=max_epochs,
            constraints=config.constraints,
            num_brackets=scheduler.num_brackets,
        )
    if scheduler.type == "asha":
        return asha(
            *objectives[0],
            grace_epochs=grace_epochs,
            reduction_factor=scheduler.reduction_factor,
            max_epochs=max_epochs,
        )
    if scheduler.type == "median":
        return median(*objectives[0], grace_epochs=grace_epochs, max_epochs=max_epochs)
    return NoRule()


def replay(plan: SearchPlan, scheduler: RuleScheduler, log: ReportLog, outcome: Outcome) -> None:
    """Report to the scheduler what the log holds, then what unfinished trials have recorded since, in order of time."""
    told = set()
    for report in log.read():
        scheduler.decide(report["trial_id"], report)
        told.add((report["trial_id"], report["epoch"]))
    ended = {row["trial_id"] for row in outcome.trials}
    recorded = [
        (timestamp_ms, trial_id, metrics)
        for trial_id in set(plan.run.trial_ids()) - set(plan.config.baselines) - ended
        if (metrics_file := plan.run.trial(trial_id).metrics).exists()
        for timestamp_ms, metrics in _in_order(read_metrics(metrics_file))
        if (trial_id, metrics["epoch"]) not in told
    ]
    for _, trial_id, metrics in sorted(recorded, key=lambda report: (*report[:2], report[2]["epoch"])):
        scheduler.take(trial_id, metrics)


def _in_order(epochs: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the epochs of a trial with times that never fall, also where the clock was set back between two of them."""
    return zip(accumulate((metrics["timestamp_ms"] for metrics in epochs), max), epochs, strict=True)
