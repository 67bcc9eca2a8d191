"""the MLflow run of a trial"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlflow.entities import Metric, Param, Run

from orchestrator.config.metrics import METRICS, NETWORK_METRICS, used_as
from orchestrator.storage.records import all_latency_columns
from orchestrator.tracking.store import points

Status = Literal["finished", "stopped", "failed", "killed"]
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
MAX_TAG_CHARS = 5000


@dataclass(frozen=True)
class _End:
    row: Mapping[str, Any]
    status: Status
    error: str | None


@dataclass
class TrialRun:
    """A trial's run, and what MLflow does not have of it yet."""

    trial_id: str
    kind: str
    run_id: str | None = None
    is_running: bool = False
    last_epoch: int = 0
    timestamp_ms: int = 0
    """Of the last epoch, or of the start; the final numbers carry it, so that they are the same when sent again."""
    params: list[Param] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    end: _End | None = None

    @property
    def is_behind(self) -> bool:
        """Whether MLflow lacks something of the trial."""
        return self.run_id is None or bool(self.params or self.metrics) or self.end is not None


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


def _final_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in (*NETWORK_METRICS, *all_latency_columns([row]))}


def _differs(row: Mapping[str, Any], recorded: Run) -> bool:
    """Return whether the row has a final number that its run has otherwise: latencies were taken anew."""
    known = {name: float(value) for name, value in _final_numbers(row).items() if value is not None}
    return any(recorded.data.metrics.get(name) != value for name, value in known.items())
