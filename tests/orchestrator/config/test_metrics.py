"""A metric is a line in config/metrics.py: every list of metrics derives from it."""

import ast
from pathlib import Path

import pytest

from orchestrator.config.metrics import BY_NAME, METRICS, NETWORK_METRICS, OBJECTIVE_METRICS, split_column, used_as
from orchestrator.pareto.asha import SHRINKING
from orchestrator.storage.records import METRICS_SCHEMA, RESULTS_SCHEMA, network_columns
from orchestrator.tracking.trial_run import _epoch_points, _final_numbers
from orchestrator.tuning.report_log import KEPT

PACKAGE = Path(__file__).resolve().parents[3] / "orchestrator"
EVERYWHERE = {"top1", "top5", "latency_ms", "macs", "macs_ratio", "params"}


def test_every_metric_is_a_column() -> None:
    names = [metric.name for metric in METRICS]
    assert [name for name in METRICS_SCHEMA.names if name in names] == names
    assert set(names) & set(RESULTS_SCHEMA.names) == {metric.name for metric in METRICS if metric.of != "training"}
    arrow = {"float64": "double"}
    assert all(str(METRICS_SCHEMA.field(one.name).type) == arrow.get(one.type, one.type) for one in METRICS)


def test_every_number_of_a_network_reaches_row_scheduler_and_tracking() -> None:
    assert set(NETWORK_METRICS) <= set(KEPT)
    row = dict.fromkeys(BY_NAME, 1.0)
    assert set(NETWORK_METRICS) <= set(network_columns(row)) & set(_final_numbers(row))


def test_every_mlflow_name_is_sent() -> None:
    sent = {point.key for point in _epoch_points({"timestamp_ms": 1, "epoch": 1, **dict.fromkeys(BY_NAME, 1.0)})}
    assert sent == {metric.mlflow_name for metric in METRICS if metric.mlflow_name}


def test_an_objective_is_a_number_of_a_network_with_a_label() -> None:
    assert set(OBJECTIVE_METRICS) == EVERYWHERE <= set(NETWORK_METRICS)
    assert all(BY_NAME[name].label for name in OBJECTIVE_METRICS)
    assert EVERYWHERE > SHRINKING == EVERYWHERE - {"top1", "top5"}


@pytest.mark.parametrize(
    ("column", "parts"),
    [
        ("latency_ms_b32", ("latency_ms", 32)),
        ("latency_p90_ms_b4", ("latency_p90_ms", 4)),
        ("latency_ms", ("latency_ms", None)),
        ("latency_ms_b0", ("latency_ms_b0", None)),
        ("gating.lr", ("gating.lr", None)),
    ],
)
def test_a_column_states_its_batch_size(column: str, parts: tuple[str, int | None]) -> None:
    assert split_column(column) == parts


def test_no_other_file_lists_metrics() -> None:
    """A list of three metrics or more is a second table, which a new metric would have to be added to."""
    lists = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple | ast.List | ast.Set)
        and sum(isinstance(one, ast.Constant) and one.value in EVERYWHERE for one in node.elts) > 2
    ]
    assert not lists, used_as("objective")
