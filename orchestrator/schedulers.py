"""Which trials are stopped early: rules that decide from reported metrics alone, and the Tune scheduler that asks them.

A rule knows neither Ray nor time: the same reports give the same decisions, in Tune, in a simulator or in a test. Tune
never saves a scheduler's state, so a continued search replays the recorded epochs into a new one.

    RuleScheduler ── ParetoRule   all objectives together
                  ├─ AshaRule     the first objective, by Ray's own ASHA
                  └─ NoRule       every trial runs to its end
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from orchestrator.config import SearchConfig
from orchestrator.plan import max_num_epochs, rung_epochs

Decision = Literal["continue", "stop"]
Mode = Literal["max", "min"]
Metrics = Mapping[str, Any]

LARGEST_JUDGED_MACS_RATIO = 0.95
"""Gates stay open for about a third of their stage and then close within an epoch or two; before that, trials differ
in nothing that they will be judged by."""

NUM_WITH_SAFE_FRONT = 10
"""While a rung holds fewer trials than this, a newcomer on its front is never stopped: of two or three trials that do
not dominate each other, position / n would stop one for no reason."""


class StoppingRule(Protocol):
    """Decides from what trials report."""

    def report(self, trial_id: str, epoch: int, metrics: Metrics) -> Decision:
        """Take note of an epoch's metrics and decide whether the trial goes on."""


class ParetoRule:
    """Asynchronous successive halving on all objectives: a trial goes on while it is among the first 1/eta of its rung.

    Each rung holds one point per trial. A newcomer is ranked among the points there, itself included: by non-dominated
    fronts, inside a front by farthest-point order from the best value of the first objective (so that what is kept
    spreads over the front), all objectives scaled to [0, 1] over the rung. It goes on iff position / n <= 1 / eta, with
    positions from 0; the first at a rung always does, and see NUM_WITH_SAFE_FRONT. A trial that skips a rung, because
    it was not to be judged there or because a report was lost, is judged at the highest one it has reached.
    Source: MO-ASHA, Schmucker et al., arXiv 2106.12639, as published; its public code confuses ranks with order.

    >>> rule = ParetoRule([("top1", "max"), ("latency_ms", "min")], grace_epochs=1, reduction_factor=3, max_epochs=9)
    >>> rule.report("a", 1, {"top1": 90.0, "latency_ms": 2.0, "macs_ratio": 0.5})
    'continue'
    >>> rule.report("b", 1, {"top1": 80.0, "latency_ms": 3.0, "macs_ratio": 0.6})  # dominated: position 1 of 2
    'stop'
    """

    def __init__(
        self, objectives: Sequence[tuple[str, Mode]], *, grace_epochs: int, reduction_factor: int, max_epochs: int
    ) -> None:
        self._objectives = tuple(objectives)
        self._reduction_factor = reduction_factor
        self._rungs: dict[int, dict[str, tuple[float, ...]]] = {
            epoch: {} for epoch in rung_epochs(grace_epochs, reduction_factor, max_epochs)
        }

    def report(self, trial_id: str, epoch: int, metrics: Metrics) -> Decision:
        """Judge the trial if it has reached a rung that it was not judged at."""
        rung = max((rung for rung in self._rungs if rung <= epoch), default=None)
        point = self._point(metrics)
        if rung is None or point is None or trial_id in self._rungs[rung]:
            return "continue"
        self._rungs[rung][trial_id] = point
        return "stop" if self._is_last_behind(np.array(list(self._rungs[rung].values()))) else "continue"

    def _point(self, metrics: Metrics) -> tuple[float, ...] | None:
        """Return the objectives, smaller is better; None when the trial is not to be judged by these metrics."""
        point = tuple(_loss(metrics.get(name), mode) for name, mode in self._objectives)
        return point if _is_judged(metrics) and all(math.isfinite(loss) for loss in point) else None

    def _is_last_behind(self, losses: np.ndarray) -> bool:
        """Return whether the last of the (n, objectives) points is to be stopped."""
        span = np.ptp(losses, axis=0)
        scaled = (losses - losses.min(axis=0)) / np.where(span > 0, span, 1.0)
        num, newcomer = len(scaled), len(scaled) - 1
        num_before = 0
        remaining = np.arange(num)
        while newcomer not in (front := remaining[_non_dominated(scaled[remaining])]):
            num_before += len(front)
            remaining = np.setdiff1d(remaining, front)
        if num_before == 0 and num <= NUM_WITH_SAFE_FRONT:
            return False
        position = num_before + _farthest_point_order(scaled[front]).index(list(front).index(newcomer))
        return position * self._reduction_factor > num


class AshaRule:
    """Ray's own ASHA on one metric. Its rungs are keyed by our trial ids, so that they can be replayed."""

    def __init__(self, metric: str, mode: Mode, *, grace_epochs: int, reduction_factor: int, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self._asha = AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            max_t=max(max_epochs, grace_epochs),
            grace_period=grace_epochs,
            reduction_factor=reduction_factor,
        )
        self._known: set[str] = set()

    def report(self, trial_id: str, epoch: int, metrics: Metrics) -> Decision:
        """Ask Ray's ASHA, except after the last epoch, where it would stop every trial before its final measurement."""
        if not _is_judged(metrics) or epoch >= self._max_epochs:
            return "continue"
        trial = SimpleNamespace(trial_id=trial_id)  # all that ASHA reads of a Tune trial
        if trial_id not in self._known:
            self._known.add(trial_id)
            self._asha.on_trial_add(None, trial)
        decision = self._asha.on_trial_result(None, trial, {**metrics, "epoch": epoch})
        return "stop" if decision == TrialScheduler.STOP else "continue"


class NoRule:
    """Lets every trial run to its end."""

    def report(self, trial_id: str, epoch: int, metrics: Metrics) -> Decision:
        """Return "continue"."""
        return "continue"


class RuleScheduler(FIFOScheduler):
    """Stops the trials that the rule says to stop; starts them in the order of their suggestion."""

    def __init__(self, rule: StoppingRule) -> None:
        super().__init__()
        self._rule = rule
        self.stopped: dict[str, int] = {}
        """Trial id -> the epoch after which it was stopped."""

    def decide(self, trial_id: str, metrics: Metrics) -> Decision:
        """Return the rule's decision; one to stop is kept, for a trial that reports again after a restart."""
        if metrics.get("final"):
            return "continue"
        if trial_id not in self.stopped and self._rule.report(trial_id, metrics["epoch"], metrics) == "stop":
            self.stopped[trial_id] = metrics["epoch"]
        return "stop" if trial_id in self.stopped else "continue"

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune with every report."""
        decision = self.decide(trial.config["trial_id"], result)
        return str(TrialScheduler.STOP if decision == "stop" else TrialScheduler.CONTINUE)


def make_scheduler(config: SearchConfig) -> RuleScheduler:
    """Return the scheduler that the config names."""
    return RuleScheduler(make_rule(config))


def make_rule(config: SearchConfig) -> StoppingRule:
    """Return the rule that the config names."""
    objectives: list[tuple[str, Mode]] = [(objective.metric, objective.mode) for objective in config.objectives]
    grace_epochs, reduction_factor = config.scheduler.grace_epochs, config.scheduler.reduction_factor
    max_epochs = max_num_epochs(config)
    if config.scheduler.type == "pareto":
        return ParetoRule(
            objectives, grace_epochs=grace_epochs, reduction_factor=reduction_factor, max_epochs=max_epochs
        )
    if config.scheduler.type == "asha":
        return AshaRule(
            *objectives[0], grace_epochs=grace_epochs, reduction_factor=reduction_factor, max_epochs=max_epochs
        )
    return NoRule()


def _loss(value: float | None, mode: Mode) -> float:
    if value is None:
        return math.nan
    return -float(value) if mode == "max" else float(value)


def _is_judged(metrics: Metrics) -> bool:
    return not metrics.get("final") and metrics["macs_ratio"] <= LARGEST_JUDGED_MACS_RATIO


def _non_dominated(losses: np.ndarray) -> np.ndarray:
    """Return an (n,) mask of the (n, objectives) points that no other point dominates."""
    no_worse = (losses[:, None] <= losses[None]).all(axis=2)
    better = (losses[:, None] < losses[None]).any(axis=2)
    return np.logical_not((no_worse & better).any(axis=0))


def _farthest_point_order(losses: np.ndarray) -> list[int]:
    """Return the indices of (n, objectives) points: the best in the first objective, then always the one farthest from
    those already taken; the earlier one of equals."""
    order = [int(losses[:, 0].argmin())]
    distance = np.full(len(losses), np.inf)
    while len(order) < len(losses):
        distance = np.minimum(distance, np.linalg.norm(losses - losses[order[-1]], axis=1))
        distance[order] = -1.0  # taken; equal points are at distance 0 and still come once each
        order.append(int(distance.argmax()))
    return order
