"""The run of one trial in MLflow: what of it is not sent yet, and how it is sent."""

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag

from orchestrator.config.metrics import (
    ACCURACIES,
    BY_NAME,
    ESTIMATED,
    METRICS,
    NETWORK_METRICS,
    SPREAD_METRICS,
    VALIDATION,
    Status,
    split_column,
    used_as,
)
from orchestrator.errors import RunDirError
from orchestrator.masking import masked_values
from orchestrator.reporting.figures import widths_png
from orchestrator.storage.files import read_json
from orchestrator.storage.records import Row, all_latency_columns, read_metrics
from orchestrator.tracking.search_run import SearchRun
from orchestrator.tracking.store import MAX_TAG_CHARS, points

logger = logging.getLogger(__name__)
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class TrialRun:
    """A trial's run, and what MLflow does not have of it yet; write() is unguarded, the Tracker guards it."""

    def __init__(
        self, search: SearchRun, trial_id: str, kind: str, params: Mapping[str, str], earlier: Run | None
    ) -> None:
        self.run_id: str | None = None
        self.is_running = False
        self.timestamp_ms = 0
        """Of the last epoch, or of the start; the final numbers carry it, so that they are the same when sent again."""
        self._search = search
        self._trial_id = trial_id
        self._kind = kind
        self._paths = search.run.trial(trial_id)
        self._params = [Param(name, value) for name, value in params.items()]
        self._metrics: list[Metric] = []
        self._end: Row | None = None
        self._last_epoch = 0
        self._is_tried = False
        if earlier is not None:
            self.run_id, self.timestamp_ms = earlier.info.run_id, earlier.info.start_time

    @property
    def is_behind(self) -> bool:
        """Whether MLflow lacks something of the trial."""
        return self.run_id is None or bool(self._params or self._metrics) or self._end is not None

    def add_epoch(self, metrics: Mapping[str, Any]) -> bool:
        """Take note of an epoch; return False, and do not send it, if it was noted before."""
        is_known = metrics["epoch"] <= self._last_epoch
        if not (is_known and metrics.get("final")):
            self.timestamp_ms = metrics["timestamp_ms"]
        if is_known:
            return False
        self._last_epoch = metrics["epoch"]
        self._metrics += _epoch_points(metrics)
        return True

    def add_end(self, row: Row, status: Status, error: str | None) -> None:
        """Take note of how the trial ended. row: as in results.parquet."""
        self._end = {**row, "status": status, "error": error}

    def write(self) -> None:
        """Send everything that MLflow does not have yet; what fails stays for the next time."""
        run_id = self.run_id if self.run_id is not None and self.is_running else self._open()
        if self._params or self._metrics:
            tags = [RunTag("gator.status", "running")]
            self._search.client.log_batch(run_id, metrics=self._metrics, params=self._params, tags=tags)
            self._params, self._metrics = [], []
        if self._end is not None:
            self._write_end(run_id, self._end)
            self._end = None

    def _open(self) -> str:
        if self.run_id is None and self._is_tried:
            # a request whose answer was lost may have made the run
            self.run_id = self._search.find_child(self._trial_id)
        self._is_tried = True
        if self.run_id is None:
            info = self._search.create_child(self._trial_id, self._kind).info
            self.run_id, self.timestamp_ms = info.run_id, self.timestamp_ms or info.start_time
        else:
            self._search.client.update_run(self.run_id, status="RUNNING")
            self._add_unsent_epochs(self.run_id)
        self.is_running = True
        return self.run_id

    def _add_unsent_epochs(self, run_id: str) -> None:
        """Add the epochs that an earlier process recorded but could not send, and take out those that are there."""
        recorded = read_metrics(self._paths.metrics) if self._paths.metrics.is_file() else []
        there = {point.step for point in self._search.client.get_metric_history(run_id, BY_NAME["loss"].mlflow_name)}
        known = there | {point.step for point in self._metrics}
        missing = [metrics for metrics in recorded if metrics["epoch"] not in known and not metrics["final"]]
        self._metrics = [point for point in self._metrics if point.step not in there]
        self._metrics += [point for metrics in missing for point in _epoch_points(metrics)]
        self._last_epoch = max([self._last_epoch, *there, *(metrics["epoch"] for metrics in missing)])

    def _write_end(self, run_id: str, row: Row) -> None:
        tags = {
            "gator.status": row["status"],
            "gator.latency_device": row.get("latency_device"),
            "gator.latency_noisy": row.get("latency_noisy"),
            **_condition_tags(row.get("latency_conditions")),
            "gator.stopped_at_epoch": row.get("stopped_epoch"),
            "gator.error": row["error"][:MAX_TAG_CHARS] if row["error"] else None,
        }
        self._search.client.log_batch(
            run_id,
            metrics=points(_final_numbers(row), self.timestamp_ms, step=0),
            tags=[RunTag(name, str(value)) for name, value in tags.items() if value is not None],
        )
        self._write_files(run_id)
        self._search.client.set_terminated(run_id, MLFLOW_STATUS[row["status"]])
        self.is_running = False

    def _write_files(self, run_id: str) -> None:
        # torch takes seconds to import; a driver has it by now, a reader of this module need not
        from gator.graph.architecture import Architecture

        client, paths = self._search.client, self._paths
        try:
            paths.refuse_links()
            config = read_json(paths.config, RunDirError, "restore it from a copy") if paths.config.is_file() else None
        except RunDirError as error:
            logger.warning("MLflow gets no files of %s: %s", self._trial_id, error)
            return
        table = self._search.config.base.profile.latency_table
        for path in (paths.architecture, paths.widths, paths.log, *(() if table is None else (Path(table),))):
            if path.is_file():
                client.log_artifact(run_id, str(path))
        if config is not None:
            client.log_text(run_id, json.dumps(masked_values(config), indent=2), paths.config.name)
        if paths.architecture.is_file():
            architecture = Architecture.load(paths.architecture)
            picture = widths_png(architecture.num_channels, architecture.widths)
            client.log_stream(run_id, io.BytesIO(picture), "widths.png")


def differs(row: Row, recorded: Run) -> bool:
    """Return whether the row has a final number that is another one in its run: latencies were measured again."""
    known = {name: float(value) for name, value in _final_numbers(row).items() if value is not None}
    return any(recorded.data.metrics.get(name) != value for name, value in known.items())


def _epoch_points(metrics: Mapping[str, Any]) -> list[Metric]:
    """Return an epoch as MLflow's metrics; of a final report, whose accuracy is that of the finished network, the others."""
    left_out = used_as("retaken") if metrics.get("final") else ()
    charted = (metric for metric in METRICS if metric.mlflow_name and metric.name not in left_out)
    values = {metric.mlflow_name: metrics.get(metric.name) for metric in charted}
    return points(values, metrics["timestamp_ms"], step=metrics["epoch"])


def _condition_tags(conditions: str | None) -> dict[str, str]:
    """Return what a latency holds for as tags, one for each field, so that MLflow can filter by it."""
    fields = {} if conditions is None else json.loads(conditions)
    return {f"gator.latency.{name}": str(value) for name, value in fields.items() if value is not None}


def _final_numbers(row: Row) -> dict[str, Any]:
    """Return what compares with the numbers of any other network: no accuracy on held-out images, no estimated latency."""
    left_out: tuple[str, ...] = ACCURACIES if row.get("accuracy_split") == VALIDATION else ()
    left_out += SPREAD_METRICS if row.get("latency_source") == ESTIMATED else ()
    names = dict.fromkeys((*NETWORK_METRICS, *all_latency_columns([row])))
    return {name: row.get(name) for name in names if split_column(name)[0] not in left_out}
