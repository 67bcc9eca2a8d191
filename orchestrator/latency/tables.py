"""Latency tables as Parquet: a row for each time, the conditions of all of them in the schema's metadata.

A row is the time of a call (what = "op") or of a whole network (what = "network"). The file is named after the network and the
fingerprint of the conditions, so a table for other hardware is another file. It is always replaced whole: after a build
was stopped it has the last complete state, from which the build resumes.
"""

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic.dataclasses
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    Json,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

import gator
from gator.costs.summary import text_table
from gator.graph.ops import OpKind
from gator.latency.measurement import Conditions
from gator.latency.table import LatencyTable, NetworkTime, OpTime
from orchestrator.config.trial import ModelConfig
from orchestrator.errors import LatencyTableError
from orchestrator.storage.files import write_atomic

VERSION = 4
"""Since 4 the conditions name the runtime; in version 3 its key was mode."""
MAX_NAME = 100
"""Characters of a network's name in that of its table."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.=-]+")
_VERSION_KEY, _CONDITIONS_KEY = b"version", b"conditions"
_TIMES = ("median_ms", "p10_ms", "p90_ms", "n", "noisy")
_POINT = ("num_in", "num_out", "num_turns")
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


def _some(widths: dict[str, int]) -> dict[str, int]:
    if not any(widths.values()):
        raise ValueError("expected the kept channels of each group, not all 0")
    return widths


class _Row(BaseModel):
    """Checks the columns of every row. A quantile of short calls may be below the clock's resolution, a median may not."""

    median_ms: Annotated[FiniteFloat, Field(gt=0)]
    p10_ms: Annotated[FiniteFloat, Field(ge=0)]
    p90_ms: Annotated[FiniteFloat, Field(ge=0)]
    n: PositiveInt
    noisy: bool


class _OpRow(_Row):
    what: Literal["op"]
    op: str
    shape: list[NonNegativeInt]
    settings: Json[dict[str, Any]]
    num_in: PositiveInt
    num_out: PositiveInt
    num_turns: PositiveInt


class _NetworkRow(_Row):
    what: Literal["network"]
    fingerprint: str
    input_shape: list[PositiveInt]
    widths: Json[Annotated[dict[str, NonNegativeInt], AfterValidator(_some)]]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class _StoredConditions(Conditions):
    batch_size: PositiveInt
    num_threads: PositiveInt


_ROWS = TypeAdapter(list[Annotated[_OpRow | _NetworkRow, Field(discriminator="what")]])
_CONDITIONS = TypeAdapter(_StoredConditions)


def write_table(path: Path, table: LatencyTable) -> None:
    """Write a table over the file."""
    rows = [*map(_op_row, table.ops), *map(_network_row, table.networks)]
    metadata = {_VERSION_KEY: str(VERSION), _CONDITIONS_KEY: json.dumps(dataclasses.asdict(table.conditions))}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata)), sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_table(path: Path, expected: Conditions | None = None) -> LatencyTable:
    """Return the table in a file.

    Raises: LatencyTableError if the file is absent, damaged or of another version, or holds for other conditions than
    `expected`; the message names both.
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
        _CONDITIONS.validate_json(metadata[_CONDITIONS_KEY])
        conditions = Conditions(**json.loads(metadata[_CONDITIONS_KEY]))
        _check_columns(stored)
        ops, networks = _times_of(stored.to_pylist())
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        problem = _first_problem(error) if isinstance(error, ValidationError) else error
        raise LatencyTableError(
            f"{path}: not a latency table, or a damaged one ({problem}); restore it from a copy, or delete it and measure again"
        ) from error
    try:
        (expected or conditions).check_same(conditions, str(path))
    except gator.LatencyError as error:
        raise LatencyTableError(str(error)) from error
    return LatencyTable(conditions, ops, networks)


def table_path(folder: Path, model: ModelConfig, image_size: int, conditions: Conditions) -> Path:
    """Return the file of a network's table under these conditions: the cache, by fingerprint.

    Networks of one name with other arguments have other files: resnet20_cifar-width=8_32px_b1_....
    """
    name = "-".join([model.name.replace(":", "."), *(f"{key}={value}" for key, value in sorted(model.kwargs.items()))])
    if len(name) > MAX_NAME or not _PLAIN_NAME.fullmatch(name):
        digest = hashlib.sha256(model.model_dump_json(include={"name", "kwargs"}).encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9_.]', '_', model.name)[:MAX_NAME]}-{digest}"
    batch, dtype = conditions.batch_size, conditions.dtype
    return folder / f"{name}_{image_size}px_b{batch}_{dtype}_{conditions.runtime}_{conditions.fingerprint}.parquet"


def table_text(graph: gator.ChannelGraph, table: LatencyTable) -> str:
    """Return the description of a network by a table: its latency with the stated error, and the share of each group.

    Raises: LatencyTableError if the table lacks a layer of this network.
    """
    try:
        cost = gator.LatencyCost(graph, table)
    except gator.LatencyError as error:
        raise LatencyTableError(f"{error}, with `orchestrator measure`") from error
    settings = table.conditions
    rows = [
        (name, f"{share.macs:.2%}", f"{share.latency:.2%}", f"{share.quotient:8.2f}")
        for name, share in cost.shares().items()
    ]
    return "\n".join(
        [
            f"{settings.device}, batch {settings.batch_size}, {settings.dtype}, {settings.runtime}: {len(table.ops)} points"
            f"{_noisy(table.ops)}; the unpruned network takes {cost.full:.3f} ms, {cost.calibration}"
            f"{_noisy(table.networks_of(graph))}",
            "savings when a group alone is halved:",
            "",
            *text_table(("group", "MACs share", "latency share", "quotient"), rows),
        ]
    )


def _noisy(times: Sequence[OpTime | NetworkTime]) -> str:
    """Return the number of noisy times as text."""
    num_noisy = sum(time.noisy for time in times)
    return f" ({num_noisy} noisy)" if num_noisy else ""


# --- rows -------------------------------------------------------------------------------------------------------------


def _op_row(time: OpTime) -> dict[str, Any]:
    kind = {"op": time.kind.name, "shape": list(time.kind.shape), "settings": time.kind.settings}
    return {"what": "op", **kind, **{name: getattr(time, name) for name in (*_POINT, *_TIMES)}}


def _network_row(time: NetworkTime) -> dict[str, Any]:
    return {
        "what": "network",
        "fingerprint": time.fingerprint,
        "input_shape": list(time.input_shape),
        "widths": json.dumps(dict(time.widths)),
        **{name: getattr(time, name) for name in _TIMES},
    }


def _times_of(rows: Sequence[dict[str, Any]]) -> tuple[tuple[OpTime, ...], tuple[NetworkTime, ...]]:
    """Return the calls and the networks. Raises: ValueError, naming the row, for a damaged or repeated one."""
    _ROWS.validate_python(rows, strict=True)
    times: dict[Hashable, OpTime | NetworkTime] = {}
    for number, row in enumerate(rows, 1):
        time = _op_time(row) if row["what"] == "op" else _network_time(row)
        key = (
            time.point
            if isinstance(time, OpTime)
            else (time.fingerprint, time.input_shape, *sorted(time.widths.items()))
        )
        if key in times:
            raise ValueError(f"row {number} repeats the {row['what']} of an earlier row")
        times[key] = time
    return (
        tuple(time for time in times.values() if isinstance(time, OpTime)),
        tuple(time for time in times.values() if isinstance(time, NetworkTime)),
    )


def _op_time(row: dict[str, Any]) -> OpTime:
    kind = OpKind(row["op"], tuple(row["shape"]), row["settings"])
    return OpTime(kind=kind, **{name: row[name] for name in (*_POINT, *_TIMES)})


def _network_time(row: dict[str, Any]) -> NetworkTime:
    return NetworkTime(
        fingerprint=row["fingerprint"],
        input_shape=tuple(row["input_shape"]),
        widths=json.loads(row["widths"]),
        **{name: row[name] for name in _TIMES},
    )


def _check_columns(stored: pa.Table) -> None:
    """Raise ValueError unless the columns have the names and types of SCHEMA."""
    for field in SCHEMA:
        found = stored.schema.field(field.name).type  # KeyError if it is missing
        if found != field.type:
            raise ValueError(f"column {field.name} is {found}, expected {field.type}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    first, *inner = problem["loc"] or ("the whole",)
    where = [f"row {first + 1}" if isinstance(first, int) else first, *map(str, inner)]
    return f"{', '.join(where)} is {reprlib.repr(problem['input'])}: {problem['msg']}"
