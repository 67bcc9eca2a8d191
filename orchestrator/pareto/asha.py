"""ParetoASHA: which trials of a search for several objectives continue. Pure logic, without Ray, time or files.

The same reports give the same decisions in Tune, in a simulator and in a test. `orchestrator.pareto` has it too.
"""

import math
import warnings
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from orchestrator.config.metrics import METRICS
from orchestrator.config.rungs import rung_epochs
from orchestrator.errors import ConfigError, RunDirError, UnjudgedReportWarning
from orchestrator.pareto.sorting import Fronts

Decision = Literal["continue", "stop"]
Mode = Literal["max", "min"]
Report = Mapping[str, Any]
"""What a trial reports after an epoch, by metric."""
State = dict[str, Any]
Entry = dict[str, Any]
"""What a rung keeps of a trial: losses, excess over the constraints, the latency's spread, the architecture's digest."""
STATE_VERSION = 2
LARGEST_JUDGED_MACS_RATIO = 0.95
"""Gates stay open for about a third of their stage and then close within an epoch or two; before that, trials differ
in nothing that they will be judged by."""
NUM_WITH_SAFE_FRONT = 10
"""While fewer trials than this are recorded at a rung, a newcomer on its front is never stopped: of two or three trials
that do not dominate each other, position / n would stop one for no reason."""
SHRINKING = {metric.name for metric in METRICS if metric.shrinks}
"""Metrics that fall while gates close and stay the same afterwards."""


class Bound(Protocol):
    """A constraint: config.Constraint, or anything with these."""

    metric: str
    max: float | None
    min: float | None


class ParetoASHA:
    """Asynchronous successive halving on all objectives: a trial continues while it is among the first 1/eta of its rung.

    Rungs are at grace_epochs, grace_epochs * eta, ... below max_epochs; each holds one point per trial. A newcomer is
    ranked among the points there, itself included: by non-dominated fronts, inside a front by farthest-point order from
    the best value of the first objective (so that what is kept spreads over the front), every objective scaled to [0, 1]
    over the rung. It continues iff position / n <= 1 / eta, with positions from 0; the first at a rung always does, and see
    NUM_WITH_SAFE_FRONT. A trial that skips a rung, because it was not to be judged there or because a report was lost, is
    judged at the highest one it has reached. What was decided stays decided: a stopped trial that reports again is
    stopped.

    Not judged yet: a report under gates with macs_ratio above 0.95, unless its target_ratio is above that too; one that is final; and,
    with an UnjudgedReportWarning, one in which an objective is missing or not finite.
    Ranked last, by how far they are off: trials that will break a constraint whatever they do. A network only shrinks, and
    only while its stage is "gate", so that is one that is too large and done with gating, or already too small.
    Equal: latencies within each other's latency_p10_ms to latency_p90_ms, and those of reports with the same
    "architecture"; the later trial takes the earlier one's value.

    Source: MO-ASHA, Schmucker et al., arXiv 2106.12639, as published; its public code confuses ranks with order.

    >>> rule = ParetoASHA([("top1", "max"), ("latency_ms", "min")], max_epochs=9)
    >>> rule.report("a", 1, {"top1": 90.0, "latency_ms": 2.0})
    'continue'
    >>> rule.report("b", 1, {"top1": 80.0, "latency_ms": 3.0})  # dominated: position 1 of 2
    'stop'
    """

    def __init__(
        self,
        objectives: Sequence[tuple[str, Mode]],
        *,
        grace_epochs: int = 1,
        reduction_factor: float = 3,
        max_epochs: int = 27,
        constraints: Sequence[Bound] = (),
        num_brackets: int = 1,
    ) -> None:
        """num_brackets: bracket b has its first rung at grace_epochs * eta**b; trials are dealt to them in turn.

        Raises: ConfigError for arguments out of range.
        """
        is_each_a_pair = all(len(objective) == 2 and objective[1] in ("max", "min") for objective in objectives)
        if not objectives or not is_each_a_pair or len(dict(objectives)) < len(objectives):
            raise ConfigError(
                f"objectives are {list(objectives)}, expected at least one (metric, 'max' or 'min'), each once"
            )
        if grace_epochs < 1 or not 1 < reduction_factor < math.inf or num_brackets < 1:
            raise ConfigError(
                f"grace_epochs is {grace_epochs}, reduction_factor {reduction_factor} and num_brackets {num_brackets}; "
                "expected at least 1, above 1 and at least 1"
            )
        self._objectives = tuple((metric, mode) for metric, mode in objectives)
        self._constraints = tuple(constraints)
        self._reduction_factor = reduction_factor
        epochs = rung_epochs(grace_epochs, reduction_factor, max_epochs)
        self._brackets = [
            {epoch: _Rung(self._objectives, reduction_factor) for epoch in epochs[first:]}
            for first in range(num_brackets)
        ]
        self._bracket_of: dict[str, int] = {}
        self._stopped: set[str] = set()

    def report(self, trial_id: str, epoch: int, metrics: Report) -> Decision:
        """Judge the trial if it has reached a rung that it was not judged at. epoch: counted from 1."""
        if metrics.get("final"):
            return "continue"
        if trial_id in self._stopped:
            return "stop"
        rung = self._rung(trial_id, epoch)
        if (
            rung is None
            or trial_id in rung.entries
            or not is_judged(metrics)
            or not self._is_measured(trial_id, metrics)
        ):
            return "continue"
        if rung.goes_on(trial_id, self._entry(metrics)):
            return "continue"
        self._stopped.add(trial_id)
        return "stop"

    def state(self) -> State:
        """Return all that later decisions depend on, as plain containers for JSON."""
        return {
            **self._arguments(),
            "bracket_of": dict(self._bracket_of),
            "stopped": sorted(self._stopped),
            "rungs": [{str(epoch): dict(rung.entries) for epoch, rung in rungs.items()} for rungs in self._brackets],
        }

    def restore(self, state: State) -> None:
        """Continue from what `state` returned of a rule with the same arguments; this one must be new.

        Raises: RunDirError if the state is of another version, or of other arguments.
        """
        assert not self._bracket_of, "restore is for a rule without reports"
        expected = self._arguments()
        found = {name: state.get(name) for name in expected}
        if found != expected:
            raise RunDirError(f"the state is that of a rule with {found}, expected {expected}")
        self._bracket_of = dict(state["bracket_of"])
        self._stopped = set(state["stopped"])
        for rungs, saved in zip(self._brackets, state["rungs"], strict=True):
            for epoch, rung in rungs.items():
                for trial_id, entry in saved[str(epoch)].items():
                    rung.add(trial_id, entry)

    def _arguments(self) -> State:
        """Return what a state has in common with all rules that it may be given to."""
        return {
            "version": STATE_VERSION,
            "objectives": [list(objective) for objective in self._objectives],
            "reduction_factor": self._reduction_factor,
            "constraints": [[one.metric, one.min, one.max] for one in self._constraints],
            "rung_epochs": [list(rungs) for rungs in self._brackets],
        }

    def _rung(self, trial_id: str, epoch: int) -> "_Rung | None":
        bracket = self._bracket_of.setdefault(trial_id, len(self._bracket_of) % len(self._brackets))
        rungs = self._brackets[bracket]
        reached = max((rung for rung in rungs if rung <= epoch), default=None)
        return None if reached is None else rungs[reached]

    def _is_measured(self, trial_id: str, metrics: Report) -> bool:
        """Return whether all objectives are finite numbers; warns if not."""
        values = {name: metrics.get(name) for name, _ in self._objectives}
        lacking = [f"{name} is {value!r}" for name, value in values.items() if not _is_number(value)]
        if lacking:
            warnings.warn(
                f"{trial_id}: {', '.join(lacking)} in a report, expected a finite number; it is not judged by this report",
                UnjudgedReportWarning,
                stacklevel=3,
            )
        return not lacking

    def _entry(self, metrics: Report) -> Entry:
        return {
            "losses": [(-1.0 if mode == "max" else 1.0) * float(metrics[name]) for name, mode in self._objectives],
            "excess": sum(_excess(metrics, constraint) for constraint in self._constraints),
            "spread": [metrics.get("latency_p10_ms"), metrics.get("latency_p90_ms")],
            "architecture": metrics.get("architecture"),
        }


class _Rung:
    """The trials that were judged at one epoch, in the order in which they came."""

    def __init__(self, objectives: Sequence[tuple[str, Mode]], reduction_factor: float) -> None:
        self._reduction_factor = reduction_factor
        self._latencies = _Latencies()
        self._latency_index = next((i for i, pair in enumerate(objectives) if pair == ("latency_ms", "min")), None)
        self._fronts = Fronts(len(objectives))
        self._excesses: list[float] = []  # of the trials ranked last, rising
        self.entries: dict[str, Entry] = {}

    def add(self, trial_id: str, entry: Entry) -> int | None:
        """Add a trial; return the index of its front, None if it is among those ranked last."""
        self.entries[trial_id] = entry
        if entry["excess"] > 0:
            insort(self._excesses, entry["excess"])
            return None
        losses = list(entry["losses"])
        if self._latency_index is not None:
            losses[self._latency_index] = self._latencies.settle(
                losses[self._latency_index], entry["spread"], entry["architecture"]
            )
        return self._fronts.add(losses)

    def goes_on(self, trial_id: str, entry: Entry) -> bool:
        """Add a trial and return whether it is among the first 1 / eta."""
        front = self.add(trial_id, entry)
        num = len(self.entries)
        last_position = math.floor(num / self._reduction_factor)
        if front is None:
            num_meeting = num - len(self._excesses)
            return num_meeting + bisect_right(self._excesses, entry["excess"]) - 1 <= last_position
        if front == 0 and num <= NUM_WITH_SAFE_FRONT:
            return True
        if front > last_position:  # each front before it holds a point: no need to count them
            return False
        num_wanted = last_position - self._fronts.num_before(front) + 1
        return num_wanted > 0 and self._fronts.is_among_first(num_wanted)


class _Latencies:
    """Which latencies count as equal."""

    def __init__(self) -> None:
        self._of_architecture: dict[str, float] = {}
        self._measured: list[tuple[float, float, float]] = []  # (latency, p10, p90), rising; none equals another

    def settle(self, latency: float, spread: Sequence[float | None], architecture: str | None) -> float:
        """Return the latency of an earlier trial if this one counts as equal to it, else its own."""
        if architecture in self._of_architecture:
            return self._of_architecture[architecture]
        low, high = spread
        settled = latency if low is None or high is None else self._among_measured(latency, low, high)
        if architecture is not None:
            self._of_architecture[architecture] = settled
        return settled

    def _among_measured(self, latency: float, low: float, high: float) -> float:
        place = bisect_left(self._measured, (latency, low, high))
        neighbours = self._measured[max(0, place - 1) : place + 1]
        near = [other for other, p10, p90 in neighbours if low <= other <= high and p10 <= latency <= p90]
        if near:
            return min(near, key=lambda other: abs(other - latency))
        self._measured.insert(place, (latency, low, high))
        return latency


def judged_epoch(metrics: Report, gating_epochs: int) -> int:
    """Return the epoch at which a report counts, so that every trial is compared as long after its cut as the others.

    gating_epochs: of the search's longest trial. One with fewer, such as a trial that starts from another for a share of the
    epochs, is cut earlier; without this it would be compared later than the others, or never.

    >>> judged_epoch({"epoch": 4, "stage": "finetune", "gating_epochs": 3}, gating_epochs=6)
    7
    """
    epoch: int = metrics["epoch"]
    own: int | None = metrics.get("gating_epochs")
    return epoch if own is None or metrics.get("stage") != "finetune" else epoch + gating_epochs - own


def is_judged(metrics: Report) -> bool:
    """Return whether enough gates have closed to compare the network with the others; see LARGEST_JUDGED_MACS_RATIO."""
    if metrics.get("stage") == "finetune":  # nothing closes any more
        return True
    macs_ratio, target_ratio = metrics.get("macs_ratio"), metrics.get("target_ratio")
    is_open = macs_ratio is not None and macs_ratio > LARGEST_JUDGED_MACS_RATIO
    return not is_open or (target_ratio is not None and target_ratio > LARGEST_JUDGED_MACS_RATIO)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _excess(metrics: Report, constraint: Bound) -> float:
    """Return by what share of its bound the network will miss a constraint for certain; 0.0 if it may yet meet it."""
    value = metrics.get(constraint.metric)
    if value is None or constraint.metric not in SHRINKING:
        return 0.0
    too_small = 0.0 if constraint.min is None else max(0.0, constraint.min - value) / (abs(constraint.min) or 1.0)
    if constraint.max is None or metrics.get("stage") == "gate":
        return too_small
    return too_small + max(0.0, value - constraint.max) / (abs(constraint.max) or 1.0)
