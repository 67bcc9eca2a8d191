"""The record of a search: what happens to its networks goes to results.parquet, the searcher, MLflow and the screen."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from orchestrator.cluster.capacity import has_nodes
from orchestrator.cluster.connection import answers
from orchestrator.cluster.waiting import Waiting
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import FAILED, FINISHED, STOPPED, TRIAL, Status
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import ClusterError, OrchestratorError, UserError
from orchestrator.masking import masked
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.progress import Progress
from orchestrator.storage.files import num_bytes, wait_until_reachable
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import (
    METRICS_SCHEMA,
    EpochMetrics,
    Row,
    all_latency_columns,
    append_result,
    network_columns,
    read_metrics,
    seconds_columns,
)
from orchestrator.tracking.tracker import Tracker
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.train_runs import TrainRuns
from orchestrator.tuning.monitoring import Monitor
from orchestrator.tuning.schedulers import RuleScheduler
from orchestrator.tuning.searchers import PARENT, TrialSource

NODES_CHECK_S = 10.0
"""How often the recorder checks whether Ray still has a node."""


@dataclass(frozen=True)
class Recorder:
    """Reports every network of a search, from its start to its row: trials, the unpruned network, references and baselines."""

    run: RunPaths
    config: SearchConfig
    tracker: Tracker
    progress: Progress
    monitor: Monitor
    train_runs: TrainRuns | None = None
    """Where the checkpoints of the trials are, which are removed when a trial has its row; none to keep them."""
    mirror: Mirror | None = None
    """The copy of the run directory, if there is one: it gets a row at once."""
    _run_ids: dict[str, str | None] = field(default_factory=dict)
    """Trial id -> its run in MLflow; None if MLflow could not be reached."""

    def started(self, trial_id: str, config: TrialConfig, kind: str, params: Mapping[str, Any] | None = None) -> None:
        """Report that a network is about to be trained or measured. params: the values of its searched parameters."""
        self._run_ids[trial_id] = self.tracker.trial_started(trial_id, params or {}, config, kind)
        self.monitor.started(trial_id, kind)
        self.progress.started(trial_id, kind)

    def has_started(self, trial_id: str) -> bool:
        """Return whether the start of a network was reported by this process."""
        return trial_id in self._run_ids

    def epoch(self, trial_id: str, metrics: EpochMetrics) -> None:
        """Report the metrics of an epoch."""
        self.monitor.epoch(metrics)
        self.tracker.epoch(trial_id, metrics)
        self.progress.epoch(trial_id, metrics)

    def ended(self, row: Row, searcher: TrialSource | None = None) -> None:
        """Report how a network has ended. Its row is written first, because all else can be made again from it.

        searcher: the one that suggested it.
        """
        row = {**row, "mlflow_run_id": self._run_ids.get(row["trial_id"])}
        append_result(self.run.results, row)
        if searcher is not None:
            searcher.tell(row)
        self.tracker.trial_ended(row["trial_id"], row, row["status"], error=row.get("error"))
        outcome = Outcome.so_far(self.config, self.run)
        self.monitor.ended(row["trial_id"], outcome)
        if searcher is not None:
            self.tracker.show(lambda: outcome)
        self.progress.ended(row)
        if self.mirror is not None:
            self.mirror.save()
        if self.train_runs is not None:
            self.train_runs.remove(row["trial_id"])


class TuneListener(tune.Callback):
    """Passes what Tune reports of the trials on to the recorder."""

    def __init__(
        self, recorder: Recorder, searcher: TrialSource, scheduler: RuleScheduler, cluster: ClusterConfig
    ) -> None:
        self._recorder = recorder
        self._searcher = searcher
        self._scheduler = scheduler
        self._last: dict[str, EpochMetrics] = {}
        self._errors: dict[str, str] = {}
        self._outside: OrchestratorError | None = None
        """What is wrong outside the trials."""
        self._nodes_check_due = 0.0
        self._waiting = Waiting(cluster)
        self._starting: dict[str, int] = {}
        """Trial without a report -> the size of its log when its driver started; a log that grows shows that its workers have."""

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called many times a second. Raises: ClusterError if no node is left that a trial could run on."""
        if time.monotonic() < self._nodes_check_due:
            return
        self._nodes_check_due = time.monotonic() + NODES_CHECK_S
        if not has_nodes():
            raise ClusterError(
                "Ray has no node left; start it again where it runs elsewhere, and rerun the same command to resume"
            )
        waiting = [trial_id for trial_id, size in self._starting.items() if size == self._log_bytes(trial_id)]
        if (text := self._waiting.text(waiting, time.monotonic())) is not None:
            self._recorder.progress.say(text)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Called when a trial's driver starts, also when it starts again."""
        trial_id, plain = _id(trial), trial.config.get("assignment")  # none if the values make no config
        self._starting[trial_id] = self._log_bytes(trial_id)
        if self._recorder.has_started(trial_id):
            return
        wait_until_reachable(self._recorder.run.config)
        config = self._recorder.config.base if plain is None else Assignment.from_dict(plain).config
        self._recorder.started(trial_id, config, self._kind(trial_id), self._searcher.params[trial_id])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Called with every report, after the scheduler has decided on it."""
        trial_id = _id(trial)
        self._starting.pop(trial_id, None)
        if "error" in result:
            self._errors[trial_id] = str(result["error"])
            if result.get("is_outside"):
                self._outside = (UserError if result["is_user_error"] else OrchestratorError)(result["error"])
            return
        names = [*METRICS_SCHEMA.names, *all_latency_columns([result])]
        self._last[trial_id] = {name: result[name] for name in names if name in result}
        self._recorder.epoch(trial_id, self._last[trial_id])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called after each event. Raises: the error of a trial that has not failed itself; it gets no row, and resumes."""
        if self._outside is not None:
            raise self._outside

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Called when a trial's driver died and is started again."""
        self._recorder.progress.say(f"{_id(trial)}: its driver died ({_error_text(trial)}); it is started again")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Called when a trial has ended without an exception, by itself or because the scheduler stopped it."""
        trial_id = _id(trial)
        if trial_id in self._errors:
            self._end(trial_id, FAILED, self._errors[trial_id])
        elif self._last.get(trial_id, {}).get("final"):
            self._end(trial_id, FINISHED)
        elif trial_id in self._scheduler.stopped and trial_id in self._last:
            self._end(trial_id, STOPPED)
        elif trial_id in self._scheduler.stopped:
            self._end(trial_id, FAILED, f"{trial_id}: it was ended on request, before its first epoch")
        else:
            self._end(trial_id, FAILED, f"{trial_id}: it ended without final metrics")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Called when a trial has ended with an exception, its driver's restarts included.

        Raises: ClusterError if Ray is gone: the trial has not failed then, and the same command resumes it.
        """
        if not answers():
            raise ClusterError(
                f"Ray is gone, and {_id(trial)} with it ({_error_text(trial)}); start Ray again where it does not run on this "
                "machine, and rerun the same command to resume"
            )
        self._end(_id(trial), FAILED, f"{_id(trial)}: {_error_text(trial)}")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts into tuner.pkl, which this project never reads

    def _kind(self, trial_id: str) -> str:
        """Return the kind of a trial's row; for a baseline it is the baseline's name."""
        return trial_id if trial_id in self._recorder.config.baselines else TRIAL

    def _end(self, trial_id: str, status: Status, error: str | None = None) -> None:
        self._starting.pop(trial_id, None)
        run = self._recorder.run
        wait_until_reachable(run.config)
        metrics = run.trial(trial_id).metrics
        epochs = read_metrics(metrics) if metrics.exists() else []
        stopped_epoch = self._scheduler.stopped[trial_id] if status == STOPPED else None
        row = {
            "trial_id": trial_id,
            "kind": self._kind(trial_id),
            "status": status,
            "stopped_epoch": stopped_epoch,
            "error": error,
            **({} if status == FAILED else network_columns(self._judged(trial_id, epochs, stopped_epoch))),
            **seconds_columns(epochs),
            **self._searcher.params[trial_id],
            PARENT: self._searcher.parents.get(trial_id),
        }
        self._recorder.ended(row, self._searcher)

    def _log_bytes(self, trial_id: str) -> int:
        return num_bytes(self._recorder.run.trial(trial_id).log)

    def _judged(self, trial_id: str, epochs: Sequence[EpochMetrics], stopped_epoch: int | None) -> EpochMetrics:
        """Return the metrics that a trial's row shows: its last, or those of the epoch after which it was stopped.

        A trial that was resumed may have trained on before the decision, made again, reached it.
        """
        return next((epoch for epoch in epochs if epoch["epoch"] == stopped_epoch), self._last[trial_id])


def _id(trial: Trial) -> str:
    return str(trial.config["trial_id"])


def _error_text(trial: Trial) -> str:
    """Return the last line of the trial's traceback."""
    path = trial.error_file
    lines = Path(path).read_text().strip().splitlines() if path else []
    return masked(lines[-1]) if lines else "no reason is known"
