"""the one table of metrics: name, type, format, label, MLflow name"""

import re

from orchestrator.errors import did_you_mean

EPOCH_METRICS = ("top1", "top5", "latency_ms", "macs", "macs_ratio", "params")
"""What every epoch reports and an objective may name."""
FINAL_METRICS = (*EPOCH_METRICS, "latency_p10_ms", "latency_p90_ms")
"""What a finished trial has and a constraint may name, besides latency_ms_b<batch size>."""


def _known_metric(value: str, names: tuple[str, ...]) -> str:
    if value in names or (names is FINAL_METRICS and re.fullmatch(r"latency_ms_b[1-9]\d*", value)):
        return value
    raise ValueError(f"expected a metric{did_you_mean(value, names)}")
