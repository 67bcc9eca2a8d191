"""The one table of metrics, from which every list of them derives; kinds and statuses of rows, and names of latency columns."""

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from orchestrator.errors import did_you_mean

Status = Literal["finished", "stopped", "failed"]
FINISHED: Final = "finished"
STOPPED: Final = "stopped"
FAILED: Final = "failed"
TRIAL: Final = "trial"
UNPRUNED: Final = "unpruned"
REFERENCE: Final = "reference"
"""Kinds of rows: a trial of the search, the unpruned network, a network to compare with. A baseline's row has its name as kind."""
TEST: Final = "test"
VALIDATION: Final = "validation"
"""Whose images top1 and top5 are of: the test split for finished networks, the validation split for epochs and so for stopped trials."""
MEASURED: Final = "measured"
ESTIMATED: Final = "estimated"
COMPUTED: Final = "computed"
"""Where a latency is from: a device, a curve or table of one, or the MACs alone (profile.clock: model)."""

Use = Literal["objective", "front", "unpruned", "headline", "log", "retaken"]
"""Where a metric appears: in objectives, in pareto.json for its front and for the unpruned network, in the first columns of
MLflow's view and of hover texts, in the log line of an epoch. retaken: a trial measures it again at its end, on other terms."""


@dataclass(frozen=True)
class Metric:
    """A column that describes a network, the training in an epoch, or the time that both took."""

    name: str
    of: Literal["network", "training", "time"]
    """network and time: in results.parquet and metrics.parquet; training: in metrics.parquet."""
    type: Literal["float64", "int64", "bool", "string"] = "float64"
    """As pyarrow calls it. Constraints, budgets and limits may name every number of a network."""
    uses: tuple[Use, ...] = ()
    format: str = "{:.4g}"
    label: str = ""
    """Title of an axis, with the unit; every objective has one."""
    mlflow_name: str = ""
    """Name in MLflow's charts of epochs, where the slash makes a section; empty for none."""
    most: float = math.inf
    """Largest possible value; the smallest is 0."""
    shrinks: bool = False
    """Whether it falls while gates close and stays the same afterwards."""
    doc: str = ""
    """What it means, with its unit: for docs/reference/metrics.md."""


METRICS = (
    Metric("loss", "training", uses=("log",), mlflow_name="train/loss",
           doc="mean training loss of the epoch, the gates' loss included"),
    Metric("top1", "network", "float64", ("objective", "front", "unpruned", "headline", "log", "retaken"),
           "{:.2f}", "top-1 accuracy (%)", "validation/top1", most=100.0, doc="percent of the images of accuracy_split"),
    Metric("top5", "network", "float64", ("objective", "front", "retaken"), "{:.2f}", "top-5 accuracy (%)",
           "validation/top5", most=100.0, doc="percent of the images of accuracy_split"),
    Metric("accuracy_split", "network", "string",
           doc="test (finished networks) or validation (epochs, and so trials that were stopped)"),
    Metric("latency_ms", "network", "float64", ("objective", "front", "unpruned", "headline", "log", "retaken"),
           "{:.3f}", "latency (ms)", "network/latency_ms", shrinks=True,
           doc="milliseconds of a forward pass at the first of profile.batch_sizes, median"),
    Metric("latency_source", "network", "string", doc="measured, estimated, or computed (profile.clock: model)"),
    Metric("latency_p10_ms", "network", uses=("front",), doc="10 % quantile of the latency"),
    Metric("latency_p90_ms", "network", uses=("front",), doc="90 % quantile of the latency"),
    Metric("latency_device", "network", "string", ("front",), doc="what was timed"),
    Metric("latency_noisy", "network", "bool", doc="whether the measurement was disturbed, at any batch size"),
    Metric("latency_conditions", "network", "string", doc="as JSON; latencies with equal fingerprints compare"),
    Metric("macs", "network", "int64", ("objective", "front", "unpruned"), "{:,.0f}",
           "MACs per image", shrinks=True, doc="multiply-adds (MACs; 1 MAC is 2 FLOPs) of convolutions and linear layers, per image"),
    Metric("macs_ratio", "network", "float64", ("objective", "front", "headline", "log"), "{:.3f}",
           "MACs, share of the unpruned network", "network/macs_ratio", most=1.0, shrinks=True,
           doc="macs over those of the unpruned network"),
    Metric("params", "network", "int64", ("objective", "front", "unpruned", "headline"), "{:,.0f}",
           "parameters", "network/params", shrinks=True, doc="number of parameters"),
    Metric("open_channels", "training", "int64", ("log",), mlflow_name="network/open_channels",
           doc="channels of all groups that are open"),
    Metric("loss_weight", "training", mlflow_name="gate/loss_weight", doc="weight of the gates' loss at the end of the epoch"),
    Metric("target_ratio", "training", doc="gating.target_ratio of the trial"),
    Metric("architecture", "training", "string", doc="digest of the channels that are kept"),
    Metric("train_s", "time", uses=("log",), mlflow_name="seconds/train", doc="wall seconds of training"),
    Metric("eval_s", "time", uses=("log",), mlflow_name="seconds/eval", doc="wall seconds of BatchNorm and evaluation"),
    Metric("measure_s", "time", uses=("log",), mlflow_name="seconds/measure", doc="wall seconds of latency measurements"),
)  # fmt: skip
"""In the order of the columns."""
BY_NAME = {metric.name: metric for metric in METRICS}
NETWORK_METRICS = tuple(one.name for one in METRICS if one.of == "network" and one.type in ("float64", "int64"))
"""The numbers that describe a network: what a constraint may name, besides latency_ms_b<batch size>."""
TIME_METRICS = tuple(one.name for one in METRICS if one.of == "time")
ACCURACIES = ("top1", "top5")
"""What is of the images that accuracy_split names."""
SPREAD_METRICS = ("latency_ms", "latency_p10_ms", "latency_p90_ms")
"""Median, 10 % and 90 % quantile of a latency: each has a column for every further batch size."""


def used_as(use: Use) -> tuple[str, ...]:
    """Return the names of the metrics that appear there."""
    return tuple(metric.name for metric in METRICS if use in metric.uses)


OBJECTIVE_METRICS = used_as("objective")
"""What every epoch reports and an objective may name."""


def latency_column(batch_size: int, metric: str = "latency_ms") -> str:
    """Return the column of a latency at a further batch size.

    >>> latency_column(32)
    'latency_ms_b32'
    """
    return f"{metric}_b{batch_size}"


def split_column(column: str) -> tuple[str, int | None]:
    """Return the metric of a column, and the batch size of a column that latency_column named.

    >>> split_column("latency_p10_ms_b32"), split_column("top1")
    (('latency_p10_ms', 32), ('top1', None))
    """
    match = re.fullmatch(rf"({'|'.join(SPREAD_METRICS)})_b([1-9]\d*)", column)
    return (match[1], int(match[2])) if match else (column, None)


def known_metric(value: str, names: tuple[str, ...]) -> str:
    """Return the metric that a config names. Raises: ValueError unless it is one of the names."""
    if value in names or (names is NETWORK_METRICS and split_column(value)[0] == "latency_ms"):
        return value
    raise ValueError(f"expected a metric{did_you_mean(value, names)}")
