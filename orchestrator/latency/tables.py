"""Latency tables as Parquet: a row for each time, the conditions of all of them in the schema's metadata.

A row is the time of a call (what = "op") or of a whole network (what = "network"). The file is named after the network and the
fingerprint of the conditions, so that a table for other hardware is another file, and it is always replaced whole: what
was cut short is the last complete state, from which the build goes on.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

import gator
from gator.graph.ops import OpKind
from gator.latency.cost import halved_shares
from gator.latency.measurement import Conditions
from gator.latency.table import LatencyTable, NetworkTime, OpTime
from orchestrator.config.trial import ModelConfig
from orchestrator.errors import LatencyTableError
from orchestrator.storage.files import parse_json, write_atomic

VERSION = 3
MAX_NAME = 100
"""Characters of a network's name in that of its table."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.=-]+")
_VERSION_KEY, _CONDITIONS_KEY = b"version", b"conditions"
_TIMES = ("median_ms", "p10_ms", "p90_ms", "n", "noisy")
_CONDITIONS = TypeAdapter(Conditions)
_WIDTHS = TypeAdapter(dict[str, int])
SCHEMA = pa.schema(
    [
        pa.field("what", pa.string(), nullable=False),  # "op" or "network"
        pa.field("op", pa.string()),  # ATen's name; the next four are its kind and its widths
        pa.field("shape", pa.list_(pa.int64())),  # of the input without the batch, 0 for the channels
        pa.field("settings", pa.string()),  # kernel, stride, padding, groups, ... as JSON
        pa.field("num_in", pa.int64()),
        pa.field("num_out", pa.int64()),
        pa.field("fingerprint", pa.string()),  # of a network's channel graph
        pa.field("input_shape", pa.list_(pa.int64())),
        pa.field("widths", pa.string()),  # kept channels of each group, as JSON
        pa.field("median_ms", pa.float64(), nullable=False),
        pa.field("p10_ms", pa.float64(), nullable=False),
        pa.field("p90_ms", pa.float64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("noisy", pa.bool_(), nullable=False),  # no two turns agree on the least time
        pa.field("num_turns", pa.int64()),  # of a call: how many its time is the fastest of
    ]
)


def write_table(path: Path, table: LatencyTable) -> None:
    """Write a table, in place of what was there."""
    rows = [*map(_op_row, table.ops), *map(_network_row, table.networks)]
    metadata = {_VERSION_KEY: str(VERSION), _CONDITIONS_KEY: json.dumps(dataclasses.asdict(table.conditions))}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata)), sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_table(path: Path, expected: Conditions | None = None) -> LatencyTable:
    """Return the table in a file.

    Raises: LatencyTableError if the file is absent, damaged or of another version, or holds for other conditions than
    `expected`; both are named.
    """
    if not path.is_file():
        raise LatencyTableError(f"{path}: no such file; measure it with `python -m orchestrator.measure`")
    try:
        stored = pq.ParquetFile(path, page_checksum_verification=True).read()
        metadata = stored.schema.metadata or {}
        version = metadata.get(_VERSION_KEY, b"none").decode()
        if version != str(VERSION):
            raise LatencyTableError(
                f"{path}: version {version}, this program reads version {VERSION}; measure it again"
            )
        conditions = _conditions(metadata[_CONDITIONS_KEY])
        _check_columns(stored)
        ops, networks = _times_of(stored.to_pylist())
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise LatencyTableError(
            f"{path}: not a latency table, or a damaged one ({error}); restore it from a copy, or delete it and measure again"
        ) from error
    if expected is not None:
        check_conditions(conditions, expected, path)
    return LatencyTable(conditions, ops, networks)


def check_conditions(found: Conditions, expected: Conditions, path: Path) -> None:
    """Raise LatencyTableError, naming both, unless a table's conditions are those that are asked for."""
    try:
        expected.check_same(found, str(path))
    except gator.LatencyError as error:
        raise LatencyTableError(str(error)) from error


def table_path(folder: Path, model: ModelConfig, image_size: int, conditions: Conditions) -> Path:
    """Return the file of a network's table under these conditions: the cache, by fingerprint.

    Networks of one name with other arguments have other files: resnet20_cifar-width=8_32px_b1_....
    """
    name = "-".join([model.name.replace(":", "."), *(f"{key}={value}" for key, value in sorted(model.kwargs.items()))])
    if len(name) > MAX_NAME or not _PLAIN_NAME.fullmatch(name):
        digest = hashlib.sha256(model.model_dump_json(include={"name", "kwargs"}).encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9_.]', '_', model.name)[:MAX_NAME]}-{digest}"
    batch, dtype = conditions.batch_size, conditions.dtype
    return folder / f"{name}_{image_size}px_b{batch}_{dtype}_{conditions.mode}_{conditions.fingerprint}.parquet"


def table_text(graph: gator.ChannelGraph, table: LatencyTable) -> str:
    """Return what a table says of a network: its latency with the stated error, and the share of each group.

    Raises: LatencyTableError if the table lacks a layer, or whole networks, of this one.
    """
    try:
        if table.ops:
            cost = gator.LatencyCost(graph, table)
            shares = cost.shares()
            summary = (
                f"{len(table.ops)} points{_noisy(table.ops)}; the unpruned network takes {cost.full:.3f} ms, "
                f"{cost.calibration}{_noisy(table.networks_of(graph))}"
            )
        else:
            shares = halved_shares(graph, table)
            summary = f"{len(table.networks)} whole networks{_noisy(table.networks_of(graph))}"
    except gator.LatencyError as error:
        raise LatencyTableError(str(error)) from error
    settings = table.conditions
    where = f"{settings.device}, batch {settings.batch_size}, {settings.dtype}, {settings.mode}"
    width = max(len("group"), *map(len, shares))
    lines = [f"{where}: {summary}", "what is saved when a group alone is halved:", ""]
    lines.append(f"{'group'.ljust(width)}   MACs share  latency share  quotient")
    lines += [
        f"{name.ljust(width)}  {share.macs:11.2%}  {share.latency:13.2%}  {share.quotient:8.2f}"
        for name, share in shares.items()
    ]
    return "\n".join(lines)


def _noisy(times: Sequence[OpTime | NetworkTime]) -> str:
    """Return how many of the times were disturbed in too many of their turns."""
    num_noisy = sum(time.noisy for time in times)
    return f" ({num_noisy} noisy)" if num_noisy else ""


def _op_row(time: OpTime) -> dict[str, Any]:
    kind = {"op": time.kind.name, "shape": list(time.kind.shape), "settings": time.kind.settings}
    return {
        "what": "op",
        **kind,
        "num_in": time.num_in,
        "num_out": time.num_out,
        "num_turns": time.num_turns,
        **_times(time),
    }


def _network_row(time: NetworkTime) -> dict[str, Any]:
    widths = json.dumps(dict(time.widths))
    shape = list(time.input_shape)
    return {
        "what": "network",
        "fingerprint": time.fingerprint,
        "input_shape": shape,
        "widths": widths,
        **_times(time),
    }


def _times(time: OpTime | NetworkTime) -> dict[str, Any]:
    return {name: getattr(time, name) for name in _TIMES}


def _check_columns(stored: pa.Table) -> None:
    """Raise ValueError unless the columns have the names and types of SCHEMA."""
    for field in SCHEMA:
        found = stored.schema.field(field.name).type  # KeyError where it is not there
        if found != field.type:
            raise ValueError(f"column {field.name} is {found}, expected {field.type}")


def _conditions(text: bytes) -> Conditions:
    """Raises: TypeError or ValueError for a field that is unknown, lacking, or of another type."""
    Conditions(**parse_json(text))  # TypeError for an unknown field, which pydantic passes over
    try:
        conditions = _CONDITIONS.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"conditions: {_first_problem(error)}") from error
    for name in ("batch_size", "num_threads"):
        if getattr(conditions, name) < 1:
            raise ValueError(f"conditions: {name} is {getattr(conditions, name)}, expected at least 1")
    return conditions


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"])) or "it"
    return f"{where} is {problem['input']!r} ({problem['msg']})"


def _times_of(rows: Sequence[dict[str, Any]]) -> tuple[tuple[OpTime, ...], tuple[NetworkTime, ...]]:
    """Return the calls and the networks. Raises: ValueError, naming the row, for one that is damaged or there twice."""
    times: dict[Hashable, OpTime | NetworkTime] = {}
    for number, row in enumerate(rows, 1):
        if row["what"] not in _READERS:
            raise ValueError(f"row {number} is of {row['what']!r}, expected op or network")
        try:
            key, time = _READERS[row["what"]](row)
        except (ValueError, RecursionError) as error:  # the latter: settings that are nested without end
            raise ValueError(f"row {number}, of {row['what']}: {error}") from error
        if key in times:
            raise ValueError(f"row {number}, of {row['what']}: the same one is there before")
        times[key] = time
    return (
        tuple(time for time in times.values() if isinstance(time, OpTime)),
        tuple(time for time in times.values() if isinstance(time, NetworkTime)),
    )


def _op(row: dict[str, Any]) -> tuple[Hashable, OpTime]:
    """Return the point and its time. Raises: ValueError."""
    _check_values(row, ("op", "shape", "settings", "num_in", "num_out", "num_turns"))
    _check_at_least(row, num_in=1, num_out=1, num_turns=1)
    kind = OpKind(row["op"], _sizes(row, "shape", least=0), row["settings"])
    if not isinstance(kind.arguments, dict):
        raise ValueError(f"settings is {kind.settings}, expected a JSON object")
    time = OpTime(kind=kind, **{name: row[name] for name in ("num_in", "num_out", "num_turns", *_TIMES)})
    return time.point, time


def _network(row: dict[str, Any]) -> tuple[Hashable, NetworkTime]:
    """Return what tells the network from others, and its time. Raises: ValueError."""
    _check_values(row, ("fingerprint", "input_shape", "widths"))
    input_shape, widths = _sizes(row, "input_shape", least=1), _widths(row["widths"])
    times = {name: row[name] for name in _TIMES}
    time = NetworkTime(fingerprint=row["fingerprint"], input_shape=input_shape, widths=widths, **times)
    return (time.fingerprint, input_shape, tuple(sorted(widths.items()))), time


_READERS: dict[str, Callable[[dict[str, Any]], tuple[Hashable, OpTime | NetworkTime]]] = {
    "op": _op,
    "network": _network,
}


def _check_values(row: dict[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError if a row lacks one of the values, or a time is no time."""
    for name in (*names, *_TIMES):
        if row[name] is None:
            raise ValueError(f"{name} is lacking")
    for name in ("median_ms", "p10_ms", "p90_ms", "n"):
        if not (math.isfinite(row[name]) and row[name] >= 0):
            raise ValueError(f"{name} is {row[name]}, which is negative or not finite")
    for name in ("median_ms", "n"):  # a quantile of short calls may be below the clock's resolution, a median may not
        if not row[name] > 0:
            raise ValueError(f"{name} is {row[name]}, expected more than 0")


def _check_at_least(row: dict[str, Any], **least: int) -> None:
    for name, number in least.items():
        if row[name] < number:
            raise ValueError(f"{name} is {row[name]}, expected at least {number}")


def _sizes(row: dict[str, Any], name: str, *, least: int) -> tuple[int, ...]:
    sizes = tuple(row[name])
    if any(size is None or size < least for size in sizes):
        raise ValueError(f"{name} is {row[name]}, expected sizes of at least {least}")
    return sizes


def _widths(text: str) -> dict[str, int]:
    """Return the kept channels of each group. Raises: ValueError unless there are some."""
    try:
        widths = _WIDTHS.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"widths: {_first_problem(error)}, expected the kept channels of each group") from error
    if min(widths.values(), default=0) < 0 or not any(widths.values()):
        raise ValueError(f"widths is {text}, expected the kept channels of each group, not all 0")
    return widths
