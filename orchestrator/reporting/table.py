"""The networks of a search as text: the table of the terminal and of the page, and CSV."""

import csv
import io
import json
import sys
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.metrics import (
    ACCURACIES,
    BY_NAME,
    ESTIMATED,
    MEASURED,
    SPREAD_METRICS,
    STOPPED,
    VALIDATION,
    split_column,
)
from orchestrator.masking import printable
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.records import RESULTS_SCHEMA, Row, latency_columns, searched_params

FRONT_MARK = "*"
ESTIMATE_MARK = "~"
TEXT_COLUMNS = ("", "trial", "status")
"""Columns that are aligned to the left; numbers are aligned to the right."""


def table_text(outcome: Outcome) -> str:
    """Return the rows as aligned plain text, one line each after a header: the unpruned network first, then the front.

    A star marks the front. top1_diff is in points against the unpruned network, speedup its latency over this one's; neither is
    given between numbers of two splits, or between an estimate and a measurement.
    """
    return "\n".join(aligned(table_cells(outcome), text_columns=range(len(TEXT_COLUMNS))))


def table_cells(outcome: Outcome) -> list[list[str]]:
    """Return the header and one list of texts per row, in reading order."""
    on_front, unpruned = outcome.front_ids, outcome.unpruned
    objectives = (objective.metric for objective in outcome.config.objectives)
    names = list(dict.fromkeys([*objectives, *latency_columns(outcome.rows), "macs_ratio", "params"]))
    columns = [(split, name) for name in names for split in _splits(name, outcome)]
    params = searched_params(outcome.rows)
    lines = [
        [
            FRONT_MARK if row["trial_id"] in on_front else "",
            row["trial_id"],
            status_text(row),
            *(number_text(row, name) if _is_of(row, name, split) else "-" for split, name in columns),
            difference_text(row, unpruned),
            speedup_text(row, unpruned),
            *(value_text(row.get(name)) for name in params),
        ]
        for row in outcome.reading_order()
    ]
    header = ["", "trial", "status", *(f"{split}{name}" for split, name in columns), "top1_diff", "speedup", *params]
    return [[printable(text, kept="") for text in line] for line in (header, *lines)]


def _splits(name: str, outcome: Outcome) -> list[str]:
    """Return what precedes the name of a metric in the header: a column for each split that its rows are of."""
    has_validation = name in ACCURACIES and any(row.get("accuracy_split") == VALIDATION for row in outcome.rows)
    return ["", f"{VALIDATION}_"] if has_validation else [""]


def _is_of(row: Row, name: str, split: str) -> bool:
    return name not in ACCURACIES or (row.get("accuracy_split") == VALIDATION) == bool(split)


def csv_text(outcome: Outcome, rows: Sequence[Row] | None = None) -> str:
    """Return all columns of results.parquet as CSV in reading order, and on_front; what was not measured is empty.

    `rows`: only these; None means all.
    """
    on_front, shown = outcome.front_ids, outcome.reading_order() if rows is None else rows
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(shown[0] if shown else RESULTS_SCHEMA.names), "on_front"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "on_front": row["trial_id"] in on_front} for row in shown)
    return printable(text.getvalue())


def summary_text(outcome: Outcome) -> str:
    """Return the lines below the table: what the star means, the most accurate network of the front, and its knee."""
    lines = [f"{FRONT_MARK} on the Pareto front ({outcome.question}); {outcome.counts}", *_devices_warning(outcome)]
    if outcome.why_empty:
        return "\n".join([*lines, outcome.why_empty])
    best, knee = outcome.front[0], outcome.knee
    bounds = f" with {outcome.bounds}" if outcome.bounds else ""
    lines.append(f"best {outcome.config.objectives[0].metric}{bounds}: {sentence(best, outcome)}")
    if knee is not None and knee is not best:
        lines.append(f"best balance, the knee of the front: {sentence(knee, outcome)}")
    return "\n".join(lines)


def _devices_warning(outcome: Outcome) -> list[str]:
    """Return a line if latencies were measured on several kinds of device, else none."""
    measured = (row for row in outcome.rows if row.get("latency_source") == MEASURED)
    devices = sorted({str(row["latency_device"]) for row in measured})
    if len(devices) < 2:
        return []
    return [
        printable(
            f"latencies were measured on {' and '.join(devices)} and do not compare; name one kind of GPU in the cluster's "
            "resources_per_worker, as {GPU: 1, accelerator_type:A10G: 0.001}"
        )
    ]


def sentence(row: Row, outcome: Outcome) -> str:
    """Return a network in a line: "trial_0003: top1 98.33, latency_ms 2.010, macs_ratio 0.431, ..."."""
    return printable(f"{row['trial_id']}: {numbers_text(row, outcome)}")


def numbers_text(row: Row, outcome: Outcome) -> str:
    """Return what counts of a network: its objectives, its size and its speed-up."""
    names = dict.fromkeys([*(objective.metric for objective in outcome.config.objectives), "macs_ratio", "params"])
    numbers = ", ".join(f"{name} {number_text(row, name)}" for name in names)
    return f"{numbers}, speedup {speedup_text(row, outcome.unpruned)}"


def status_text(row: Row) -> str:
    """Return "finished", "failed" or "stopped at epoch 3"."""
    return f"stopped at epoch {row['stopped_epoch']}" if row["status"] == STOPPED else str(row["status"])


def metric_text(name: str, value: float | None) -> str:
    """Return a metric with as many digits as it deserves; "-" when it was not measured."""
    return "-" if value is None else BY_NAME[split_column(name)[0]].format.format(value)


def number_text(row: Row, name: str) -> str:
    """Return a metric of a row; a tilde marks an estimated latency."""
    is_estimate = row.get("latency_source") == ESTIMATED and row.get(name) is not None
    mark = ESTIMATE_MARK if is_estimate and split_column(name)[0] in SPREAD_METRICS else ""
    return mark + metric_text(name, row.get(name))


def value_text(value: object) -> str:
    """Return a searched parameter; "-" when the row has none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def difference_text(row: Row, unpruned: Row | None) -> str:
    """Return the top-1 points gained or lost against the unpruned network; "-" for accuracies of two splits."""
    if unpruned is None or row.get("top1") is None or unpruned.get("top1") is None:
        return "-"
    if row.get("accuracy_split") != unpruned.get("accuracy_split"):
        return "-"
    return f"{row['top1'] - unpruned['top1']:+.2f}"


def speedup_text(row: Row, unpruned: Row | None) -> str:
    """Return how many times faster than the unpruned network; "-" unless both were timed, under the same conditions, or neither."""
    held = [json.loads(one["latency_conditions"]) for one in (row, unpruned or {}) if one.get("latency_conditions")]
    if len({conditions.get("fingerprint") for conditions in held}) > 1:
        return "-"
    if unpruned is not None and row.get("latency_source") != unpruned.get("latency_source"):
        return "-"
    return ratio_text(unpruned, row, "latency_ms")


def ratio_text(first: Row | None, second: Row, name: str) -> str:
    """Return how many times as large a number of the first row is: "2.00x"; "-" where one of the two has none."""
    if first is None or first.get(name) is None or not second.get(name):
        return "-"
    return f"{first[name] / second[name]:.2f}x"


def aligned(lines: Sequence[Sequence[str]], text_columns: Collection[int]) -> list[str]:
    """Return the lines with their cells aligned: to the left in text_columns, to the right in the others."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(f"{text:{'<' if n in text_columns else '>'}{widths[n]}}" for n, text in enumerate(line)).rstrip()
        for line in lines
    ]


def print_table(outcome: Outcome) -> None:
    """Print the table: with colours on a terminal, as plain aligned text anywhere else."""
    if not sys.stdout.isatty():
        print(table_text(outcome))
        return
    header, *lines = table_cells(outcome)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(Text(name), justify="left" if name in TEXT_COLUMNS else "right")
    for line in lines:
        table.add_row(*map(Text, line), style="bold green" if line[0] else None)
    Console().print(table)
