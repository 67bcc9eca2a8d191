"""a Latency as columns"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gator
from orchestrator.config.metrics import SPREAD_METRICS, latency_column


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of the forward pass of one batch: median and spread over the repeats."""

    median_ms: float
    p10_ms: float | None = None
    p90_ms: float | None = None
    device: str | None = None
    """None, like the spread, for an estimate."""
    noisy: bool | None = None
    """Whether the measurement was disturbed, however often it was made again; over turns, whether no two of them agree on the least."""
    conditions: str | None = None
    """How it was taken, as JSON: gator.latency.Conditions with their fingerprint, which another latency must share to compare,
    the repeats, the commit, the time, and what the GPU's driver said."""


def _latency(measured: gator.LatencyMeasurement, *, noisy: bool) -> Latency:
    return Latency(
        median_ms=measured.median_ms,
        p10_ms=measured.p10_ms,
        p90_ms=measured.p90_ms,
        device=measured.device,
        noisy=noisy,
        conditions=_conditions_json(measured),
    )


def _conditions_json(measured: gator.LatencyMeasurement) -> str:
    gpu = {} if measured.gpu is None else asdict(measured.gpu)
    return json.dumps(
        {
            **asdict(measured.conditions),
            "fingerprint": measured.conditions.fingerprint,
            **{name: getattr(measured, name) for name in ("clock", "n", "num_warmup", "is_warm", "commit", "time")},
            **{f"gpu_{name}": value for name, value in gpu.items()},
        }
    )


def _columns(by_size: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """by_size: the fields of a Latency per batch size, the first of profile.batch_sizes first."""
    first, *others = by_size.items()
    latency = first[1]
    return {
        "latency_ms": latency["median_ms"],
        "latency_p10_ms": latency["p10_ms"],
        "latency_p90_ms": latency["p90_ms"],
        "latency_device": latency["device"],
        "latency_noisy": _any(other["noisy"] for other in by_size.values()),
        "latency_conditions": latency["conditions"],
        **{
            latency_column(size, metric): other[f"{name}_ms"]
            for size, other in others
            for metric, name in zip(SPREAD_METRICS, ("median", "p10", "p90"), strict=True)
        },
    }


def _any(noisy: Iterable[bool | None]) -> bool | None:
    """Return whether any was; None where none is known."""
    known = [one for one in noisy if one is not None]
    return any(known) if known else None
