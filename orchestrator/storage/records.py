"""The tables of a run as Parquet: one row per trial (results.parquet), one row per epoch (metrics.parquet).

RESULTS_SCHEMA and METRICS_SCHEMA have the fixed columns; their metadata has the version. Each table also has
latency_ms_b<size>, latency_p10_ms_b<size> and latency_p90_ms_b<size> for every further profile batch size, and
results.parquet a column per searched parameter, under its dotted name. Accuracies are percent. Missing measurements
(the end of a stopped trial) are null.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.config.metrics import METRICS, TIME_METRICS, Status, split_column
from orchestrator.errors import RunDirError
from orchestrator.storage.files import POLL_S, parse_json, write_atomic

VERSION = 1
_VERSION_KEY = b"version"
_METADATA = {_VERSION_KEY: str(VERSION).encode()}
_PARAM_TYPES = (pa.int64(), pa.float64(), pa.string(), pa.bool_(), pa.null())
_LATENCY_TYPES = (pa.float64(), pa.null())  # null: not measured in any row yet
Row = Mapping[str, Any]
"""A row of results.parquet."""
EpochMetrics = dict[str, Any]
"""A row of metrics.parquet, or what an epoch reports."""


def _fields(*kinds: str) -> list[pa.Field]:
    return [pa.field(metric.name, pa.type_for_alias(metric.type)) for metric in METRICS if metric.of in kinds]


RESULTS_SCHEMA = pa.schema(
    [
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # one of config/metrics.py, or a baseline's name
        pa.field("status", pa.string(), nullable=False),
        pa.field("stopped_epoch", pa.int64()),
        pa.field("error", pa.string()),  # why the trial failed
        *_fields("network"),  # searched parameters follow under their dotted names
        pa.field("parent", pa.string()),  # the trial that it started from; only where trials have one, see _OPTIONAL
        pa.field("mlflow_run_id", pa.string()),
        *_fields("time"),  # wall seconds summed over the epochs of the trial
    ],
    metadata=_METADATA,
)
_OPTIONAL = ("parent", "gating_epochs", "num_epochs", "accuracy_split", "latency_source")
"""Columns that a table lacks if no row has a value."""
METRICS_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int64(), nullable=False),  # 1-based, gating and fine-tuning together
        pa.field("stage", pa.string(), nullable=False),
        pa.field("gating_epochs", pa.int64()),  # of this trial: after the last of them its network is pruned
        pa.field("num_epochs", pa.int64()),  # of this trial
        # end of the epoch; MLflow takes the row once, however often it is sent
        pa.field("timestamp_ms", pa.int64(), nullable=False),
        *_fields("network", "training", "time"),
        pa.field("final", pa.bool_()),  # true in the last row: top1 and top5 are those of the test split
    ],
    metadata=_METADATA,
)
_NETWORK_COLUMNS = [field.name for field in _fields("network")]


def append_result(path: Path, row: Row) -> None:
    """Add the row of a trial to results.parquet, in place of an earlier row of the same trial.

    The file is replaced whole. Keys that are neither fixed columns nor latency_ms_b<size> become columns of searched
    parameters. NaN is stored as null.
    """
    assert row["status"] in get_args(Status), row["status"]
    rows = [kept for kept in read_results(path) if kept["trial_id"] != row["trial_id"]] + [dict(row)]
    _write(path, rows, RESULTS_SCHEMA)


def update_results(path: Path, rows: Iterable[Row]) -> None:
    """Put rows in the places of the earlier ones of the same trials, all at once."""
    by_id = {row["trial_id"]: row for row in rows}
    updated = [by_id.get(row["trial_id"], row) for row in read_results(path)]
    _write(path, updated, RESULTS_SCHEMA)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the rows of results.parquet, oldest first, none where there is no file. Raises: RunDirError if it is unreadable."""
    rows = _read(path, RESULTS_SCHEMA) if path.exists() else []
    statuses = get_args(Status)
    if odd := {row["status"] for row in rows} - set(statuses):
        raise RunDirError(f"{path}: found status {odd.pop()!r}, expected {', '.join(statuses)}; restore it from a copy")
    return rows


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Write metrics.parquet, all epochs of a trial, replacing an earlier file."""
    _write(path, rows, METRICS_SCHEMA)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return one dict per epoch. Raises: RunDirError if the file is absent or unreadable."""
    return _read(path, METRICS_SCHEMA)


def searched_params(rows: Iterable[Row]) -> list[str]:
    """Return the names of the searched parameters that the rows carry, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in RESULTS_SCHEMA.names and split_column(name)[1] is None]


def latency_columns(rows: Iterable[Row]) -> list[str]:
    """Return latency_ms and the latency_ms_b<size> that the rows carry, sorted by batch size: the medians."""
    return [name for name in all_latency_columns(rows) if split_column(name)[0] == "latency_ms"]


def all_latency_columns(rows: Iterable[Row]) -> list[str]:
    """Return latency_ms and every latency of a further batch size, latency_p10_ms_b<size> and latency_p90_ms_b<size> included."""
    sizes = {name: split_column(name)[1] or 0 for row in rows for name in row}
    return ["latency_ms", *sorted((name for name in sizes if sizes[name]), key=lambda name: (sizes[name], name))]


def _write(path: Path, rows: Sequence[Row], schema: pa.Schema) -> None:
    names = _column_order(rows, schema)
    arrays = [_column(name, [_plain(row.get(name)) for row in rows], schema) for name in names]
    fields = [
        pa.field(name, array.type, nullable=_is_nullable(name, schema))
        for name, array in zip(names, arrays, strict=True)
    ]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=schema.metadata))
    pq.write_table(table, sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def _column_order(rows: Sequence[Row], schema: pa.Schema) -> list[str]:
    """Return the names of the schema, latencies of further batch sizes after the first, searched parameters after the network."""
    names: list[str] = []
    for name in schema.names:
        if name in _OPTIONAL and all(row.get(name) is None for row in rows):
            continue
        names += all_latency_columns(rows) if name == "latency_ms" else [name]
        names += searched_params(_without(rows, schema)) if name == _NETWORK_COLUMNS[-1] else []
    return names


def _without(rows: Sequence[Row], schema: pa.Schema) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in schema.names} for row in rows]


def _is_nullable(name: str, schema: pa.Schema) -> bool:
    return name not in schema.names or schema.field(name).nullable


def _column(name: str, values: list[Any], schema: pa.Schema) -> pa.Array:
    if name in schema.names:
        assert _is_nullable(name, schema) or None not in values, f"{name} must be set in every row"
        return pa.array(values, type=schema.field(name).type)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # choices of several types, such as [false, 0.5, "auto"]
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _read(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    if not path.is_file():  # reading a pipe would block
        raise RunDirError(f"{path} is missing or not a file: no results yet, or not a run directory")
    try:
        # not read_table: it takes a folder named "a=b" for a partition
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise RunDirError(
            f"{path} cannot be read as Parquet ({error}); restore it from a copy, or start a new run"
        ) from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode(errors="replace")
    if version != str(VERSION):
        raise RunDirError(
            f"{path} has version {version}, this program reads version {VERSION}; use the release that wrote it"
        )
    if problems := list(_problems(table, schema)):
        raise RunDirError(f"{path} is damaged: {'; '.join(problems[:3])}; restore it from a copy, or start a new run")
    return rows


def _is_mapping(text: object) -> bool:
    """Return whether a text is the JSON of a mapping, or null."""
    try:
        return text is None or isinstance(parse_json(str(text)), dict)
    except ValueError:
        return False


def _problems(table: pa.Table, schema: pa.Schema) -> Iterator[str]:
    """Yield what is wrong with the columns of a table; nothing is with tables that this program wrote."""
    for field in schema:
        if field.name in _OPTIONAL and field.name not in table.schema.names:
            continue
        if table.schema.names.count(field.name) != 1:
            yield f"column {field.name} was found {table.schema.names.count(field.name)} times, expected once"
        elif table.schema.field(field.name).type != field.type:
            yield f"column {field.name} is {table.schema.field(field.name).type}, expected {field.type}"
        elif not field.nullable and table[field.name].null_count:
            yield f"column {field.name} lacks values"
        elif field.name == "latency_conditions" and not all(map(_is_mapping, table[field.name].to_pylist())):
            yield f"column {field.name} holds other text than JSON mappings"
    for field in table.schema:
        is_latency = split_column(field.name)[1] is not None
        if field.name not in schema.names and field.type not in (_LATENCY_TYPES if is_latency else _PARAM_TYPES):
            yield f"column {field.name} is {field.type}, expected numbers{'' if is_latency else ' or text'}"


def network_columns(metrics: EpochMetrics) -> EpochMetrics:
    """Return the columns of results.parquet that describe the network a report is about."""
    return {name: value for name, value in metrics.items() if split_column(name)[0] in _NETWORK_COLUMNS}


def seconds_columns(epochs: Sequence[Row]) -> EpochMetrics:
    """Return the wall seconds of a trial by activity, summed over its epochs and final measurement.

    epochs: as in metrics.parquet.
    """
    return {name: math.fsum(epoch[name] or 0.0 for epoch in epochs) for name in TIME_METRICS}


class NewEpochs:
    """Reads each epoch of metrics.parquet once, except the final row.

    Epochs from before this driver started are read too, since an earlier driver may have died before it reported the last ones.
    The scheduler and MLflow ignore what they have already received.

    Ray's own way from Train to Tune, TuneReportCallback, starts a process per trial that takes 2.6 CPU seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[tuple[int, int]] = set()

    def read(self) -> list[EpochMetrics]:
        """Return the epochs since the last call, without missing metrics."""
        rows = [row for row in self._rows() if _identity(row) not in self._seen and not row["final"]]
        self._seen |= {_identity(row) for row in rows}
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def until(self, training: Future[Any]) -> Iterator[EpochMetrics]:
        """Yield the epochs as they end, until the training has ended."""
        is_done = False
        while not is_done:
            is_done = bool(wait([training], timeout=POLL_S).done)
            yield from self.read()

    def _rows(self) -> list[EpochMetrics]:
        return read_metrics(self._path) if self._path.exists() else []


def _identity(row: EpochMetrics) -> tuple[int, int]:
    """Return what distinguishes reports: an epoch that is run again has another time, but the clock may not have advanced."""
    return row["epoch"], row["timestamp_ms"]
