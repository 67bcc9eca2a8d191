"""When a search starts no further trial, though some are left."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import TIME_METRICS
from orchestrator.config.search import SearchAlgorithmConfig
from orchestrator.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits in hours of wall time and of GPUs; None means unlimited."""

    hours: float | None
    gpu_hours: float | None
    num_gpus: float
    """GPUs of one trial."""
    began_s: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, search: SearchAlgorithmConfig, cluster: ClusterConfig) -> "Budget":
        """Return the budget of a search; its clock starts now. Raises: ClusterError for GPU hours without GPUs."""
        num_gpus = cluster.workers_per_trial * cluster.resources_per_worker.get("GPU", 0.0)
        if search.max_gpu_hours is not None and num_gpus == 0:
            raise ClusterError(
                f"search.max_gpu_hours is {search.max_gpu_hours:g}, but a trial has no GPU on this cluster; set GPU in the "
                "cluster's resources_per_worker, or search.max_hours instead"
            )
        return cls(hours=search.max_hours, gpu_hours=search.max_gpu_hours, num_gpus=num_gpus)

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self.hours is not None or self.gpu_hours is not None

    def why_spent(self, rows: Sequence[Mapping[str, Any]], now_s: float) -> str | None:
        """Return why no further trial starts, None if one may. now_s: time.monotonic().

        rows: results.parquet so far, and the seconds of the trials under way.
        """
        hours = (now_s - self.began_s) / 3600
        if self.hours is not None and hours >= self.hours:
            return f"search.max_hours {self.hours:g} are spent"
        gpu_hours = self.num_gpus * sum(seconds_of(row) for row in rows) / 3600
        if self.gpu_hours is not None and gpu_hours >= self.gpu_hours:
            return f"{gpu_hours:.3g} of search.max_gpu_hours {self.gpu_hours:g} are spent"
        return None


def seconds_of(row: Mapping[str, Any]) -> float:
    """Return the seconds that a row of results.parquet or metrics.parquet has spent."""
    return sum(row.get(name) or 0.0 for name in TIME_METRICS)
