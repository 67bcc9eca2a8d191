"""MLflow as the record of a search that people share: one parent run per search, one child run per trial.

The run directory is the truth and MLflow a copy of it. So a store that is gone never holds up a search: what could not
be sent waits here and goes out with the trial's next write, at the end, or when the search is continued. Everything is
idempotent: runs are found by their tags (gator.search_id, gator.trial_id), and a metric sent twice with its recorded
timestamp is stored once.

    experiment = the search space's name    tag mlflow.sharedViewState.<key>: a view, accuracy against latency
    └── parent run = one search             search.yaml, front.png, front.html, results.csv, pareto.json, report.html
        └── child run = one network         params: the flat TrialConfig; per epoch "train/loss", "holdout/top1", ...
                                            final numbers without a slash: top1, latency_ms, macs, ...
                                            architecture.json, widths.csv, widths.png, config.json, log.txt

Only the driver writes. The embedded store is SQLite in write-ahead mode, for a local disk; the artifact folder stands
in it as an absolute path, so a storage that was moved keeps its numbers in MLflow but loses its files there.
"""

import io
import json
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag, ViewType
from mlflow.tracking.context.registry import resolve_tags

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import BY_NAME
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import RunDirError, TrackingError
from orchestrator.masking import masked, masked_values
from orchestrator.reporting.figures import widths_png
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.files import LEFTOVER_PREFIX, read_json, read_text, write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths, TrialPaths
from orchestrator.storage.records import read_metrics
from orchestrator.tracking.delivery import PAUSE_S, PROBE_S, SLOW_FAILURE_S
from orchestrator.tracking.registry import Registry, aliases
from orchestrator.tracking.search_run import SearchRun
from orchestrator.tracking.store import (
    STORE_ERRORS,
    creation_lock,
    find_or_create_experiment,
    first_line,
    flatten,
    is_there,
    open_client,
    points,
    sqlite_uri,
)
from orchestrator.tracking.trial_run import (
    MAX_TAG_CHARS,
    MLFLOW_STATUS,
    Status,
    TrialRun,
    _condition_tags,
    _differs,
    _End,
    _epoch_points,
    _final_numbers,
)
from orchestrator.tracking.views import ui_command, view_link

logger = logging.getLogger(__name__)
Package = Callable[[list[str], str], dict[str, str]]
"""Trial ids and a folder -> {trial id: why there is no model of it}."""
PROGRESS_SHARE = 0.005
"""Share of the time that goes into showing the front while the search runs."""


class Tracker:
    """The search's record in MLflow, written by the driver alone. Made by open()."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, config: SearchConfig, run: RunPaths) -> None:
        self.uri = uri
        self.experiment_id = experiment_id
        self.search_id = _search_id(run, config.name)
        self.num_failed_writes = 0
        """Writes that failed or were left out while the store was down; what they held is sent again later."""
        self._client = client
        self._config = config
        self._run = run
        self._trials: dict[str, TrialRun] = {}
        self._earlier: dict[str, Run] = {}
        """Trial id -> the run that an earlier process made."""
        self._paused_until = 0.0
        self._context_tags = resolve_tags()  # user, program and git commit, as MLflow's own API would set them
        self._parent = self._open_parent()
        self._epochs = {trial_id: _num_epochs(run.trial(trial_id)) for trial_id in run.trial_ids()}
        """Trial id -> epochs it has spent."""
        self._progress_due = 0.0
        self._is_registered = False
        self._last_told: str | None = None
        """What the store said when it failed last; None after a write that went well."""

    @classmethod
    def open(cls, config: SearchConfig, run: RunPaths, storage: StoragePaths, mlflow_uri: str | None = None) -> Self:
        """Return the tracker of the search in `run`, attached to its parent run if an earlier process made one.

        The store is `mlflow_uri`, or SQLite in the storage when that is None; it is created when it is not there.
        Children that an earlier process left RUNNING become KILLED, and results that it could not send are sent now.
        Raises: TrackingError when the store cannot be opened or written.
        """
        uri = mlflow_uri or sqlite_uri(storage)
        try:
            with creation_lock(None if mlflow_uri else storage):
                client = open_client(uri, must_exist=False)
                artifacts = None if mlflow_uri else (storage.mlartifacts / config.name).resolve().as_uri()
                experiment_id = find_or_create_experiment(client, config.name, artifacts)
            tracker = cls(client, uri, experiment_id, config, run)
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
        return self._parent.run_id

    def describe_cluster(self, facts: Mapping[str, Any], config: ClusterConfig) -> None:
        """Record what the search runs on: facts, such as {"nodes": 4, "CPU": 64}, as tags, the config as cluster.yaml."""
        self._attempt(lambda: self._parent.tag(facts))
        self._attempt(lambda: self._parent.write_cluster(config))

    def trial_started(
        self, trial_id: str, params: Mapping[str, Any], config: TrialConfig, kind: str = "trial"
    ) -> str | None:
        """Open the trial's run and write its parameters; return the run's id, None while the store cannot be reached.

        kind: "trial", "unpruned", or a baseline's name.
        """
        values = flatten(config.model_dump(mode="json")) | flatten(params)
        trial = TrialRun(trial_id, kind, params=[Param(name, value) for name, value in values.items()])
        if trial_id in self._earlier:
            info = self._earlier[trial_id].info
            trial.run_id, trial.timestamp_ms = info.run_id, info.start_time
        self._trials[trial_id] = trial
        self._send(trial)
        return trial.run_id

    def epoch(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Write what the worker reported for an epoch, in one request.

        An epoch that was written is not written again: a trial that goes on from an earlier checkpoint repeats some. The final
        report (`final`) is left to trial_ended(), unless it is also the only report of its epoch.
        """
        trial = self._trials[trial_id]
        is_known = metrics["epoch"] <= trial.last_epoch
        if not (is_known and metrics.get("final")):
            trial.timestamp_ms = metrics["timestamp_ms"]
        if is_known:
            return
        trial.last_epoch = metrics["epoch"]
        self._epochs[trial_id] = trial.last_epoch
        trial.metrics += _epoch_points(metrics)
        self._send(trial)

    def trial_ended(
        self,
        trial_id: str,
        row: Mapping[str, Any],
        status: Status,
        error: str | None = None,
    ) -> None:
        """Write the trial's final numbers, its files and how it ended. row: as in results.parquet."""
        trial = self._trials[trial_id]
        trial.end = _End(dict(row), status, error)
        self._send(trial)

    def remeasured(self, row: Mapping[str, Any]) -> None:
        """Write the final numbers of a trial that has ended once more, with new latencies. row: as in results.parquet."""
        trial_id = row["trial_id"]
        if trial_id not in self._trials and trial_id in self._earlier:
            self._trials[trial_id] = TrialRun(trial_id, row["kind"], self._earlier[trial_id].info.run_id)
        elif trial_id not in self._trials:
            self._replay(row)
        self._trials[trial_id].timestamp_ms = int(time.time() * 1000)  # of two values MLflow shows the later one
        self.trial_ended(trial_id, row, row["status"])

    def register_front(self, outcome: Outcome, package: Package) -> None:
        """Put the networks of the front into MLflow's registry, those that are not there yet.

        package: writes the networks of trials into a folder, see mlflow_models.package().
        """
        self._flush()
        if self._is_away():
            self.num_failed_writes += 1
            return
        run_ids = self._run_ids()
        wanted = [*outcome.front, *aliases(outcome).values()]
        rows = {row["trial_id"]: row for row in wanted if row["trial_id"] in run_ids}
        registry = Registry(self._client, self.experiment_id, self._config.name)
        with self._guarded(), tempfile.TemporaryDirectory(dir=self._run.root, prefix=LEFTOVER_PREFIX) as folder:
            registry.ensure()
            missing = registry.missing({trial_id: run_ids[trial_id] for trial_id in rows})
            errors = package(missing, folder) if missing else {}
            for trial_id in missing:
                if trial_id in errors:
                    logger.warning("%s is not registered in MLflow: %s", trial_id, errors[trial_id])
                    self._client.set_tag(run_ids[trial_id], "gator.export_error", errors[trial_id][:MAX_TAG_CHARS])
                else:
                    config = TrialConfig.model_validate_json(self._run.trial(trial_id).config.read_bytes())
                    registry.add(rows[trial_id], run_ids[trial_id], config, Path(folder, trial_id))
            registry.set_aliases(outcome, run_ids)
            self._is_registered = True

    def search_ended(self, outcome: Outcome, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Send what is still missing, then the front and how the search ended; call it after report.write_report().

        Trials that have not ended become KILLED.
        """
        self._flush()
        before = self.num_failed_writes
        unended = [trial.run_id for trial in self._trials.values() if trial.is_running and trial.run_id]
        self._attempt(lambda: self._kill(unended))
        self._attempt(lambda: self._parent.write_end(outcome, self._run_ids(), sum(self._epochs.values())))
        self._attempt(lambda: self._client.set_terminated(self.parent_id, status))
        num_behind = sum(trial.is_behind for trial in self._trials.values())
        if num_behind or self.num_failed_writes > before:
            logger.warning(
                "MLflow lacks a part of %d trials or of the search; %s has it all, and the same command sends it again",
                num_behind,
                self._run.root,
            )
        elif status != "KILLED" and (self._is_registered or not outcome.front):
            write_atomic(self._run.recorded, self.how_to_open() + "\n")

    def how_to_open(self, port: int = 5000) -> str:
        """Return what to type and which link to open to see the search in MLflow, a line each."""
        if self.uri.startswith("http"):
            return view_link(masked(self.uri), self.experiment_id, self.search_id)
        link = view_link(f"http://127.0.0.1:{port}", self.experiment_id, self.search_id)
        return f"{ui_command(masked(self.uri), port)}\n{link}"

    # ---- one request or a few, unguarded

    def _open_parent(self) -> SearchRun:
        """Find or create the parent run, and write what is known before the first trial."""
        found = self._search("=", max_results=1)
        if found:
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = self._create_run(self.search_id, "search").info.run_id
        parent = SearchRun(self._client, self.experiment_id, str(run_id), self.search_id, self._run)
        parent.describe(self._config)
        return parent

    def _create_run(self, name: str, kind: str, **tags: str) -> Run:
        shared = {"gator.kind": kind, "gator.search_id": self.search_id, "gator.run_dir": str(self._run.root.resolve())}
        return self._client.create_run(self.experiment_id, run_name=name, tags={**self._context_tags, **shared, **tags})

    def _search(self, equals: Literal["=", "!="], max_results: int = 1000, token: str | None = None) -> Any:
        """Return a page of this search's runs: the parent for "=", the children for "!="."""
        query = f"tags.`gator.search_id` = '{self.search_id}' AND tags.`gator.kind` {equals} 'search'"
        order = ["attributes.start_time ASC"]
        return self._client.search_runs([self.experiment_id], query, ViewType.ACTIVE_ONLY, max_results, order, token)

    def _find_child(self, trial_id: str) -> str | None:
        query = f"tags.`gator.search_id` = '{self.search_id}' AND tags.`gator.trial_id` = '{trial_id}'"
        found = self._client.search_runs([self.experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _adopt_children(self) -> None:
        """Take over the children of an earlier process: kill what died, send what it could not send."""
        page = self._search("!=")
        children = list(page)
        while page.token:
            page = self._search("!=", token=page.token)
            children += page
        self._earlier = {child.data.tags["gator.trial_id"]: child for child in children}
        self._kill(child.info.run_id for child in children if child.info.status == "RUNNING")
        has_ended = {
            child.data.tags["gator.trial_id"] for child in children if child.info.status in ("FINISHED", "FAILED")
        }
        for row in Outcome.so_far(self._config, self._run).rows:
            if row["trial_id"] not in has_ended:
                self._replay(row)
            elif _differs(row, self._earlier[row["trial_id"]]):
                self.remeasured(row)

    def _replay(self, row: Mapping[str, Any]) -> None:
        """Send a trial again from its files."""
        trial_id, paths = row["trial_id"], self._run.trial(row["trial_id"])
        config = self._config.base
        if paths.config.is_file():
            config = TrialConfig.model_validate_json(paths.config.read_bytes())
        self.trial_started(trial_id, {}, config, row["kind"])
        for metrics in read_metrics(paths.metrics) if paths.metrics.is_file() else []:
            self.epoch(trial_id, metrics)
        self.trial_ended(trial_id, row, row["status"])

    def _kill(self, run_ids: Iterable[str]) -> None:
        for run_id in run_ids:
            self._client.set_tag(run_id, "gator.status", "killed")
            self._client.set_terminated(run_id, "KILLED")

    def _open_run(self, trial: TrialRun) -> None:
        if trial.run_id is None and self.num_failed_writes:
            # a request whose answer was lost may have made the run
            trial.run_id = self._find_child(trial.trial_id)
        if trial.run_id is None:
            tags = {"gator.trial_id": trial.trial_id, "mlflow.parentRunId": self.parent_id}
            info = self._create_run(trial.trial_id, trial.kind, **tags).info
            trial.run_id, trial.timestamp_ms = info.run_id, trial.timestamp_ms or info.start_time
        else:
            self._client.update_run(trial.run_id, status="RUNNING")
            self._make_up_for(trial, trial.run_id)
        trial.is_running = True

    def _make_up_for(self, trial: TrialRun, run_id: str) -> None:
        """Add the epochs that an earlier process recorded but could not send, and take out those that are there."""
        path = self._run.trial(trial.trial_id).metrics
        recorded = read_metrics(path) if path.is_file() else []
        there = {point.step for point in self._client.get_metric_history(run_id, BY_NAME["loss"].mlflow_name)}
        known = there | {point.step for point in trial.metrics}
        missing = [metrics for metrics in recorded if metrics["epoch"] not in known and not metrics["final"]]
        trial.metrics = [point for point in trial.metrics if point.step not in there]
        trial.metrics += [point for metrics in missing for point in _epoch_points(metrics)]
        trial.last_epoch = max([trial.last_epoch, *there, *(metrics["epoch"] for metrics in missing)])

    def _write(self, trial: TrialRun) -> None:
        if not trial.is_running:
            self._open_run(trial)
        assert trial.run_id is not None
        if trial.params or trial.metrics:
            tags = [RunTag("gator.status", "running")]
            self._client.log_batch(trial.run_id, metrics=trial.metrics, params=trial.params, tags=tags)
            trial.params, trial.metrics = [], []
        if trial.end is not None:
            self._write_end(trial, trial.end)
            trial.end = None

    def _write_end(self, trial: TrialRun, end: _End) -> None:
        assert trial.run_id is not None
        values = _final_numbers(end.row)
        tags = {
            "gator.status": end.status,
            # of a stopped trial the numbers are those of its last epoch: on held-out images, its latency an estimate on CPUs
            "gator.numbers": {"finished": "final", "stopped": "last epoch"}.get(end.status),
            "gator.latency_device": end.row.get("latency_device"),
            "gator.latency_noisy": end.row.get("latency_noisy"),
            **_condition_tags(end.row.get("latency_conditions")),
            "gator.stopped_at_epoch": end.row.get("stopped_epoch"),
            "gator.error": end.error[:MAX_TAG_CHARS] if end.error else None,
        }
        self._client.log_batch(
            trial.run_id,
            metrics=points(values, trial.timestamp_ms, step=0),
            tags=[RunTag(name, str(value)) for name, value in tags.items() if value is not None],
        )
        self._write_files(trial.run_id, self._run.trial(trial.trial_id))
        self._client.set_terminated(trial.run_id, MLFLOW_STATUS[end.status])
        trial.is_running = False

    def _write_files(self, run_id: str, paths: TrialPaths) -> None:
        # torch takes seconds to import; a driver has it by now, a reader of this module need not
        from gator.graph.architecture import Architecture

        try:
            paths.refuse_links()
            config = read_json(paths.config, RunDirError, "restore it from a copy") if paths.config.is_file() else None
        except RunDirError as error:
            logger.warning("MLflow gets no files of it: %s", error)
            return
        latency_table = self._config.base.profile.latency_table
        tables = () if latency_table is None else (Path(latency_table),)
        for path in (paths.architecture, paths.widths, paths.log, *tables):
            if path.is_file():
                self._client.log_artifact(run_id, str(path))
        if config is not None:
            self._client.log_text(run_id, json.dumps(masked_values(config), indent=2), paths.config.name)
        if paths.architecture.is_file():
            architecture = Architecture.load(paths.architecture)
            picture = widths_png(architecture.num_channels, architecture.widths)
            self._client.log_stream(run_id, io.BytesIO(picture), "widths.png")

    def _run_ids(self) -> dict[str, str]:
        ids = {trial_id: run.info.run_id for trial_id, run in self._earlier.items()}
        return ids | {trial_id: trial.run_id for trial_id, trial in self._trials.items() if trial.run_id}

    # ---- a store that fails holds nobody up

    def _flush(self) -> None:
        """Send what trials wait to have sent, a pause notwithstanding."""
        self._paused_until = 0.0
        for trial in self._trials.values():
            if trial.is_behind:
                self._send(trial)

    def show(self, outcome: Outcome) -> None:
        """Write the front as it is now, unless that was done lately: at most PROGRESS_SHARE of the time goes into it."""
        began = time.monotonic()
        if began < self._progress_due or self._is_away():
            return
        with self._guarded():
            self._parent.write_progress(outcome, self._run_ids(), sum(self._epochs.values()))
        now = time.monotonic()
        self._progress_due = now + (now - began) / PROGRESS_SHARE

    def _send(self, trial: TrialRun) -> None:
        """Write everything that MLflow does not have of the trial yet; what fails stays for the next time."""
        self._attempt(lambda: self._write(trial))

    def _is_away(self) -> bool:
        """Return whether the store is to be left alone: for PAUSE_S, and for as long as a server that failed is silent.

        A server that hangs would hold up each write through all its retries; asking it first takes PROBE_S at most.
        """
        if time.monotonic() < self._paused_until:
            return True
        if self._last_told is None or is_there(self.uri, PROBE_S):
            return False
        self._paused_until = time.monotonic() + PAUSE_S
        return True

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write, guarded, unless the store is away."""
        if self._is_away():
            self.num_failed_writes += 1
            return
        with self._guarded():
            write()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Log the first failure, count all, and pause after one that made us wait."""
        began = time.monotonic()
        try:
            yield
        except STORE_ERRORS as error:
            self.num_failed_writes += 1
            if first_line(error) != self._last_told:
                self._last_told = first_line(error)
                logger.warning(
                    "MLflow at %s cannot be written (%s); the search goes on, and what is missing is sent later",
                    masked(self.uri),
                    self._last_told,
                )
            if time.monotonic() - began > SLOW_FAILURE_S:
                self._paused_until = time.monotonic() + PAUSE_S
        else:
            self._last_told = None


def _search_id(run: RunPaths, name: str) -> str:
    """Return the id that ties this run directory to its parent run; drawn once and kept in the run directory."""
    if not run.search_id.exists():
        write_atomic(run.search_id, f"{name}-{uuid.uuid4().hex[:8]}\n")
    advice = "restore it from a copy, or delete it: the search gets another run in MLflow then"
    search_id = read_text(run.search_id, RunDirError, advice).strip()
    if not re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{8}}", search_id):
        raise RunDirError(f"{run.search_id} is damaged: found {search_id!r:.60}, expected {name}-<8 digits>; {advice}")
    return search_id


def _num_epochs(paths: TrialPaths) -> int:
    epochs = read_metrics(paths.metrics) if paths.metrics.is_file() else []
    return max((metrics["epoch"] for metrics in epochs), default=0)  # the final report repeats the last epoch
