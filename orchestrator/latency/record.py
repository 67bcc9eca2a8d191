"""The latency of a network and its columns in results.parquet."""

import functools
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gator
from orchestrator.config.metrics import COMPUTED, ESTIMATED, MEASURED, SPREAD_METRICS, latency_column


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of the forward pass of one batch: median and spread over the repeats."""

    median_ms: float
    p10_ms: float | None = None
    p90_ms: float | None = None
    device: str | None = None
    """None, like the spread, for an estimate; "model" for a computed latency."""
    noisy: bool | None = None
    """Whether every attempt at the measurement was disturbed; over turns, whether no two of them agree on the least time."""
    conditions: str | None = None
    """How it was measured, as JSON: gator's Conditions with their fingerprint, which another latency must share to compare,
    the repeats, the exported file, the commit, the time, and the driver's report on the GPU."""

    @property
    def source(self) -> str:
        """MEASURED, ESTIMATED or COMPUTED."""
        return MEASURED if self.conditions is not None else ESTIMATED if self.device is None else COMPUTED


def measured_latency(measured: gator.LatencyMeasurement, *, noisy: bool, file_sha256: str | None = None) -> Latency:
    """Return a measurement as a Latency. file_sha256: of the exported file that was timed."""
    return Latency(
        median_ms=measured.median_ms,
        p10_ms=measured.p10_ms,
        p90_ms=measured.p90_ms,
        device=measured.conditions.device,
        noisy=noisy,
        conditions=_conditions_json(measured, file_sha256),
    )


def _conditions_json(measured: gator.LatencyMeasurement, file_sha256: str | None) -> str:
    gpu = {} if measured.gpu is None else asdict(measured.gpu)
    return json.dumps(
        {
            **asdict(measured.conditions),
            "fingerprint": measured.conditions.fingerprint,
            **{name: getattr(measured, name) for name in ("clock", "n", "num_warmup", "is_warm")},
            "file_sha256": file_sha256,
            "commit": _commit(),
            "time": measured.time,
            **{f"gpu_{name}": value for name, value in gpu.items()},
        }
    )


@functools.cache
def _commit() -> str | None:
    """Return the git commit of the checkout that holds this file; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def latency_columns(by_size: Mapping[int, Latency]) -> dict[str, Any]:
    """Return the latency columns of a row of results.parquet.

    by_size: a latency per batch size, the first of profile.batch_sizes first.
    """
    first, *others = by_size.items()
    known = [latency.noisy for latency in by_size.values() if latency.noisy is not None]
    return {
        "latency_ms": first[1].median_ms,
        "latency_source": first[1].source,
        "latency_p10_ms": first[1].p10_ms,
        "latency_p90_ms": first[1].p90_ms,
        "latency_device": first[1].device,
        "latency_noisy": any(known) if known else None,
        "latency_conditions": first[1].conditions,
        **{
            latency_column(size, metric): getattr(latency, f"{name}_ms")
            for size, latency in others
            for metric, name in zip(SPREAD_METRICS, ("median", "p10", "p90"), strict=True)
        },
    }
