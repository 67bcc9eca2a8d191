"""MLflow as the record of a search that people share: one parent run per search, one child run per trial.

The run directory is the source of truth; MLflow holds a copy. A store that is away never holds up a search: what could not
be sent waits here and is sent with the trial's next write, at the end, or when the search is continued. Everything is
idempotent: runs are found by their tags (gator.search_id, gator.trial_id), and a metric sent twice with its recorded
timestamp is stored once.

    experiment, named by the cluster's file    tag mlflow.sharedViewState.<key>: a view, accuracy against latency
    └── parent run = one search             search.yaml, front.png, report.html, results.csv, pareto.json
        └── child run = one network         params: the flat TrialConfig; per epoch "train/loss", "validation/top1", ...
                                            final numbers without a slash: top1, latency_ms, macs, ...
                                            architecture.json, widths.csv, widths.png, config.json, log.txt

Only the driver writes.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import Status
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import TrackingError, first_line
from orchestrator.masking import masked
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths, TrialPaths
from orchestrator.storage.records import read_metrics
from orchestrator.storage.run_dir import read_trial_config
from orchestrator.tracking.delivery import Delivery
from orchestrator.tracking.registry import Package, Registry
from orchestrator.tracking.search_run import SearchRun
from orchestrator.tracking.store import (
    STORE_ERRORS,
    creation_lock,
    find_or_create_experiment,
    flatten,
    open_client,
    sqlite_uri,
)
from orchestrator.tracking.trial_run import TrialRun, differs
from orchestrator.tracking.views import ui_command, view_link

logger = logging.getLogger(__name__)
DEFAULT_CLUSTER = ClusterConfig()
MANAGED = ("databricks", "arn:aws:sagemaker", "azureml")
"""What the addresses of services begin with that have pages of their own."""
PROGRESS_SHARE = 0.005
"""Share of the time that goes into showing the front while the search runs."""


class Tracker:
    """Records what the search reports in MLflow, from the driver alone. Made by open()."""

    def __init__(
        self,
        client: MlflowClient,
        uri: str,
        experiment_id: str,
        config: SearchConfig,
        run: RunPaths,
        cluster: ClusterConfig,
    ) -> None:
        self.uri = uri
        self._config = config
        self._experiment = cluster.experiment_of(config.name)
        self._model = cluster.model_of(config.name)
        self._run = run
        self.delivery = Delivery(uri)
        self.search = SearchRun(client, experiment_id, config, run)
        self._trials: dict[str, TrialRun] = {}
        self._earlier: dict[str, Run] = {}
        """Trial id -> the run that an earlier process made."""
        self._epochs = {trial_id: _num_epochs(run.trial(trial_id)) for trial_id in run.trial_ids()}
        """Trial id -> epochs it has spent."""
        self._progress_due = 0.0
        self._is_registered = self._model is None

    @classmethod
    def open(
        cls, config: SearchConfig, run: RunPaths, storage: StoragePaths, cluster: ClusterConfig = DEFAULT_CLUSTER
    ) -> Self:
        """Return the tracker of the search in `run`, attached to its parent run if an earlier process made one.

        The store is the cluster's `mlflow_uri`, or SQLite in the storage when that is None; it is created when it is not there.
        Children that an earlier process left RUNNING become KILLED, and results that it could not send are sent now.
        Raises: TrackingError when the store cannot be opened or written.
        """
        uri = cluster.mlflow_uri or sqlite_uri(storage)
        try:
            with creation_lock(None if cluster.mlflow_uri else storage):
                client = open_client(uri, must_exist=False)
                artifacts = None if cluster.mlflow_uri else (storage.mlartifacts / config.name).resolve().as_uri()
                experiment_id = find_or_create_experiment(client, cluster.experiment_of(config.name), artifacts)
            tracker = cls(client, uri, experiment_id, config, run, cluster)
            tracker._adopt_children()
        except STORE_ERRORS as error:
            raise TrackingError(
                f"the MLflow store {masked(uri)} cannot be opened: {first_line(error)}; start its server, or "
                "set another mlflow_uri in the cluster file (null means SQLite in the storage, on a local disk)"
            ) from error
        return tracker

    @property
    def parent_id(self) -> str:
        """The run of the whole search."""
        return self.search.run_id

    def describe_cluster(self, facts: Mapping[str, Any], config: ClusterConfig) -> None:
        """Record what the search runs on: facts, such as {"nodes": 4, "CPU": 64}, as tags, the config as cluster.yaml."""
        self.delivery.attempt(lambda: self.search.write_cluster(facts, config))

    def trial_started(
        self, trial_id: str, params: Mapping[str, Any], config: TrialConfig, kind: str = "trial"
    ) -> str | None:
        """Open the trial's run and write its parameters; return the run's id, None while the store cannot be reached.

        kind: "trial", "unpruned", or a baseline's name.
        """
        values = flatten(config.model_dump(mode="json")) | flatten(params)
        self._trials[trial_id] = TrialRun(self.search, trial_id, kind, values, self._earlier.get(trial_id))
        self._send(trial_id)
        return self._trials[trial_id].run_id

    def epoch(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Write what the worker reported for an epoch, in one request.

        An epoch that was written is not written again: a trial that continues from an earlier checkpoint repeats some. The
        final report (`final`) is left to trial_ended(), unless it is also the only report of its epoch.
        """
        if self._trials[trial_id].add_epoch(metrics):
            self._epochs[trial_id] = metrics["epoch"]
            self._send(trial_id)

    def trial_ended(self, trial_id: str, row: Mapping[str, Any], status: Status, error: str | None = None) -> None:
        """Write the trial's final numbers, its files and how it ended. row: as in results.parquet."""
        self._trials[trial_id].add_end(row, status, error)
        self._send(trial_id)

    def remeasured(self, row: Mapping[str, Any]) -> None:
        """Write the final numbers of a trial that has ended once more, with new latencies. row: as in results.parquet."""
        trial_id = row["trial_id"]
        if trial_id not in self._trials and trial_id in self._earlier:
            self._trials[trial_id] = TrialRun(self.search, trial_id, row["kind"], {}, self._earlier[trial_id])
        elif trial_id not in self._trials:
            self._replay(row)
        self._trials[trial_id].timestamp_ms = int(time.time() * 1000)  # of two values MLflow shows the later one
        self.trial_ended(trial_id, row, row["status"])

    def show(self, read: Callable[[], Outcome]) -> None:
        """Write the front as it is now, unless that was done lately: at most PROGRESS_SHARE of the time goes into it.

        read: returns the outcome; called only if it is written, and its errors count as failed writes.
        """
        began = time.monotonic()
        if began < self._progress_due:
            return
        self.delivery.attempt(lambda: self.search.write_progress(read(), self._run_ids(), self._num_epochs))
        now = time.monotonic()
        self._progress_due = now + (now - began) / PROGRESS_SHARE

    def register_front(self, outcome: Outcome, package: Package, *, promotes: bool = False) -> list[str]:
        """Put the networks of the front into MLflow's registry, those that are not there yet, unless no model is to be there.

        promotes: whether aliases of other searches' networks move to those of this one. Returns: those that do not.
        """
        kept: list[str] = []

        def register() -> None:
            """Register, and note that it is done."""
            assert self._model is not None
            registry = Registry(self.search.client, self.search, self._model, promotes=promotes)
            kept.extend(registry.register(outcome, self._run, self._run_ids(), package))
            self._is_registered = True

        if self._model is not None:
            self._flush()
            self.delivery.attempt(register)
        return kept

    def search_ended(
        self, read: Callable[[], Outcome], status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
    ) -> None:
        """Send what is still missing, then the front and how the search ended. Trials that have not ended become KILLED.

        read: returns the outcome, as for show.
        """
        self._flush()
        before = self.delivery.num_failed
        unended = [trial.run_id for trial in self._trials.values() if trial.is_running and trial.run_id]
        self.delivery.attempt(lambda: self.search.kill(unended))
        self.delivery.attempt(lambda: self.search.write_end(read(), self._run_ids(), self._num_epochs))
        self.delivery.attempt(lambda: self.search.client.set_terminated(self.parent_id, status))
        num_behind = sum(trial.is_behind for trial in self._trials.values())
        if num_behind or self.delivery.num_failed > before:
            logger.warning(
                "MLflow lacks a part of %d trials or of the search; %s has it all, and the same command sends it again",
                num_behind,
                self._run.root,
            )
        elif status != "KILLED" and (self._is_registered or not read().front):
            write_atomic(self._run.recorded, self.how_to_open() + "\n")

    def how_to_open(self, port: int = 5000) -> str:
        """Return what to type and which link to open to see the search in MLflow, a line each."""
        if self.uri.startswith("http"):
            return view_link(masked(self.uri), self.search.experiment_id, self.search.search_id)
        if self.uri.startswith(MANAGED):
            return f"experiment {self._experiment} (id {self.search.experiment_id}) at {masked(self.uri)}"
        link = view_link(f"http://127.0.0.1:{port}", self.search.experiment_id, self.search.search_id)
        return f"{ui_command(masked(self.uri), port)}\n{link}"

    def _adopt_children(self) -> None:
        """Take over the children of an earlier process: kill those left running, send what it could not send."""
        self._earlier = self.search.children()
        self.search.kill(run.info.run_id for run in self._earlier.values() if run.info.status == "RUNNING")
        has_ended = {name for name, run in self._earlier.items() if run.info.status in ("FINISHED", "FAILED")}
        for row in Outcome.so_far(self._config, self._run).rows:
            if row["trial_id"] not in has_ended:
                self._replay(row)
            elif differs(row, self._earlier[row["trial_id"]]):
                self.remeasured(row)

    def _replay(self, row: Mapping[str, Any]) -> None:
        """Send a trial again from its files."""
        trial_id, paths = row["trial_id"], self._run.trial(row["trial_id"])
        config = read_trial_config(paths) if paths.config.is_file() else self._config.base
        self.trial_started(trial_id, {}, config, row["kind"])
        for metrics in read_metrics(paths.metrics) if paths.metrics.is_file() else []:
            self.epoch(trial_id, metrics)
        self.trial_ended(trial_id, row, row["status"])

    def _send(self, trial_id: str) -> None:
        self.delivery.attempt(self._trials[trial_id].write)

    def _flush(self) -> None:
        """Send what is not sent yet of any trial, also during a pause."""
        self.delivery.end_pause()
        for trial in self._trials.values():
            if trial.is_behind:
                self.delivery.attempt(trial.write)

    def _run_ids(self) -> dict[str, str]:
        ids = {trial_id: run.info.run_id for trial_id, run in self._earlier.items()}
        return ids | {trial_id: trial.run_id for trial_id, trial in self._trials.items() if trial.run_id}

    @property
    def _num_epochs(self) -> int:
        return sum(self._epochs.values())


def _num_epochs(paths: TrialPaths) -> int:
    epochs = read_metrics(paths.metrics) if paths.metrics.is_file() else []
    return max((metrics["epoch"] for metrics in epochs), default=0)  # the final report repeats the last epoch
