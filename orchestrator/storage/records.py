"""The tables of a run as Parquet: one row per trial (results.parquet), one row per epoch (metrics.parquet).

The fixed columns stand in RESULTS_SCHEMA and METRICS_SCHEMA; their metadata carries the version. Beside them a table
has latency_ms_b<size>, latency_p10_ms_b<size> and latency_p90_ms_b<size> for every further profile batch size, and
results.parquet a column per searched parameter, under its dotted name. Accuracies are percent. What was not measured
(a stopped trial's end) is null.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import RunDirError
from orchestrator.storage.files import parse_json, write_atomic

VERSION = 1
STATUSES = ("finished", "stopped", "failed")
_VERSION_KEY = b"version"
_METADATA = {_VERSION_KEY: str(VERSION).encode()}
_PARAM_TYPES = (pa.int64(), pa.float64(), pa.string(), pa.bool_(), pa.null())
_LATENCY_TYPES = (pa.float64(), pa.null())  # null: not measured in any row yet
_FURTHER_BATCH_SIZE = re.compile(r"latency_(?:|p10_|p90_)ms_b(\d+)")
Row = Mapping[str, Any]
RESULTS_SCHEMA = pa.schema(
    [
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # "trial", "unpruned", "reference", or a baseline's name
        pa.field("status", pa.string(), nullable=False),
        pa.field("stopped_epoch", pa.int64()),
        pa.field("error", pa.string()),  # why the trial failed
        pa.field("top1", pa.float64()),
        pa.field("top5", pa.float64()),
        pa.field("latency_ms", pa.float64()),  # for profile.batch_sizes[0]; further sizes follow as latency_ms_b<size>
        pa.field("latency_p10_ms", pa.float64()),
        pa.field("latency_p90_ms", pa.float64()),
        pa.field("latency_device", pa.string()),
        pa.field("latency_noisy", pa.bool_()),  # whether it was disturbed, at any batch size
        pa.field("latency_conditions", pa.string()),  # how it was taken, as JSON; equal fingerprints compare
        pa.field("macs", pa.int64()),
        pa.field("macs_ratio", pa.float64()),
        pa.field("params", pa.int64()),  # searched parameters follow under their dotted names
        pa.field("parent", pa.string()),  # the trial that it goes on from; only where trials do, see _OPTIONAL
        pa.field("mlflow_run_id", pa.string()),
        pa.field("train_s", pa.float64()),  # wall seconds summed over the epochs of the trial
        pa.field("eval_s", pa.float64()),
        pa.field("measure_s", pa.float64()),
    ],
    metadata=_METADATA,
)
_OPTIONAL = ("parent", "gating_epochs", "num_epochs")
"""Columns that a table lacks where no row has a value."""
METRICS_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int64(), nullable=False),  # 1-based, gating and fine-tuning together
        pa.field("stage", pa.string(), nullable=False),
        pa.field("gating_epochs", pa.int64()),  # of this trial: after the last of them its network is cut
        pa.field("num_epochs", pa.int64()),  # of this trial
        pa.field(
            "timestamp_ms", pa.int64(), nullable=False
        ),  # end of the epoch; MLflow takes the row once, however often sent
        pa.field("loss", pa.float64()),
        pa.field("top1", pa.float64()),
        pa.field("top5", pa.float64()),
        pa.field("latency_ms", pa.float64()),
        pa.field("latency_p10_ms", pa.float64()),
        pa.field("latency_p90_ms", pa.float64()),
        pa.field("latency_device", pa.string()),
        pa.field("latency_noisy", pa.bool_()),
        pa.field("latency_conditions", pa.string()),
        pa.field("macs", pa.int64()),
        pa.field("macs_ratio", pa.float64()),
        pa.field("params", pa.int64()),
        pa.field("open_channels", pa.int64()),
        pa.field("loss_weight", pa.float64()),
        pa.field("target_ratio", pa.float64()),
        pa.field("architecture", pa.string()),  # digest of what is kept
        pa.field("train_s", pa.float64()),
        pa.field("eval_s", pa.float64()),
        pa.field("measure_s", pa.float64()),
        pa.field("final", pa.bool_()),  # true in the last row: top1 and top5 are those of the val split
    ],
    metadata=_METADATA,
)


def append_result(path: Path, row: Row) -> None:
    """Add the row of a trial to results.parquet, in place of an earlier row of the same trial.

    The file is replaced whole. Keys that are neither fixed columns nor latency_ms_b<size> become columns of searched
    parameters. NaN is stored as null.
    """
    assert row["status"] in STATUSES, row["status"]
    earlier = read_results(path) if path.exists() else []
    rows = [kept for kept in earlier if kept["trial_id"] != row["trial_id"]] + [dict(row)]
    _write(path, rows, RESULTS_SCHEMA, extra_follows="params")


def update_results(path: Path, rows: Iterable[Row]) -> None:
    """Put rows in the places of the earlier ones of the same trials, all at once."""
    by_id = {row["trial_id"]: row for row in rows}
    updated = [by_id.get(row["trial_id"], row) for row in read_results(path)]
    _write(path, updated, RESULTS_SCHEMA, extra_follows="params")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the rows of results.parquet, oldest first; raises RunDirError when it is absent or unreadable."""
    rows = _read(path, RESULTS_SCHEMA)
    if odd := {row["status"] for row in rows} - set(STATUSES):
        raise RunDirError(f"{path}: found status {odd.pop()!r}, expected {', '.join(STATUSES)}; restore it from a copy")
    return rows


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Write metrics.parquet, all epochs of a trial, in place of what was there."""
    _write(path, rows, METRICS_SCHEMA, extra_follows="final")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return one dict per epoch; raises RunDirError when the file is absent or unreadable."""
    return _read(path, METRICS_SCHEMA)


def searched_params(rows: Iterable[Row]) -> list[str]:
    """Return the names of the searched parameters that the rows carry, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in RESULTS_SCHEMA.names and not _FURTHER_BATCH_SIZE.fullmatch(name)]


def latency_columns(rows: Iterable[Row]) -> list[str]:
    """Return latency_ms and the latency_ms_b<size> that the rows carry, sorted by batch size: the medians."""
    return [name for name in all_latency_columns(rows) if name.startswith("latency_ms")]


def all_latency_columns(rows: Iterable[Row]) -> list[str]:
    """Return latency_ms and every latency of a further batch size, latency_p10_ms_b<size> and latency_p90_ms_b<size> included."""
    names = {name for row in rows for name in row if _FURTHER_BATCH_SIZE.fullmatch(name)}
    return ["latency_ms", *sorted(sorted(names), key=_batch_size)]


def _batch_size(column: str) -> int:
    match = _FURTHER_BATCH_SIZE.fullmatch(column)
    assert match is not None, column
    return int(match[1])


def _write(path: Path, rows: Sequence[Row], schema: pa.Schema, extra_follows: str) -> None:
    names = _column_order(rows, schema, extra_follows)
    arrays = [_column(name, [_plain(row.get(name)) for row in rows], schema) for name in names]
    fields = [
        pa.field(name, array.type, nullable=_is_nullable(name, schema))
        for name, array in zip(names, arrays, strict=True)
    ]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=schema.metadata))
    pq.write_table(table, sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def _column_order(rows: Sequence[Row], schema: pa.Schema, extra_follows: str) -> list[str]:
    names: list[str] = []
    for name in schema.names:
        if name in _OPTIONAL and all(row.get(name) is None for row in rows):
            continue
        names += all_latency_columns(rows) if name == "latency_ms" else [name]
        names += searched_params(_without(rows, schema)) if name == extra_follows else []
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
    if not path.is_file():  # a pipe would be waited for
        raise RunDirError(f"{path} is missing, or no file: the run directory holds no results yet, or is none")
    try:
        # not read_table: it takes a folder named "a=b" for a partition
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
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
    """Return whether it is the JSON of a mapping, or null."""
    try:
        return text is None or isinstance(parse_json(str(text)), dict)
    except ValueError:
        return False


def _problems(table: pa.Table, schema: pa.Schema) -> Iterator[str]:
    """Yield what is wrong with the columns of a table that is read; what this program writes has nothing wrong."""
    for field in schema:
        if field.name in _OPTIONAL and field.name not in table.schema.names:
            continue
        if table.schema.names.count(field.name) != 1:
            yield f"column {field.name} stands {table.schema.names.count(field.name)} times in it, expected once"
        elif table.schema.field(field.name).type != field.type:
            yield f"column {field.name} is {table.schema.field(field.name).type}, expected {field.type}"
        elif not field.nullable and table[field.name].null_count:
            yield f"column {field.name} lacks values"
        elif field.name == "latency_conditions" and not all(map(_is_mapping, table[field.name].to_pylist())):
            yield f"column {field.name} holds other text than JSON mappings"
    for field in table.schema:
        is_latency = _FURTHER_BATCH_SIZE.fullmatch(field.name) is not None
        if field.name not in schema.names and field.type not in (_LATENCY_TYPES if is_latency else _PARAM_TYPES):
            yield f"column {field.name} is {field.type}, expected numbers{'' if is_latency else ' or text'}"


UNPRUNED = "unpruned"
REFERENCE = "reference"
"""The kind of a network that is measured beside the trials and not trained."""
Metrics = dict[str, Any]
LATENCY_DETAILS = ("latency_p10_ms", "latency_p90_ms", "latency_device", "latency_noisy", "latency_conditions")


def network_columns(metrics: Mapping[str, Any]) -> Metrics:
    """Return the columns of results.parquet that describe the network a report is about."""
    names = ["top1", "top5", *LATENCY_DETAILS, "macs", "macs_ratio", "params"]
    assert set(names) <= set(RESULTS_SCHEMA.names)
    return {name: metrics[name] for name in [*names, *all_latency_columns([metrics])] if name in metrics}


def seconds_columns(epochs: Sequence[Mapping[str, Any]]) -> Metrics:
    """Return the wall seconds of a trial by what they were spent on, summed over its epochs and final measurement.

    epochs: as in metrics.parquet.
    """
    names = ("train_s", "eval_s", "measure_s")
    return {name: math.fsum(epoch[name] or 0.0 for epoch in epochs) for name in names}


class NewEpochs:
    """Reads each epoch of metrics.parquet once, except the final row.

    Those that were there before this driver are read too: the one before may have died with the last untold. The scheduler
    and MLflow pass over what they have heard.

    Ray's own way from Train to Tune, TuneReportCallback, starts a process per trial that takes 2.6 CPU seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[tuple[int, int]] = set()

    def read(self) -> list[Metrics]:
        """Return the epochs since the last call, without the metrics that they do not have."""
        rows = [row for row in self._rows() if _identity(row) not in self._seen and not row["final"]]
        self._seen |= {_identity(row) for row in rows}
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def _rows(self) -> list[Metrics]:
        return read_metrics(self._path) if self._path.exists() else []


def _identity(row: Metrics) -> tuple[int, int]:
    """Return what tells reports apart: an epoch that is run again has another time; the time alone may stand still."""
    return row["epoch"], row["timestamp_ms"]
