"""Numbers of a running search for Prometheus, exported by Ray at each node's /metrics.

    ray_gator_trials{search, status}       trials that are running, finished, stopped and failed
    ray_gator_best{search, metric}         the best value of each objective on the front
    ray_gator_front_size{search}           networks of the front
    ray_gator_hypervolume{search}          what the front dominates, as in report.html
    ray_gator_epochs_total{search}         epochs of trials and baselines that this process received
    ray_gator_gpu_seconds_total{search}    seconds of these epochs, times the GPUs of a trial

Counters start at 0 in each process of a search. clusters/grafana/gator.json plots all of them.
"""

from collections import Counter as CountOf
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from orchestrator.config.metrics import FAILED, FINISHED, STOPPED, TRIAL
from orchestrator.reporting.outcome import Outcome, sort_best_first
from orchestrator.tuning.budget import seconds_of

RUNNING = "running"


class Monitor:
    """Keeps the numbers of one search. num_gpus: of one trial."""

    def __init__(self, search: str, num_gpus: float) -> None:
        self._num_gpus = num_gpus
        self._running: set[str] = set()

        def tagged(metric: Any) -> Any:
            return metric.set_default_tags({"search": search})

        self._trials = tagged(Gauge("gator_trials", "Trials of the search, by status.", ("search", "status")))
        self._best = tagged(Gauge("gator_best", "Best value of an objective on the front.", ("search", "metric")))
        self._front_size = tagged(Gauge("gator_front_size", "Networks of the Pareto front.", ("search",)))
        self._hypervolume = tagged(Gauge("gator_hypervolume", "What the Pareto front dominates.", ("search",)))
        self._epochs = tagged(Counter("gator_epochs", "Epochs reported.", ("search",)))
        self._gpu_seconds = tagged(Counter("gator_gpu_seconds", "GPU seconds of the epochs reported.", ("search",)))

    def started(self, trial_id: str, kind: str) -> None:
        """Count a trial as running; other kinds of networks are not counted."""
        if kind == TRIAL:
            self._running.add(trial_id)
            self._trials.set(len(self._running), {"status": RUNNING})

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Count an epoch. metrics: as in metrics.parquet, whose final row is not an epoch."""
        if not metrics.get("final"):
            self._epochs.inc()
        if (gpu_seconds := self._num_gpus * seconds_of(metrics)) > 0:
            self._gpu_seconds.inc(gpu_seconds)

    def ended(self, trial_id: str, outcome: Outcome) -> None:
        """Export the numbers of the search after a network has ended. outcome: with its row."""
        self._running.discard(trial_id)
        statuses = CountOf(row["status"] for row in outcome.trials)
        for status in (FINISHED, STOPPED, FAILED):
            self._trials.set(statuses[status], {"status": status})
        self._trials.set(len(self._running), {"status": RUNNING})
        self._front_size.set(len(outcome.front))
        for objective in outcome.config.objectives if outcome.front else ():
            best = sort_best_first(outcome.front, [objective])[0]
            self._best.set(best[objective.metric], {"metric": objective.metric})
        if outcome.hypervolume is not None:
            self._hypervolume.set(outcome.hypervolume)
